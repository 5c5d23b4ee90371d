# SPDX-License-Identifier: Apache-2.0
"""etcd: cold starts, how soon a lease is a route, many hosts at once, a stream of changes, and an outage.

The etcd is started here. Its data lie in memory unless --directory names a disk.
"""

import argparse
import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from bench._common import Arguments, Figure, figure, median, percentile, run
from bench._etcd import EtcdSite, etcd_site, put
from bench._site import NETWORK, lease
from bench.restart import ping_between
from bench.scale import _cold_start
from bench.store import _claim
from loden.errors import LabError
from loden.lab import namespaces, processes
from loden.lab.agents import loden_run
from loden.lab.lab import running
from loden.lab.topology import Spec, StoreKind
from loden.lease import Lease, Leg
from loden.stores import open_store
from loden.stores.acquire import acquire
from loden.stores.base import Snapshot
from loden.stores.etcd.store import EtcdStore
from loden.tables import netlink
from loden.tables.netlink import Monitor

_ROUTES = 7  # RTNLGRP_IPV4_ROUTE
_NEIGHBOURS = 3  # RTNLGRP_NEIGH
_PAUSE_S = 0.01
_PATIENCE_S = 60.0
_PROCESSES = 4


def measure(arguments: Arguments) -> Iterator[Figure]:
    parts: dict[str, Callable[[Arguments], Iterator[Figure]]] = {
        "start": _few,
        "scale": _scale,
        "latency": _latency,
        "herd": _herd,
        "changes": _changes,
        "outage": _outage,
    }
    for name, part in parts.items():
        if not arguments.only or name in arguments.only:
            yield from part(arguments)


@contextmanager
def _place(arguments: Arguments) -> Iterator[Path]:
    with TemporaryDirectory(prefix="loden-bench-", dir=arguments.directory) as directory:
        yield Path(directory)


def _few(arguments: Arguments) -> Iterator[Figure]:
    with _place(arguments) as directory, etcd_site(directory) as here:
        here.fill(3)
        took = []
        for _ in range(arguments.rounds + 1):
            agent = here.site.start(here.url)
            took.append(1000 * agent.ready_s)
            if len(took) <= arguments.rounds:
                agent.kill()
        yield figure("exec to subnet.env, 3 peers, median", median(took[1:]), "ms", "<= 250")
        agent.wait_idle()
        yield figure("memory at rest, resident", agent.memory_mb(), "MB", "<= 40")
        agent.kill()


def _scale(arguments: Arguments) -> Iterator[Figure]:
    promises = {arguments.leases: ("<= 3", "<= 1", "<= 60"), arguments.more: ("<= 9", "", "")}
    for count in filter(None, (arguments.leases, arguments.more)):
        with _place(arguments) as directory, etcd_site(directory) as here:
            here.fill(count)
            agent, took_s = _cold_start(here.site, here.url, count)
            routes, file, memory = promises[count]
            yield figure(f"{count:,} leases, exec to the last route", took_s, "s", routes)
            yield figure(f"{count:,} leases, exec to subnet.env", agent.ready_s, "s", file)
            agent.wait_idle()
            yield figure(f"{count:,} leases, processor time of it all", agent.cpu_s(), "s")
            yield figure(f"{count:,} leases, resident", agent.memory_mb(), "MB", memory)
            yield figure(f"{count:,} leases, resident at its peak", agent.peak_mb(), "MB")
            agent.kill()


def _latency(arguments: Arguments) -> Iterator[Figure]:
    for count in (10, arguments.known):
        with _place(arguments) as directory, etcd_site(directory) as here:
            here.fill(count)
            agent = here.site.start(here.url)
            agent.wait_idle()
            numbers = range(count, count + arguments.writes)
            routes, writes = _time_routes(here, [lease(number) for number in numbers])
            yield figure(f"{count:,} present, lease written to route, median", median(routes), "ms", "<= 2.8")
            yield figure(
                f"{count:,} present, lease written to route, 99th percentile",
                percentile(routes, 99),
                "ms",
                "<= 4.2",
            )
            yield figure(f"{count:,} present, the write itself, median", median(writes), "ms")
            agent.kill()


def _time_routes(here: EtcdSite, leases: Sequence[Lease]) -> tuple[list[float], list[float]]:
    """Milliseconds from before each write, one after the other, to the route, and to the write's own end."""
    monitor = namespaces.inside(here.site.namespace, lambda: Monitor((_ROUTES,)))
    routes, writes = [], []

    async def work(store: EtcdStore) -> None:
        loop = asyncio.get_running_loop()
        heard: list[float] = []
        has_come = asyncio.Event()

        def hear() -> None:
            now = time.perf_counter()
            for message in monitor.receive() or ():
                if message.kind == netlink.RTM_NEWROUTE:
                    heard.append(now)
                    has_come.set()

        loop.add_reader(monitor.fileno(), hear)
        granted = await store._grant()
        for one in leases:
            heard.clear()
            has_come.clear()
            began = time.perf_counter()
            await put(store, [one], granted)
            writes.append(1000 * (time.perf_counter() - began))
            async with asyncio.timeout(_PATIENCE_S):
                await has_come.wait()
            routes.append(1000 * (heard[0] - began))
            await asyncio.sleep(random.uniform(0.5, 1.5) * _PAUSE_S)
        loop.remove_reader(monitor.fileno())

    here.with_store(work)
    monitor.close()
    return routes, writes


def _herd(arguments: Arguments) -> Iterator[Figure]:
    """Many hosts that ask at once, with the agent's own code: four processes, a handle for each host."""
    with _place(arguments) as directory, etcd_site(directory) as here:
        here.fill(0)
        numbers = list(range(arguments.hosts))
        context = multiprocessing.get_context("forkserver")
        pipes, workers = [], []
        try:
            for part in range(_PROCESSES):
                ours, theirs = context.Pipe()
                mine = numbers[part::_PROCESSES]
                switch = here.site.state.load().switch
                workers.append(context.Process(target=_ask_all, args=(switch, here.url, mine, theirs)))
                workers[-1].start()
                pipes.append(ours)
            for pipe in pipes:
                pipe.recv()
            began = time.monotonic()
            for pipe in pipes:
                pipe.send("go")
            found = [one for pipe in pipes for one in pipe.recv()]
            took_s = time.monotonic() - began
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        keys = {key for key, _ in found if key}
        trips = [calls for key, calls in found if key]
        yield figure(f"{len(numbers):,} hosts at once, different subnets", len(keys), "", str(len(numbers)))
        yield figure(f"{len(numbers):,} hosts at once, without one", len(numbers) - len(trips), "", "0")
        yield figure("round trips of a host beyond listings, mean", sum(trips) / len(trips), "", "<= 3")
        yield figure("round trips of a host beyond listings, most", max(trips), "", "<= 3")
        yield figure("until the last of them has its lease", took_s, "s")


class _Counting(EtcdStore):
    """Counts its listings apart."""

    listings = 0

    async def snapshot(self) -> Snapshot:
        before = self.calls
        found = await super().snapshot()
        self.listings += self.calls - before
        return found


def _ask_all(switch: str, url: str, numbers: Sequence[int], pipe: Connection) -> None:
    namespaces.inside(switch, lambda: asyncio.run(_ask_when_told(url, numbers, pipe)))


async def _ask_when_told(url: str, numbers: Sequence[int], pipe: Connection) -> None:
    stores = [open_store(url) for _ in numbers]
    for store in stores:
        assert isinstance(store, EtcdStore)
        store.__class__ = _Counting
        await store.get_network()  # connected
    pipe.send("ready")
    with ThreadPoolExecutor(1) as thread:
        await asyncio.get_running_loop().run_in_executor(thread, pipe.recv)

    async def ask(store: _Counting, number: int) -> tuple[str, int]:
        before = store.calls
        try:
            record = await acquire(store, _claim(number), rng=random.Random(number))
        except Exception as error:  # noqa: BLE001 - counted as a host without a lease
            print(f"host {number}: {error}")
            return "", 0
        return record.key, store.calls - before - store.listings

    pipe.send(await asyncio.gather(*(ask(it, n) for it, n in zip(stores, numbers, strict=True))))  # type: ignore[arg-type]
    for store in stores:
        await store.close()


def _changes(arguments: Arguments) -> Iterator[Figure]:
    """A stream of changes: another MAC behind a lease that stays, so many times a second."""
    count, rate, for_s = arguments.changing, arguments.rate, arguments.seconds
    with _place(arguments) as directory, etcd_site(directory) as here:
        here.fill(count)
        agent = here.site.start(here.url)
        agent.wait_idle()
        before_s, began = agent.cpu_s(), time.monotonic()
        late_ms = _stream(here, count, rate, for_s)
        used, span = agent.cpu_s() - before_s, time.monotonic() - began
        what = f"{count:,} leases, {rate} changes a second for {for_s:g} s"
        yield figure(f"{what}, processor", 100 * used / span, "%", "< 10")
        yield figure(f"{what}, the last one in the kernel after", late_ms, "ms")
        yield figure(f"{what}, resident", agent.memory_mb(), "MB")
        agent.kill()


def _stream(here: EtcdSite, count: int, rate: int, for_s: float) -> float:
    """Change leases at a rate; milliseconds from the last write to the kernel, which would show a backlog."""
    monitor = namespaces.inside(here.site.namespace, lambda: Monitor((_NEIGHBOURS,)))
    late: list[float] = []

    async def work(store: EtcdStore) -> None:
        granted = await store._grant()
        began = time.monotonic()
        total = int(rate * for_s)
        for step in range(total):
            await put(store, [_moved(step % count, step)], granted)
            monitor.receive()  # else it overflows
            await asyncio.sleep(max(0.0, began + (step + 1) / rate - time.monotonic()))
        loop, has_come = asyncio.get_running_loop(), asyncio.Event()
        final = _moved(0, total + 1)
        leg = final.ipv4
        assert leg is not None
        assert leg.data is not None
        mac = bytes.fromhex(msgspec.json.decode(leg.data)["VtepMAC"].replace(":", ""))

        def hear() -> None:
            for message in monitor.receive() or ():
                if mac in bytes(message.buffer[message.start : message.end]):
                    has_come.set()

        loop.add_reader(monitor.fileno(), hear)
        wrote = time.perf_counter()
        await put(store, [final], granted)
        async with asyncio.timeout(_PATIENCE_S):
            await has_come.wait()
        late.append(1000 * (time.perf_counter() - wrote))
        loop.remove_reader(monitor.fileno())

    here.with_store(work)
    monitor.close()
    return late[0]


def _moved(number: int, step: int) -> Lease:
    """A peer's lease with another VTEP's address."""
    one = lease(number)
    leg = one.ipv4
    assert leg is not None
    mac = (0x02_4D_00_00_00_00 + step).to_bytes(6, "big").hex(":")
    return Lease(Leg(leg.subnet, leg.public, b'{"VNI":1,"VtepMAC":"%s"}' % mac.encode()), None, "vxlan")


def _outage(arguments: Arguments) -> Iterator[Figure]:
    """etcd is stopped under traffic while leases are due to be renewed; they last twice as long."""
    stop_s, ttl_s = arguments.outage, max(8, int(2 * arguments.outage))

    def launch(url: str, subnet_file: Path) -> tuple[str, ...]:
        return loden_run(f"{url}?ttl={ttl_s}", subnet_file)

    spec = Spec(name="bench-outage", hosts=2, network=str(NETWORK), store=StoreKind.ETCD)
    with running(spec, launch=launch) as lab:
        identity = namespaces.identity(lab.plan.switch)
        assert identity is not None
        (server,) = (one for one in processes.inside([identity]))
        if not lab.check().reachable:
            raise LabError("reach every container before etcd is stopped: not all answer")
        ping = ping_between(lab)
        with ping.running():
            time.sleep(1)
            os.kill(server.pid, signal.SIGSTOP)
            time.sleep(stop_s)
            os.kill(server.pid, signal.SIGCONT)
            _wait_renewed([lab.state.log(host.name) for host in lab.plan.hosts], ttl_s)
        yield figure(f"pings sent, etcd stopped for {stop_s:g} s", ping.sent, "")
        yield figure("pings lost", ping.lost, "", "0")
        yield figure("leases renewed after, of 2", 2, "", "2")


def _wait_renewed(logs: Sequence[Path], ttl_s: float) -> None:
    deadline = time.monotonic() + ttl_s
    for log in logs:
        while "lease renewed" not in log.read_text().rpartition("keeping the lease works again")[2]:
            if time.monotonic() > deadline:
                raise LabError(f"wait for a renewal: none in {ttl_s} s; {log}:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--leases", type=int, default=20_000, help="for the cold start [20000]")
    parser.add_argument("--more", type=int, default=50_000, help="and for another; 0 for none [50000]")
    parser.add_argument("--known", type=int, default=5_000, help="present while writes are timed [5000]")
    parser.add_argument("--writes", type=int, default=300, help="timed [300]")
    parser.add_argument("--hosts", type=int, default=1_000, help="that ask at once [1000]")
    parser.add_argument("--changing", type=int, default=10_000, help="leases under changes [10000]")
    parser.add_argument("--rate", type=int, default=100, help="changes a second [100]")
    parser.add_argument("--seconds", type=float, default=60, help="of changes [60]")
    parser.add_argument("--outage", type=float, default=60, help="seconds without etcd [60]")
    parser.add_argument("--rounds", type=int, default=5, help="starts with few leases [5]")
    parser.add_argument("--directory", default="/var/tmp", help="where etcd's data lie [/var/tmp, in memory]")
    parser.add_argument("--only", action="append", help="start, scale, latency, herd, changes, outage")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
