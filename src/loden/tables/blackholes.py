# SPDX-License-Identifier: Apache-2.0
"""Blackhole routes of the main table, marked with our protocol number.

flannel gives them the metric of all others. The kernel then appends the route to the containers' own bridge
behind the blackhole, which wins, or refuses the blackhole where the bridge was first. Ours has a very weak
metric instead (the one in the kernel's documentation of VRF), so that it takes what nobody else does.

::

    struct rtmsg { u8 family, dst_len, src_len, tos, table, protocol, scope, type; u32 flags; };
"""

import errno as errnos
import struct
import sys
from collections.abc import Hashable, Mapping, Sequence

from loden.address import Family, Prefix
from loden.tables import netlink
from loden.tables.base import Failures
from loden.tables.entries import Blackhole
from loden.tables.netlink import Message, Netlink, attribute, attribute_u32, parse_attributes

METRIC = 4278198272

_RTMSG = struct.Struct("=BBBBBBBBI")
_RTA_DST, _RTA_PRIORITY, _RTA_TABLE = 1, 6, 15
_RT_TABLE_MAIN, _RTN_BLACKHOLE = 254, 6


class BlackholeTable:
    """Blackhole routes of the main table with our protocol number and metric.

    Args:
        requests: the socket.
    """

    entry_type = Blackhole

    def __init__(self, requests: Netlink) -> None:
        self._requests = requests

    async def read(self, wanted: Mapping[Hashable, Blackhole]) -> dict[Hashable, Blackhole]:
        found: dict[Hashable, Blackhole] = {}
        for family in Family:
            body = _RTMSG.pack(family, 0, 0, 0, _RT_TABLE_MAIN, netlink.PROTOCOL, 0, _RTN_BLACKHOLE, 0)
            for datagram in await self._requests.dump(netlink.RTM_GETROUTE, body):
                for message in netlink.parse_messages(datagram):
                    entry = _parse(message)
                    if entry is not None:
                        found[entry.dst] = wanted.get(entry.dst, entry)
        return found

    async def put(self, entries: Sequence[Blackhole]) -> Failures:
        flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
        return await self._send(netlink.RTM_NEWROUTE, flags, entries, done=errnos.EEXIST)

    async def drop(self, entries: Sequence[Blackhole]) -> Failures:
        return await self._send(netlink.RTM_DELROUTE, 0, entries, done=errnos.ESRCH)

    def heard(self, message: Message, wanted: Mapping[Hashable, Blackhole]) -> Hashable | None:
        if message.kind != netlink.RTM_DELROUTE:
            return None
        entry = _parse(message)
        return entry.dst if entry is not None and entry.dst in wanted else None

    async def _send(self, kind: int, flags: int, entries: Sequence[Blackhole], *, done: int) -> Failures:
        refused = await self._requests.batch(
            [netlink.message(kind, flags, _body(entry)) for entry in entries]
        )
        operation = "add" if kind == netlink.RTM_NEWROUTE else "delete"
        return {
            entries[place].dst: refusal.error(operation, entries[place])
            for place, refusal in refused.items()
            if refusal.errno != done
        }


def _body(entry: Blackhole) -> bytes:
    header = _RTMSG.pack(
        entry.dst.family, entry.dst.length, 0, 0, _RT_TABLE_MAIN, netlink.PROTOCOL, 0, _RTN_BLACKHOLE, 0
    )
    return header + attribute(_RTA_DST, entry.dst.address) + attribute_u32(_RTA_PRIORITY, METRIC)


def _parse(message: Message) -> Blackhole | None:
    """A route, where it is one of ours."""
    family, length, _src, tos, table, by, _scope, kind, _flags = _RTMSG.unpack_from(
        message.buffer, message.start
    )
    if (tos, by, kind) != (0, netlink.PROTOCOL, _RTN_BLACKHOLE):
        return None
    attributes = parse_attributes(message.buffer, message.start + _RTMSG.size, message.end)
    numbers = [int.from_bytes(attributes.get(key, b""), sys.byteorder) for key in (_RTA_TABLE, _RTA_PRIORITY)]
    if (numbers[0] or table, numbers[1]) != (_RT_TABLE_MAIN, METRIC):
        return None
    return Blackhole(Prefix(attributes.get(_RTA_DST, bytes(Family(family).size)), length))
