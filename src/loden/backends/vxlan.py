# SPDX-License-Identifier: Apache-2.0
"""``vxlan``: packets in the kernel's own VXLAN, one device for each address family (COMPAT §7.3).

For each peer three entries, so that nothing is ever flooded or asked for::

    route     10.5.9.0/24 via 10.5.9.0 dev flannel.1 onlink     the peer's subnet, behind the peer's VTEP
    neigh     10.5.9.0 lladdr 02:…:09 dev flannel.1             the VTEP's link-layer address
    fdb       02:…:09 dst 192.0.2.9 dev flannel.1               the host behind that address

With DirectRouting, a peer on this host's own network gets one plain route instead.
"""

import hashlib
from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from loden.address import Family, format_address, is_host
from loden.backends.base import Host, Plain
from loden.backends.host_gw import direct_route
from loden.errors import ConfigError, MalformedLease, PeerUnreachable
from loden.interface import Hop
from loden.lease import Leg
from loden.tables.entries import Entry, FdbEntry, LinkAddress, Neighbour, Route, VxlanLink, format_mac

#: Outer headers, bytes: IP, UDP 8, VXLAN 8, inner Ethernet 14. Flannel takes 50 for both families (W16).
OVERHEAD = {Family.IPV4: 20 + 8 + 8 + 14, Family.IPV6: 40 + 8 + 8 + 14}


#: The identifier has 24 bits, a device's name 15 characters: ``flannel.9999999``.
_MOST_VNI = 9_999_999
#: The smallest packet that every host has to take: RFC 791 and RFC 8200.
_LEAST_MTU = {Family.IPV4: 576, Family.IPV6: 1280}

_NAMES = {
    "vni": "VNI",
    "port": "Port",
    "mtu": "MTU",
    "gbp": "GBP",
    "learning": "Learning",
    "direct_routing": "DirectRouting",
}


class Options(msgspec.Struct, frozen=True, rename=_NAMES):
    """The options of ``vxlan``.

    Args:
        vni: VXLAN network identifier, and the device's suffix.
        port: outer UDP port; 0 is the kernel's default, 8472.
        mtu: of the underlay, bytes; 0 takes the interface's, which is also the most that counts.
        gbp: VXLAN group based policy.
        learning: let the device learn from packets.
        direct_routing: plain routes to peers on the same network.
    """

    vni: Annotated[int, msgspec.Meta(ge=0, le=_MOST_VNI)] = 1
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    mtu: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    gbp: bool = False
    learning: bool = False
    direct_routing: bool = False

    def __post_init__(self) -> None:
        least = _LEAST_MTU[Family.IPV4] + OVERHEAD[Family.IPV4]
        if 0 < self.mtu < least:
            raise ValueError(f"MTU: {self.mtu} leaves no room for packets; 0 or from {least} on")


class _Data(msgspec.Struct, frozen=True):
    """``BackendData``: compact and in this order, because flannel picks the address out as text (§7.3)."""

    VNI: int
    VtepMAC: str


class _PeerData(msgspec.Struct, frozen=True):
    """What receivers look at: not the VNI, which is the same in the whole cluster (COMPAT §7.3)."""

    VtepMAC: str


_decoder = msgspec.json.Decoder(_PeerData)


class Vxlan(Plain):
    """A device for each family, and neighbour, forwarding entry and route for each peer."""

    Options: ClassVar[type[msgspec.Struct]] = Options
    lease_type: ClassVar[str] = "vxlan"

    def __init__(self, host: Host, options: msgspec.Struct) -> None:
        assert isinstance(options, Options)
        self._options = options
        self._underlay = host.underlay
        self.needs_hops = options.direct_routing
        # The kernel gives no device more than the one below it carries, whatever the whole cluster's MTU is.
        outer = min(options.mtu or host.underlay.mtu, host.underlay.mtu)
        self._links = {
            family: self._link(family, outer - OVERHEAD[family], host) for family in host.network.families
        }
        self.mtu = min(link.mtu for link in self._links.values())

    def _link(self, family: Family, mtu: int, host: Host) -> VxlanLink:
        least = _LEAST_MTU[family]
        if mtu < least:
            raise ConfigError(
                "Backend.MTU",
                f"{mtu} bytes are left for packets inside VXLAN over {family} on {host.underlay.name}",
                hint=f"{family} needs {least}: set Backend.MTU to {least + OVERHEAD[family]} or more, "
                "or raise the interface's",
            )
        name = f"flannel.{self._options.vni}" if family is Family.IPV4 else f"flannel-v6.{self._options.vni}"
        if len(name) > 15:
            raise ConfigError(
                "Backend.VNI",
                f"{self._options.vni} makes {name} longer than a device's name may be",
                hint="up to 9999999 for IPv4, up to 9999 for IPv6",
            )
        standing = next((link.mac for link in host.facts.links if link.name == name), b"")
        local = host.underlay.addresses[family]
        return VxlanLink(
            name=name,
            vni=self._options.vni,
            local=local,
            underlay=host.underlay.name,
            mtu=mtu,
            mac=standing or stable_mac(host.underlay.public[family], name),
            port=self._options.port,
            gbp=self._options.gbp,
            learning=self._options.learning,
        )

    def data(self, family: Family) -> bytes | None:
        link = self._links[family]
        return msgspec.json.encode(_Data(VNI=link.vni, VtepMAC=format_mac(link.mac)))

    def own_entries(self, leg: Leg) -> Sequence[Entry]:
        link = self._links[leg.subnet.family]
        return link, LinkAddress(link.name, leg.subnet.address, leg.subnet.family.bits)

    def entries(self, leg: Leg, hop: Hop | None) -> Sequence[Entry]:
        if self._options.direct_routing and hop is not None and hop.via is None:
            return (direct_route(leg, hop),)
        if leg.public is None:
            raise PeerUnreachable(
                f"route {leg.subnet}: the peer's lease names no {leg.subnet.family} address"
            )
        if not is_host(leg.public) or leg.public == self._underlay.public.get(leg.subnet.family):
            raise PeerUnreachable(
                f"route {leg.subnet}: {format_address(leg.public)} is our own address, or no host's",
                hint="give that host an address of its own with --public-ip",
            )
        device = self._links[leg.subnet.family].name
        mac = vtep_mac(leg)
        vtep = leg.subnet.address
        return (
            Neighbour(device, vtep, mac),
            FdbEntry(device, mac, leg.public),
            Route(leg.subnet, device, vtep, onlink=True),
        )


def stable_mac(public: bytes, name: str) -> bytes:
    """A link-layer address for a VTEP: the same after every restart and reboot, without a store of its own.

    Peers that missed a change of it would send into the void (users' pain 5). It is a hash of what already
    tells hosts apart, the public address, with the bits of a locally administered unicast address.
    """
    digest = bytearray(hashlib.blake2s(public + name.encode(), digest_size=6, person=b"VTEP").digest())
    digest[0] = digest[0] & 0xFE | 0x02
    return bytes(digest)


def vtep_mac(leg: Leg) -> bytes:
    """The link-layer address in a peer's data.

    Raises:
        MalformedLease: there is none, or it is no unicast address.
    """
    try:
        mac = bytes.fromhex(_decoder.decode(leg.data or b"null").VtepMAC.replace(":", ""))
    except (msgspec.DecodeError, ValueError) as error:
        raise MalformedLease(f"read BackendData of {leg.subnet}: {error}") from error
    if len(mac) != 6 or mac[0] & 1 or not any(mac):
        raise MalformedLease(
            f"read BackendData of {leg.subnet}: VtepMAC {format_mac(mac)!r} is no unicast address"
        )
    return mac
