# SPDX-License-Identifier: Apache-2.0
"""Nexthop objects: a gateway and a device, by a number that routes can point at.

Linux has them from 5.3 on (commit ab84be7e54fc, "net: Initial nexthop code"); whether the running kernel does
is found out by asking for them. Their numbers are one space for the whole network namespace.

::

    struct nhmsg { u8 family, scope, protocol, resvd; u32 flags; };
"""

import errno as errnos
import struct
from collections.abc import Iterable

import msgspec

from loden.address import Family
from loden.errors import KernelError
from loden.tables import netlink
from loden.tables.entries import Route
from loden.tables.netlink import Message, Netlink, attribute_u32, number_in, parse_attributes

RTNH_F_ONLINK = 4

#: The first number we take. Routing daemons count from one, so a high start keeps clear of them, and a number
#: that is taken all the same is passed over.
FIRST = 0x4C00_0000

_NHA_ID, _NHA_OIF, _NHA_GATEWAY = 1, 5, 6
_NHMSG = struct.Struct("=BBBBI")

# Header, nhmsg, NHA_ID, NHA_OIF, NHA_GATEWAY.
_LAYOUT = {
    Family.IPV4: struct.Struct("=IHHII BBBBI HHI HHI HH4s"),
    Family.IPV6: struct.Struct("=IHHII BBBBI HHI HHI HH16s"),
}


class Nexthop(msgspec.Struct, frozen=True, gc=False):
    """A nexthop object of ours, as the kernel has it."""

    index: int
    via: bytes | None
    onlink: bool


class Nexthops:
    """The nexthop objects with our protocol number, and which numbers are free.

    Args:
        requests: the socket.
        are_known: None finds out; False says that this kernel has none.
    """

    def __init__(self, requests: Netlink, *, are_known: bool | None = None) -> None:
        self._requests = requests
        self._are_known = are_known
        self._listed: dict[int, Nexthop] = {}
        self._spare: list[int] = []  # ours, and no route points at them
        self._taken: set[int] = set()  # others', from the first on
        self._next = FIRST

    @property
    def are_known(self) -> bool:
        """Whether the kernel has nexthop objects, as far as a listing has told."""
        return bool(self._are_known)

    async def find_out(self) -> None:
        """Find out whether the kernel has them, where no listing has told yet."""
        if self._are_known is None:
            await self.read()

    async def read(self) -> None:
        """List them all; :meth:`get` knows them until :meth:`keep`."""
        if self._are_known is False:
            return
        try:
            datagrams = await self._requests.dump(netlink.RTM_GETNEXTHOP, _NHMSG.pack(0, 0, 0, 0, 0))
        except KernelError as error:
            if error.errno not in (errnos.EOPNOTSUPP, errnos.EINVAL):
                raise
            self._are_known = False
            return
        self._are_known = True
        self._listed, self._taken = {}, set()
        for datagram in datagrams:
            for one in netlink.parse_messages(datagram):
                number, nexthop = parse_nexthop(one)
                if nexthop is not None:
                    self._listed[number] = nexthop
                elif number >= FIRST:
                    self._taken.add(number)
        self._next = max((FIRST, *(number + 1 for number in self._listed)))

    def get(self, number: int) -> Nexthop | None:
        """A nexthop of ours, while a listing is at hand."""
        return self._listed.get(number)

    def keep(self, used: Iterable[int]) -> None:
        """Say which of those listed are in use. The others are spare; the listing itself is let go."""
        self._spare = list(self._listed.keys() - set(used))
        self._listed = {}

    def take(self) -> tuple[int, int]:
        """A number for a route's nexthop, and the flags to put it there with."""
        if self._spare:
            return self._spare.pop(), netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
        while self._next in self._taken:
            self._next += 1
        self._next += 1
        return self._next - 1, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL

    def give_back(self, number: int) -> None:
        """A number of ours that no route uses any more."""
        self._spare.append(number)

    def avoid(self, number: int) -> None:
        """A number that turned out to be another's."""
        self._taken.add(number)

    async def delete_spare(self) -> None:
        """Remove those that no route uses: a nexthop takes the routes that point at it along."""
        spare, self._spare = self._spare, []
        await self._requests.batch(
            netlink.message(
                netlink.RTM_DELNEXTHOP, 0, _NHMSG.pack(0, 0, 0, 0, 0) + attribute_u32(_NHA_ID, number)
            )
            for number in spare
        )


def encode_nexthop(flags: int, number: int, index: int, entry: Route) -> bytes:
    """``ip nexthop add|replace id NUMBER via VIA dev INDEX [onlink] protocol 76`` as a message."""
    assert entry.via is not None
    family = entry.dst.family
    layout = _LAYOUT[family]
    return layout.pack(
        layout.size, netlink.RTM_NEWNEXTHOP, flags | netlink.NLM_F_REQUEST, 0, 0,
        family, 0, netlink.PROTOCOL, 0, RTNH_F_ONLINK if entry.onlink else 0,
        8, _NHA_ID, number,
        8, _NHA_OIF, index,
        4 + family.size, _NHA_GATEWAY, entry.via,
    )  # fmt: skip


def parse_nexthop(found: Message) -> tuple[int, Nexthop | None]:
    """A nexthop's number, and what it is where it is ours."""
    _family, _scope, protocol, _reserved, flags = _NHMSG.unpack_from(found.buffer, found.start)
    attributes = parse_attributes(found.buffer, found.start + 8, found.end)
    number = number_in(attributes, _NHA_ID)
    if protocol != netlink.PROTOCOL:
        return number, None
    index = number_in(attributes, _NHA_OIF)
    return number, Nexthop(index, attributes.get(_NHA_GATEWAY), bool(flags & RTNH_F_ONLINK))
