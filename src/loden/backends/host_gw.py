# SPDX-License-Identifier: Apache-2.0
"""``host-gw``: a route to each peer's subnet with the peer itself as the router (COMPAT §7.2).

Full speed and no encapsulation, where all hosts share one network. A peer behind a router is refused: the
route would be accepted by some kernels and lead nowhere.
"""

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from loden.address import Family, format_address
from loden.backends.base import Host, Plain
from loden.errors import ConfigError, PeerUnreachable
from loden.interface import Hop
from loden.lease import Leg
from loden.tables.entries import Entry, Route


class Options(msgspec.Struct, frozen=True):
    """It has none."""


class HostGw(Plain):
    """One route for each peer."""

    Options: ClassVar[type[msgspec.Struct]] = Options
    lease_type: ClassVar[str] = "host-gw"

    def __init__(self, host: Host, options: msgspec.Struct) -> None:
        del options
        self.needs_hops = True
        self.mtu = host.underlay.mtu
        for family, own in host.underlay.addresses.items():
            public = host.underlay.public[family]
            if public != own:  # peers use the public address as their router: it must be on the wire (W38)
                raise ConfigError(
                    "Backend.Type",
                    f"host-gw needs the public address {format_address(public)} on interface "
                    f"{host.underlay.name}, which has {format_address(own)}",
                    hint="drop --public-ip, choose the interface with --iface, or use the backend vxlan",
                )

    def data(self, family: Family) -> bytes | None:
        del family
        return None

    def own_entries(self, leg: Leg) -> Sequence[Entry]:
        del leg
        return ()

    def entries(self, leg: Leg, hop: Hop | None) -> Sequence[Entry]:
        return (direct_route(leg, hop),)


def direct_route(leg: Leg, hop: Hop | None) -> Route:
    """The route to a peer's subnet over the peer's own address, which must be on-link.

    Raises:
        PeerUnreachable: it is not, and this is why.
    """
    if leg.public is None:
        raise PeerUnreachable(f"route {leg.subnet}: the peer's lease names no {leg.subnet.family} address")
    peer = format_address(leg.public)
    if hop is None:
        raise PeerUnreachable(
            f"route {leg.subnet}: this host has no route to the peer's address {peer}, or it is its own",
            hint="give each host an address of its own that all others can reach",
        )
    if hop.via is not None:
        raise PeerUnreachable(
            f"route {leg.subnet}: the peer {peer} is behind the router {format_address(hop.via)}, "
            f"not on the network of {hop.device}",
            hint="host-gw needs all hosts on one network; use vxlan, with DirectRouting for those that are",
        )
    return Route(leg.subnet, hop.device, leg.public)
