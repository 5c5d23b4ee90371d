# SPDX-License-Identifier: Apache-2.0
"""A network namespace for one test, and the tables of a host in it, wired as the agent wires them."""

import asyncio
import ctypes
import json
import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import pytest

from loden.address import Family, Prefix, format_address, parse_address
from loden.reconcile import Reconciler
from loden.tables.addresses import AddressTable
from loden.tables.devices import Devices
from loden.tables.entries import Entry, FdbEntry, LinkAddress, Neighbour, Route, VxlanLink, format_mac
from loden.tables.neighbours import FdbTable, NeighbourTable
from loden.tables.netlink import Monitor, Netlink
from loden.tables.routes import RouteTable

T = TypeVar("T")

#: Nobody waits for so long unless something is broken.
PATIENCE_S = 40.0

#: RTNLGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE, _NEXTHOP
GROUPS = (1, 3, 5, 7, 9, 11, 32)

_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_libc = ctypes.CDLL(None, use_errno=True)  # os.unshare and os.setns come with Python 3.12


@contextmanager
def namespace() -> Iterator[None]:
    """Be in a new network namespace, with ``lo`` up and nothing else; it goes with whoever used it last."""
    with open("/proc/thread-self/ns/net", encoding="ascii") as outside:
        require_zero(_libc.unshare(_CLONE_NEWNET))
        try:
            ip("link set lo up")
            yield
        finally:
            require_zero(_libc.setns(outside.fileno(), _CLONE_NEWNET))


def require_zero(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def ip(arguments: str) -> str:
    """``ip ARGUMENTS``, which must work."""
    return command(f"ip {arguments}")


def bridge(arguments: str) -> str:
    """``bridge ARGUMENTS``, which must work."""
    return command(f"bridge {arguments}")


def command(line: str) -> str:
    done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


def lines(text: str) -> list[str]:
    """The lines of a listing, blanks and the flags that come and go by themselves taken out."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def link_json(name: str) -> dict[str, Any]:
    """``ip -json -details link show``."""
    (found,) = json.loads(ip(f"-json -details link show dev {name}"))
    assert isinstance(found, dict)
    return found


def leave_neighbour(entry: Neighbour, state: str) -> None:
    """``ip neighbour replace``, as somebody else."""
    address, mac = format_address(entry.address), format_mac(entry.mac)
    ip(f"neighbour replace {address} lladdr {mac} nud {state} dev {entry.device}")


def leave_fdb(entry: FdbEntry) -> None:
    """``bridge fdb replace``, as somebody else."""
    mac, remote = format_mac(entry.mac), format_address(entry.remote)
    bridge(f"fdb replace {mac} dst {remote} dev {entry.device} self permanent")


def leave_route(entry: Route, more: str = "") -> None:
    """``ip route replace``, as somebody else."""
    flag = "-4" if len(entry.dst.address) == 4 else "-6"
    via = f"via {format_address(entry.via)}" if entry.via else ""
    onlink = "onlink" if entry.onlink else ""
    ip(f"{flag} route replace {entry.dst} {via} dev {entry.device} {onlink} {more}")


def wire_underlay() -> None:
    """``eth0`` with 192.0.2.1/24 and 2001:db8::1/64, on a wire to ``wire``."""
    ip("link add eth0 type veth peer name wire")
    ip("link set wire up")
    ip("address add 192.0.2.1/24 dev eth0")
    ip("address add 2001:db8::1/64 dev eth0 nodad")
    ip("link set eth0 up")
    while "2001:db8::1 " not in ip("-6 route show table local type local"):
        time.sleep(0.01)  # the kernel takes an IPv6 address into use when it has noticed the carrier


class Names:
    """What one address family's test calls things; the two instances make one test two."""

    def __init__(self, family: Family) -> None:
        self.family = family
        is_ipv4 = family is Family.IPV4
        self.flag = "-4" if is_ipv4 else "-6"
        self.device = "flannel.1" if is_ipv4 else "flannel-v6.1"
        self.local = parse_address("192.0.2.1" if is_ipv4 else "2001:db8::1")
        self.network = Prefix.parse("10.5.0.0/16" if is_ipv4 else "fd00:5::/48")
        self.outside = "203.0.113.7/32" if is_ipv4 else "2001:db8:ffff::7/128"
        self.mtu = 1450 if is_ipv4 else 1430
        #: What the kernel prints behind a route of the default metric.
        self.metric = "" if is_ipv4 else " metric 1024 pref medium"

    def __repr__(self) -> str:
        return str(self.family)

    def subnet(self, number: int) -> Prefix:
        """The subnet of one host, by its number."""
        if self.family is Family.IPV4:
            return Prefix.of(bytes((10, 5 + (number >> 8), number & 255, 0)), 24)
        return Prefix.of(parse_address(f"fd00:5:0:{number:x}::"), 64)

    def remote(self, number: int) -> bytes:
        """The public address of one host."""
        if self.family is Family.IPV4:
            return bytes((192, 0, 2 + (number >> 8), number & 255))
        return parse_address(f"2001:db8::{number:x}")

    def mac(self, number: int) -> bytes:
        """The VTEP's address of one host."""
        return bytes((2, 0, 0, 0, number >> 8, number & 255))

    def link(self, **changed: Any) -> VxlanLink:
        """The own device."""
        usual: dict[str, Any] = {
            "name": self.device,
            "vni": 1,
            "local": self.local,
            "underlay": "eth0",
            "mtu": self.mtu,
            "mac": self.mac(1),
        }
        return VxlanLink(**(usual | changed))

    def own(self, **changed: Any) -> tuple[Entry, ...]:
        """What stands on the host itself."""
        return self.link(**changed), LinkAddress(self.device, self.subnet(1).address, self.family.bits)

    def peer(self, number: int) -> tuple[Neighbour, FdbEntry, Route]:
        """What leads to a peer over the device."""
        subnet, mac = self.subnet(number), self.mac(number)
        return (
            Neighbour(self.device, subnet.address, mac),
            FdbEntry(self.device, mac, self.remote(number)),
            Route(subnet, self.device, subnet.address, onlink=True),
        )

    def direct(self, number: int) -> Route:
        """The route to a peer on the same network."""
        return Route(self.subnet(number), "eth0", self.remote(number))


BOTH = (Names(Family.IPV4), Names(Family.IPV6))
NETWORKS = [names.network for names in BOTH]


class Kernel:
    """The five tables of the namespace that the caller is in, and a monitor that hears others."""

    def __init__(self, *, nexthop_objects: bool | None = None) -> None:
        self.nexthop_objects = nexthop_objects
        self.requests = Netlink()
        self.monitor = Monitor(GROUPS, ignore_port=self.requests.port)
        self.devices = Devices(self.requests)
        self.devices.follow(["eth0"])
        self.addresses = AddressTable(self.requests, self.devices, NETWORKS)
        self.neighbours = NeighbourTable(self.requests, self.devices)
        self.fdb = FdbTable(self.requests, self.devices)
        self.routes = RouteTable(self.requests, self.devices, nexthop_objects=nexthop_objects)
        self.reconciler = Reconciler([self.devices, self.addresses, self.neighbours, self.fdb, self.routes])

    def close(self) -> None:
        self.monitor.close()
        self.requests.close()

    def hear(self) -> int:
        """Tell the reconciler what was heard since the last time; how many messages."""
        count = 0
        while True:
            messages = self.monitor.receive()
            if messages is None:
                self.reconciler.look_soon()
                continue
            for message in messages:
                self.reconciler.hear(message)
            count += len(messages)
            if not messages:
                return count

    async def stand(self, *entries: Entry) -> None:
        """Want entries and look; all of them must stand."""
        self.reconciler.want("test", entries)
        await self.reconciler.look()
        assert self.reconciler.failures("test") == []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The reconciler at work, hearing what others do, as in the agent."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.monitor.fileno(), self.hear)
        try:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(self.reconciler.run())
                await until(lambda: self.reconciler.statistics.looks > 0)
                yield
                task.cancel()
        finally:
            loop.remove_reader(self.monitor.fileno())


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for a condition that others bring about."""
    while not is_so():  # noqa: ASYNC110  # it is the kernel that changes, and nothing here hears of it
        await asyncio.sleep(0.01)


def run(work: Awaitable[T]) -> T:
    """Run a test's coroutine in an event loop of its own, and fail rather than hang."""

    async def bounded() -> T:
        async with asyncio.timeout(PATIENCE_S):
            return await work

    return asyncio.run(bounded())


def require_bpf() -> None:
    """Skip where the kernel takes no programs of us: that needs privileges in its first user namespace."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        if file.read().split() != ["0", "0", "4294967295"]:
            pytest.skip("eBPF programs need root, outside of user namespaces")


def require_tun() -> None:
    """Skip where this user may make no TUN devices; a host without any is a failure."""
    path = "/dev/net/tun"
    if os.path.exists(path) and not os.access(path, os.R_OK | os.W_OK):
        pytest.skip(f"{path} is closed to this user")
