# SPDX-License-Identifier: Apache-2.0
"""Keeps the rules standing: writes them, looks whether they still are as written, puts them back."""

import asyncio
import logging
import time
from collections.abc import Sequence

import msgspec

from loden.errors import FirewallError
from loden.firewall.by_nft import IptablesByNft
from loden.firewall.choice import choose
from loden.firewall.elsewhere import Elsewhere
from loden.firewall.iptables import Iptables
from loden.firewall.nftables import Nftables
from loden.firewall.programs import Change, Kind, Tool, find_programs
from loden.firewall.rules import RuleSet
from loden.firewall.view import Legacy, View
from loden.retry import Backoff, Trouble

log = logging.getLogger(__name__)

#: From a notification to the look it asks for, so that somebody who changes rules all the time costs us a
#: hundredth of a core and no more.
_SPACING_S = 0.3
_SAID_SPACING_S = 5.0
#: To write; to find that somebody else wrote at the same time, and write again; to see that it stands.
_PASSES = 3
_RETRY_FIRST_S, _RETRY_MOST_S = 0.5, 30.0


class _Seen(msgspec.Struct, frozen=True):
    """The state of all firewalls, as far as it can be seen without a program; None where it cannot.

    Args:
        generation: of nftables.
        legacy: legacy iptables' tables.
    """

    generation: int | None = None
    legacy: Legacy | None = None


class Statistics(msgspec.Struct, frozen=True):
    """What the keeper has seen.

    Args:
        tool: in use, or empty.
        is_standing: whether the rules stood when last looked at.
        repairs: how often they had to be put back.
        looks: how often they were listed.
    """

    tool: str
    is_standing: bool
    repairs: int
    looks: int


class Firewall:
    """The rules of the network namespace of the thread that makes it.

    Args:
        enable_nftables: what the network's configuration says.
        resync_s: seconds between looks; with nft, notifications of the kernel's come before that.
    """

    def __init__(self, *, enable_nftables: bool = False, resync_s: float = 5.0) -> None:
        self._enable_nftables = enable_nftables
        self._resync_s = resync_s
        self._wanted: tuple[RuleSet, ...] = ()
        self._settled: tuple[RuleSet, ...] | None = ()  # what was made to stand
        self._kind: Kind | None = None
        self._tools: dict[Kind, Tool] = {}
        self._verified = _Seen()  # when our rules stood
        self._tended: _Seen | None = None  # when all was well in the firewalls that are not in use
        self._legacy: Legacy | None = None  # as last seen
        self._heard: tuple[str, ...] = ()
        self._wake = asyncio.Event()
        self._is_standing = False
        self._repairs = self._looks = 0
        self._said = float("-inf")  # when drift was said last
        self._view = View()
        self._kernel = self._view.kernel
        self._elsewhere = Elsewhere(self._view)

    def close(self) -> None:
        """Close the sockets; the rules stay. Idempotent."""
        self._view.close()

    @property
    def statistics(self) -> Statistics:
        return Statistics(self._kind or "", self._is_standing, self._repairs, self._looks)

    def want(self, wanted: Sequence[RuleSet]) -> None:
        """Make these the rules, of :func:`loden.firewall.rules.make_rules`, in place of all earlier ones.

        Takes effect with the next :meth:`settle` or in :meth:`run`. Does not block.
        """
        new = tuple(wanted)
        if new != self._wanted:
            self._wanted, self._settled = new, None
            self._wake.set()

    async def run(self) -> None:
        """Keep the rules standing, for ever; what does not work is said once, and tried again."""
        loop = asyncio.get_running_loop()
        trouble = Trouble(log, "keeping the firewall's rules")
        backoff = Backoff(first_s=_RETRY_FIRST_S, most_s=_RETRY_MOST_S)
        if self._kernel is not None:
            loop.add_reader(self._kernel.fileno(), self._hear)
        try:
            while True:
                self._wake.clear()
                try:
                    await self.settle()
                except FirewallError as error:
                    trouble.happened(error)
                    await self._wait(backoff.next_s())
                else:
                    trouble.ended()
                    backoff.reset()
                    await self._wait(self._resync_s)
        finally:
            if self._kernel is not None:
                loop.remove_reader(self._kernel.fileno())

    async def settle(self) -> None:
        """Make what is wanted stand, and remove our rules from wherever else they are.

        Raises:
            FirewallError: it does not stand.
        """
        wanted = self._wanted
        is_new = wanted != self._settled
        if self._kind is None and not is_new:
            self._is_standing = True
            return
        culprits = self._take_culprits()
        if is_new:
            self._is_standing = False
            await self._equip(wanted)
        seen = self._see()
        if self._kind is not None and (is_new or not self._is_verified(seen)):
            self._is_standing = False
            sets = wanted if is_new else tuple(one for one in wanted if one.rules)
            await self._make_stand(self._tools[self._kind], sets, is_new=is_new, culprits=culprits)
            seen = self._verified
        if is_new or seen != self._tended:
            # Only now: the new rules stand before the old ones go.
            is_done = await self._elsewhere.tend(
                self._kind,
                self._tools,
                wanted,
                legacy=seen.legacy,
                is_new=is_new,
                changed_by=" ".join(culprits),
            )
            self._tended = seen if is_done else None
        self._settled = wanted
        self._take_culprits()  # our own programs among them
        self._is_standing = True
        if self._kind is Kind.NFT and self._view.generation() != seen.generation:
            self._wake.set()  # somebody wrote meanwhile; it may have been us

    async def _equip(self, wanted: Sequence[RuleSet]) -> None:
        """Find the tools, and choose one if there are rules to write."""
        programs = await find_programs()
        usable = {program.kind: program for program in programs if not program.flaw}
        self._tools = {
            kind: Nftables(program) if kind is Kind.NFT else Iptables(program)
            for kind, program in usable.items()
        }
        if Kind.NFT in usable:
            self._tools.setdefault(Kind.IPTABLES_NFT, IptablesByNft(usable[Kind.NFT]))
        before, self._kind = self._kind, None
        if any(one.rules for one in wanted):
            census = await self._view.census()
            choice = choose(programs, census, enable_nftables=self._enable_nftables)
            self._kind = choice.program.kind
            if self._kind is not before:
                log.info("firewall tool=%s path=%s: %s", self._kind, choice.program.path, choice.reason)
                self._elsewhere.know(census)

    async def _make_stand(
        self, tool: Tool, sets: Sequence[RuleSet], *, is_new: bool, culprits: Sequence[str]
    ) -> None:
        for turn in range(_PASSES):
            seen = self._see()
            changes, errors = await _differences(tool, sets)
            self._looks += 1
            if not changes and not errors:
                self._verified = seen
                return
            if turn == 0 and changes and not is_new:
                self._repairs += 1
                self._say_drifted(culprits)
            for change in changes:
                try:
                    await change.apply()
                except FirewallError as error:
                    errors.append(error)
            if errors:
                raise errors[0]
            if turn == 0 and is_new:
                log.info("firewall rules written tool=%s transactions=%d", self._kind, len(changes))
        again = " ".join(self._take_culprits()) or "not known which"
        raise FirewallError(
            f"keep rules with {self._kind}: they were written {_PASSES} times and do not stand",
            hint=f"another program changes them at once: {again}",
        )

    def _say_drifted(self, culprits: Sequence[str]) -> None:
        """Once in a while is enough where somebody undoes ours again and again."""
        now = time.monotonic()
        if now - self._said >= _SAID_SPACING_S:
            self._said = now
            log.warning(
                "firewall drift total=%d tool=%s changed_by=%s: putting our rules back",
                self._repairs, self._kind, " ".join(culprits) or "?",
            )  # fmt: skip

    def _see(self) -> _Seen:
        # Where our rules are, a table of the same size may yet be another one.
        before = None if self._kind is Kind.IPTABLES_LEGACY else self._legacy
        self._legacy = self._view.legacy(before)
        return _Seen(self._view.generation(), self._legacy)

    def _is_verified(self, seen: _Seen) -> bool:
        """Whether our rules cannot have changed since they stood."""
        if self._kind is Kind.IPTABLES_LEGACY:
            before, now = self._verified.legacy, seen.legacy
            return before is not None and now is not None and before.ours == now.ours
        return seen.generation is not None and seen.generation == self._verified.generation

    def _hear(self) -> None:
        """Somebody changed nftables. With iptables the look can wait: kube-proxy changes it all the time."""
        self._collect_culprits()
        if self._kind is Kind.NFT and self._is_standing:
            self._wake.set()

    def _collect_culprits(self) -> None:
        if self._kernel is not None:
            self._heard = (*self._heard, *self._kernel.take_culprits())[-_PASSES:]

    def _take_culprits(self) -> tuple[str, ...]:
        self._collect_culprits()
        heard, self._heard = self._heard, ()
        return tuple(dict.fromkeys(heard))

    async def _wait(self, pause_s: float) -> None:
        """Until the pause is over, other rules are wanted, or a notification is old enough to look."""
        try:
            async with asyncio.timeout(pause_s):
                await self._wake.wait()
        except TimeoutError:
            return
        if self._wanted == self._settled:
            await asyncio.sleep(_SPACING_S)


async def _differences(tool: Tool, sets: Sequence[RuleSet]) -> tuple[list[Change], list[FirewallError]]:
    """What to change, and why a family cannot be looked at, which leaves the other one alone."""
    changes: list[Change] = []
    errors: list[FirewallError] = []
    for family in dict.fromkeys(one.family for one in sets):
        try:
            changes += await tool.difference([one for one in sets if one.family is family])
        except FirewallError as error:
            errors.append(error)
    return changes, errors
