# SPDX-License-Identifier: Apache-2.0
"""Devices: the link table, and the names by which the other tables know a device.

A VXLAN device is an entry like any other: when it vanishes, that is drift, and what stood on it follows.
Ours carry the alias ``loden`` (``IFLA_IFALIAS``), so that a later start finds those it no longer wants.
"""

import errno as errnos
import struct
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from loden.errors import KernelError
from loden.interface import Link
from loden.tables import netlink
from loden.tables.base import LOOK, Failures
from loden.tables.entries import FdbEntry, LinkAddress, Neighbour, Route, VxlanLink
from loden.tables.netlink import (
    Message,
    Netlink,
    attribute,
    attribute_u32,
    nested,
    number_in,
    parse_attributes,
)

ALIAS = b"loden"

IFF_UP, IFF_LOOPBACK = 0x1, 0x8

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_TXQLEN = 1, 3, 4, 13
_IFLA_LINKINFO, _IFLA_IFALIAS = 18, 20
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_VXLAN_ID, _VXLAN_LINK, _VXLAN_LOCAL, _VXLAN_LEARNING, _VXLAN_PORT = 1, 3, 4, 7, 15
_VXLAN_LOCAL6, _VXLAN_ZERO_CSUM6_RX, _VXLAN_GBP = 17, 20, 23

# struct ifinfomsg { u8 family; u8 pad; u16 type; s32 index; u32 flags; u32 change; }
_IFINFO = struct.Struct("=BxHiII")

_KERNEL_DEFAULT_PORT = 8472


OnDevice = TypeVar("OnDevice", LinkAddress, Neighbour, FdbEntry, Route)


class VxlanState(msgspec.Struct, frozen=True):
    """What the kernel says of a VXLAN device.

    Args:
        link: what every device has.
        vni, port, gbp, learning, zero_checksum: as in :class:`VxlanLink`.
        local: None where unset.
        underlay_index: of the lower device; 0 where unset.
    """

    link: Link
    vni: int
    port: int
    local: bytes | None
    underlay_index: int
    gbp: bool
    learning: bool
    zero_checksum: bool


def encode_link(kind: int, index: int, *, mtu: int = 0, alias: bytes = b"", queue_length: int = 0) -> bytes:
    """``ip link set INDEX up [mtu MTU] [alias ALIAS] [txqueuelen LENGTH]``, or ``delete``, as a message."""
    flags = 0 if kind == netlink.RTM_DELLINK else IFF_UP
    body = _IFINFO.pack(0, 0, index, flags, flags)
    body += attribute_u32(_IFLA_MTU, mtu) if mtu else b""
    body += attribute_u32(_IFLA_TXQLEN, queue_length) if queue_length else b""
    body += attribute(_IFLA_IFALIAS, alias) if alias else b""
    return netlink.message(kind, 0, body)


def parse_link(found: Message) -> tuple[Link, VxlanState | None]:
    """A link message as what every device has, and as a VXLAN device where it is one."""
    _family, _type, index, flags, _change = _IFINFO.unpack_from(found.buffer, found.start)
    attributes = parse_attributes(found.buffer, found.start + 16, found.end)
    info = attributes.get(_IFLA_LINKINFO, b"")
    details = parse_attributes(info, 0, len(info))
    link = Link(
        index=index,
        name=attributes.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="replace"),
        kind=details.get(_IFLA_INFO_KIND, b"").rstrip(b"\0").decode(errors="replace"),
        mtu=number_in(attributes, _IFLA_MTU),
        mac=attributes.get(_IFLA_ADDRESS, b""),
        is_up=bool(flags & IFF_UP),
        is_loopback=bool(flags & IFF_LOOPBACK),
        alias=attributes.get(_IFLA_IFALIAS, b"").rstrip(b"\0"),
    )
    if link.kind != "vxlan":
        return link, None
    raw = details.get(_IFLA_INFO_DATA, b"")
    data = parse_attributes(raw, 0, len(raw))
    return link, VxlanState(
        link=link,
        vni=number_in(data, _VXLAN_ID),
        port=int.from_bytes(data.get(_VXLAN_PORT, b""), "big"),
        local=data.get(_VXLAN_LOCAL) or data.get(_VXLAN_LOCAL6),
        underlay_index=number_in(data, _VXLAN_LINK),
        gbp=_VXLAN_GBP in data,
        learning=any(data.get(_VXLAN_LEARNING, b"")),
        zero_checksum=any(data.get(_VXLAN_ZERO_CSUM6_RX, b"")),
    )


class Devices:
    """The table of VXLAN devices, and the register of every device's name and index.

    The other kernel tables ask it for the index of a name and for which devices are ours.

    Args:
        requests: the socket.
    """

    entry_type = VxlanLink

    def __init__(self, requests: Netlink) -> None:
        self._requests = requests
        self._follow: frozenset[str] = frozenset()
        self._links: dict[str, Link] = {}
        self._names: dict[int, str] = {}
        self._vxlans: dict[str, VxlanState] = {}

    def follow(self, names: Iterable[str]) -> None:
        """Listen for devices of others that our entries use: when one goes down, routes go silently."""
        self._follow = frozenset(names)

    def index(self, name: str) -> int | None:
        """The index of a device, as last seen."""
        link = self._links.get(name)
        return link.index if link else None

    def sort_out(self, entries: Sequence[OnDevice]) -> tuple[list[tuple[int, OnDevice]], Failures]:
        """Entries with their devices' indexes; a failure for each whose device is not there."""
        sound: list[tuple[int, OnDevice]] = []
        failures: Failures = {}
        missing: dict[str, KernelError] = {}  # one for all entries of a device: there may be thousands
        for entry in entries:
            link = self._links.get(entry.device)
            if link is not None:
                sound.append((link.index, entry))
                continue
            if entry.device not in missing:
                missing[entry.device] = KernelError("use", f"device {entry.device}", errnos.ENODEV)
            failures[entry.slot] = missing[entry.device]
        return sound, failures

    def name(self, index: int) -> str | None:
        """The name of a device, as last seen."""
        return self._names.get(index)

    def is_ours(self, index: int) -> bool:
        """Whether a device carries our alias: everything permanent on it is ours."""
        link = self._links.get(self._names.get(index, ""))
        return link is not None and link.alias == ALIAS

    def matters(self, index: int) -> bool:
        """Whether entries stand on a device: it is ours, or one of others that ours use."""
        return self.is_ours(index) or self._names.get(index) in self._follow

    @property
    def ours(self) -> list[Link]:
        """The devices that carry our alias."""
        return [link for link in self._links.values() if link.alias == ALIAS]

    def link(self, name: str) -> Link | None:
        """A device of any kind and owner, as last seen."""
        return self._links.get(name)

    def vxlan(self, name: str) -> VxlanState | None:
        """A VXLAN device of any owner, as last seen."""
        return self._vxlans.get(name)

    async def refresh(self) -> None:
        """Read every device again."""
        links: dict[str, Link] = {}
        vxlans: dict[str, VxlanState] = {}
        for datagram in await self._requests.dump(netlink.RTM_GETLINK, _IFINFO.pack(0, 0, 0, 0, 0)):
            for found in netlink.parse_messages(datagram):
                link, state = parse_link(found)
                links[link.name] = link
                if state is not None:
                    vxlans[link.name] = state
        self._links, self._vxlans = links, vxlans
        self._names = {link.index: link.name for link in links.values()}

    def heard(self, message: Message, wanted: Mapping[Hashable, VxlanLink]) -> Hashable | None:
        """Everything else stands on devices, so a change of one that matters means to look at all of it."""
        if message.kind not in (netlink.RTM_NEWLINK, netlink.RTM_DELLINK):
            return None
        link, state = parse_link(message)
        names = {link.name, self._names.get(link.index, "")}  # a device may have been renamed
        if names.isdisjoint(wanted) and names.isdisjoint(self._follow):
            return None
        known = self._links.get(link.name)
        is_gone = message.kind == netlink.RTM_DELLINK
        is_same = known is not None and (known.index, known.is_up, known.mtu, known.mac) == (
            link.index, link.is_up, link.mtu, link.mac,
        )  # fmt: skip
        return None if is_same and not is_gone and self._vxlans.get(link.name) == state else LOOK

    async def read(self, wanted: Mapping[Hashable, VxlanLink]) -> dict[Hashable, VxlanLink]:
        """The devices that carry our alias. One that is down is reported as not there."""
        await self.refresh()
        found: dict[Hashable, VxlanLink] = {}
        for name, state in self._vxlans.items():
            if state.link.alias != ALIAS or (name in wanted and not state.link.is_up):
                continue
            found[name] = self._entry(state, wanted.get(name))
        return found

    def _entry(self, state: VxlanState, want: VxlanLink | None) -> VxlanLink:
        port = state.port
        if want is not None and want.port == 0 and port == _KERNEL_DEFAULT_PORT:
            port = 0
        return VxlanLink(
            name=state.link.name,
            vni=state.vni,
            local=state.local or b"",
            underlay=self._names.get(state.underlay_index, ""),
            mtu=state.link.mtu,
            mac=state.link.mac if want is None or want.mac else b"",
            port=port,
            gbp=state.gbp,
            learning=state.learning,
            zero_checksum=state.zero_checksum,
        )

    async def put(self, entries: Sequence[VxlanLink]) -> Failures:
        """Make each device, or bring the one of its name into line.

        A device is changed in place where the kernel can (address, MTU, lower device, learning), so that what
        stands on it stays. Another VNI, port or GBP needs a new one; a device of another kind under the name
        is not ours to delete.
        """
        failures: Failures = {}
        for entry in entries:
            try:
                await self._put(entry)
            except KernelError as error:
                failures[entry.slot] = error
        await self.refresh()
        for entry in entries:
            # What we see here is no news when its notification comes: nobody else would look again.
            if entry.slot not in failures and not self._stands(entry):
                failures[entry.slot] = KernelError(
                    "add", str(entry), errnos.EAGAIN, detail="somebody changed it or removed it at once"
                )
        return failures

    def _stands(self, entry: VxlanLink) -> bool:
        state = self._vxlans.get(entry.name)
        return state is not None and state.link.is_up and self._entry(state, entry) == entry

    async def drop(self, entries: Sequence[VxlanLink]) -> Failures:
        """Delete devices that carry our alias."""
        failures: Failures = {}
        if not entries:  # to refresh here would hide a change from the look that its notification asks for
            return failures
        for entry in entries:
            state = self._vxlans.get(entry.name)
            if state is None or state.link.alias != ALIAS:
                continue
            refused = await self._delete(state.link.index)
            if refused and refused.errno != errnos.ENODEV:
                failures[entry.slot] = refused.error("delete", entry)
        await self.refresh()
        return failures

    async def _put(self, entry: VxlanLink) -> None:
        await self.refresh()
        underlay = self.index(entry.underlay)
        if underlay is None:
            raise KernelError(
                "add", str(entry), errnos.ENODEV, hint=f"there is no interface {entry.underlay}"
            )
        standing = self._links.get(entry.name)
        state = self._vxlans.get(entry.name)
        if standing is not None and state is None:
            raise KernelError(
                "add",
                str(entry),
                errnos.EEXIST,
                detail=f"{entry.name} is a device of kind {standing.kind or 'physical'}",
                hint=f"remove or rename it: ip link delete {entry.name}",
            )
        if state is not None and not _can_change(state, entry):
            refused = await self._delete(state.link.index)
            if refused:
                raise refused.error("delete", entry)
            state = None
        if state is None:
            await self._create(entry, underlay)
        else:
            await self._change(entry, state, underlay)
        refuse_router_advertisements(entry.name)
        if not entry.mac:
            _refuse_broadcasts(entry.name)

    async def _create(self, entry: VxlanLink, underlay: int) -> None:
        body = _IFINFO.pack(0, 0, 0, 0, 0) + b"".join(
            (
                attribute(_IFLA_IFNAME, entry.name.encode() + b"\0"),
                attribute_u32(_IFLA_MTU, entry.mtu),
                # Set at creation: then addr_assign_type says so, and udev leaves the address alone.
                attribute(_IFLA_ADDRESS, entry.mac) if entry.mac else b"",
                attribute_u32(_IFLA_TXQLEN, 0),
                _vxlan_info(entry, underlay, is_new=True),
            )
        )
        flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
        refused = await self._requests.request(netlink.message(netlink.RTM_NEWLINK, flags, body))
        if refused:
            raise refused.error("add", entry, hint=self._creation_hint(entry, refused.errno))
        await self.refresh()
        state = self._vxlans.get(entry.name)
        if state is None:
            raise KernelError("add", str(entry), errnos.ENODEV, detail="it vanished as soon as it was made")
        await self._change(entry, state, underlay)

    async def _change(self, entry: VxlanLink, state: VxlanState, underlay: int) -> None:
        """Set what is not as wanted on a standing device, and nothing else.

        Setting the address that a device has already makes the kernel flush its neighbours, permanent or not.
        """
        link = state.link
        if (state.local, state.underlay_index, state.learning) != (entry.local, underlay, entry.learning):
            # By itself: together with these the kernel refuses an MTU (vxlan_nl2conf).
            await self._set(entry, link.index, _vxlan_info(entry, underlay, is_new=False))
        attributes = b""
        if link.mtu != entry.mtu:
            attributes += attribute_u32(_IFLA_MTU, entry.mtu)
        if entry.mac and link.mac != entry.mac:
            attributes += attribute(_IFLA_ADDRESS, entry.mac)
        if link.alias != ALIAS:
            attributes += attribute(_IFLA_IFALIAS, ALIAS)
        if attributes or not link.is_up:
            await self._set(entry, link.index, attributes)

    async def _set(self, entry: VxlanLink, index: int, attributes: bytes) -> None:
        body = _IFINFO.pack(0, 0, index, IFF_UP, IFF_UP) + attributes
        refused = await self._requests.request(netlink.message(netlink.RTM_NEWLINK, 0, body))
        if refused:
            hint = self._taken_hint(entry, refused.errno) or _change_hint(entry, refused.errno)
            raise refused.error("change", entry, hint=hint)

    async def _delete(self, index: int) -> netlink.Refusal | None:
        body = _IFINFO.pack(0, 0, index, 0, 0)
        return await self._requests.request(netlink.message(netlink.RTM_DELLINK, 0, body))

    def _creation_hint(self, entry: VxlanLink, errno: int) -> str:
        if errno == errnos.EOPNOTSUPP:
            return "the kernel has no VXLAN: load or build in the module vxlan"
        return self._taken_hint(entry, errno)

    def _taken_hint(self, entry: VxlanLink, errno: int) -> str:
        """A VNI is taken when a device is made, a port when it is set up."""
        if errno not in (errnos.EEXIST, errnos.EADDRINUSE):
            return ""
        port = entry.port or _KERNEL_DEFAULT_PORT
        rivals = [
            name
            for name, state in self._vxlans.items()
            if (state.vni, state.port) == (entry.vni, port) and name != entry.name
        ]
        named = f"device {', '.join(rivals)} uses" if rivals else "another program uses"
        what = f"VNI {entry.vni} or UDP port {port}"
        return f"{named} {what} (ss -lunp, ip -d link): stop it, or give vxlan another Backend.VNI or .Port"


def _change_hint(entry: VxlanLink, errno: int) -> str:
    if errno != errnos.EINVAL:
        return ""
    return f"is {entry.mtu} more than {entry.underlay} carries? See Backend.MTU and the interface's MTU"


def _can_change(state: VxlanState, entry: VxlanLink) -> bool:
    """Whether the kernel can turn the one into the other (``vxlan_changelink``)."""
    port = entry.port or _KERNEL_DEFAULT_PORT
    local_bytes = len(state.local) if state.local else 4  # one made without is of IPv4
    return (state.vni, state.port, state.gbp, state.zero_checksum, local_bytes) == (
        entry.vni, port, entry.gbp, entry.zero_checksum, len(entry.local),
    )  # fmt: skip


def _vxlan_info(entry: VxlanLink, underlay: int, *, is_new: bool) -> bytes:
    local = _VXLAN_LOCAL if len(entry.local) == 4 else _VXLAN_LOCAL6
    data = [
        attribute_u32(_VXLAN_ID, entry.vni),
        attribute_u32(_VXLAN_LINK, underlay),
        attribute(local, entry.local),
        attribute(_VXLAN_LEARNING, bytes([entry.learning])),
    ]
    if is_new and entry.port:
        data.append(attribute(_VXLAN_PORT, entry.port.to_bytes(2, "big")))
    if is_new and entry.zero_checksum:
        data.append(attribute(_VXLAN_ZERO_CSUM6_RX, b"\x01"))
    if is_new and entry.gbp:
        data.append(attribute(_VXLAN_GBP, b""))
    return nested(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, b"vxlan\0"), nested(_IFLA_INFO_DATA, *data))


def refuse_router_advertisements(name: str) -> None:
    """``accept_ra`` = 0 on a device of ours, as flannel sets it (COMPAT §7.3).

    A kernel without IPv6 has no such file.
    """
    _set_if_possible(f"ipv6/conf/{name}/accept_ra", "0")


def _refuse_broadcasts(name: str) -> None:
    """``drop_unicast_in_l2_multicast`` = 1 where nobody has to know the device's address.

    Else who does not know it could still send to the host itself, in broadcast frames.
    """
    _set_if_possible(f"ipv4/conf/{name}/drop_unicast_in_l2_multicast", "1")


def _set_if_possible(path: str, value: str) -> None:
    """Write a setting below ``/proc/sys/net``, which a container may have read-only."""
    with suppress(OSError):
        Path("/proc/sys/net", path).write_text(value, encoding="ascii")
