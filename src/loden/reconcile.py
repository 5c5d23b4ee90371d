# SPDX-License-Identifier: Apache-2.0
"""The one loop that keeps tables equal to what is wanted.

What is wanted comes from *owners* (a lease's key, the host itself): each owner's entries are replaced as a
whole, and the union of all is what shall stand. The loop then does one of two things:

- *settle*: put and drop the slots that changed, or that a notification says have drifted;
- *look*: read every table, compare with what is wanted, and mend the difference. The first look of an agent's
  life is its recovery: it finds what a dead agent left and removes what nobody wants any more.

In both, entries are put in the order of the tables (a route needs its device) and dropped in reverse order,
after all puts: the new way stands before the old one goes. A look reads each table when those before it are
mended, because what stood on a device goes with it. An entry that fails is retried alone.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from loden.errors import KernelError, LodenError
from loden.retry import Backoff, Trouble
from loden.tables.base import LOOK, Failures, Reporting, Table
from loden.tables.entries import Entry
from loden.tables.netlink import Message

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 60.0
#: Between two repairs of drift: somebody who undoes ours at once must not make us spin.
_DRIFT_SPACING_S = 0.2
_NAMED_IN_LOG = 3

Clock = Callable[[], float]


class Statistics(msgspec.Struct, frozen=True):
    """A reconciler's counters.

    Args:
        wanted: entries that shall stand.
        failing: entries that cannot be put or dropped now.
        drifted: entries that were not as wanted and were put back, since the start.
        looks: complete readings, since the start.
    """

    wanted: int
    failing: int
    drifted: int
    looks: int


class Pace(msgspec.Struct, frozen=True):
    """How often tables are read, and how soon what failed is tried again.

    Args:
        look_s: between complete readings, seconds.
        retry_first_s, retry_most_s: from the first pause after a failure to the longest, seconds.
        spread: the share by which each of these is longer or shorter at random, so that many hosts do not
            ask one API at once.
    """

    look_s: float = LOOK_INTERVAL_S
    retry_first_s: float = 0.1
    retry_most_s: float = 30.0
    spread: float = 0.0


KERNEL_PACE = Pace()


class _Retry(msgspec.Struct):
    entry: Entry
    error: LodenError
    due: float
    delay_s: float


class Wanted:
    """The union of what all owners want, for one type of entry.

    Two owners may want the same slot (two leases that name one VTEP): the first keeps it, and the other gets
    it when the first lets go.
    """

    def __init__(self) -> None:
        self.slots: dict[Hashable, Entry] = {}
        self._rivals: dict[Hashable, dict[Hashable, Entry]] = {}

    def add(self, owner: Hashable, slot: Hashable, entry: Entry) -> Entry:
        """Want an entry in a slot; the entry that keeps it, which may be another owner's."""
        if slot not in self.slots:
            self.slots[slot] = entry
        else:
            self._rivals.setdefault(slot, {})[owner] = entry
        return self.slots[slot]

    def remove(self, owner: Hashable, slot: Hashable) -> None:
        """Want nothing in a slot any more on behalf of one owner."""
        rivals = self._rivals.get(slot)
        if rivals is None:
            self.slots.pop(slot, None)
            return
        if owner in rivals:
            del rivals[owner]
        else:
            heir = next(iter(rivals))
            self.slots[slot] = rivals.pop(heir)
        if not rivals:
            del self._rivals[slot]


class Reconciler:
    """Keeps tables equal to what is wanted.

    Args:
        tables: in the order in which entries depend on each other.
        clock: monotonic seconds.
        pace: how often to read and to try again.
        place: what the tables are, for the log.
    """

    def __init__(
        self,
        tables: Sequence[Table[Any]],
        *,
        clock: Clock = time.monotonic,
        pace: Pace = KERNEL_PACE,
        place: str = "the kernel's tables",
    ) -> None:
        self._tables = tuple(tables)
        self._clock = clock
        self._pace = pace
        self._place = place
        self._wanted: dict[type[Entry], Wanted] = {table.entry_type: Wanted() for table in self._tables}
        self._owned: dict[Hashable, tuple[Entry, ...]] = {}
        # Slots to put or drop, with the entry that stood or shall stand there.
        self._dirty: dict[type[Entry], dict[Hashable, Entry]] = {
            table.entry_type: {} for table in self._tables
        }
        self._retries: dict[tuple[type[Entry], Hashable], _Retry] = {}
        self._drift: dict[type[Entry], dict[Hashable, Entry]] = {
            table.entry_type: {} for table in self._tables
        }
        self._wake = asyncio.Event()
        self._passed = asyncio.Event()
        self._look_due = float("inf")
        self._drift_due = 0.0  # repairs of drift wait until then
        self._lock = asyncio.Lock()  # tables are used by one task at a time
        self._drifted = 0
        self._looks = 0

    @property
    def statistics(self) -> Statistics:
        return Statistics(
            wanted=sum(len(wanted.slots) for wanted in self._wanted.values()),
            failing=len(self._retries),
            drifted=self._drifted,
            looks=self._looks,
        )

    @property
    def problems(self) -> Mapping[str, str]:
        """Entries that cannot be put or dropped now, as text, each with the reason."""
        return {str(retry.entry): str(retry.error) for retry in self._retries.values()}

    def reports(self) -> dict[str, Any]:
        """What tables have to say of themselves besides, by the type of their entries."""
        found: dict[str, Any] = {}
        for table in self._tables:
            if isinstance(table, Reporting):
                try:
                    report = table.report()
                except KernelError as error:
                    report = {"error": str(error)}
                if report:
                    found[table.entry_type.__name__] = report
        return found

    def want(self, owner: Hashable, entries: Iterable[Entry]) -> None:
        """Make these the owner's entries, in place of what it wanted before; none lets go of all.

        Takes effect with the next :meth:`settle` or in :meth:`run`. Does not block.

        Args:
            owner: on whose behalf.
            entries: no two of one type in the same slot.
        """
        old = self._owned.get(owner, ())
        new = tuple(entries)
        if old == new:
            return
        self._owned[owner] = new
        if not new:
            del self._owned[owner]
        kept = frozenset(old).intersection(new)
        for entry in old:
            if entry in kept:
                continue
            kind, slot = type(entry), entry.slot
            # What stands is the first that was wanted since the last time, a rival's perhaps: to drop any
            # other would be refused, and taken for done.
            self._dirty[kind].setdefault(slot, self._wanted[kind].slots[slot])
            self._wanted[kind].remove(owner, slot)
        for entry in new:
            if entry in kept:
                continue
            kind, slot = type(entry), entry.slot
            standing = self._wanted[kind].add(owner, slot, entry)
            if standing != entry:
                log.warning("contested entry=%r owner=%r keeps=%r", str(entry), owner, str(standing))
            self._dirty[kind].setdefault(slot, entry)
        self._wake.set()

    @property
    def owners(self) -> frozenset[Hashable]:
        """Who wants anything now."""
        return frozenset(self._owned)

    def hear(self, message: Message) -> None:
        """Take note of a change that somebody else made. Does not block."""
        for table in self._tables:
            slots = self._wanted[table.entry_type].slots
            slot = table.heard(message, slots)
            if slot is LOOK:
                self.look_soon()
            elif slot is not None:
                self._mark_drifted(table.entry_type, slots[slot])

    def look_soon(self) -> None:
        """Read everything again as soon as the spacing of repairs allows."""
        self._look_due = min(self._look_due, max(self._clock(), self._drift_due))
        self._wake.set()

    def failures(self, owner: Hashable) -> list[LodenError]:
        """What does not stand, of what one owner wants."""
        keys = ((type(entry), entry.slot) for entry in self._owned.get(owner, ()))
        return [self._retries[key].error for key in keys if key in self._retries]

    @property
    def has_settled(self) -> bool:
        """Whether everything was read, and nothing that was wanted since is yet to be done."""
        return self._looks > 0 and not self._lock.locked() and not any(self._dirty.values())

    async def wait_pass(self) -> None:
        """Return when :meth:`run` has done something the next time."""
        await self._passed.wait()

    async def settle(self) -> None:
        """Put and drop what changed, drifted or is to be tried again; see :meth:`failures`."""
        async with self._lock:
            self._requeue()
            work, self._dirty = self._dirty, {table.entry_type: {} for table in self._tables}
            for table in self._tables:
                has_put = await self._put(table, work[table.entry_type])
                if has_put and table.entry_type.carries_others:
                    self.look_soon()  # what stood on what had to be made anew went with it
            for table in reversed(self._tables):
                if work[table.entry_type]:
                    await self._drop(table, work[table.entry_type])

    async def look(self) -> None:
        """Read every table and mend every difference.

        Raises:
            LodenError: a table cannot be read.
        """
        async with self._lock:
            garbage: dict[type[Entry], dict[Hashable, Entry]] = {}
            for table in self._tables:
                kind = table.entry_type
                self._drift[kind].clear()
                if table is self._tables[0]:
                    # What was heard so far is about what stood before, and all tables are yet to be read. Not
                    # later: what is heard while devices are read or put may be that one went again.
                    self._look_due = self._clock() + self._spread(self._pace.look_s)
                found = await table.read(self._wanted[kind].slots)
                missing, garbage[kind] = self._difference(kind, found)
                self._note_standing(kind, found, missing)
                # That is the difference to what is wanted now: nothing is left to settle.
                self._dirty[kind] = {}
                await self._put(table, missing)
            self._looks += 1
            for table in reversed(self._tables):
                await self._drop(table, garbage[table.entry_type])
            self._drift_due = self._clock() + _DRIFT_SPACING_S

    async def run(self) -> None:
        """Keep the tables as wanted, for ever; the first thing is a look."""
        self._look_due = self._clock()
        trouble = Trouble(log, f"reading {self._place}")
        backoff = Backoff(first_s=self._pace.retry_first_s, most_s=self._pace.retry_most_s)
        while True:
            await self._wait()
            try:
                if self._look_due <= self._clock():
                    await self.look()
                    trouble.ended()
                    backoff.reset()
                await self.settle()
            except LodenError as error:
                trouble.happened(error)
                self._look_due = self._clock() + backoff.next_s()
            self._passed.set()
            self._passed.clear()

    def _spread(self, pause_s: float) -> float:
        return pause_s * random.uniform(1 - self._pace.spread, 1 + self._pace.spread)

    def _mark_drifted(self, kind: type[Entry], entry: Entry) -> None:
        slot = entry.slot
        retry = self._retries.get((kind, slot))
        if retry is not None:  # what was in the way may be gone
            retry.due = min(retry.due, self._clock() + _DRIFT_SPACING_S)
        elif slot not in self._dirty[kind]:
            self._drift[kind][slot] = entry
        self._wake.set()

    def _difference(
        self, kind: type[Entry], found: Mapping[Hashable, Entry]
    ) -> tuple[dict[Hashable, Entry], dict[Hashable, Entry]]:
        """The slots of one table that are not as wanted, and what it holds that nobody wants."""
        wanted = self._wanted[kind].slots
        pending = self._dirty[kind]
        missing = {slot: entry for slot, entry in wanted.items() if found.get(slot) != entry}
        garbage = {slot: entry for slot, entry in found.items() if slot not in wanted}
        known = {slot for other, slot in self._retries if other is kind}
        drifted = [entry for slot, entry in missing.items() if slot not in pending and slot not in known]
        if drifted and self._looks:
            self._say_drifted(drifted)
        strays = [entry for slot, entry in garbage.items() if slot not in pending and slot not in known]
        if strays:
            log.info("garbage count=%d entries=%s: removing what nobody wants", len(strays), _some(strays))
        return missing, garbage

    def _note_standing(
        self, kind: type[Entry], found: Mapping[Hashable, Entry], missing: Mapping[Hashable, Entry]
    ) -> None:
        """What failed before, and was found as wanted now: somebody else mended it."""
        failed = [slot for other, slot in self._retries if other is kind]
        wanted = self._wanted[kind].slots
        mended = [wanted[slot] for slot in failed if slot in found and slot in wanted and slot not in missing]
        self._note(kind, mended, {})

    async def _put(self, table: Table[Any], slots: Iterable[Hashable]) -> bool:
        """Put what is wanted in these slots; whether any of it had to be put and was."""
        wanted = self._wanted[table.entry_type].slots
        puts = [wanted[slot] for slot in slots if slot in wanted]
        if not puts:
            return False
        failures = await _attempt(table.put, puts)
        self._note(table.entry_type, puts, failures)
        return len(failures) < len(puts)

    async def _drop(self, table: Table[Any], slots: Mapping[Hashable, Entry]) -> None:
        """Drop what nobody wants in these slots; a table may have to tidy up even where that is nothing."""
        wanted = self._wanted[table.entry_type].slots
        drops = [entry for slot, entry in slots.items() if slot not in wanted]
        self._note(table.entry_type, drops, await _attempt(table.drop, drops))

    def _note(self, kind: type[Entry], entries: Sequence[Entry], failures: Failures) -> None:
        """Remember what failed, forget what did not fail any more; say either once."""
        fresh: list[LodenError] = []
        mended: list[Entry] = []
        for entry in entries:
            key = (kind, entry.slot)
            before = self._retries.pop(key, None)
            error = failures.get(entry.slot)
            if error is None:
                if before is not None:
                    mended.append(before.entry)
                continue
            if before is None or (before.error is not error and str(before.error) != str(error)):
                fresh.append(error)
            delay_s = self._pace.retry_first_s
            if before is not None:
                delay_s = min(before.delay_s * 2, self._pace.retry_most_s)
            due = self._clock() + self._spread(delay_s)
            self._retries[key] = _Retry(entry, error, due, delay_s)
        if fresh:
            log.error("refused count=%d errors=%s: trying again", len(fresh), _some(dict.fromkeys(fresh)))
        if mended:
            log.info("mended count=%d entries=%s", len(mended), _some(mended))

    def _requeue(self) -> None:
        """What drifted, and what failed long enough ago, is to be put or dropped again."""
        now = self._clock()
        for (kind, slot), retry in self._retries.items():
            if retry.due <= now:
                self._dirty[kind].setdefault(slot, retry.entry)
        drifted = [entry for slots in self._drift.values() for entry in slots.values()]
        if not drifted or self._drift_due > now:
            return
        self._drift_due = now + _DRIFT_SPACING_S
        self._say_drifted(drifted)
        for kind, slots in self._drift.items():
            for slot, entry in slots.items():
                self._dirty[kind].setdefault(slot, entry)
            slots.clear()

    def _say_drifted(self, entries: Sequence[Entry]) -> None:
        self._drifted += len(entries)
        log.warning(
            "drift count=%d total=%d entries=%s: somebody changed or removed them, putting them back",
            len(entries), self._drifted, _some(entries),
        )  # fmt: skip

    async def _wait(self) -> None:
        due = min([self._look_due, *(retry.due for retry in self._retries.values())])
        if any(self._drift.values()):
            due = min(due, self._drift_due)
        if any(self._dirty.values()):
            due = 0.0
        remaining = due - self._clock()
        if remaining > 0:
            try:
                async with asyncio.timeout(remaining):
                    await self._wake.wait()
            except TimeoutError:
                pass
        self._wake.clear()


async def _attempt(
    change: Callable[[Sequence[Entry]], Awaitable[Failures]], entries: Sequence[Entry]
) -> Failures:
    """What failed of a change: all of it where the table cannot be worked with at all."""
    try:
        return await change(entries)
    except LodenError as error:
        return {entry.slot: error for entry in entries}


def _some(things: Collection[object]) -> str:
    """A few of many, for one line of the log."""
    listed = "; ".join(str(thing) for thing in islice(things, _NAMED_IN_LOG))
    rest = len(things) - _NAMED_IN_LOG
    return repr(listed + (f"; and {rest} more" if rest > 0 else ""))
