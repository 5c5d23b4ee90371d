# SPDX-License-Identifier: Apache-2.0
"""A store full of leases, from the agent's exec to the last route in the kernel; and starting again there.

The last route is seen by a listener of the kernel's notifications, which costs the other core.
"""

import argparse
import asyncio
import os
import select
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench._common import Arguments, Figure, figure, run, scratch
from bench._site import Agent, Site, fill, lease, make_vxlan, run_batch, site
from loden.address import format_address
from loden.backends.vxlan import vtep_mac
from loden.errors import LabError
from loden.lab import namespaces
from loden.tables import netlink
from loden.tables.devices import Devices
from loden.tables.entries import Route, format_mac
from loden.tables.netlink import Monitor, Netlink
from loden.tables.routes import RouteTable

_RTNLGRP_NEIGH, _RTNLGRP_IPV4_ROUTE, _RTNLGRP_NEXTHOP = 3, 7, 32
_WRITES = frozenset(
    (
        *(netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE, netlink.RTM_NEWNEIGH, netlink.RTM_DELNEIGH),
        *(netlink.RTM_NEWNEXTHOP, netlink.RTM_DELNEXTHOP),
    )
)
_PROTOCOL_OFFSET = 5  # of rtm_protocol in struct rtmsg
_PATIENCE_S = 120.0


def measure(arguments: Arguments) -> Iterator[Figure]:
    small, large, by_hand = arguments.leases, arguments.more, arguments.by_hand
    hand_s = _by_hand(by_hand)
    for backend in ("vxlan", "host-gw"):
        with scratch() as directory:
            url = fill(Path(directory) / "small.db", small, backend)
            with site() as here:
                agent, small_s = _cold_start(here, url, small)
                anchor = (f"ip and bridge, from {by_hand:,}", hand_s * small / by_hand)
                yield figure(
                    f"{backend}, {small:,} leases, exec to the last route", small_s, "s",
                    "<= 2.5" if backend == "vxlan" else "", anchor=anchor if backend == "vxlan" else None,
                )  # fmt: skip
                yield from _rest(here, agent, url, f"{backend}, {small:,}")
            if not large:
                continue
            url = fill(Path(directory) / "large.db", large, backend)
            with site() as here:
                agent, large_s = _cold_start(here, url, large)
                yield figure(f"{backend}, {large:,} leases, exec to the last route", large_s, "s")
                yield figure(f"{backend}, {large:,} to {small:,}", large_s / small_s, "times", "<= 3")
                agent.wait_idle()
                yield figure(f"{backend}, {large:,} leases, resident", agent.memory_mb(), "MB")
    yield figure(f"ip and bridge in batches, {by_hand:,} leases", hand_s, "s")
    yield from _forms((by_hand, small))


def _rest(here: Site, agent: Agent, url: str, what: str) -> Iterator[Figure]:
    """What the agent takes when all stands, and what it costs to start again."""
    agent.wait_idle()
    yield figure(f"{what} leases, processor time of it all", agent.cpu_s(), "s")
    yield figure(f"{what} leases, resident", agent.memory_mb(), "MB", "<= 60")
    yield figure(f"{what} leases, resident at its peak", agent.peak_mb(), "MB")
    agent.kill()
    with _Changes(here) as changes:
        again = here.start(url)
        again.wait_idle()
        yield figure(f"{what} leases, started again, ready", again.ready_s, "s")
        yield figure(f"{what} leases, started again, processor time", again.cpu_s(), "s")
    yield figure(f"{what} leases, started again, entries changed", changes.count, "", "0")
    again.kill()


class _Changes:
    """Counts, in a thread, what the kernel says of routes, nexthops and neighbours in a block."""

    def __init__(self, here: Site) -> None:
        self.count = 0
        self._monitor = _listen(here, (_RTNLGRP_NEIGH, _RTNLGRP_IPV4_ROUTE, _RTNLGRP_NEXTHOP))
        self._stop, self._stopped = os.pipe()
        self._thread = threading.Thread(target=self._work, name="changes")

    def __enter__(self) -> "_Changes":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._stopped)
        self._thread.join()
        os.close(self._stop)
        self._monitor.close()

    def _work(self) -> None:
        poll = select.poll()
        poll.register(self._monitor, select.POLLIN)
        poll.register(self._stop, select.POLLHUP)
        while any(ready != self._stop for ready, _ in poll.poll()):
            # None: more came than fits. The count is then too low, and far from the promise either way.
            self.count += sum(
                message.kind in _WRITES and message.buffer[message.start] == socket.AF_INET
                for message in self._monitor.receive() or ()
            )


def _cold_start(here: Site, url: str, count: int) -> tuple[Agent, float]:
    """Start the agent; it, and the seconds until its last route stood."""
    monitor = _listen(here, (_RTNLGRP_IPV4_ROUTE,))
    agent = here.start(url)
    seen = 0
    while seen < count:
        if not select.select([monitor], [], [], _PATIENCE_S)[0]:
            raise LabError(f"wait for {count} routes: {seen} after {_PATIENCE_S:g} s without another one")
        heard = monitor.receive()
        if heard is None:
            raise LabError("wait for routes: more than the listener could take")
        seen += sum(
            message.kind == netlink.RTM_NEWROUTE
            and message.buffer[message.start + _PROTOCOL_OFFSET] == netlink.PROTOCOL
            for message in heard
        )
    took_s = time.perf_counter() - agent.started
    monitor.close()
    return agent, took_s


def _listen(here: Site, groups: Sequence[int]) -> Monitor:
    return namespaces.inside(here.namespace, lambda: Monitor(groups))


def _by_hand(count: int) -> float:
    """Seconds that iproute2 takes for the entries of so many vxlan leases: three processes, in batches."""
    neighbours, forwarding, routes = [], [], []
    for number in range(count):
        leg = lease(number).ipv4
        assert leg is not None
        assert leg.public is not None
        mac, vtep = format_mac(vtep_mac(leg)), format_address(leg.subnet.address)
        neighbours.append(f"neigh replace {vtep} lladdr {mac} dev flannel.1 nud permanent")
        forwarding.append(f"fdb replace {mac} dst {format_address(leg.public)} dev flannel.1 self permanent")
        routes.append(f"route replace {leg.subnet} via {vtep} dev flannel.1 onlink")
    with site() as here:
        make_vxlan(here)
        started = time.perf_counter()
        run_batch(here, "ip", neighbours)
        run_batch(here, "bridge", forwarding)
        run_batch(here, "ip", routes)
        return time.perf_counter() - started


def _forms(counts: Sequence[int]) -> Iterator[Figure]:
    """Routes alone, through nexthop objects and with a gateway each."""
    took: dict[tuple[int, bool], float] = {}
    for count in counts:
        gone: dict[bool, float] = {}
        for objects in (True, False):
            took[count, objects], gone[objects] = asyncio.run(_put_routes(count, nexthop_objects=objects))
        yield figure(
            f"{count:,} routes through nexthop objects", took[count, True], "s",
            anchor=("a gateway in each route", took[count, False]),
        )  # fmt: skip
        yield figure(
            f"{count:,} such routes, their device removed", gone[True], "s",
            anchor=("a gateway in each route", gone[False]),
        )  # fmt: skip
    small, large = counts
    for objects, name in ((True, "nexthop objects"), (False, "a gateway in each")):
        yield figure(
            f"{name}: {large:,} routes to {small:,}",
            took[large, objects] / took[small, objects],
            "times",
            anchor=("in leases", large / small),
        )


async def _put_routes(count: int, *, nexthop_objects: bool) -> tuple[float, float]:
    """Seconds that so many routes take, and the removal of the device that they use."""
    with site() as here:
        make_vxlan(here)
        requests = namespaces.inside(here.namespace, Netlink)
        devices = Devices(requests)
        await devices.refresh()
        table = RouteTable(requests, devices, nexthop_objects=None if nexthop_objects else False)
        await table.read({})
        legs = [leg for number in range(count) for leg in lease(number).legs]
        entries = [Route(leg.subnet, "flannel.1", leg.subnet.address, onlink=True) for leg in legs]
        started = time.perf_counter()
        failures = await table.put(entries)
        put_s = time.perf_counter() - started
        requests.close()
        for error in failures.values():
            raise error
        started = time.perf_counter()
        run_batch(here, "ip", ["link del flannel.1"])
        return put_s, time.perf_counter() - started


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--leases", type=int, default=20_000, help="how many [20000]")
    parser.add_argument("--more", type=int, default=50_000, help="and how many more; 0 for none [50000]")
    parser.add_argument("--by-hand", type=int, default=5_000, help="how many with ip and bridge [5000]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
