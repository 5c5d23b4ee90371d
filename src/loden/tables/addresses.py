# SPDX-License-Identifier: Apache-2.0
"""The addresses on our devices."""

import errno as errnos
import struct
from collections.abc import Hashable, Mapping, Sequence

from loden.address import Family, Prefix
from loden.errors import errno_of
from loden.interface import HostAddress
from loden.tables import netlink
from loden.tables.base import LOOK, Failures
from loden.tables.devices import Devices
from loden.tables.entries import LinkAddress
from loden.tables.netlink import Message, Netlink, attribute, number_in, parse_attributes

_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_IFA_F_TEMPORARY, _IFA_F_NODAD, _IFA_F_DEPRECATED, _IFA_F_PERMANENT = 0x01, 0x02, 0x20, 0x80

_KINDS = (netlink.RTM_NEWADDR, netlink.RTM_DELADDR)

# struct ifaddrmsg { u8 family; u8 prefixlen; u8 flags; u8 scope; u32 index; }
_IFADDR = struct.Struct("=BBBBI")


def parse_host_address(found: Message) -> HostAddress | None:
    """An address message; None where it holds no address."""
    family, length, flags, scope, index = _IFADDR.unpack_from(found.buffer, found.start)
    attributes = parse_attributes(found.buffer, found.start + 8, found.end)
    address = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)
    if family not in (Family.IPV4, Family.IPV6) or address is None:
        return None
    flags = number_in(attributes, _IFA_FLAGS, flags)  # the header has room for eight of them
    return HostAddress(
        index=index,
        address=address,
        length=length,
        scope=scope,
        is_permanent=bool(flags & _IFA_F_PERMANENT),
        # One bit with two meanings: IFA_F_SECONDARY for IPv4.
        is_temporary=family == Family.IPV6 and bool(flags & _IFA_F_TEMPORARY),
        is_deprecated=bool(flags & _IFA_F_DEPRECATED),
    )


async def read_addresses(requests: Netlink, index: int = 0) -> list[HostAddress]:
    """Every address, or those of one device, in the kernel's order."""
    body = _IFADDR.pack(0, 0, 0, 0, index)
    return [
        address
        for datagram in await requests.dump(netlink.RTM_GETADDR, body)
        for found in netlink.parse_messages(datagram)
        if (address := parse_host_address(found)) is not None
    ]


class AddressTable:
    """The addresses of our devices that lie inside the cluster's networks; others stay (COMPAT §7.3).

    Args:
        requests: the socket.
        devices: which devices there are.
        networks: the cluster's.
    """

    entry_type = LinkAddress

    def __init__(self, requests: Netlink, devices: Devices, networks: Sequence[Prefix]) -> None:
        self._requests = requests
        self._devices = devices
        self._networks = tuple(networks)

    def heard(self, message: Message, wanted: Mapping[Hashable, LinkAddress]) -> Hashable | None:
        """With a device's last address the kernel drops the routes over it, and says nothing of them."""
        host = parse_host_address(message) if message.kind in _KINDS else None
        if host is None or not self._devices.matters(host.index):
            return None
        if message.kind == netlink.RTM_DELADDR:
            return LOOK
        entry = self._entry(host)
        return LOOK if entry is not None and entry.slot not in wanted else None

    def _entry(self, host: HostAddress) -> LinkAddress | None:
        """The entry that an address amounts to; None where it is not of ours or not of the networks."""
        name = self._devices.name(host.index) if self._devices.is_ours(host.index) else None
        if name is None or not any(network.holds(host.address) for network in self._networks):
            return None
        return LinkAddress(name, host.address, host.length)

    async def read(self, wanted: Mapping[Hashable, LinkAddress]) -> dict[Hashable, LinkAddress]:
        """The addresses inside the cluster's networks on devices that carry our alias."""
        del wanted  # few entries: nothing to share
        hosts = [
            host for link in self._devices.ours for host in await read_addresses(self._requests, link.index)
        ]
        entries = (self._entry(host) for host in hosts)
        return {entry.slot: entry for entry in entries if entry is not None}

    async def put(self, entries: Sequence[LinkAddress]) -> Failures:
        flags = netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
        return await self._each(netlink.RTM_NEWADDR, flags, "add", entries)

    async def drop(self, entries: Sequence[LinkAddress]) -> Failures:
        failures = await self._each(netlink.RTM_DELADDR, 0, "delete", entries)
        gone = (errnos.EADDRNOTAVAIL, errnos.ENODEV)
        return {slot: error for slot, error in failures.items() if errno_of(error) not in gone}

    async def _each(self, kind: int, flags: int, verb: str, entries: Sequence[LinkAddress]) -> Failures:
        sent, failures = self._devices.sort_out(entries)
        for index, entry in sent:
            family = Family.of(entry.address)
            # Duplicate address detection on a tunnel would delay IPv6 by a second for nothing.
            own = _IFA_F_NODAD if family is Family.IPV6 else 0
            body = _IFADDR.pack(family, entry.length, own, 0, index) + b"".join(
                (attribute(_IFA_LOCAL, entry.address), attribute(_IFA_ADDRESS, entry.address))
            )
            refused = await self._requests.request(netlink.message(kind, flags, body))
            if refused:
                failures[entry.slot] = refused.error(verb, entry)
        return failures
