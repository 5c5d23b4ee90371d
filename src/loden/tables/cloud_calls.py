# SPDX-License-Identifier: Apache-2.0
"""Calls that block, from an event loop: one thread for one cloud, and an end to every wait.

The vendors' clients block. They get a thread that is no part of any pool, so that a call which hangs delays
neither the loop nor the end of the process; a thread that does not come back in time is left to its fate and
another one takes its place.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from loden.errors import CloudError, CloudUnavailable
from loden.tables.cloud import Cloud

log = logging.getLogger(__name__)

T = TypeVar("T")

#: What reading an answer that lacks something, or is something else, ends in.
_MISREADINGS = (AttributeError, IndexError, KeyError, TypeError, ValueError)
_REPORT = "is there a proxy or a portal in between? if not, report it with what the log has of it"

#: No call takes longer; each request within it has a limit of its own.
DEADLINE_S = 60.0
#: Metadata are a hop away: who does not answer in this time is not there.
ATTACH_S = 5.0


class _Job(msgspec.Struct):
    act: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


class CloudCalls:
    """Calls one cloud's methods, one at a time.

    Args:
        cloud: not attached yet.
        deadline_s: how long one call may take, seconds.
        attach_s: how long it may take to find out which instance this is, seconds.
        attached: told what was found, once.
    """

    def __init__(
        self,
        cloud: Cloud,
        *,
        deadline_s: float = DEADLINE_S,
        attach_s: float = ATTACH_S,
        attached: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.cloud = cloud
        self._deadline_s = deadline_s
        self._attach_s = attach_s
        self._attached = attached
        self._attached_to: Cloud | None = None
        self._jobs: queue.SimpleQueue[_Job | None] | None = None
        self._turn = asyncio.Lock()

    def change(self, cloud: Cloud) -> None:
        """Call this one from now on; it is attached first."""
        self.cloud = cloud

    async def call(self, doing: str, act: Callable[[Cloud], T]) -> T:
        """What a blocking function returns; the cloud is attached first. Safe to cancel.

        Args:
            doing: a verb and an object, for the message.
            act: calls the cloud that it is given: another one, perhaps, than when this call got in line.

        Raises:
            CloudError: the function's own, or it took too long.
        """
        async with self._turn:
            cloud = self.cloud  # it may be changed while we wait
            if self._attached_to is not cloud:
                found = await self._run(f"read metadata of {cloud.name}", cloud.attach, self._attach_s)
                self._attached_to = cloud
                self._attached(found)
            return await self._run(doing, lambda: act(cloud), self._deadline_s)

    async def _run(self, doing: str, act: Callable[[], T], most_s: float) -> T:
        loop = asyncio.get_running_loop()
        job = _Job(act, loop, loop.create_future())
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=_work, args=(self._jobs,), name="loden-cloud", daemon=True).start()
        self._jobs.put(job)
        try:
            async with asyncio.timeout(most_s):
                result: T = await job.future
                return result
        except TimeoutError:
            self.close()
            verb, _, subject = doing.partition(" ")
            raise CloudUnavailable(verb, subject, f"no answer within {most_s:g} s") from None
        except _MISREADINGS as error:
            # What a cloud answers is not ours to rely on, and no reason for the rest of the agent to end.
            log.exception("cloud.answer_misread doing=%r", doing)
            verb, _, subject = doing.partition(" ")
            raise CloudError(
                verb, subject, f"the answer is not as expected: {type(error).__name__}", hint=_REPORT
            ) from error

    def close(self) -> None:
        """Let the thread end when its call does; idempotent."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None


def _work(jobs: "queue.SimpleQueue[_Job | None]") -> None:
    while (job := jobs.get()) is not None:
        try:
            result, error = job.act(), None
        except BaseException as raised:  # noqa: BLE001 - handed to the caller, whatever it is
            result, error = None, raised
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            job.loop.call_soon_threadsafe(_finish, job.future, result, error)
        del job, result, error


def _finish(future: "asyncio.Future[Any]", result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
