# SPDX-License-Identifier: Apache-2.0
"""The SQLite store: how soon others hear of a write, and what a lease costs with thousands present."""

import argparse
import asyncio
import multiprocessing
import random
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from multiprocessing.connection import Connection
from pathlib import Path

from bench._common import Arguments, Figure, figure, median, percentile, run, scratch
from bench._site import NETWORK, fill, lease
from loden.address import Family, Prefix
from loden.errors import LabError
from loden.lease import Lease, Leg
from loden.network import Range
from loden.stores import open_store
from loden.stores.acquire import Claim, acquire
from loden.stores.base import Changes, Holder, Snapshot

_PAUSE_S = 0.01
_ROUNDS = 5
_HOSTS_PUBLIC = 0xC0000200  # 192.0.2.0, which no lease of the bench has


def measure(arguments: Arguments) -> Iterator[Figure]:
    with scratch() as directory:
        yield from _latency(Path(directory) / "watch.db", arguments.writes)
        costs = {}
        for count in (arguments.leases, arguments.more):
            url = fill(Path(directory) / f"{count}.db", count)
            costs[count] = asyncio.run(_acquire_each(url))
            yield figure(f"a lease with {count:,} present, median", 1000 * costs[count], "ms")
            yield figure(f"a snapshot of {count:,}, median", 1000 * asyncio.run(_snapshot(url)), "ms")
        small, large = costs
        yield figure(
            f"a lease with {large:,} to {small:,}", costs[large] / costs[small], "times",
            anchor=("in leases", large / small),
        )  # fmt: skip
        for count in (0, arguments.leases):
            took = _acquire_at_once(fill(Path(directory) / f"{count}-at-once.db", count), arguments.agents)
            yield figure(f"{arguments.agents} hosts at once with {count:,} present, the last", took, "s")


def _latency(path: Path, writes: int) -> Iterator[Figure]:
    """From the call that writes, in one process, to the event in another: the commit's sync included."""
    url = fill(path, 0)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    writer = multiprocessing.get_context("spawn").Process(target=_write, args=(url, writes, theirs))
    writer.start()
    try:
        heard, written = asyncio.run(_watch(url, writes, ours))
    finally:
        writer.kill()
        writer.join()
    began = [1000 * (heard[key] - began) for key, (began, _) in written.items()]
    ended = [1000 * (heard[key] - ended) for key, (_, ended) in written.items()]
    commits = [1000 * (ended - began) for began, ended in written.values()]
    yield figure("write to event in another process, median", median(began), "ms", "<= 50")
    yield figure("write to event in another process, 99th percentile", percentile(began, 99), "ms", "<= 50")
    yield figure("of it, the write itself, median", median(commits), "ms")
    yield figure("of it, behind the write, 99th percentile", percentile(ended, 99), "ms")


def _write(url: str, count: int, pipe: Connection) -> None:
    asyncio.run(_write_leases(url, count, pipe))


async def _write_leases(url: str, count: int, pipe: Connection) -> None:
    """In the other process: write when told to, then send when each write began and ended, by key."""
    times = {}
    store = open_store(url)
    await store.snapshot()
    pipe.recv()
    for number in range(count):
        one = lease(number)
        began = time.monotonic()
        await store.create(one, holder=Holder("bench/writer"))
        times[one.key] = (began, time.monotonic())
        await asyncio.sleep(_PAUSE_S)
    await store.close()
    pipe.send(times)


async def _watch(
    url: str, count: int, pipe: Connection
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    heard: dict[str, float] = {}
    store = open_store(url)
    revision = (await store.snapshot()).revision
    pipe.send("go")
    async with asyncio.timeout(120), aclosing(store.watch(revision)) as events:
        await _hear(events, heard, count)
    await store.close()
    written: dict[str, tuple[float, float]] = pipe.recv()
    return heard, written


async def _hear(
    events: AsyncGenerator[Changes | Snapshot, None], heard: dict[str, float], count: int
) -> None:
    async for event in events:
        now = time.monotonic()
        records = event.written if isinstance(event, Changes) else event.records
        for key in records:
            heard.setdefault(key, now)
        if len(heard) >= count:
            return


def _claim(number: int) -> Claim:
    """What one host asks for; its public address is like no lease's."""
    range_ = Range(
        NETWORK,
        24,
        Prefix.from_int(Family.IPV4, NETWORK.first + 256, 24),
        Prefix.from_int(Family.IPV4, NETWORK.last - 255, 24),
    )
    public = (_HOSTS_PUBLIC + number).to_bytes(4, "big")
    data = b'{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}'

    def make(subnets: dict[Family, Prefix]) -> Lease:
        return Lease.make({Family.IPV4: Leg(subnets[Family.IPV4], public, data)}, "vxlan")

    return Claim((range_,), {Family.IPV4: public}, (), Holder(f"bench/host{number}", f"host{number}"), make)


async def _acquire_each(url: str) -> float:
    """The median time of one host after the other, in seconds."""
    store = open_store(url)
    took = []
    for number in range(_ROUNDS):
        started = time.monotonic()
        await acquire(store, _claim(number), rng=random.Random(number))
        took.append(time.monotonic() - started)
    await store.close()
    return median(took)


async def _snapshot(url: str) -> float:
    store = open_store(url)
    took = []
    for _ in range(_ROUNDS):
        started = time.monotonic()
        await store.snapshot()
        took.append(time.monotonic() - started)
    await store.close()
    return median(took)


def _acquire_at_once(url: str, count: int) -> float:
    """How long it takes until all of many hosts, a process each, have leases; in seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench._site", "loden.stores.acquire", "loden.stores.sqlite"])
    pipes, processes = [], []
    try:
        for number in range(count):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=_take_lease, args=(url, number, theirs)))
            processes[-1].start()
            pipes.append(ours)
        for pipe in pipes:
            pipe.recv()  # its store is open
        started = time.monotonic()
        for pipe in pipes:
            pipe.send("go")
        keys = {pipe.recv() for pipe in pipes}
        took = time.monotonic() - started
    finally:
        for process in processes:
            process.kill()
            process.join()
    if len(keys) != count:
        raise LabError(f"take {count} leases at once: there are {len(keys)} different ones")
    return took


def _take_lease(url: str, number: int, pipe: Connection) -> None:
    """In the other process: take a lease when told to."""
    asyncio.run(_take_lease_when_told(url, number, pipe))


async def _take_lease_when_told(url: str, number: int, pipe: Connection) -> None:
    store = open_store(url)
    await store.get_network()
    pipe.send("ready")
    pipe.recv()
    record = await acquire(store, _claim(100 + number), rng=random.Random(number))
    pipe.send(record.key)
    await store.close()


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--writes", type=int, default=300, help="watched [300]")
    parser.add_argument("--leases", type=int, default=20_000, help="present [20000]")
    parser.add_argument("--more", type=int, default=50_000, help="present, the second time [50000]")
    parser.add_argument("--agents", type=int, default=50, help="that ask at once [50]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
