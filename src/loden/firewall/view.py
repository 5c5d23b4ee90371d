# SPDX-License-Identifier: Apache-2.0
"""What every firewall on the host holds, both kinds of iptables and nftables, seen without running a program.

Legacy iptables and nftables are two firewalls, and a packet has to pass both. Whoever keeps rules in one has
to know of the other: rules of ours there are left over, those of others decide as well, and a FORWARD chain
that drops there is not overruled by an accept here.
"""

import logging
from collections.abc import Mapping, Sequence

import msgspec

from loden.address import Family
from loden.errors import KernelError
from loden.firewall.choice import IPTABLES_TABLES, OUR_TABLES, Census
from loden.firewall.iptables import CHAINS, MARKS
from loden.firewall.legacy import LegacyTables, Size
from loden.firewall.nfnetlink import Nftables as Kernel
from loden.firewall.nfnetlink import Place
from loden.firewall.nftables import WORDS
from loden.firewall.programs import Kind
from loden.firewall.rules import Purpose

log = logging.getLogger(__name__)

_FORWARD = CHAINS[Purpose.FORWARD]
_MARKS = tuple(mark.encode() for mark in MARKS)


class Legacy(msgspec.Struct, frozen=True):
    """What legacy iptables holds, as far as it concerns us.

    Args:
        sizes: of every table.
        ours: the rules of our chains and the jumps to them, by family and table; where there are any.
        drops: families whose FORWARD chain has the policy DROP.
    """

    sizes: Mapping[tuple[Family, str], Size] = {}
    ours: Mapping[tuple[Family, str], tuple[bytes, ...]] = {}
    drops: frozenset[Family] = frozenset()


class View:
    """Of the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self._legacy = LegacyTables()
        try:
            self.kernel: Kernel | None = Kernel()
        except (OSError, KernelError) as error:
            log.info("nftables of this kernel cannot be listened to: %s", error)
            self.kernel = None

    def close(self) -> None:
        """Close the sockets; idempotent."""
        self._legacy.close()
        if self.kernel is not None:
            self.kernel.close()

    def generation(self) -> int | None:
        """The number of nftables' state, iptables' with nf_tables among it; None where there is none."""
        return self.kernel.generation() if self.kernel is not None else None

    def legacy(self, before: Legacy | None = None) -> Legacy | None:
        """What legacy iptables holds; None where we may not look.

        Args:
            before: an earlier answer, if a table that has the same size counts as the same but for its
                policy. Rules of ours do not appear without a change of size.
        """
        try:
            sizes = self._legacy.sizes()
            ours, drops = {}, set()
            for chain in CHAINS.values():
                for family in Family:
                    place = (family, chain.table)
                    if place not in sizes:
                        continue
                    if before and chain is not _FORWARD and before.sizes.get(place) == sizes[place]:
                        found = before.ours.get(place, ())
                    else:
                        table = self._legacy.read(*place)
                        found = table.ours(chain)
                        if chain is _FORWARD and table.drops(chain.base):
                            drops.add(family)
                    if found:
                        ours[place] = found
        except KernelError as error:
            log.debug("%s", error)
            return None
        return Legacy(sizes, ours, frozenset(drops))

    def drops(self, legacy: Legacy | None) -> dict[Kind, frozenset[Family]]:
        """For each kind of iptables, the families whose FORWARD chain has the policy DROP.

        Args:
            legacy: as :meth:`legacy` has it.
        """
        places = {Place(WORDS[family], _FORWARD.table, _FORWARD.base): family for family in Family}
        found = self.kernel.find_chains(tuple(places)) if self.kernel is not None else {}
        return {
            Kind.IPTABLES_NFT: frozenset(places[place] for place, one in found.items() if one.drops),
            Kind.IPTABLES_LEGACY: legacy.drops if legacy is not None else frozenset(),
        }

    async def holders(self, legacy: Legacy | None) -> frozenset[Kind]:
        """Where chains or tables of ours are.

        Args:
            legacy: as :meth:`legacy` has it.
        """
        found = {Kind.IPTABLES_LEGACY} if legacy is not None and legacy.ours else set()
        if self.kernel is not None:
            places = [
                Place(WORDS[family], chain.table, chain.name)
                for family in Family
                for chain in CHAINS.values()
            ]
            found |= {Kind.IPTABLES_NFT} if self.kernel.find_chains(places) else set()
            found |= {Kind.NFT} if OUR_TABLES & (await self.kernel.tables()).keys() else set()
        return frozenset(found)

    async def foreign_tables(self) -> dict[str, int]:
        """Tables of nftables that are neither ours nor iptables', with how much is in each."""
        tables = await self.kernel.tables() if self.kernel is not None else {}
        return {
            name: used
            for name, used in tables.items()
            if name not in IPTABLES_TABLES and name not in OUR_TABLES
        }

    async def count_iptables_nft(self) -> int:
        """How many rules of others are in the tables of iptables with nf_tables."""
        if self.kernel is None:
            return 0
        tables = sorted(IPTABLES_TABLES & (await self.kernel.tables()).keys())
        return sum([await self.kernel.count_rules(table, without=_MARKS) for table in tables])

    async def count_legacy(self) -> int:
        """How many rules of others are in legacy iptables; none where we may not look."""
        try:
            return sum(self._legacy.read(*place).count_foreign() for place in self._legacy.sizes())
        except KernelError:
            return 0

    async def census(self) -> Census:
        """Whose rules the host has."""
        return Census(
            nft_tables=frozenset(await self.foreign_tables()),
            iptables_nft=await self.count_iptables_nft(),
            iptables_legacy=await self.count_legacy(),
        )

    async def forwarding_chains(self) -> list[Place] | None:
        """Base chains of nftables for what is passed on, but iptables' and ours; None: not to be had now."""
        found = await self.kernel.forwarding_chains() if self.kernel is not None else ()
        if found is None:
            return None
        return [
            place
            for place in found
            if place.family in ("ip", "ip6", "inet")
            and f"{place.family} {place.table}" not in IPTABLES_TABLES | OUR_TABLES
        ]

    def dropping(self, places: Sequence[Place]) -> list[Place]:
        """Those of these base chains of nftables that drop by policy now what is passed on."""
        found = self.kernel.find_chains(places) if self.kernel is not None else {}
        return [place for place, one in found.items() if one.drops and one.forwards]
