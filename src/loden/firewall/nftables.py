# SPDX-License-Identifier: Apache-2.0
"""The rules in nftables: one table of our own for a family, with a base chain for each purpose (COMPAT §9.2).

A transaction makes the whole table anew, so nothing of an earlier network or subnet, and nothing that
somebody else put into our table, outlives it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from loden.address import Family, format_address
from loden.errors import FirewallError
from loden.firewall.programs import Change, Program, run
from loden.firewall.rules import SERVICE_MARK, Purpose, Rule, RuleSet, Verdict

TABLES = {Family.IPV4: "flannel-ipv4", Family.IPV6: "flannel-ipv6"}
#: What nft calls a family: of tables, and of the header whose addresses a rule looks at.
WORDS = {Family.IPV4: "ip", Family.IPV6: "ip6"}


class Chain(msgspec.Struct, frozen=True):
    """A base chain of ours; *number* is what nft lists for the name of its priority."""

    name: str
    type: str
    hook: str
    priority: str
    number: int


CHAINS = {
    Purpose.FORWARD: Chain("forward", "filter", "forward", "filter", 0),
    Purpose.MASQUERADE: Chain("postrtg", "nat", "postrouting", "srcnat", 100),
}


def render(family: Family, wanted: Sequence[RuleSet]) -> str:
    """The script for ``nft -f`` that puts a family's table in the place of whatever table has its name.

    Args:
        family: of the table.
        wanted: its chains; without any rules the table goes.
    """
    table = f"{WORDS[family]} {TABLES[family]}"
    lines = [f"add table {table}", f"delete table {table}"]  # deleting what is not there would be an error
    if any(one.rules for one in wanted):
        lines += [f"table {table} {{", f'\tcomment "rules for {TABLES[family]}"']
        for one in wanted:
            lines += _render_chain(one) if one.rules else ()
        lines.append("}")
    return "\n".join((*lines, ""))


class Nftables:
    """The program nft.

    Args:
        program: where it is.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    async def difference(self, wanted: Sequence[RuleSet]) -> list[Change]:
        """What to change so that our tables are as wanted; nothing where they are.

        Raises:
            FirewallError: what stands cannot be read.
        """
        changes = []
        for family in dict.fromkeys(one.family for one in wanted):
            sets = [one for one in wanted if one.family is family]
            if not is_same(sets, await self._read(family)):
                changes.append(Change((self._program.path, "-f", "-"), render(family, sets)))
        return changes

    async def _read(self, family: Family) -> list[Any]:
        """The objects in our table, as nft lists them; none where there is no such table."""
        table = (WORDS[family], TABLES[family])
        done = await run(self._program.path, "-j", "list", "table", *table)
        if done.status == 0:
            try:
                return list(msgspec.json.decode(done.text)["nftables"])
            except (msgspec.DecodeError, TypeError, KeyError) as error:
                raise FirewallError(
                    f"list table {' '.join(table)} with nft: its answer cannot be read: {error}"
                ) from error
        if "No such file or directory" in done.complaint or "not supported" in done.complaint:
            return []  # the latter where the kernel lacks the family
        raise FirewallError(
            f"list table {' '.join(table)} with nft: {done.complaint}",
            hint="an nft without JSON does not do" if "JSON" in done.complaint else "",
        )


def is_same(wanted: Sequence[RuleSet], listed: Sequence[Any]) -> bool:
    """Whether a table holds what is wanted, in order, and nothing else.

    Args:
        wanted: all chains of one family's table.
        listed: the objects of ``nft -j list table``.
    """
    chains: dict[str, tuple[object, ...]] = {}
    rules: dict[str, list[object]] = {}
    has_table = False
    for item in listed:
        ((kind, value),) = item.items()
        if kind == "table":
            has_table = True
        elif kind == "chain":
            chains[value["name"]] = tuple(value.get(key) for key in ("type", "hook", "prio", "policy"))
        elif kind == "rule":
            rules.setdefault(value["chain"], []).append([_plain(part) for part in value["expr"]])
        elif kind != "metainfo":
            return False  # a set, a map: somebody else's
    sets = [one for one in wanted if one.rules]
    specs = {
        chain.name: (chain.type, chain.hook, chain.number, "accept")
        for chain in (CHAINS[one.purpose] for one in sets)
    }
    expected = {
        CHAINS[one.purpose].name: [list(expression(one.family, rule)) for rule in one.rules] for one in sets
    }
    return has_table == bool(sets) and chains == specs and rules == expected


def _render_chain(wanted: RuleSet) -> Iterator[str]:
    chain = CHAINS[wanted.purpose]
    yield f"\tchain {chain.name} {{"
    yield f"\t\ttype {chain.type} hook {chain.hook} priority {chain.priority}; policy accept;"
    for rule in wanted.rules:
        yield f"\t\t{' '.join(words(wanted.family, rule))}"
    yield "\t}"


def words(family: Family, rule: Rule) -> Iterator[str]:
    """A rule as nft reads it."""
    if rule.is_marked:
        yield f"meta mark & {SERVICE_MARK:#x} == {SERVICE_MARK:#x}"
    for field, side in (("saddr", rule.source), ("daddr", rule.destination)):
        if side is not None:
            yield f"{WORDS[family]} {field} {'!= ' * side.is_outside}{side.prefix}"
    yield rule.verdict
    if rule.is_fully_random:
        yield "fully-random"


def expression(family: Family, rule: Rule) -> Iterator[Mapping[str, Any]]:
    """A rule in the form that :func:`_plain` gives to what nft lists."""
    if rule.is_marked:
        masked = {"&": [{"meta": {"key": "mark"}}, SERVICE_MARK]}
        yield {"match": {"op": "==", "left": masked, "right": SERVICE_MARK}}
    for field, side in (("saddr", rule.source), ("daddr", rule.destination)):
        if side is None:
            continue
        address = format_address(side.prefix.address)
        is_one = side.prefix.length == family.bits
        yield {
            "match": {
                "op": "!=" if side.is_outside else "==",
                "left": {"payload": {"protocol": WORDS[family], "field": field}},
                "right": address if is_one else {"prefix": {"addr": address, "len": side.prefix.length}},
            }
        }
    flags = {"flags": ["fully-random"]} if rule.is_fully_random else None
    yield {str(rule.verdict): flags if rule.verdict is Verdict.MASQUERADE else None}


def _plain(part: Any) -> Any:
    """One statement of a rule; a single flag is a list or not, as the version of nft has it."""
    masquerade = part.get(Verdict.MASQUERADE)
    if isinstance(masquerade, dict) and isinstance(masquerade.get("flags"), str):
        return {str(Verdict.MASQUERADE): {**masquerade, "flags": [masquerade["flags"]]}}
    return part
