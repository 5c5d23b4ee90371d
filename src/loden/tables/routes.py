# SPDX-License-Identifier: Apache-2.0
"""Routes of the main table, marked with our protocol number.

Where the kernel has nexthop objects each route points at one of its own (:mod:`loden.tables.nexthops`).
Routes that carry their gateways themselves all hash into one bucket of the kernel's nexthop table when the
device is the same, so that adding N of them costs N squared; PERFORMANCE has figures.

::

    struct rtmsg { u8 family, dst_len, src_len, tos, table, protocol, scope, type; u32 flags; };
"""

import errno as errnos
import struct
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence

import msgspec

from loden.address import Family, Prefix
from loden.errors import KernelError, errno_of
from loden.tables import netlink
from loden.tables.base import LOOK, Failures
from loden.tables.devices import Devices
from loden.tables.entries import Route
from loden.tables.netlink import (
    Message,
    Netlink,
    Refusal,
    attribute,
    attribute_u32,
    nested,
    number_in,
    parse_attributes,
)
from loden.tables.nexthops import FIRST, RTNH_F_ONLINK, Nexthops, encode_nexthop, parse_nexthop

_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_METRICS = 1, 4, 5, 6, 8
_RTA_TABLE, _RTA_NH_ID = 15, 30
_RTAX_MTU = 2
_RT_TABLE_MAIN, _RTN_UNICAST = 254, 1
_RT_SCOPE_UNIVERSE, _RT_SCOPE_LINK, _RT_SCOPE_NOWHERE = 0, 253, 255
_RTM_F_CLONED, _RTM_F_FIB_MATCH = 0x200, 0x2000
_RTPROT_BOOT = 3

_RTMSG = struct.Struct("=BBBBBBBBI")

# Header, rtmsg, RTA_DST, RTA_NH_ID: a route that points at a nexthop object.
_ROUTE_TO_NEXTHOP = {
    Family.IPV4: struct.Struct("=IHHII BBBBBBBBI HH4s HHI"),
    Family.IPV6: struct.Struct("=IHHII BBBBBBBBI HH16s HHI"),
}

#: The metric the kernel gives a route that names none, by family.
_METRIC: dict[int, int] = {Family.IPV4: 0, Family.IPV6: 1024}


class Standing(msgspec.Struct, frozen=True, gc=False):
    """A route as the kernel has it.

    Args:
        route: the entry that it amounts to.
        protocol: who made it.
        nexthop: the number of its nexthop object; 0 where it carries its gateway itself.
    """

    route: Route
    protocol: int
    nexthop: int


class RouteTable:
    """Routes of the main table with our protocol number, and the nexthop objects behind them.

    A route that an agent of flannel left on a device of ours counts as ours: it is marked, or removed.

    Args:
        requests: the socket.
        devices: which devices there are.
        nexthop_objects: None finds out; False forces the plain form, as on kernels before 5.3.
    """

    entry_type = Route

    def __init__(self, requests: Netlink, devices: Devices, *, nexthop_objects: bool | None = None) -> None:
        self._requests = requests
        self._devices = devices
        self._nexthops = Nexthops(requests, are_known=nexthop_objects)
        self._numbers: dict[Prefix, int] = {}  # of the nexthops of the destinations that are ours; 0: none
        self._unmarked: set[Prefix] = set()  # destinations that an agent of flannel left

    @property
    def uses_nexthop_objects(self) -> bool:
        """Whether routes point at nexthop objects; known after the first reading."""
        return self._nexthops.are_known

    async def read(self, wanted: Mapping[Hashable, Route]) -> dict[Hashable, Route]:
        """The routes that are ours, of both families; of flannel's those that nobody wants."""
        await self._nexthops.read()
        found: dict[Hashable, Route] = {}
        # A destination that was ours stays ours: what somebody put there in the meantime is drift.
        numbers = {dst: 0 for dst in self._numbers if dst in wanted}
        for standing in self._parsed(await self._dump(netlink.PROTOCOL)):
            entry = standing.route
            want = wanted.get(entry.dst)
            kept = want if want is not None and want == entry else entry
            found[kept.dst] = kept
            numbers[kept.dst] = standing.nexthop
        self._nexthops.keep(numbers.values())
        self._numbers = numbers
        left = await self._left_by_flannel() if self._devices.ours else []
        self._unmarked = {entry.dst for entry in left if entry.dst not in found}
        numbers.update(dict.fromkeys(self._unmarked, 0))
        found.update((entry.dst, entry) for entry in left if entry.dst not in wanted)
        return found

    async def put(self, entries: Sequence[Route]) -> Failures:
        """Put the nexthops first and then the routes that point at them; a route that stands is replaced.

        Replacing either is one step in the kernel: there is no moment without a route.
        """
        sound, failures = self._devices.sort_out(entries)
        await self._nexthops.find_out()
        failures |= await self._put(sound)
        stuck = [one for one in sound if one[1].dst in failures]
        freed = [one for one in stuck if await self._clear_way(one[1], failures)]
        failures |= await self._put(freed)
        return failures

    async def drop(self, entries: Sequence[Route]) -> Failures:
        messages = [self._encode_drop(entry) for entry in entries]
        for entry in entries:
            self._forget(entry.dst)
        failures: Failures = {}
        for place, refused in (await self._requests.batch(messages)).items():
            if refused.errno != errnos.ESRCH:
                failures[entries[place].dst] = refused.error("delete", entries[place])
        await self._nexthops.delete_spare()
        return failures

    def heard(self, message: Message, wanted: Mapping[Hashable, Route]) -> Hashable | None:
        """Routes of every protocol are heard: somebody may have replaced ours."""
        if message.kind in (netlink.RTM_NEWNEXTHOP, netlink.RTM_DELNEXTHOP):
            number, nexthop = parse_nexthop(message)
            return LOOK if nexthop is not None or number >= FIRST else None
        if message.kind not in (netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE):
            return None
        standing = self._parse(message)
        want = None if standing is None else wanted.get(standing.route.dst)
        if standing is None or want is None:
            return None
        # The message does not say what a nexthop is; those that change are heard of by themselves.
        is_ours = standing.nexthop != 0 and standing.nexthop == self._numbers.get(want.dst)
        is_well = message.kind == netlink.RTM_NEWROUTE and (is_ours or standing.route == want)
        return None if is_well else want.dst

    async def _dump(self, protocol: int) -> list[bytes]:
        # With NETLINK_GET_STRICT_CHK the kernel leaves out what has another protocol or table.
        datagrams: list[bytes] = []
        for family in Family:
            body = _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_MAIN, protocol, 0, 0, 0)
            datagrams += await self._requests.dump(netlink.RTM_GETROUTE, body)
        return datagrams

    async def _left_by_flannel(self) -> list[Route]:
        """What agents of flannel wrote for peers, on devices that are ours now: their mark is the shape."""
        return [
            standing.route
            for standing in self._parsed(await self._dump(_RTPROT_BOOT))
            if standing.protocol == _RTPROT_BOOT
            and standing.route.onlink
            and standing.route.via == standing.route.dst.address
            and self._is_on_ours(standing.route)
        ]

    def _is_on_ours(self, entry: Route) -> bool:
        return self._devices.is_ours(self._devices.index(entry.device) or 0)

    def _parsed(self, datagrams: Sequence[bytes]) -> Iterator[Standing]:
        for datagram in datagrams:
            for one in netlink.parse_messages(datagram):
                standing = self._parse(one)
                if standing is not None:
                    yield standing

    def _parse(self, found: Message) -> Standing | None:
        """A route that an entry could stand for: unicast, in the main table, with the default metric."""
        family, length, _src, tos, table, by, _scope, kind, flags = _RTMSG.unpack_from(
            found.buffer, found.start
        )
        if kind != _RTN_UNICAST or tos or flags & _RTM_F_CLONED or family not in _METRIC:
            return None
        attributes = parse_attributes(found.buffer, found.start + 12, found.end)
        if number_in(attributes, _RTA_TABLE, table) != _RT_TABLE_MAIN:
            return None
        if number_in(attributes, _RTA_PRIORITY) != _METRIC[family]:
            return None
        base = attributes.get(_RTA_DST, bytes(Family(family).size))
        number = number_in(attributes, _RTA_NH_ID)
        nexthop = self._nexthops.get(number)
        if nexthop is not None:
            index, via, onlink = nexthop.index, nexthop.via, nexthop.onlink
        else:
            index, via = number_in(attributes, _RTA_OIF), attributes.get(_RTA_GATEWAY)
            onlink = bool(flags & RTNH_F_ONLINK)
        entry = Route(Prefix(base, length), self._devices.name(index) or "", via, onlink, mtu_in(attributes))
        return Standing(entry, by, number)

    async def _put(self, sound: Sequence[tuple[int, Route]]) -> Failures:
        new = {entry.dst for _index, entry in sound if entry.dst not in self._numbers}
        failures = await self._put_nexthops(sound)
        failures |= await self._put_routes([one for one in sound if one[1].dst not in failures], new)
        self._unmarked.difference_update(entry.dst for _index, entry in sound)
        for dst in new & failures.keys():
            self._forget(dst)
        return failures

    async def _put_nexthops(self, sound: Sequence[tuple[int, Route]]) -> Failures:
        """Give each destination its nexthop; those that carry their gateways themselves have the number 0."""
        failures: Failures = {}
        waiting: list[tuple[int, Route]] = []
        for index, entry in sound:
            if self._nexthops.are_known and entry.via is not None:
                waiting.append((index, entry))
            else:
                self._forget(entry.dst)
                self._numbers[entry.dst] = 0
        while waiting:
            taken: list[tuple[int, Route]] = []
            for place, refused in (await self._requests.batch(map(self._encode_nexthop, waiting))).items():
                entry = waiting[place][1]
                if refused.errno == errnos.EEXIST:  # somebody took the number since the listing
                    self._nexthops.avoid(self._numbers.pop(entry.dst))
                    taken.append(waiting[place])
                else:
                    failures[entry.dst] = refused.error("add", entry, hint=_hint(entry, refused))
            waiting = taken
        return failures

    def _encode_nexthop(self, one: tuple[int, Route]) -> bytes:
        index, entry = one
        number, flags = self._numbers.get(entry.dst), netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
        if not number:
            number, flags = self._nexthops.take()
            self._numbers[entry.dst] = number
        return encode_nexthop(flags, number, index, entry)

    async def _put_routes(self, sound: Sequence[tuple[int, Route]], new: Container[Prefix]) -> Failures:
        """Put routes; where a destination is new to us, nothing that stands there is replaced."""
        messages = (
            self._encode_route(
                netlink.NLM_F_CREATE | (netlink.NLM_F_EXCL if entry.dst in new else netlink.NLM_F_REPLACE),
                index,
                entry,
            )
            for index, entry in sound
        )
        failures: Failures = {}
        for place, refused in (await self._requests.batch(messages)).items():
            entry = sound[place][1]
            failures[entry.dst] = refused.error("add", entry, hint=_hint(entry, refused))
        self._unmarked.difference_update(entry.dst for _, entry in sound if entry.dst not in failures)
        return failures

    def _encode_route(self, flags: int, index: int, entry: Route) -> bytes:
        number = self._numbers[entry.dst]
        if number:
            return encode_route_to_nexthop(flags, number, entry)
        return encode_plain_route(flags, index, entry)

    def _encode_drop(self, entry: Route) -> bytes:
        protocol = _RTPROT_BOOT if entry.dst in self._unmarked else netlink.PROTOCOL
        body = _RTMSG.pack(
            entry.dst.family, entry.dst.length, 0, 0, _RT_TABLE_MAIN, protocol,
            _RT_SCOPE_NOWHERE, _RTN_UNICAST, 0,
        )  # fmt: skip
        return netlink.message(netlink.RTM_DELROUTE, 0, body + attribute(_RTA_DST, entry.dst.address))

    def _forget(self, dst: Prefix) -> None:
        """Let go of a destination; its nexthop waits to be used again or deleted."""
        number = self._numbers.pop(dst, 0)
        if number:
            self._nexthops.give_back(number)

    async def _clear_way(self, entry: Route, failures: Failures) -> bool:
        """Whether what kept a route away is ours and out of the way now; if it is another's, name it."""
        errno = errno_of(failures[entry.dst])
        if errno not in (errnos.EEXIST, errnos.EINVAL):
            return False
        if entry.dst in self._numbers:
            if entry.dst.family is Family.IPV4 or not entry.onlink:
                return False
            # An IPv6 router may not be reached over another device already, and be it by the very route that
            # is to be replaced (ip6_route_check_nh_onlink): that one has to go first.
            del failures[entry.dst]
            failures |= await self.drop([entry])
            return entry.dst not in failures
        rival = self._find(entry.dst)
        if rival is None:
            return False
        if self._may_take_over(entry, rival):
            self._numbers[entry.dst] = 0
            del failures[entry.dst]
            return True
        failures[entry.dst] = KernelError(
            "add",
            str(entry),
            errnos.EEXIST,
            detail=f"{rival.route} of protocol {rival.protocol} is in the way",
            hint=f"it is not ours to change: ip route delete {entry.dst}, or move the network",
        )
        return False

    def _may_take_over(self, entry: Route, rival: Standing) -> bool:
        """What stands on our own device, or is a flannel agent's route to the same place (COMPAT §13.13)."""
        if self._is_on_ours(rival.route) or rival.protocol == netlink.PROTOCOL:
            return True
        is_same = (rival.route.device, rival.route.via) == (entry.device, entry.via)
        return is_same and rival.protocol == _RTPROT_BOOT

    def _find(self, dst: Prefix) -> Standing | None:
        """The route of whatever owner that holds a destination."""
        body = _RTMSG.pack(dst.family, dst.family.bits, 0, 0, 0, 0, 0, 0, _RTM_F_FIB_MATCH)
        body += attribute(_RTA_DST, dst.address)
        (answer,) = self._requests.ask([netlink.message(netlink.RTM_GETROUTE, 0, body)])
        standing = None if isinstance(answer, Refusal) else self._parse(answer)
        return standing if standing is not None and standing.route.dst == dst else None


def encode_route_to_nexthop(flags: int, number: int, entry: Route) -> bytes:
    """``ip route add|replace DST nhid NUMBER [mtu MTU] protocol 76`` as a message."""
    family = entry.dst.family
    layout, metrics = _ROUTE_TO_NEXTHOP[family], _metrics(entry)
    return layout.pack(
        layout.size + len(metrics), netlink.RTM_NEWROUTE, flags | netlink.NLM_F_REQUEST, 0, 0,
        family, entry.dst.length, 0, 0, _RT_TABLE_MAIN, netlink.PROTOCOL, _RT_SCOPE_UNIVERSE, _RTN_UNICAST, 0,
        4 + family.size, _RTA_DST, entry.dst.address,
        8, _RTA_NH_ID, number,
    ) + metrics  # fmt: skip


def encode_plain_route(flags: int, index: int, entry: Route) -> bytes:
    """``ip route add|replace DST [via VIA] dev INDEX [onlink] [mtu MTU] protocol 76`` as a message."""
    family = entry.dst.family
    is_link = entry.via is None and family is Family.IPV4  # IPv6 knows no scopes of routes
    body = _RTMSG.pack(
        family, entry.dst.length, 0, 0, _RT_TABLE_MAIN, netlink.PROTOCOL,
        _RT_SCOPE_LINK if is_link else _RT_SCOPE_UNIVERSE, _RTN_UNICAST, RTNH_F_ONLINK if entry.onlink else 0,
    )  # fmt: skip
    body += attribute(_RTA_DST, entry.dst.address) + attribute_u32(_RTA_OIF, index)
    if entry.via is not None:
        body += attribute(_RTA_GATEWAY, entry.via)
    return netlink.message(netlink.RTM_NEWROUTE, flags, body + _metrics(entry))


def _metrics(entry: Route) -> bytes:
    return nested(_RTA_METRICS, attribute_u32(_RTAX_MTU, entry.mtu)) if entry.mtu else b""


def mtu_in(attributes: Mapping[int, bytes]) -> int:
    """The MTU among a route's metrics (``RTA_METRICS``), bytes; 0 where it has none of its own."""
    metrics = attributes.get(_RTA_METRICS, b"")
    return number_in(parse_attributes(metrics, 0, len(metrics)), _RTAX_MTU)


def _hint(entry: Route, refused: Refusal) -> str:
    if refused.errno in (errnos.ENETUNREACH, errnos.EHOSTUNREACH) or "gateway" in refused.detail:
        return f"the next hop is not on the network of {entry.device}"
    return ""
