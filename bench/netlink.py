# SPDX-License-Identifier: Apache-2.0
"""rtnetlink messages a second: in batches, one call at a time, and with pyroute2 where it is installed.

The messages are what vxlan leases ask for: a neighbour, a forwarding entry, a nexthop and a route each.
"""

import argparse
import asyncio
import importlib
import importlib.util
import struct
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from bench._common import Arguments, Figure, figure, run
from bench._site import Site, lease, make_vxlan, site
from loden.address import format_address
from loden.backends.vxlan import vtep_mac
from loden.errors import LabError
from loden.lab import namespaces
from loden.tables import neighbours, netlink, nexthops, routes
from loden.tables.devices import Devices
from loden.tables.entries import FdbEntry, Neighbour, Route, format_mac
from loden.tables.netlink import Netlink

_DEVICE = "flannel.1"
_FLAGS_OFFSET = 6  # of nlmsg_flags in struct nlmsghdr
_FIRST_NEXTHOP = 1000

Way = Callable[[Netlink, Sequence[bytes]], Coroutine[Any, Any, None]]


def measure(arguments: Arguments) -> Iterator[Figure]:
    count = arguments.leases
    each = _rate(_one_by_one, count)
    anchor = ("one call each", each)
    yield figure("one call each", each, "/s")
    yield figure("batches, each message acknowledged", _rate(_acknowledged, count), "/s", anchor=anchor)
    yield figure("batches, the last acknowledged", _rate(_batches, count), "/s", anchor=anchor)
    if importlib.util.find_spec("pyroute2") is None:
        yield figure("pyroute2, neighbours: it is not installed", None, "/s")
        return
    with site() as here:
        make_vxlan(here)
        yield figure(
            "pyroute2, neighbours",
            namespaces.inside(here.namespace, lambda: _pyroute2(count)),
            "/s",
            anchor=anchor,
        )


def _rate(way: Way, leases: int) -> float:
    """Messages a second, in a fresh namespace."""
    with site() as here:
        make_vxlan(here)
        return asyncio.run(_time(way, here, leases))


async def _time(way: Way, here: Site, leases: int) -> float:
    requests = namespaces.inside(here.namespace, Netlink)
    devices = Devices(requests)
    await devices.refresh()
    messages = _messages(leases, devices.index(_DEVICE) or 0)
    started = time.perf_counter()
    await way(requests, messages)
    took_s = time.perf_counter() - started
    requests.close()
    return len(messages) / took_s


async def _batches(requests: Netlink, messages: Sequence[bytes]) -> None:
    for refused in (await requests.batch(messages)).values():
        raise LabError(f"send messages: the kernel refused one: {refused.detail or refused.errno}")


async def _acknowledged(requests: Netlink, messages: Sequence[bytes]) -> None:
    await _batches(requests, [_asking(one) for one in messages])


async def _one_by_one(requests: Netlink, messages: Sequence[bytes]) -> None:
    for one in messages:
        await _batches(requests, [one])


def _asking(message: bytes) -> bytes:
    (flags,) = struct.unpack_from("=H", message, _FLAGS_OFFSET)
    return (
        message[:_FLAGS_OFFSET] + struct.pack("=H", flags | netlink.NLM_F_ACK) + message[_FLAGS_OFFSET + 2 :]
    )


def _messages(leases: int, index: int) -> Sequence[bytes]:
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
    found: list[list[bytes]] = [[], [], [], []]
    for number in range(leases):
        leg = lease(number).ipv4
        assert leg is not None
        assert leg.public is not None
        mac, vtep = vtep_mac(leg), leg.subnet.address
        route = Route(leg.subnet, _DEVICE, vtep, onlink=True)
        nexthop = _FIRST_NEXTHOP + number
        kind = netlink.RTM_NEWNEIGH
        found[0].append(neighbours.encode_neighbour(kind, flags, index, Neighbour(_DEVICE, vtep, mac)))
        found[1].append(neighbours.encode_fdb(kind, flags, index, FdbEntry(_DEVICE, mac, leg.public)))
        found[2].append(nexthops.encode_nexthop(flags, nexthop, index, route))
        found[3].append(routes.encode_route_to_nexthop(flags, nexthop, route))
    return [one for kind_of in found for one in kind_of]


def _pyroute2(leases: int) -> float:
    """Messages a second, one call each: neighbours only, which cost the kernel least."""
    module: Any = importlib.import_module("pyroute2")
    with module.IPRoute() as requests:
        (index,) = requests.link_lookup(ifname=_DEVICE)
        legs = [leg for number in range(leases) for leg in lease(number).legs]
        started = time.perf_counter()
        for leg in legs:
            requests.neigh(
                "replace",
                dst=format_address(leg.subnet.address),
                lladdr=format_mac(vtep_mac(leg)),
                ifindex=index,
                state=0x80,
            )
        return leases / (time.perf_counter() - started)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--leases", type=int, default=5_000, help="how many, four messages each [5000]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
