# SPDX-License-Identifier: Apache-2.0
"""Entries: the wanted facts of the kernel, as inert values.

An entry names its device, never its index: what it means does not change when the device is made anew.
Two entries of one type with the same *slot* cannot both stand; everything else about them can be changed
in place. ``str(entry)`` is how ``ip`` and ``bridge`` print the same thing.
"""

from collections.abc import Hashable
from typing import ClassVar

import msgspec

from loden.address import Prefix, format_address


def format_mac(mac: bytes) -> str:
    """A link-layer address as lower-case colon hex."""
    return mac.hex(":")


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One wanted fact; see the subclasses."""

    #: Whether entries of other types stand on this one, and go with it when it has to be made anew.
    carries_others: ClassVar[bool] = False

    @property
    def slot(self) -> Hashable:
        """The place the entry takes among those of its own type."""
        raise NotImplementedError


class VxlanLink(Entry, frozen=True, gc=False):
    """A VXLAN device (COMPAT §7.3), administratively up.

    Args:
        name: such as ``flannel.1``.
        vni: the VXLAN network identifier.
        local: the outer source address, packed; its family is the underlay's.
        underlay: the name of the lower device.
        mtu: of the device itself: the underlay's less the encapsulation, bytes.
        mac: the VTEP's address; empty leaves it to the kernel, which takes a random one.
        port: the UDP port; 0 leaves it to the kernel, whose default is 8472.
        gbp: carry group policy marks (``VXLAN_F_GBP``).
        learning: let the device learn remote VTEPs from packets.
        zero_checksum: take in datagrams without a UDP checksum over IPv6, too (RFC 6935).
    """

    name: str
    vni: int
    local: bytes
    underlay: str
    mtu: int
    mac: bytes
    port: int = 0
    gbp: bool = False
    learning: bool = False
    zero_checksum: bool = False

    carries_others: ClassVar[bool] = True

    @property
    def slot(self) -> Hashable:
        return self.name

    def __str__(self) -> str:
        local = format_address(self.local)
        return f"link {self.name} type vxlan id {self.vni} local {local} dev {self.underlay}"


class TunLink(Entry, frozen=True, gc=False):
    """A TUN device that outlives whoever made it, administratively up (COMPAT §7.5).

    Args:
        name: such as ``flannel0``.
        mtu: bytes.
    """

    name: str
    mtu: int

    carries_others: ClassVar[bool] = True

    @property
    def slot(self) -> Hashable:
        return self.name

    def __str__(self) -> str:
        return f"link {self.name} type tun mtu {self.mtu}"


class UdpTunnel(Entry, frozen=True, gc=False):
    """What goes into a TUN device comes out of a UDP port, and the other way round.

    Args:
        device: the TUN device's name.
        underlay: the interface that datagrams come in on.
        local: this host's outer address, packed; its family is the underlay's and the packets'.
        source: this host's address in the container network, packed: who sends ICMP errors.
        port: the UDP port.
        acceleration: ``ebpf`` or ``engine``; ``auto`` is ebpf as far as that can be.
        allow_unknown: take in datagrams of whoever sends them.
        reason: why it is the engine, for people.
        detour: the VXLAN device that TCP of containers and super-packets go through; empty: none.
        detour_reason: why there is none to be had, for people.
    """

    device: str
    underlay: str
    local: bytes
    source: bytes
    port: int
    acceleration: str = "auto"
    allow_unknown: bool = False
    reason: str = ""
    detour: str = ""
    detour_reason: str = ""

    carries_others: ClassVar[bool] = True

    @property
    def slot(self) -> Hashable:
        return self.device

    def __str__(self) -> str:
        local = format_address(self.local)
        return f"tunnel {self.device} over UDP port {self.port} of {local} dev {self.underlay}"


class UdpPeer(Entry, frozen=True, gc=False):
    """Where the packets for a subnet go, and from where packets of that subnet may come.

    Args:
        tunnel: the TUN device's name.
        subnet: the peer's.
        remote: its outer address, packed.
        port: its UDP port.
        device: the interface that leads there.
        mtu: the most bytes of a packet for it, where that is less than the TUN device carries; else 0.
        is_fast: whether the peer says that it takes packets in as the kernel hands them on.
        is_near: whether no router stands between it and the interface.
    """

    tunnel: str
    subnet: Prefix
    remote: bytes
    port: int
    device: str
    mtu: int = 0
    is_fast: bool = False
    is_near: bool = False

    @property
    def slot(self) -> Hashable:
        return self.subnet

    def __str__(self) -> str:
        mtu = f" mtu {self.mtu}" if self.mtu else ""
        remote = format_address(self.remote)
        return f"udp peer {self.subnet} at {remote} port {self.port} dev {self.device}{mtu}"


class LinkAddress(Entry, frozen=True, gc=False):
    """An address on a device.

    Args:
        device: its name.
        address: packed.
        length: of the prefix, bits.
    """

    device: str
    address: bytes
    length: int

    @property
    def slot(self) -> Hashable:
        return self.device, self.address, self.length

    def __str__(self) -> str:
        return f"address {format_address(self.address)}/{self.length} dev {self.device}"


class Neighbour(Entry, frozen=True, gc=False):
    """A permanent neighbour: which link-layer address an address on a device has.

    Args:
        device: its name.
        address: packed.
        mac: 6 bytes.
    """

    device: str
    address: bytes
    mac: bytes

    @property
    def slot(self) -> Hashable:
        return self.device, self.address

    def __str__(self) -> str:
        return f"neigh {format_address(self.address)} lladdr {format_mac(self.mac)} dev {self.device}"


class FdbEntry(Entry, frozen=True, gc=False):
    """A permanent forwarding entry of a VXLAN device: behind which underlay address a VTEP lives.

    Args:
        device: its name.
        mac: the VTEP's, 6 bytes.
        remote: the underlay address, packed.
    """

    device: str
    mac: bytes
    remote: bytes

    @property
    def slot(self) -> Hashable:
        return self.device, self.mac

    def __str__(self) -> str:
        return f"fdb {format_mac(self.mac)} dst {format_address(self.remote)} dev {self.device}"


class Route(Entry, frozen=True, gc=False):
    """A unicast route of the main table, with the default metric.

    Args:
        dst: the destination.
        device: the outgoing device's name.
        via: the next router, packed, of the destination's family; None for an on-link destination.
        onlink: take the router as reachable on the device, whatever the device's own addresses say.
        mtu: the most that fits through it, bytes, where that is less than the device carries; else 0.
    """

    dst: Prefix
    device: str
    via: bytes | None = None
    onlink: bool = False
    mtu: int = 0

    @property
    def slot(self) -> Hashable:
        return self.dst

    def __str__(self) -> str:
        via = f" via {format_address(self.via)}" if self.via else ""
        mtu = f" mtu {self.mtu}" if self.mtu else ""
        return f"route {self.dst}{via} dev {self.device}{' onlink' if self.onlink else ''}{mtu}"


class Blackhole(Entry, frozen=True, gc=False):
    """A route of the main table that drops what no better route takes (COMPAT §9.3).

    Args:
        dst: the destination.
    """

    dst: Prefix

    @property
    def slot(self) -> Hashable:
        return self.dst

    def __str__(self) -> str:
        return f"route blackhole {self.dst}"


class Sysctl(Entry, frozen=True, gc=False):
    """A kernel setting.

    Args:
        path: below ``/proc/sys``, with slashes: a device's name may hold dots.
        value: as text.
    """

    path: str
    value: str

    @property
    def slot(self) -> Hashable:
        return self.path

    def __str__(self) -> str:
        return f"sysctl {self.path}={self.value}"


#: How a cloud route says that it leads to the host that wants it.
HERE = "this host"


class CloudRoute(Entry, frozen=True, gc=False):
    """A route in a cloud's route tables, in each of them that this host's network looks into.

    Args:
        dst: the destination.
        via: the next hop: :data:`HERE`, or the cloud's own name for another, where one was found.
    """

    dst: Prefix
    via: str = HERE

    @property
    def slot(self) -> Hashable:
        return self.dst

    def __str__(self) -> str:
        return f"cloud route {self.dst} via {self.via}"


class CloudSetting(Entry, frozen=True, gc=False):
    """Something about this host's instance in a cloud, without which its routes are of no use.

    Args:
        name: in the cloud's words, such as ``source/destination check``.
        value: as text.
    """

    name: str
    value: str

    @property
    def slot(self) -> Hashable:
        return self.name

    def __str__(self) -> str:
        return f"cloud setting {self.name}={self.value}"


def is_clouds(entry: Entry) -> bool:
    """Whether an entry stands in a cloud, and not in the kernel."""
    return isinstance(entry, CloudRoute | CloudSetting)
