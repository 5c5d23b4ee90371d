# SPDX-License-Identifier: Apache-2.0
"""``udp``: packets as the payload of UDP datagrams, one in each, as flannel has them (COMPAT §7.5).

For the host a TUN device with a route to the whole network, and for each peer one line in the tunnel's
table::

    route     10.5.0.0/16 dev flannel0                          every subnet, known or not
    peer      10.5.9.0/24 at 192.0.2.9 port 8285 dev eth0       the peer's subnet, and the peer
    link      flannel0.in type vxlan                            TCP of containers and super-packets pass it

A peer behind a narrow path has a route of its own besides, with the MTU that is left, so that the kernel
tells senders what fits.
"""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from loden.address import Family, format_address, is_host
from loden.backends.base import Host, Kernel, Lacks
from loden.errors import ConfigError, PeerUnreachable
from loden.interface import Hop
from loden.lease import Leg, public_port
from loden.tables.base import Table
from loden.tables.entries import Entry, LinkAddress, Route, TunLink, UdpPeer, UdpTunnel, VxlanLink
from loden.tables.udp_detour import detour_link

#: What a host may have to do without (:meth:`Udp.lacks`).
EBPF, DETOUR = "ebpf", "detour"

#: Outer headers, bytes: IP, and UDP's 8.
OVERHEAD: Mapping[Family, int] = {Family.IPV4: 20 + 8, Family.IPV6: 40 + 8}
#: The smallest packet that every host has to take: RFC 791 and RFC 8200.
_LEAST_MTU: Mapping[Family, int] = {Family.IPV4: 576, Family.IPV6: 1280}

#: The first is flannel's, which has no IPv6.
DEVICES: Mapping[Family, str] = {Family.IPV4: "flannel0", Family.IPV6: "flannel-v6"}


class Options(
    msgspec.Struct,
    frozen=True,
    rename={
        "port": "Port",
        "mtu": "MTU",
        "acceleration": "Acceleration",
        "allow_unknown": "AllowUnknownPeers",
    },
):
    """The options of ``udp``.

    Args:
        port: UDP port of every host that says nothing else in its lease.
        mtu: of the underlay, bytes; 0 takes the interface's, which is also the most that counts.
        acceleration: eBPF programs, the engine in user space, or the programs where they work.
        allow_unknown: take in datagrams of whoever sends them, as flannel does.
    """

    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8285
    mtu: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    acceleration: Literal["auto", "ebpf", "engine"] = "auto"
    allow_unknown: bool = False


class _Data(msgspec.Struct, frozen=True, omit_defaults=True):
    """``BackendData``, which flannel leaves out and does not read.

    Args:
        Port: where this host is reached, where it is not the network's port.
        Acceleration: ``ebpf`` where packets are taken in by programs in the kernel.
    """

    Port: int = 0
    Acceleration: str = ""


_decoder = msgspec.json.Decoder(_Data)


class Udp:
    """A TUN device and a tunnel for each family, and a line in a table for each peer."""

    Options: ClassVar[type[msgspec.Struct]] = Options
    lease_type: ClassVar[str] = ""

    def __init__(self, host: Host, options: msgspec.Struct) -> None:
        assert isinstance(options, Options)
        self._options = options
        self._host = host
        self._underlay = host.underlay
        self.needs_hops = True
        self._outer_mtu = min(options.mtu or host.underlay.mtu, host.underlay.mtu)
        self._mtus = {family: self._inner_mtu(family) for family in host.network.families}
        self.mtu = min(self._mtus.values())

    @classmethod
    async def lacks(cls, options: msgspec.Struct, families: Sequence[Family]) -> Lacks:
        """Why eBPF programs do not carry packets here, or there is no detour; with ``auto`` alone
        this makes a difference."""
        assert isinstance(options, Options)
        if options.acceleration != "auto":
            return {}
        from loden.tables.udp_probe import find_lacks  # noqa: PLC0415  # and with it ctypes

        # It takes a few hundredths of a second, in a thread with a namespace of its own.
        return {family: await asyncio.to_thread(find_lacks, family) for family in families}

    @classmethod
    def tables(cls, kernel: Kernel) -> Sequence[Table[Any]]:
        from loden.tables.tun import TunTable  # noqa: PLC0415
        from loden.tables.udp import TunnelTable, UdpPeerTable  # noqa: PLC0415

        tunnels = TunnelTable(
            kernel.requests,
            kernel.devices,
            look_soon=kernel.look_soon,
            paths_changed=kernel.host_changed,
        )
        kernel.closing.callback(tunnels.close)
        return TunTable(kernel.requests, kernel.devices), tunnels, UdpPeerTable(tunnels)

    def _inner_mtu(self, family: Family) -> int:
        mtu, least = self._outer_mtu - OVERHEAD[family], _LEAST_MTU[family]
        if mtu < least:
            raise ConfigError(
                "Backend.MTU",
                f"{mtu} bytes are left for packets inside UDP over {family} on {self._underlay.name}",
                hint=f"{family} needs {least}: set Backend.MTU to {least + OVERHEAD[family]} or more, "
                "or raise the interface's",
            )
        return mtu

    def data(self, family: Family) -> bytes | None:
        port = self._underlay.public_port
        announced = _Data(
            Port=port if port != self._options.port else 0,
            Acceleration="" if self._reason(family) else "ebpf",
        )
        return None if announced == _Data() else msgspec.json.encode(announced)

    def _reason(self, family: Family) -> str:
        """Why packets of a family are the engine's; empty where they are not."""
        if self._options.acceleration == "engine":
            return "the network configuration asks for the engine"
        return self._lack(family, EBPF)

    def _lack(self, family: Family, what: str) -> str:
        """Why this host has to do without something; empty where it has it, or the configuration insists."""
        found = self._host.lacks.get(family, {}) if self._options.acceleration == "auto" else {}
        return found.get(what, "")

    def own_entries(self, leg: Leg) -> Sequence[Entry]:
        family = leg.subnet.family
        device = DEVICES[family]
        tunnel = UdpTunnel(
            device=device,
            underlay=self._underlay.name,
            local=self._underlay.addresses[family],
            source=leg.subnet.address,
            port=self._options.port,
            acceleration="engine" if self._reason(family) else self._options.acceleration,
            allow_unknown=self._options.allow_unknown,
            reason=self._reason(family),
            detour=next((link.name for link in self.optional_entries(leg)), ""),
            detour_reason=self._lack(family, DETOUR),
        )
        own = self._host.network.range_of(family)
        assert own is not None
        return (
            TunLink(device, self._mtus[family]),
            tunnel,
            LinkAddress(device, leg.subnet.address, family.bits),
            Route(own.network, device),
        )

    def optional_entries(self, leg: Leg) -> Sequence[VxlanLink]:
        """The device that TCP of containers and super-packets go through: the programs alone need it."""
        family = leg.subnet.family
        if self._reason(family) or self._lack(family, DETOUR):
            return ()
        return (detour_link(DEVICES[family], self._underlay.name, self._underlay.addresses[family]),)

    def entries(self, leg: Leg, hop: Hop | None) -> Sequence[Entry]:
        if leg.public is None:
            raise PeerUnreachable(
                f"reach {leg.subnet}: the peer's lease names no {leg.subnet.family} address"
            )
        port = public_port(leg) or self._options.port
        is_own = leg.public == self._underlay.public.get(leg.subnet.family) and port == self._own_port
        if not is_host(leg.public) or is_own:
            raise PeerUnreachable(
                f"reach {leg.subnet}: {format_address(leg.public)} port {port} is our own, or no host's",
                hint="give that host an address of its own with --public-ip, or a port with --public-port",
            )
        if hop is None:
            raise PeerUnreachable(
                f"reach {leg.subnet}: this host has no route to the peer's address "
                f"{format_address(leg.public)}"
            )
        mtu = self._narrow_mtu(leg, hop)
        device = DEVICES[leg.subnet.family]
        peer = UdpPeer(
            device,
            leg.subnet,
            leg.public,
            port,
            hop.device,
            mtu,
            is_fast=_is_fast(leg),
            is_near=hop.via is None,
        )
        return (peer, Route(leg.subnet, device, mtu=mtu)) if mtu else (peer,)

    @property
    def _own_port(self) -> int:
        return self._underlay.public_port or self._options.port

    def _narrow_mtu(self, leg: Leg, hop: Hop) -> int:
        """What fits through to a peer, where it is less than the device carries; else 0."""
        family = leg.subnet.family
        most = self._mtus[family]
        left = hop.mtu - OVERHEAD[family] if hop.mtu else most
        # IPv6 has to carry so much; what lies below that must cut datagrams, which ours forbid.
        left = max(left, _LEAST_MTU[family]) if family is Family.IPV6 else left
        return left if left < most else 0


def _is_fast(leg: Leg) -> bool:
    try:
        return _decoder.decode(leg.data or b"{}").Acceleration == "ebpf"
    except msgspec.DecodeError:
        return False
