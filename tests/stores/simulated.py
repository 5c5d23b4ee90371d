# SPDX-License-Identifier: Apache-2.0
"""Hosts without a kernel: the agent's own acquisition, keeper and watch, on a real store; and a wire that can
be cut."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence

from loden.address import Family, Prefix, parse_address
from loden.errors import LodenError, StoreError
from loden.keeper import Keeper
from loden.lease import Lease, Leg
from loden.network import Range
from loden.retry import Backoff
from loden.stores.acquire import Acquired, Claim, acquire_seen
from loden.stores.base import Holder, Record, Store
from tests.stores.history import History


class Relay:
    """A wire to an etcd that can be cut: what is sent stays on it, and nobody is told."""

    def __init__(self, host: str, port: str) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._whole = asyncio.Event()
        self._whole.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Where to connect to."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        try:
            port = self._server.sockets[0].getsockname()[1]
            yield f"127.0.0.1:{port}"
        finally:
            self._server.close()
            self.drop()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        self._whole.set()

    def lead_to(self, host: str, port: str) -> None:
        """Lead to another place from now on."""
        self._target = (host, port)
        self.drop()

    def drop(self) -> None:
        """Break every connection off."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._whole.wait()
            there, back = await asyncio.open_connection(*self._target)
            self._writers += [writer, back]
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, back))
                group.create_task(self._pump(there, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._whole.wait()
                target.write(data)
                await target.drain()
        except OSError:
            pass
        target.transport.abort()


class SimulatedHost:
    """One host's agent, as far as its lease goes; what it believes goes into a history.

    Args:
        number: its public address is ``192.0.2.number``.
        store: a handle of its own.
        history: written to.
        range_: what it asks for.
    """

    def __init__(self, number: int, store: Store, history: History, range_: Range) -> None:
        self.name = f"host{number}"
        self._address = parse_address(f"192.0.2.{number}")
        self._store = store
        self._history = history
        self._range = range_
        self._believed: Prefix | None = None
        self.keeper: Keeper | None = None
        self.worst_lag_s = 0.0

    @property
    def believed(self) -> Prefix | None:
        """The subnet that it acts as the owner of."""
        return self._believed

    async def run(self, previous: Sequence[Prefix] = ()) -> None:
        """Take a lease and keep it until this is canceled, which is a crash."""
        try:
            acquired = await self._acquire(previous)
            keeper = Keeper(self._store, acquired.record, self._claim, margin_s=3600)
            self.keeper = keeper
            self._believe(acquired.record)
            async with asyncio.TaskGroup() as group:
                group.create_task(keeper.keep(self._believe))
                group.create_task(keeper.guard(self._let_go))
                group.create_task(self._follow(keeper, acquired.seen.revision))
                group.create_task(self._measure_lag())
        finally:
            self._let_go()

    async def _acquire(self, previous: Sequence[Prefix]) -> Acquired:
        backoff = Backoff(first_s=0.05, most_s=0.5)
        while True:
            try:
                return await acquire_seen(
                    self._store, self._claim(previous), rng=random.Random(), answer_s=0.5
                )
            except LodenError:
                await asyncio.sleep(backoff.next_s())

    def _claim(self, previous: Sequence[Prefix]) -> Claim:
        return Claim(
            ranges=(self._range,),
            public={Family.IPV4: self._address},
            previous=tuple(previous),
            holder=Holder(f"boot/{self.name}", self.name),
            make=lambda subnets: Lease.make(
                {f: Leg(s, self._address) for f, s in subnets.items()}, "host-gw"
            ),
        )

    async def _follow(self, keeper: Keeper, revision: int) -> None:
        backoff = Backoff(first_s=0.05, most_s=0.5)
        while True:
            try:
                async with contextlib.aclosing(self._store.watch(revision)) as events:
                    async for news in events:
                        backoff.reset()
                        revision = news.revision
                        keeper.hear(news)
            except StoreError:
                await asyncio.sleep(backoff.next_s())

    async def _measure_lag(self) -> None:
        """How late this process notices that time has passed: nobody can let go sooner than that."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            self.worst_lag_s = max(self.worst_lag_s, time.monotonic() - before - 0.01)

    def _believe(self, record: Record) -> None:
        (leg,) = record.lease.legs
        if self._believed != leg.subnet:
            self._let_go()
            self._believed = leg.subnet
            self._history.begin(time.monotonic(), self.name, leg.subnet)

    def _let_go(self) -> None:
        if self._believed is not None:
            self._history.end(time.monotonic(), self.name, self._believed)
            self._believed = None


async def wait_for(what: str, condition: Callable[[], object], *, most_s: float = 30.0) -> None:
    """Return when something holds."""
    deadline = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {most_s} s: {what}"
        await asyncio.sleep(0.01)
