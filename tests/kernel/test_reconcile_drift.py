# SPDX-License-Identifier: Apache-2.0
"""What somebody changes in the kernel comes back, and what nobody wants goes."""

import asyncio
import json
import logging
import socket
import subprocess
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from loden.address import format_address
from loden.tables import netlink
from loden.tables.entries import Entry, FdbEntry
from loden.tables.netlink import Monitor
from loden.tables.nexthops import FIRST
from tests.kernel.kernel import (
    BOTH,
    Kernel,
    Names,
    bridge,
    ip,
    leave_fdb,
    leave_neighbour,
    leave_route,
    link_json,
    run,
    until,
)

IPV4 = BOTH[0]
PEERS = range(9, 14)


def wanted(names: Names) -> list[Entry]:
    """The own device, some peers behind it and one on the same network."""
    return [*names.own(), *(entry for number in PEERS for entry in names.peer(number)), names.direct(20)]


def view(names: Names) -> dict[str, Any]:
    """All that matters of what stands, indexes left out."""
    routes = json.loads(ip(f"-json -details {names.flag} route show proto 76"))
    for route in routes:
        route.pop("nhid", None)
        route.pop("nh_info", None)
    link = link_json(names.device)
    neighbours = json.loads(ip(f"-json {names.flag} neighbour show nud permanent dev {names.device}"))
    addresses = json.loads(ip(f"-json {names.flag} address show scope global dev {names.device}"))
    return {
        "link": {key: link.get(key) for key in ("mtu", "address", "ifalias", "linkinfo")},
        "up": "UP" in link["flags"],
        "addresses": [one.get("local") for one in addresses[0]["addr_info"]] if addresses else [],
        "neighbours": sorted(map(json.dumps, neighbours)),
        "fdb": sorted(bridge(f"fdb show dev {names.device}").splitlines()),
        "routes": sorted(map(json.dumps, routes)),
    }


def seen(names: Names) -> dict[str, Any] | None:
    """The view; None while the device is away."""
    try:
        return view(names)
    except AssertionError:
        return None


def settled(names: Names, kernel: Kernel, before: dict[str, Any]) -> Callable[[], bool]:
    return lambda: kernel.reconciler.statistics.failing == 0 and seen(names) == before


DRIFTS: dict[str, Callable[[Names], object]] = {
    "route deleted": lambda names: ip(f"{names.flag} route delete {names.subnet(9)}"),
    "route replaced": lambda names: leave_route(
        msgspec.structs.replace(names.direct(20), via=names.remote(77)), "proto static"
    ),
    "every route deleted": lambda names: [
        ip(f"{names.flag} route delete {names.subnet(number)}") for number in (*PEERS, 20)
    ],
    "neighbour deleted": lambda names: ip(
        f"{names.flag} neighbour flush nud permanent dev {names.device}"
    ),
    "neighbour replaced": lambda names: leave_neighbour(
        msgspec.structs.replace(names.peer(9)[0], mac=names.mac(77)), "permanent"
    ),
    "neighbour made stale": lambda names: leave_neighbour(names.peer(9)[0], "stale"),
    "forwarding entry deleted": lambda names: bridge(
        f"fdb delete 02:00:00:00:00:09 dev {names.device} self"
    ),
    "forwarding entry replaced": lambda names: leave_fdb(
        msgspec.structs.replace(names.peer(9)[1], remote=names.remote(77))
    ),
    "address removed": lambda names: ip(f"{names.flag} address flush scope global dev {names.device}"),
    "device deleted": lambda names: ip(f"link delete {names.device}"),
    "device down": lambda names: ip(f"link set {names.device} down"),
    "device renamed": lambda names: [
        ip(f"link set {names.device} down"), ip(f"link set {names.device} name elsewhere"),
        ip("link delete elsewhere"),
    ],
    "address of the link rewritten": lambda names: ip(
        f"link set {names.device} address 02:de:ad:00:00:01"
    ),
    "mtu changed": lambda names: ip(f"link set {names.device} mtu 1300"),
    "alias removed": lambda names: ip(f"link set {names.device} alias theirs"),
    "device replaced": lambda names: [
        ip(f"link delete {names.device}"),
        ip(f"link add {names.device} type vxlan id 5 dev eth0 dstport 8472"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("drift", DRIFTS)
def test_drift_is_repaired(either: Kernel, names: Names, drift: str) -> None:
    async def act() -> None:
        either.reconciler.want("test", wanted(names))
        async with either.running():
            await until(lambda: either.reconciler.statistics.failing == 0)
            before = view(names)
            DRIFTS[drift](names)
            assert seen(names) != before
            await until(settled(names, either, before))
        assert either.reconciler.statistics.drifted > 0

    run(act())


def test_device_that_somebody_deletes_again_and_again_comes_back(kernel: Kernel, names: Names) -> None:
    """Also where it goes while it is being made: nothing but that one notification tells of it."""

    def delete_often() -> None:
        for _ in range(150):
            subprocess.run(["ip", "link", "delete", names.device], stderr=subprocess.DEVNULL, check=False)

    async def act() -> None:
        kernel.reconciler.want("test", wanted(names))
        async with kernel.running():
            before = view(names)
            await asyncio.to_thread(delete_often)
            await until(settled(names, kernel, before))

    run(act())


def test_underlay_going_down_and_up_is_survived(either: Kernel) -> None:
    """The kernel drops IPv4 routes over a device that goes down without a word."""

    async def act() -> None:
        either.reconciler.want("test", wanted(IPV4))
        async with either.running():
            before = view(IPV4)
            ip("link set eth0 down")
            await until(lambda: either.reconciler.statistics.failing > 0)
            ip("link set eth0 up")
            await until(settled(IPV4, either, before))

    run(act())


def test_nexthops_flushed_or_replaced_come_back(kernel: Kernel, names: Names) -> None:
    async def act() -> None:
        kernel.reconciler.want("test", wanted(names))
        async with kernel.running():
            before = view(names)
            ip("nexthop flush proto 76")
            await until(settled(names, kernel, before))

            ip(f"nexthop replace id {FIRST} via {format_address(names.remote(77))} dev eth0")
            await until(settled(names, kernel, before))

    run(act())


def test_what_the_monitor_lost_is_found_by_looking(kernel: Kernel) -> None:
    async def act() -> None:
        kernel.reconciler.want("test", wanted(IPV4))
        async with kernel.running():
            before = view(IPV4)
            kernel.monitor._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            looks = kernel.reconciler.statistics.looks
            DRIFTS["every route deleted"](IPV4)
            for number in range(100, 120):
                ip(f"route add 198.51.100.{number} dev eth0")
            await until(settled(IPV4, kernel, before))
            await until(lambda: kernel.reconciler.statistics.looks > looks)

    run(act())


def test_first_look_removes_what_a_dead_agent_left(either: Kernel, after: Kernel, names: Names) -> None:
    old = names.link(name="flannel.2", vni=2)
    on_old = msgspec.structs.replace(names.peer(30)[2], device="flannel.2")
    left = [*wanted(names), *names.peer(40), names.direct(41), old, on_old]
    run(either.stand(*left))

    run(after.stand(*wanted(names)))
    found = view(names)
    assert "flannel.2" not in ip("link show type vxlan")
    assert len(found["neighbours"]) == len(found["fdb"]) == len(PEERS)
    assert len(found["routes"]) == len(PEERS) + 1
    after.reconciler.want("test", [])
    run(after.reconciler.look())
    assert ip("nexthop show") == ""
    assert ip("link show type vxlan") == ""
    assert ip(f"{names.flag} route show proto 76") == ""


def test_restart_changes_nothing_that_stands(
    either: Kernel, after: Kernel, witness: Monitor, names: Names
) -> None:
    """Not even for a moment: somebody who listens hears of no change."""
    run(either.stand(*wanted(names)))
    while witness.receive():
        pass
    after.reconciler.want("own", names.own())

    async def start() -> None:
        await after.devices.refresh()
        await after.reconciler.settle()
        after.reconciler.want("peers", wanted(names)[2:])
        await after.reconciler.look()
        assert after.reconciler.failures("peers") == []

    run(start())

    heard = {message.kind for message in witness.receive() or []}
    # The kernel says by itself, late, that a link and its link-local address and route are in order.
    assert heard <= {netlink.RTM_NEWADDR, netlink.RTM_NEWLINK, netlink.RTM_NEWROUTE}


def test_host_of_flannel_is_taken_over(either: Kernel, names: Names) -> None:

    local = format_address(names.local)
    ip(
        f"link add {names.device} address 02:aa:bb:cc:dd:ee mtu {names.mtu} txqueuelen 0"
        f" type vxlan id 1 local {local} dev eth0 dstport 8472 nolearning"
    )
    ip(f"link set {names.device} up")
    ip(f"address add {format_address(names.subnet(1).address)}/{names.family.bits} dev {names.device}")
    for number in (9, 50):  # 50 vanished while nobody looked
        neighbour, fdb, route = names.peer(number)
        leave_neighbour(neighbour, "permanent")
        leave_fdb(fdb)
        leave_route(route)
    index = link_json(names.device)["ifindex"]

    entries = [*names.own(mac=bytes.fromhex("02aabbccddee")), *names.peer(9)]

    async def start() -> None:
        await either.devices.refresh()
        either.reconciler.want("test", entries)
        await either.reconciler.look()

    run(start())
    found = view(names)
    assert link_json(names.device)["ifindex"] == index
    assert (len(found["neighbours"]), len(found["fdb"]), len(found["routes"])) == (1, 1, 1)
    assert ip(f"{names.flag} route show proto boot dev {names.device}") == ""

    either.reconciler.want("test", entries[:2])  # the peer leaves before the next look
    run(either.reconciler.settle())
    assert view(names)["routes"] == []


def test_foreign_entries_survive_everything(kernel: Kernel, names: Names) -> None:
    run(kernel.stand(*wanted(names)))

    via = format_address(names.remote(77))
    ip(f"{names.flag} route add {names.subnet(60)} via {via} dev eth0 proto static")
    ip(f"{names.flag} route add {names.subnet(9)} via {via} dev eth0 proto static metric 9999")
    ip(f"nexthop add id {FIRST + 500} via {via} dev eth0")
    ip(f"address add {names.outside} dev {names.device}")
    ip("link add theirs type vxlan id 77 dev eth0 dstport 8472")
    bridge(f"fdb append 00:00:00:00:00:00 dst {via} dev {names.device} self permanent")
    bridge(f"fdb add 02:00:00:00:00:88 dst {via} dev {names.device} self dynamic")
    run(kernel.reconciler.look())
    kernel.reconciler.want("test", names.own())
    run(kernel.reconciler.look())
    run(kernel.reconciler.settle())
    assert len(json.loads(ip(f"-json {names.flag} route show proto static"))) == 2
    assert f"id {FIRST + 500} " in ip("nexthop show")
    assert names.outside.split("/", maxsplit=1)[0] in ip(f"address show dev {names.device}")
    assert "theirs" in ip("link show type vxlan")
    fdb = bridge(f"fdb show dev {names.device}")
    assert "00:00:00:00:00:00" in fdb
    assert "02:00:00:00:00:88" in fdb


def test_foreign_route_in_the_way_fails_alone_and_ours_takes_its_place_when_it_goes(
    kernel: Kernel, names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rival = msgspec.structs.replace(names.direct(20), via=names.remote(77))
    leave_route(rival, "proto static")

    async def act() -> None:
        kernel.reconciler.want("test", wanted(names))
        async with kernel.running():
            assert kernel.reconciler.statistics.failing == 1
            assert [str(names.subnet(20)) in problem for problem in kernel.reconciler.problems] == [True]
            ip(f"{names.flag} route delete {rival.dst} proto static")
            await until(lambda: kernel.reconciler.statistics.failing == 0)

    run(act())
    assert caplog.text.count("refused count=1") == 1
    assert caplog.text.count("mended count=1") == 1


def test_nothing_stays_when_rivals_for_one_slot_go_together(kernel: Kernel, names: Names) -> None:
    async def act() -> None:
        await kernel.stand(*names.own())
        _, fdb, _ = names.peer(9)
        assert isinstance(fdb, FdbEntry)
        for number in (7, 8):
            rival = msgspec.structs.replace(fdb, remote=names.remote(number))
            kernel.reconciler.want(number, [rival])
        await kernel.reconciler.settle()
        for number in (7, 8):
            kernel.reconciler.want(number, ())
        await kernel.reconciler.settle()
        assert "dst" not in bridge(f"fdb show dev {names.device}")

    run(act())
