# SPDX-License-Identifier: Apache-2.0
"""The lock of a network namespace; here under another name, as the machine's own may be taken."""

import asyncio
import os

import pytest

from loden import lock
from loden.errors import AlreadyRunning
from loden.lock import one_agent


@pytest.fixture(autouse=True)
def _own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_ADDRESS", f"\0loden/test/{os.getpid()}".encode())


def test_second_is_refused_as_often_as_it_asks() -> None:
    async def work() -> None:
        async with one_agent():
            for _ in range(300):  # more than any queue of connections takes
                with pytest.raises(AlreadyRunning, match=rf"another agent \(pid {os.getpid()}\)"):
                    async with one_agent(patience_s=0):
                        pass
                await asyncio.sleep(0)

    asyncio.run(work())


def test_next_waits_for_one_that_is_ending() -> None:
    async def work() -> None:
        async def first() -> None:
            async with one_agent():
                held.set()
                await asyncio.sleep(0.1)

        held = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(first())
            await held.wait()
            async with one_agent():
                pass

    asyncio.run(work())


def test_waiting_can_be_cancelled() -> None:
    async def work() -> None:
        async with one_agent():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1), one_agent():
                    pass

    asyncio.run(work())
