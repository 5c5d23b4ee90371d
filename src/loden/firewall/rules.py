# SPDX-License-Identifier: Apache-2.0
"""Which packets are masqueraded and which may pass, as data: a pure function from configuration to rules.

The table is flannel's (COMPAT §9.1), one for both families and for every tool. C is the cluster's range,
N the own subnet, E a range to which containers show their own address:

====  ======  ==========  =============  ==========
rule  mark    source      destination    verdict
====  ======  ==========  =============  ==========
1     0x4000                             return
2             N           C              return
3             C           N              return
4             not C       N              return
E             C           E              return
5             C           not multicast  masquerade
6             not C       C              masquerade
====  ======  ==========  =============  ==========
"""

import enum
from collections.abc import Iterator, Mapping

import msgspec

from loden.address import Family, Prefix
from loden.network import Network

#: kube-proxy's mark on packets that it masquerades itself, and the mask that keeps other bits out.
SERVICE_MARK = 0x4000

MULTICAST = {Family.IPV4: Prefix.parse("224.0.0.0/4"), Family.IPV6: Prefix.parse("ff00::/8")}


class FirewallOptions(msgspec.Struct, frozen=True):
    """What the agent was told about the firewall (COMPAT §9).

    Args:
        masquerade: ``--ip-masq``.
        exclude: ``--ip-masq-exclude``: destinations that see the container's own address.
        is_fully_random: not ``--ip-masq-fully-random-disable``.
        forward: ``--iptables-forward-rules``.
        resync_s: ``--iptables-resync``: seconds between looks at the rules.
    """

    masquerade: bool = False
    exclude: tuple[Prefix, ...] = ()
    is_fully_random: bool = True
    forward: bool = True
    resync_s: float = 5.0


class Verdict(enum.StrEnum):
    """What happens to a packet that a rule matches."""

    ACCEPT = "accept"
    RETURN = "return"
    MASQUERADE = "masquerade"


class Purpose(enum.Enum):
    """What a chain is for."""

    MASQUERADE = enum.auto()
    FORWARD = enum.auto()


class Side(msgspec.Struct, frozen=True):
    """One side of a packet: addresses in a range, or all but those."""

    prefix: Prefix
    is_outside: bool = False

    def __str__(self) -> str:
        return f"not {self.prefix}" if self.is_outside else str(self.prefix)


class Rule(msgspec.Struct, frozen=True):
    """One rule; what is None or False matches every packet.

    Args:
        verdict: for what matches.
        source, destination: of the packet.
        is_marked: matches what carries :data:`SERVICE_MARK`, whatever its other bits.
        is_fully_random: masquerade with ports that are random over the whole range.
    """

    verdict: Verdict
    source: Side | None = None
    destination: Side | None = None
    is_marked: bool = False
    is_fully_random: bool = False

    def __str__(self) -> str:
        words = [
            f"from {self.source}" if self.source else "",
            f"to {self.destination}" * bool(self.destination),
        ]
        words.append(f"with mark {SERVICE_MARK:#x}" * self.is_marked)
        verdict = f"{self.verdict}{', any port' * self.is_fully_random}"
        return f"{' '.join(filter(None, words)) or 'all'}: {verdict}"


class RuleSet(msgspec.Struct, frozen=True):
    """What one chain holds, in order; without rules there is no such chain."""

    family: Family
    purpose: Purpose
    rules: tuple[Rule, ...] = ()


def make_rules(
    told: FirewallOptions, network: Network, subnets: Mapping[Family, Prefix]
) -> tuple[RuleSet, ...]:
    """Every chain of both families; those that shall not be there have no rules.

    Args:
        told: what the agent was told.
        network: says which families are enabled; one that is not gets no rules, whatever range the
            configuration has for it.
        subnets: this host's; a family without one is not masqueraded.
    """
    exclude = frozenset(told.exclude + network.masquerade_exclude)
    return tuple(
        RuleSet(
            family,
            purpose,
            tuple(make(told, cluster.network, subnets.get(family), exclude)) if cluster else (),
        )
        for family in Family
        for cluster in (network.range_of(family),)
        for purpose, make in _MAKERS.items()
    )


def _masquerade(
    told: FirewallOptions, cluster: Prefix, own: Prefix | None, exclude: frozenset[Prefix]
) -> Iterator[Rule]:
    if own is None or not told.masquerade:
        return
    in_cluster, outside = Side(cluster), Side(cluster, is_outside=True)
    not_multicast = Side(MULTICAST[cluster.family], is_outside=True)
    yield Rule(Verdict.RETURN, is_marked=True)
    yield Rule(Verdict.RETURN, Side(own), in_cluster)
    yield Rule(Verdict.RETURN, in_cluster, Side(own))
    yield Rule(Verdict.RETURN, outside, Side(own))
    for prefix in sorted(prefix for prefix in exclude if prefix.family is cluster.family):
        # A range of all addresses is no condition: no tool prints one, and the rule would never look right.
        yield Rule(Verdict.RETURN, in_cluster, Side(prefix) if prefix.length else None)
    is_random = told.is_fully_random
    yield Rule(Verdict.MASQUERADE, in_cluster, not_multicast, is_fully_random=is_random)
    yield Rule(Verdict.MASQUERADE, outside, in_cluster, is_fully_random=is_random)


def _forward(
    told: FirewallOptions, cluster: Prefix, _own: Prefix | None, _exclude: frozenset[Prefix]
) -> Iterator[Rule]:
    if told.forward:
        yield Rule(Verdict.ACCEPT, Side(cluster))
        yield Rule(Verdict.ACCEPT, None, Side(cluster))


_MAKERS = {Purpose.MASQUERADE: _masquerade, Purpose.FORWARD: _forward}
