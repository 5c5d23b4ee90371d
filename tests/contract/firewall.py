# SPDX-License-Identifier: Apache-2.0
"""What the firewall must do with a packet: the table of COMPAT §9.1 once more, written as a test would."""

import json
from typing import NamedTuple

from loden.address import Family, Prefix, format_address
from loden.firewall.rules import FirewallOptions, RuleSet, make_rules
from loden.network import Network, parse_network

MASQUERADED, KEPT, ACCEPTED, PASSED = "masqueraded", "kept", "accepted", "passed"


class Packet(NamedTuple):
    source: bytes
    destination: bytes
    mark: int = 0

    def __repr__(self) -> str:
        return f"{format_address(self.source)} > {format_address(self.destination)} mark {self.mark:#x}"


class Setup(NamedTuple):
    """One family's part of a configuration."""

    cluster: Prefix
    own: Prefix
    told: FirewallOptions

    def sets(self) -> tuple[RuleSet, ...]:
        return make_rules(self.told, network_of(self.cluster), {self.own.family: self.own})


def network_of(*clusters: Prefix, **members: object) -> Network:
    keys = {Family.IPV4: "Network", Family.IPV6: "IPv6Network"}
    found = {keys[cluster.family]: str(cluster) for cluster in clusters}
    families = {cluster.family for cluster in clusters}
    enabled = {"EnableIPv4": Family.IPV4 in families, "EnableIPv6": Family.IPV6 in families}
    return parse_network(json.dumps({**enabled, **found, **members}).encode())


def reference(setup: Setup, packet: Packet) -> str:
    """COMPAT §9.1, word by word, with excluded destinations before rule 5."""
    cluster, own = setup.cluster, setup.own
    multicast = Prefix.parse("224.0.0.0/4" if cluster.family is Family.IPV4 else "ff00::/8")
    from_cluster, to_cluster = cluster.holds(packet.source), cluster.holds(packet.destination)
    from_own, to_own = own.holds(packet.source), own.holds(packet.destination)
    kept = (
        not setup.told.masquerade,
        packet.mark & 0x4000 == 0x4000,
        from_own and to_cluster,
        from_cluster and to_own,
        not from_cluster and to_own,
        from_cluster and any(prefix.holds(packet.destination) for prefix in setup.told.exclude),
    )
    if any(kept):
        return KEPT
    leaves = from_cluster and not multicast.holds(packet.destination)
    return MASQUERADED if leaves or (not from_cluster and to_cluster) else KEPT
