# SPDX-License-Identifier: Apache-2.0
"""Our chains in the tables of iptables with nf_tables, by nft, on a host without such an iptables.

What iptables left behind is removed, and the network's packets are accepted where iptables' FORWARD would
drop them. The rules are such that iptables, if it is there after all, can show them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from loden.firewall.iptables import CHAINS, Chain
from loden.firewall.nftables import WORDS, expression, words
from loden.firewall.programs import Change, Program, run
from loden.firewall.rules import RuleSet


class IptablesByNft:
    """The chains of ours in the tables of iptables, as nft sees them.

    Args:
        program: nft.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    async def difference(self, wanted: Sequence[RuleSet]) -> list[Change]:
        """What to change so that these chains are as wanted; those without rules, and jumps to them, go.

        A chain is only filled where the chain that jumps to it is there.
        """
        changes = []
        for one in wanted:
            chain = CHAINS[one.purpose]
            table = f"{WORDS[one.family]} {chain.table}"
            base, own = await self._list(table, chain.base), await self._list(table, chain.name)
            if one.rules and base is not None:
                lines = _fill(one, chain, base, own)
            else:
                lines = [] if own is None else [*_unjump(table, chain, base or ()), *_remove(table, chain)]
            if lines:
                changes.append(Change((self._program.path, "-f", "-"), "\n".join((*lines, ""))))
        return changes

    async def _list(self, table: str, chain: str) -> list[Any] | None:
        """The rules of a chain; None where it is not there."""
        done = await run(self._program.path, "-j", "list", "chain", *table.split(), chain)
        if done.status:
            return None
        return [item["rule"] for item in msgspec.json.decode(done.text)["nftables"] if "rule" in item]


def _fill(one: RuleSet, chain: Chain, base: Sequence[Any], own: Sequence[Any] | None) -> list[str]:
    """The lines that make a chain and one jump to it; none where both are as they should be."""
    table = f"{WORDS[one.family]} {chain.table}"
    has_jump = len(list(_unjump(table, chain, base))) == 1
    wanted = [list(expression(one.family, rule)) for rule in one.rules]
    if has_jump and own is not None and [rule["expr"] for rule in own] == wanted:
        return []
    lines = [f"add chain {table} {chain.name}", f"flush chain {table} {chain.name}"]
    lines += [f"add rule {table} {chain.name} {' '.join(words(one.family, rule))}" for rule in one.rules]
    if not has_jump:
        lines += [*_unjump(table, chain, base), f"add rule {table} {chain.base} jump {chain.name}"]
    return lines


def _unjump(table: str, chain: Chain, base: Sequence[Any]) -> Iterator[str]:
    """The lines that remove the jumps to a chain from the rules that have them."""
    for rule in base:
        if {"jump": {"target": chain.name}} in rule["expr"]:
            yield f"delete rule {table} {chain.base} handle {rule['handle']}"


def _remove(table: str, chain: Chain) -> tuple[str, str]:
    return f"flush chain {table} {chain.name}", f"delete chain {table} {chain.name}"
