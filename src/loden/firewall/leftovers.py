# SPDX-License-Identifier: Apache-2.0
"""What iptables with nf_tables left behind, removed by nft on a host that has no such iptables (any more)."""

from collections.abc import Sequence
from typing import Any

import msgspec

from loden.firewall.iptables import CHAINS
from loden.firewall.nftables import WORDS
from loden.firewall.programs import Change, Program, run
from loden.firewall.rules import RuleSet


class Leftovers:
    """The chains of ours in the tables of iptables, as nft sees them.

    Args:
        program: nft.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    async def difference(self, wanted: Sequence[RuleSet]) -> list[Change]:
        """How to remove the chains for these purposes, and the jumps to them; whatever rules are wanted."""
        changes = []
        for one in wanted:
            chain = CHAINS[one.purpose]
            table = f"{WORDS[one.family]} {chain.table}"
            if await self._list(table, chain.name) is None:
                continue
            jumps = [
                f"delete rule {table} {chain.base} handle {rule['handle']}"
                for rule in await self._list(table, chain.base) or ()
                if {"jump": {"target": chain.name}} in rule["expr"]
            ]
            lines = (*jumps, f"flush chain {table} {chain.name}", f"delete chain {table} {chain.name}", "")
            changes.append(Change((self._program.path, "-f", "-"), "\n".join(lines)))
        return changes

    async def _list(self, table: str, chain: str) -> list[Any] | None:
        """The rules of a chain; None where it is not there."""
        done = await run(self._program.path, "-j", "list", "chain", *table.split(), chain)
        if done.status:
            return None
        return [item["rule"] for item in msgspec.json.decode(done.text)["nftables"] if "rule" in item]
