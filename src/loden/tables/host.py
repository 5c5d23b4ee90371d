# SPDX-License-Identifier: Apache-2.0
"""What the host has and where it would send packets: reading only."""

import struct
from collections.abc import Iterable

from loden.address import Family
from loden.interface import DefaultRoute, Hop, HostFacts
from loden.tables import netlink
from loden.tables.addresses import read_addresses
from loden.tables.devices import parse_link
from loden.tables.netlink import Message, Netlink, attribute, number_in, parse_attributes
from loden.tables.routes import mtu_in

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_MULTIPATH = 1, 4, 5, 6, 7, 9
_RTA_TABLE, _RTA_VIA = 15, 18
_RT_TABLE_MAIN, _RTN_UNICAST = 254, 1
_RTMSG = struct.Struct("=BBBBBBBBI")
# struct rtnexthop { u16 len; u8 flags; u8 hops; s32 ifindex; }, attributes behind it
_RTNEXTHOP = struct.Struct("=HBBi")


async def read_host(requests: Netlink) -> HostFacts:
    """The host's links, addresses and default routes, as they are now.

    Raises:
        KernelError: the kernel refused to list them.
    """
    links = [
        parse_link(found)[0]
        for datagram in await requests.dump(netlink.RTM_GETLINK, bytes(16))
        for found in netlink.parse_messages(datagram)
    ]
    return HostFacts(
        links=tuple(links),
        addresses=tuple(await read_addresses(requests)),
        default_routes=tuple(await _read_default_routes(requests)),
    )


def find_hops(requests: Netlink, destinations: Iterable[bytes]) -> dict[bytes, Hop | None]:
    """Where the kernel would send a packet to each address, policy rules and all.

    Args:
        requests: the socket.
        destinations: packed addresses.

    Returns:
        for each address the hop; None where the kernel has no route, or the address is the host's own.
    """
    names: dict[int, str] = {}
    wanted = list(dict.fromkeys(destinations))
    answers = requests.ask([_lookup(address) for address in wanted])
    found: dict[bytes, Hop | None] = {}
    for address, answer in zip(wanted, answers, strict=True):
        found[address] = _parse_hop(requests, answer, names) if isinstance(answer, Message) else None
    return found


def _lookup(address: bytes) -> bytes:
    family = Family.of(address)
    body = _RTMSG.pack(family, family.bits, 0, 0, 0, 0, 0, 0, 0) + attribute(_RTA_DST, address)
    return netlink.message(netlink.RTM_GETROUTE, 0, body)


def _parse_hop(requests: Netlink, answer: Message, names: dict[int, str]) -> Hop | None:
    if _RTMSG.unpack_from(answer.buffer, answer.start)[7] != _RTN_UNICAST:
        return None
    attributes = parse_attributes(answer.buffer, answer.start + 12, answer.end)
    index = number_in(attributes, _RTA_OIF)
    via = attributes.get(_RTA_GATEWAY)
    if via is None and _RTA_VIA in attributes:  # an IPv4 route over an IPv6 router (RFC 5549)
        via = attributes[_RTA_VIA][2:]
    if index not in names:
        names[index] = _device_name(requests, index)
    return Hop(
        index=index,
        source=attributes.get(_RTA_PREFSRC),
        via=via,
        device=names[index],
        mtu=mtu_in(attributes),
    )


def _device_name(requests: Netlink, index: int) -> str:
    (answer,) = requests.ask(
        [netlink.message(netlink.RTM_GETLINK, 0, struct.pack("=BxHiII", 0, 0, index, 0, 0))]
    )
    return parse_link(answer)[0].name if isinstance(answer, Message) else ""


async def _read_default_routes(requests: Netlink) -> list[DefaultRoute]:
    found: list[DefaultRoute] = []
    for family in Family:
        body = _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_MAIN, 0, 0, 0, 0)
        for datagram in await requests.dump(netlink.RTM_GETROUTE, body):
            for one in netlink.parse_messages(datagram):
                found += _default_routes(family, one)
    return sorted(found, key=lambda route: (route.family, route.metric))


def _default_routes(family: Family, found: Message) -> Iterable[DefaultRoute]:
    _family, length, _src, _tos, _table, _by, _scope, kind, _flags = _RTMSG.unpack_from(
        found.buffer, found.start
    )
    if length != 0 or kind != _RTN_UNICAST:
        return
    attributes = parse_attributes(found.buffer, found.start + 12, found.end)
    if number_in(attributes, _RTA_TABLE) != _RT_TABLE_MAIN:
        return
    metric = number_in(attributes, _RTA_PRIORITY)
    paths = attributes.get(_RTA_MULTIPATH, b"")
    if not paths:
        yield DefaultRoute(family=family, index=number_in(attributes, _RTA_OIF), metric=metric)
    offset = 0
    while offset + _RTNEXTHOP.size <= len(paths):
        length, _nexthop_flags, _hops, index = _RTNEXTHOP.unpack_from(paths, offset)
        yield DefaultRoute(family=family, index=index, metric=metric)
        offset += max((length + 3) & ~3, _RTNEXTHOP.size)
