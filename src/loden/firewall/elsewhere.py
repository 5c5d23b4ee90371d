# SPDX-License-Identifier: Apache-2.0
"""The firewalls that are not in use: what of ours is left there goes, what others have there is said.

One exception. A packet has to pass every firewall, so an accept here does not help where the FORWARD chain of
an iptables that is not in use drops by policy, as Docker has it. There our forward rules stand as well.
"""

import logging
import time
from collections.abc import Mapping, Sequence

from loden.address import Family
from loden.firewall.choice import Census
from loden.firewall.nfnetlink import Place
from loden.firewall.nftables import WORDS, words
from loden.firewall.programs import INSTALL, Kind, Tool
from loden.firewall.rules import Purpose, RuleSet
from loden.firewall.view import Legacy, View
from loden.retry import Backoff

log = logging.getLogger(__name__)

#: Between two removals of rules that somebody writes again and again: this is no fight.
_REMOVE_FIRST_S, _REMOVE_MOST_S = 5.0, 600.0
#: Chains of nftables may be thousands, and may change all the time: to read them takes a hundredth of a core.
_CHAINS_SPACING = 100


class Elsewhere:
    """Looks after the firewalls that are not in use.

    Args:
        view: of all of them.
    """

    def __init__(self, view: View) -> None:
        self._view = view
        self._said: set[str] = set()
        self._foreign: set[Kind] = set()  # who has rules of others, as far as it was said
        self._tables: frozenset[str] = frozenset()
        self._chains: Mapping[str, int] | None = None  # tables whose chains were read
        self._chains_due = 0.0
        self._forwarding: Sequence[Place] = ()  # base chains of others, as last read
        self._backoffs: dict[Kind, Backoff] = {}
        self._removals_due: dict[Kind, float] = {}

    def know(self, census: Census) -> None:
        """Take for said what the choice of a tool has said."""
        counts = {Kind.IPTABLES_NFT: census.iptables_nft, Kind.IPTABLES_LEGACY: census.iptables_legacy}
        self._foreign = {kind for kind, count in counts.items() if count}
        self._tables = census.nft_tables

    async def tend(
        self,
        kind: Kind | None,
        tools: Mapping[Kind, Tool],
        wanted: Sequence[RuleSet],
        *,
        legacy: Legacy | None,
        is_new: bool,
        changed_by: str = "",
    ) -> bool:
        """Put everything right that is not in the tool in use; whether that is all done.

        Args:
            kind: in use; None for no rules at all.
            tools: that work.
            wanted: all chains.
            legacy: as :meth:`View.legacy` has it.
            is_new: look closely, for what an earlier start may have left.
            changed_by: who changed nftables of late.

        Raises:
            FirewallError: a program failed.
        """
        drops = self._view.drops(legacy)
        holders = await self._view.holders(legacy)
        is_done = True
        for other in Kind:
            if other is kind:
                continue
            sets = [_there(one, drops.get(other, frozenset())) for one in wanted]
            tool = tools.get(other)
            if filled := [one for one in sets if one.rules]:
                await self._add(other, tool, filled)
            if tool is None and other in holders:
                self._say_once(
                    f"firewall rules of ours are in {other}, and no program to remove them works: {INSTALL}"
                )
            elif tool is not None and (is_new or other in holders):
                emptied = [one for one in sets if not one.rules]
                is_done &= await self._remove(other, tool, emptied, is_new=is_new, changed_by=changed_by)
        if kind is not None:
            is_done &= await self._report(kind, wanted, changed_by)
        return is_done

    async def _add(self, kind: Kind, tool: Tool | None, sets: Sequence[RuleSet]) -> None:
        families = " and ".join(str(one.family) for one in sets)
        if tool is None:
            self._say_once(
                f"firewall: FORWARD of {kind} drops {families} by policy, and no program that works is there "
                f"to accept the network's packets in it: install {kind}, or set its policy to ACCEPT"
            )
            return
        changes = await tool.difference(sets)
        for change in changes:
            await change.apply()
        if changes:
            log.info(
                "firewall forward rules written to %s too: its FORWARD drops %s by policy", kind, families
            )

    async def _remove(
        self, kind: Kind, tool: Tool, sets: Sequence[RuleSet], *, is_new: bool, changed_by: str
    ) -> bool:
        """Remove our rules; False where that has to wait."""
        changes = await tool.difference(sets)
        if not changes:
            return True
        now = time.monotonic()
        if not is_new:
            if now < self._removals_due.get(kind, 0.0):
                return False
            backoff = self._backoffs.setdefault(kind, Backoff(first_s=_REMOVE_FIRST_S, most_s=_REMOVE_MOST_S))
            self._removals_due[kind] = now + backoff.next_s()
        by = f", changed_by={changed_by}" if changed_by else ""
        log.warning("firewall rules of ours found in %s: removing them%s", kind, by)
        for change in changes:
            await change.apply()
        return True

    async def _report(self, kind: Kind, wanted: Sequence[RuleSet], changed_by: str) -> bool:
        """Say whose rules have come since the choice; False where a look has to wait."""
        counts = {
            Kind.IPTABLES_NFT: self._view.count_iptables_nft,
            Kind.IPTABLES_LEGACY: self._view.count_legacy,
        }
        for other, count in counts.items():
            if other is not kind and other not in self._foreign and (found := await count()):
                self._foreign.add(other)
                log.warning(
                    "firewall rules of others found in %s count=%d changed_by=%s: packets meet them beside "
                    "ours in %s; restart the agent to have it follow what most rules use",
                    other, found, changed_by or "?", kind,
                )  # fmt: skip
        tables = await self._view.foreign_tables()
        if kind is not Kind.NFT and (fresh := tables.keys() - self._tables):
            log.info(
                "firewall tables of others found in nft: %s; packets meet them beside ours in %s",
                ", ".join(sorted(fresh)),
                kind,
            )
        self._tables = frozenset(tables)
        is_current = tables == self._chains or await self._read_chains(tables)
        # A policy changes without anything being added: these few are looked at each time.
        for place in self._view.dropping(self._forwarding):
            remedy = _remedy(place, wanted)
            if remedy:
                self._say_once(
                    f"firewall chain '{place}' drops by policy, and what is accepted elsewhere does not "
                    f"count in it: unless it accepts the network's packets already, run: {remedy}"
                )
        return is_current

    async def _read_chains(self, tables: Mapping[str, int]) -> bool:
        """Find the base chains of others; False where it is too early to read all chains again."""
        before = time.monotonic()
        if before < self._chains_due:
            return False
        found = await self._view.forwarding_chains()
        self._chains_due = time.monotonic() + _CHAINS_SPACING * (time.monotonic() - before)
        if found is None:
            return False
        self._chains, self._forwarding = tables, found
        return True

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            log.warning("%s", text)


def _there(one: RuleSet, drops: frozenset[Family]) -> RuleSet:
    """What of a chain shall be where our rules are not."""
    is_needed = one.purpose is Purpose.FORWARD and one.family in drops
    return one if is_needed else RuleSet(one.family, one.purpose)


def _remedy(place: Place, wanted: Sequence[RuleSet]) -> str:
    """The commands that have a chain of nftables accept what our forward rules accept."""
    return "; ".join(
        f"nft insert rule {place} {' '.join(words(one.family, rule))}"
        for one in wanted
        if one.purpose is Purpose.FORWARD and place.family in ("inet", WORDS[one.family])
        for rule in one.rules
    )
