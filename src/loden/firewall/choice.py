# SPDX-License-Identifier: Apache-2.0
"""Which tool a host gets: the one that its other rules are written with, as long as it works."""

from collections.abc import Sequence

import msgspec

from loden.errors import FirewallError
from loden.firewall.nftables import TABLES, WORDS
from loden.firewall.programs import Kind, Program

OUR_TABLES = frozenset(f"{WORDS[family]} {name}" for family, name in TABLES.items())

#: Tables that iptables with nf_tables makes for itself.
IPTABLES_TABLES = frozenset(
    f"{family} {table}"
    for family in ("ip", "ip6", "arp", "bridge")
    for table in ("filter", "nat", "mangle", "raw", "security", "broute")
)


class Census(msgspec.Struct, frozen=True):
    """Whose rules a host has, ours not counted.

    Args:
        nft_tables: that no iptables made, as nft names them.
        iptables_nft, iptables_legacy: how many rules.
    """

    nft_tables: frozenset[str] = frozenset()
    iptables_nft: int = 0
    iptables_legacy: int = 0


class Choice(msgspec.Struct, frozen=True):
    """The tool, and why that one."""

    program: Program
    reason: str


def choose(programs: Sequence[Program], census: Census, *, enable_nftables: bool) -> Choice:
    """The tool for a host.

    Args:
        programs: that are installed, the host's own iptables first.
        census: of its rules.
        enable_nftables: what the network's configuration says.

    Raises:
        FirewallError: no tool works; says what each one lacks.
    """
    usable = {program.kind: program for program in programs if not program.flaw}
    flaws = [f"{program.path}: {program.flaw}" for program in programs if program.flaw]
    if not usable or (enable_nftables and Kind.NFT not in usable):
        wanted = "nft" if enable_nftables else "firewall tool"
        raise FirewallError(
            f"find a {wanted}: {'; '.join(flaws) or f'no {wanted} is installed'}",
            hint="install nftables 1.0.1 or newer"
            + ("" if enable_nftables else ", or iptables 1.6.2 or newer, or switch off what needs it:"
               " --iptables-forward-rules=false, --ip-masq=false"),
        )  # fmt: skip
    if enable_nftables:
        return Choice(usable[Kind.NFT], f"EnableNFTables is true{_others(census)}")
    for kind, reason in _preferences(census):
        if kind in usable:
            return Choice(usable[kind], reason)
    first = next(iter(usable.values()))
    reason = "it is the host's iptables" if first.kind is not Kind.NFT else "there is no iptables that works"
    return Choice(first, f"no other rules decide, {reason}{_others(census)}")


def _preferences(census: Census) -> list[tuple[Kind, str]]:
    """Kinds that the host's rules speak for, the strongest first."""
    counts = [(Kind.IPTABLES_NFT, census.iptables_nft), (Kind.IPTABLES_LEGACY, census.iptables_legacy)]
    counts.sort(key=lambda pair: -pair[1])
    if counts[0][1] == counts[1][1]:
        counts = []
    found = [(kind, f"of other programs' rules {_listed(counts)}") for kind, count in counts if count]
    if census.nft_tables and not census.iptables_nft and not census.iptables_legacy:
        found.append(
            (Kind.NFT, f"{len(census.nft_tables)} tables of other programs use it, and none uses iptables")
        )
    return found


def _others(census: Census) -> str:
    """What the choice did not follow: packets meet those rules as well, whichever tool ours are in."""
    counts = [(Kind.IPTABLES_NFT, census.iptables_nft), (Kind.IPTABLES_LEGACY, census.iptables_legacy)]
    listed = _listed(counts)
    return f"; of other programs' rules {listed}" if listed else ""


def _listed(counts: Sequence[tuple[Kind, int]]) -> str:
    return " and ".join(f"{count} are in {kind}" for kind, count in counts if count)
