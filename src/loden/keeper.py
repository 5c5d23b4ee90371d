# SPDX-License-Identifier: Apache-2.0
"""Keeps this host's lease: renews it, answers for it, takes another when it is lost, and says when to let go.

What is to be done follows from what is known, not from what happened: a step that fails leaves its reason in
place, and the next try finds it there. The store may be away for hours meanwhile.

A host acts as a subnet's owner only as long as nobody else can be: until a little before its lease's end, by
its own clock, whether or not the store answers; and not a moment longer once somebody else has the subnet.
"""

import asyncio
import logging
import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec

from loden.address import Prefix
from loden.errors import Conflict, LodenError
from loden.retry import Backoff, Trouble
from loden.stores.acquire import Claim, acquire, answer
from loden.stores.base import Changes, Record, Snapshot, Store
from loden.stores.clock import Clock, SystemClock

log = logging.getLogger(__name__)

#: No sleep is longer: the loop's clock stands still while the machine is suspended, the lease's does not.
_LONGEST_SLEEP_S = 60.0

#: So long before its end, at most, a lease is no reason any more to act as its owner. In a day, clocks come
#: apart by some seconds, and the kernel's tables take one.
_SAFETY_S = 30.0
_TICK_S = 5.0
#: So long may taking a lost lease again take, which nobody else is known to have.
_GRACE_S = 2.0

#: What this host asks for, given the subnets that it had.
MakeClaim = Callable[[Sequence[Prefix]], Claim]

#: Told of each lease that was taken in the place of a lost one. Does not block.
Taken = Callable[[Record], None]

#: Told that this host owns nothing for now. Does not block.
LetGo = Callable[[], None]


class _News(msgspec.Struct, frozen=True):
    """What a key held at a revision of the store; None for nothing."""

    key: str
    revision: int
    record: Record | None


class Keeper:
    """One host's hold on one lease.

    Args:
        store: where the lease lives.
        record: the lease, as this host took it.
        claim: makes what this host asks for when the lease is lost.
        margin_s: renew so long before the end, seconds.
        clock: what leases end by.
    """

    def __init__(
        self, store: Store, record: Record, claim: MakeClaim, *, margin_s: float, clock: Clock | None = None
    ) -> None:
        self._store = store
        self._record = record
        self._me = record.holder
        self._claim = claim
        # A margin that leaves no time between two renewals would make them one endless write.
        self._margin_s = min(margin_s, store.ttl_s / 2)
        self._safety_s = min(_SAFETY_S, store.ttl_s / 10)
        self._clock = clock or SystemClock()
        self._is_lost = False
        self._is_usurped = False
        self._lost_at_s = 0.0
        self._has_let_go = False
        self._judged = asyncio.Event()
        self._is_outdated = False
        self._news: _News | None = None
        self._heard = asyncio.Event()
        self._contender_id = ""  # the last that was named in the log

    @property
    def record(self) -> Record:
        """The lease as last seen in the store; while it is lost, as it was before."""
        return self._record

    @property
    def is_held(self) -> bool:
        """Whether the lease is ours: not lost, and its time not over, whatever the store is doing."""
        return not self._is_lost and self._left_s > 0

    @property
    def has_let_go(self) -> bool:
        """Whether this host may not act as the owner of any subnet for now."""
        return self._has_let_go

    @property
    def _left_s(self) -> float:
        """How long this host may act as the lease's owner, as far as time goes."""
        expires = self._record.expires
        end_s = math.inf if expires is None else expires - self._safety_s
        if self._is_lost:
            end_s = min(end_s, self._lost_at_s + _GRACE_S)
        return end_s - self._clock.since_boot_s()

    def hear(self, news: Changes | Snapshot) -> None:
        """Take note of what a watch says, where it says anything of our key. Does not block.

        The newest replaces what was heard before: what counts is how the key stands now.
        """
        key = self._record.key
        if isinstance(news, Snapshot):
            self._note(_News(key, news.revision, news.records.get(key)))
        elif key in news.written or key in news.removed:
            self._note(_News(key, news.revision, news.written.get(key)))

    def _note(self, news: _News) -> None:
        self._news = news
        self._heard.set()

    def publish_again(self) -> None:
        """The claim is not what it was: write the lease anew, with the same subnets. Does not block."""
        self._is_outdated = True
        self._heard.set()

    async def keep(self, taken: Taken) -> None:
        """Keep the lease, for ever. Also what only a person can mend in the store is waited for here."""
        trouble = Trouble(log, "keeping the lease")
        backoff = Backoff(first_s=0.5, most_s=min(30.0, self._margin_s / 8))
        while True:
            try:
                await self._step(taken)
                self._hold_again(taken)
            except LodenError as error:
                if self._is_lost:
                    self._usurped()  # nobody is known to have the subnet, and everybody may take it
                trouble.happened(error)
                await self._wait(backoff.next_s())  # news of our lease mean that the store is back
            else:
                trouble.ended()
                backoff.reset()

    async def guard(self, let_go: LetGo) -> None:
        """Say when this host may not act as its subnet's owner any more, for ever, without asking the store.

        :meth:`keep` says when it may again.

        Args:
            let_go: told so.
        """
        while True:
            self._judged.clear()
            if not self._has_let_go and (self._is_usurped or self._left_s <= 0):
                self._has_let_go = True
                log.error(
                    "lease let go subnet=%s: %s; this host neither sends to the network nor answers for the "
                    "subnet until it holds a lease again",
                    self._record.lease,
                    "it is not ours any more" if self._is_lost else "it could not be renewed before its end",
                )
                let_go()
            # The loop's clock stands still while the machine is suspended, and the lease's does not.
            left_s = _TICK_S if self._has_let_go else min(max(self._left_s, 0.0), _TICK_S)
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._judged.wait()

    def _hold_again(self, taken: Taken) -> None:
        if self._has_let_go and self.is_held:
            self._has_let_go = False
            log.warning("lease held again subnet=%s", self._record.lease)
            taken(self._record)

    def _usurped(self) -> None:
        self._is_usurped = True
        self._judged.set()

    async def _step(self, taken: Taken) -> None:
        """Do the one thing that is to be done; wait where there is none."""
        await self._judge_news()
        if self._is_lost or self._is_outdated:
            await self._take_again(taken)
        elif self._record.contender is not None:
            await self._answer()
        elif (left_s := self._until_due_s()) <= 0:
            await self._renew()
        else:
            await self._wait(left_s)

    async def _wait(self, most_s: float) -> None:
        try:
            async with asyncio.timeout(min(most_s, _LONGEST_SLEEP_S)):
                await self._heard.wait()
        except TimeoutError:
            pass
        self._heard.clear()

    def _until_due_s(self) -> float:
        """How long until the lease is to be renewed; a reservation never is."""
        if self._record.expires is None:
            return _LONGEST_SLEEP_S
        return self._record.expires - self._margin_s - self._clock.since_boot_s()

    async def _judge_news(self) -> None:
        """See whether the lease is still ours.

        News from before our last write are late, or the store is another one: put back from a copy, or made
        anew while the wall clock was slow. Only asking tells.
        """
        news, self._news = self._news, None
        if news is None or news.key != self._record.key or self._is_lost:
            return
        if news.revision < self._record.revision:
            await self._look()
        else:
            self._judge(news.record)

    def _judge(self, found: Record | None) -> None:
        """See whether what our key holds, as it was after our last write, is still our lease."""
        held = self._record
        if found is None or found.lease != held.lease or _id(found) != _id(held):
            self._is_lost, self._lost_at_s = True, self._clock.since_boot_s()
            self._judged.set()
            log.error("lease lost subnet=%s: %s", held.lease, self._how_lost(found))
            if found is not None and _id(found) != _id(held):
                self._usurped()
            return
        if found.expires == math.inf:  # somebody wrote it as it was; when that ends, only the store knows
            found = msgspec.structs.replace(found, expires=held.expires)
        self._record = found  # renewed, made a reservation by a person, or asked for by another host
        self._name_contender(found)

    def _how_lost(self, found: Record | None) -> str:
        if found is None:
            return "it was released or ran out; taking it again"
        if found.holder is None or _id(found) == _id(self._record):
            return "somebody changed it in the store; taking it again"
        return (
            f"host {found.holder.name!r} took it while this host was silent: it has the same public address, "
            "or this host was suspended for longer than the lease lasts"
        )

    def _name_contender(self, record: Record) -> None:
        if record.contender is not None and record.contender.id != self._contender_id:
            self._contender_id = record.contender.id
            log.error(
                "lease contended subnet=%s contender=%r: that host has our public address; this one keeps "
                "the lease. Give each host its own address, with --public-ip or --iface",
                record.lease,
                record.contender.name,
            )

    async def _take_again(self, taken: Taken) -> None:
        held = self._record
        subnets = [leg.subnet for leg in held.lease.legs]
        was_lost = self._is_lost
        self._is_outdated = False  # it may be set again while the store works
        claim = self._claim(subnets)
        if not was_lost:
            claim = msgspec.structs.replace(claim, held=tuple(subnets))
        try:
            self._record = await acquire(self._store, claim, rng=random.Random())
        except LodenError:
            self._is_outdated = True
            raise
        self._is_lost = self._is_usurped = self._has_let_go = False
        if [leg.subnet for leg in self._record.lease.legs] == subnets:  # whatever the keys are written like
            log.info("lease %s again subnet=%s", "taken" if was_lost else "written", self._record.lease)
        else:
            log.error(
                "subnet changed old=%s new=%s: containers started before keep addresses of the old subnet "
                "and are cut off; start them again",
                held.lease,
                self._record.lease,
            )
        taken(self._record)
        await self._look()  # until now the watch was asked about the old key

    async def _answer(self) -> None:
        answered = await answer(self._store, self._record, self._me) if self._me is not None else None
        if answered is None:
            await self._look()
        else:
            self._record = answered

    async def _renew(self) -> None:
        try:
            self._record = await self._store.replace(self._record)
        except Conflict:
            await self._look()
        else:
            log.info("lease renewed subnet=%s", self._record.lease)

    async def _look(self) -> None:
        self._judge((await self._store.snapshot()).records.get(self._record.key))


def _id(record: Record) -> str:
    return record.holder.id if record.holder is not None else ""
