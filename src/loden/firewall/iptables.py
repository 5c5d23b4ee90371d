# SPDX-License-Identifier: Apache-2.0
"""The rules in iptables, of either kind: two chains of our own, and one jump to each (COMPAT §9.1).

A transaction flushes and fills our chain, so nothing of an earlier network or subnet outlives it. Of the
chains that all share, only what is marked as ours is touched: jumps to our chains, and rules with our comment
(early flannel had no chains of its own).
"""

import itertools
import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from loden.address import Family
from loden.errors import FirewallError
from loden.firewall.programs import Change, Kind, Program, run
from loden.firewall.rules import SERVICE_MARK, Purpose, Rule, RuleSet, Verdict

#: Seconds to wait for the xtables lock; whoever calls tries again, and is not blocked in between.
_WAIT_S = 1

_LEGACY_TABLES = {Family.IPV4: "ip_tables_names", Family.IPV6: "ip6_tables_names"}


class Chain(msgspec.Struct, frozen=True):
    """A chain of ours.

    Args:
        table: that it is in.
        base: the chain that jumps to it.
        name: of ours.
        comment: on every rule of ours.
    """

    table: str
    base: str
    name: str
    comment: str


CHAINS = {
    Purpose.MASQUERADE: Chain("nat", "POSTROUTING", "FLANNEL-POSTRTG", "flanneld masq"),
    Purpose.FORWARD: Chain("filter", "FORWARD", "FLANNEL-FWD", "flanneld forward"),
}

#: What every line that concerns us has in it.
MARKS = ("FLANNEL-", "flanneld ")


def render(wanted: RuleSet) -> str:
    """The payload for ``iptables-restore --noflush`` that makes a chain where nothing of ours is."""
    return _payload(CHAINS[wanted.purpose], compare(wanted, ()))


def compare(wanted: RuleSet, standing: Sequence[str]) -> list[str]:
    """The lines that turn what stands into what is wanted; none where it is that already, in this order.

    Args:
        wanted: what one chain shall hold.
        standing: the lines of ``iptables-save`` or ``iptables -S`` that concern it.
    """
    chain = CHAINS[wanted.purpose]
    is_there = any(
        line.split()[:2] == ["-N", chain.name] or line.startswith(f":{chain.name} ") for line in standing
    )
    rules = [line for line in standing if line.startswith(f"-A {chain.name} ")]
    ours = [line for line in standing if line.startswith(f"-A {chain.base} ") and _is_ours(chain, line)]
    declare = f":{chain.name} - [0:0]"
    if not wanted.rules:
        return [declare, *map(_delete, ours), f"-X {chain.name}"] if is_there or ours else []
    jump = _jump(chain)
    fill = [_render_rule(chain, rule) for rule in wanted.rules]
    has_jump = [_options(line) for line in ours] == [_options(jump)]
    if is_there and has_jump and [_options(line) for line in rules] == [_options(line) for line in fill]:
        return []
    return [declare, *fill] if has_jump else [declare, *map(_delete, ours), jump, *fill]


class Iptables:
    """One kind of iptables.

    Args:
        program: which.
    """

    def __init__(self, program: Program) -> None:
        self._program = program

    async def difference(self, wanted: Sequence[RuleSet]) -> list[Change]:
        """What to change so that these chains are as wanted; nothing where they are.

        Raises:
            FirewallError: what stands cannot be read.
        """
        changes = []
        for family in dict.fromkeys(one.family for one in wanted):
            sets = [one for one in wanted if one.family is family]
            standing = await self._read(family, sets)
            for one in sets:
                chain = CHAINS[one.purpose]
                lines = compare(one, standing.get(chain.table, ()))
                if lines:
                    command = (f"{self._program.path_of(family)}-restore", "--noflush", f"--wait={_WAIT_S}")
                    changes.append(Change(command, _payload(chain, lines)))
        return changes

    async def _read(self, family: Family, sets: Sequence[RuleSet]) -> dict[str, list[str]]:
        """The lines that concern us, by table.

        The cheapest way differs. Legacy fetches whole tables whatever is asked for, so one program does for
        all chains; with nf_tables a single chain is a hundredth of the work (``bench/firewall.py``).
        """
        is_wanted = any(one.rules for one in sets)
        is_legacy = self._program.kind is Kind.IPTABLES_LEGACY
        has_program = bool(self._program.path if family is Family.IPV4 else self._program.path_ipv6)
        if not is_wanted and (not has_program or (is_legacy and not legacy_tables(family))):
            return {}  # a program that is not there has left nothing
        path = self._program.path_of(family)
        if is_legacy:
            return _by_table((await _list(f"{path}-save")).splitlines())
        found: dict[str, list[str]] = {}
        for one in sets:
            chain = CHAINS[one.purpose]
            # To list a chain that is not there is an error; that there is no base chain is one only to us.
            base = await _list(path, "-t", chain.table, "-S", chain.base, may_fail=not one.rules)
            own = await _list(path, "-t", chain.table, "-S", chain.name, may_fail=True)
            found[chain.table] = _concerning_us([*base.splitlines(), *own.splitlines()])
        return found


async def _list(*command: str, may_fail: bool = False) -> str:
    done = await run(*command)
    if done.status and not may_fail:
        raise FirewallError(
            f"list rules with {' '.join((os.path.basename(command[0]), *command[1:]))}: {done.complaint}",
            hint="the kernel may lack NAT, or a rule in there is none that iptables can show",
        )
    return done.text


def _by_table(lines: Sequence[str]) -> dict[str, list[str]]:
    """The lines of ``iptables-save`` that concern us, by table."""
    starts = [place for place, line in enumerate(lines) if line.startswith("*")]
    return {
        lines[start].removeprefix("*"): _concerning_us(lines[start:end])
        for start, end in itertools.pairwise([*starts, len(lines)])
    }


def _concerning_us(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if MARKS[0] in line or MARKS[1] in line]


def legacy_tables(family: Family) -> frozenset[str]:
    """The legacy tables that this network namespace has; asking for one by program would make it."""
    try:
        return frozenset(Path("/proc/thread-self/net", _LEGACY_TABLES[family]).read_text().split())
    except OSError:
        return frozenset()


def _payload(chain: Chain, lines: Sequence[str]) -> str:
    return "\n".join((f"*{chain.table}", *lines, "COMMIT", "")) if lines else ""


def _jump(chain: Chain) -> str:
    return f'-A {chain.base} -m comment --comment "{chain.comment}" -j {chain.name}'


def _delete(line: str) -> str:
    return f"-D{line.removeprefix('-A')}"


def _render_rule(chain: Chain, rule: Rule) -> str:
    return " ".join(
        (f"-A {chain.name}", *_matches(rule), f'-m comment --comment "{chain.comment}"', *_target(rule))
    )


def _matches(rule: Rule) -> Iterator[str]:
    for letter, side in (("-s", rule.source), ("-d", rule.destination)):
        if side is not None:
            yield f"{'! ' * side.is_outside}{letter} {side.prefix}"
    if rule.is_marked:
        yield f"-m mark --mark {SERVICE_MARK:#x}/{SERVICE_MARK:#x}"


def _target(rule: Rule) -> Iterator[str]:
    yield f"-j {rule.verdict.upper()}"
    if rule.verdict is Verdict.MASQUERADE and rule.is_fully_random:
        yield "--random-fully"


def _is_ours(chain: Chain, line: str) -> bool:
    options = _options(line)
    return ("-j", chain.name) in options or ("--comment", chain.comment) in options


def _options(line: str) -> frozenset[tuple[str, ...]]:
    """A rule without regard to the order in which its options are printed, which differs among versions."""
    options: list[list[str]] = []
    negation = ""
    for word in _words(line):
        if word == "!":
            negation = "! "  # of the option behind it
        elif word.startswith("-") or not options:
            options.append([negation + word])
            negation = ""
        else:
            options[-1].append(word)
    return frozenset(tuple(option) for option in options)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # no rule of ours has quotes that do not match
        return [line]
