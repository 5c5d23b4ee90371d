# SPDX-License-Identifier: Apache-2.0
"""Permanent neighbours and VXLAN forwarding entries: the two kinds of ``RTM_NEWNEIGH``.

::

    struct ndmsg { __u8 family; __u8 pad1; __u16 pad2; __s32 ifindex; __u16 state; __u8 flags; __u8 type; };

Everything permanent on a device of ours is ours: forwarding entries carry no mark of their owner, so the
device is the mark. Neighbours carry our protocol number besides (``NDA_PROTOCOL``, from Linux 5.0 on).
"""

import errno as errnos
import struct
from collections.abc import Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from loden.address import Family
from loden.errors import errno_of
from loden.tables import netlink
from loden.tables.base import Failures
from loden.tables.devices import Devices
from loden.tables.entries import FdbEntry, Neighbour
from loden.tables.netlink import Message, Netlink, attribute_u32, parse_attributes

_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX, _NDA_PROTOCOL = 1, 2, 8, 12
_NUD_PERMANENT, _NUD_NOARP = 0x80, 0x40
_NTF_SELF = 0x02
_RTN_UNICAST = 1

_NDMSG = struct.Struct("=BxxxiHBB")

# Header and ndmsg, then NDA_DST, NDA_LLADDR and, for neighbours, NDA_PROTOCOL, each padded to 4 bytes.
_NEIGHBOUR = {
    Family.IPV4: struct.Struct("=IHHII BxxxiHBB HH4s HH6sxx HHBxxx"),
    Family.IPV6: struct.Struct("=IHHII BxxxiHBB HH16s HH6sxx HHBxxx"),
}
_FDB = {
    Family.IPV4: struct.Struct("=IHHII BxxxiHBB HH4s HH6sxx"),
    Family.IPV6: struct.Struct("=IHHII BxxxiHBB HH16s HH6sxx"),
}

E = TypeVar("E", Neighbour, FdbEntry)


def encode_neighbour(kind: int, flags: int, index: int, entry: Neighbour) -> bytes:
    """``ip neigh replace ADDRESS lladdr MAC nud permanent dev DEVICE`` as a message."""
    family = Family.of(entry.address)
    layout = _NEIGHBOUR[family]
    return layout.pack(
        layout.size, kind, flags | netlink.NLM_F_REQUEST, 0, 0,
        family, index, _NUD_PERMANENT, 0, _RTN_UNICAST,
        4 + family.size, _NDA_DST, entry.address,
        10, _NDA_LLADDR, entry.mac,
        5, _NDA_PROTOCOL, netlink.PROTOCOL,
    )  # fmt: skip


def encode_fdb(kind: int, flags: int, index: int, entry: FdbEntry) -> bytes:
    """``bridge fdb replace MAC dst REMOTE self permanent dev DEVICE`` as a message."""
    family = Family.of(entry.remote)
    layout = _FDB[family]
    return layout.pack(
        layout.size, kind, flags | netlink.NLM_F_REQUEST, 0, 0,
        netlink.AF_BRIDGE, index, _NUD_PERMANENT | _NUD_NOARP, _NTF_SELF, 0,
        4 + family.size, _NDA_DST, entry.remote,
        10, _NDA_LLADDR, entry.mac,
    )  # fmt: skip


class _NeighTable(Generic[E]):
    """What the two tables share: only the message and its reading differ."""

    entry_type: type[E]
    _families: tuple[int, ...]

    def __init__(self, requests: Netlink, devices: Devices) -> None:
        self._requests = requests
        self._devices = devices

    def _encode(self, kind: int, flags: int, index: int, entry: E) -> bytes:
        raise NotImplementedError

    def heard(self, message: Message, wanted: Mapping[Hashable, E]) -> Hashable | None:
        if message.kind not in (netlink.RTM_NEWNEIGH, netlink.RTM_DELNEIGH):
            return None
        parsed = self._parse(message)
        want = None if parsed is None else wanted.get(parsed[0].slot)
        if want is None:
            return None
        return None if message.kind == netlink.RTM_NEWNEIGH and parsed == (want, True) else want.slot

    def _parse(self, found: Message) -> tuple[E, bool] | None:
        """The entry that a message is about, and whether it is permanent; None where it is not ours."""
        family, index, state, _flags, _type = _NDMSG.unpack_from(found.buffer, found.start)
        name = self._devices.name(index) if self._devices.is_ours(index) else None
        if family not in self._families or name is None:
            return None
        attributes = parse_attributes(found.buffer, found.start + 12, found.end)
        entry = self._entry(name, attributes.get(_NDA_DST, b""), attributes.get(_NDA_LLADDR, b""))
        return None if entry is None else (entry, bool(state & _NUD_PERMANENT))

    def _entry(self, name: str, dst: bytes, mac: bytes) -> E | None:
        raise NotImplementedError

    async def read(self, wanted: Mapping[Hashable, E]) -> dict[Hashable, E]:
        """The permanent entries on devices that carry our alias."""
        found: dict[Hashable, E] = {}
        for link in self._devices.ours:
            for family in self._families:
                # Strict checking wants the device as an attribute and not in the header.
                body = _NDMSG.pack(family, 0, 0, 0, 0) + attribute_u32(_NDA_IFINDEX, link.index)
                for datagram in await self._requests.dump(netlink.RTM_GETNEIGH, body):
                    for one in netlink.parse_messages(datagram):
                        entry, is_permanent = self._parse(one) or (None, False)
                        if entry is not None and is_permanent:
                            slot = entry.slot
                            want = wanted.get(slot)
                            found[slot] = want if want is not None and want == entry else entry
        return found

    async def put(self, entries: Sequence[E]) -> Failures:
        flags = netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
        return await self._each(netlink.RTM_NEWNEIGH, flags, "add", entries)

    async def drop(self, entries: Sequence[E]) -> Failures:
        failures = await self._each(netlink.RTM_DELNEIGH, 0, "delete", entries)
        gone = (errnos.ENOENT, errnos.ENODEV)
        return {slot: error for slot, error in failures.items() if errno_of(error) not in gone}

    async def _each(self, kind: int, flags: int, verb: str, entries: Sequence[E]) -> Failures:
        sent, failures = self._devices.sort_out(entries)
        messages = (self._encode(kind, flags, index, entry) for index, entry in sent)
        for place, refused in (await self._requests.batch(messages)).items():
            _index, entry = sent[place]
            failures[entry.slot] = refused.error(verb, entry)
        return failures


class NeighbourTable(_NeighTable[Neighbour]):
    """Permanent neighbours on our devices."""

    entry_type = Neighbour
    _families = (Family.IPV4, Family.IPV6)

    def _encode(self, kind: int, flags: int, index: int, entry: Neighbour) -> bytes:
        return encode_neighbour(kind, flags, index, entry)

    def _entry(self, name: str, dst: bytes, mac: bytes) -> Neighbour | None:
        return Neighbour(name, dst, mac) if dst else None


class FdbTable(_NeighTable[FdbEntry]):
    """Permanent forwarding entries of our VXLAN devices; the all-zero address, which floods, is let alone."""

    entry_type = FdbEntry
    _families = (netlink.AF_BRIDGE,)

    def _encode(self, kind: int, flags: int, index: int, entry: FdbEntry) -> bytes:
        return encode_fdb(kind, flags, index, entry)

    def _entry(self, name: str, dst: bytes, mac: bytes) -> FdbEntry | None:
        return FdbEntry(name, mac, dst) if dst and any(mac) else None
