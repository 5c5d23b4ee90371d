# SPDX-License-Identifier: Apache-2.0
"""What every table must do, wherever it is: subclass :class:`TableContract`, give it a ``place``."""

import asyncio
from collections.abc import Awaitable, Hashable, Sequence
from typing import Any, Protocol, TypeVar

import pytest

from loden.tables.base import Table
from loden.tables.entries import Entry

T = TypeVar("T")

#: Nobody waits for so long unless something is broken.
PATIENCE_S = 40.0


class Place(Protocol):
    """A table with nothing of ours in it, and entries that it could hold."""

    @property
    def table(self) -> Table[Any]: ...

    def entry(self, number: int) -> Entry:
        """One of many entries, each in a slot of its own."""
        ...

    def changed(self, number: int) -> Entry:
        """Another entry for the same slot; the same one where a slot says all there is to say."""
        ...

    def bad(self) -> Entry:
        """An entry that the table refuses, in a slot that no other has."""
        ...


def run(work: Awaitable[T]) -> T:
    """Run a coroutine in an event loop of its own, and fail rather than hang."""

    async def bounded() -> T:
        async with asyncio.timeout(PATIENCE_S):
            return await work

    return asyncio.run(bounded())


def by_slot(entries: Sequence[Entry]) -> dict[Hashable, Entry]:
    return {entry.slot: entry for entry in entries}


class TableContract:
    """The tests."""

    @pytest.fixture
    def entries(self, place: Place) -> list[Entry]:
        return [place.entry(number) for number in range(3)]

    def test_holds_nothing_at_first(self, place: Place) -> None:
        assert run(place.table.read({})) == {}

    def test_reads_back_what_was_put(self, place: Place, entries: list[Entry]) -> None:
        assert run(place.table.put(entries)) == {}
        assert run(place.table.read({})) == by_slot(entries)
        assert run(place.table.read(by_slot(entries))) == by_slot(entries)

    def test_putting_again_changes_nothing(self, place: Place, entries: list[Entry]) -> None:
        for _ in range(2):
            assert run(place.table.put(entries)) == {}
        assert run(place.table.read({})) == by_slot(entries)

    def test_putting_into_a_slot_replaces_what_stands_there(self, place: Place, entries: list[Entry]) -> None:
        run(place.table.put(entries))
        changed = [place.changed(number) for number in range(3)]
        assert by_slot(changed).keys() == by_slot(entries).keys()
        assert run(place.table.put(changed)) == {}
        assert run(place.table.read({})) == by_slot(changed)

    def test_drops_what_it_is_told_and_no_more(self, place: Place, entries: list[Entry]) -> None:
        run(place.table.put(entries))
        assert run(place.table.drop(entries[:2])) == {}
        assert run(place.table.read({})) == by_slot(entries[2:])

    def test_what_is_gone_already_counts_as_dropped(self, place: Place, entries: list[Entry]) -> None:
        run(place.table.put(entries[:1]))
        for _ in range(2):
            assert run(place.table.drop(entries)) == {}
        assert run(place.table.read({})) == {}

    def test_dropping_and_putting_nothing_does_nothing(self, place: Place, entries: list[Entry]) -> None:
        run(place.table.put(entries))
        assert run(place.table.put([])) == {}
        assert run(place.table.drop([])) == {}
        assert run(place.table.read({})) == by_slot(entries)

    def test_what_was_dropped_can_be_put_again(self, place: Place, entries: list[Entry]) -> None:
        run(place.table.put(entries))
        run(place.table.drop(entries))
        assert run(place.table.put(entries)) == {}
        assert run(place.table.read({})) == by_slot(entries)

    def test_one_bad_entry_fails_alone(self, place: Place, entries: list[Entry]) -> None:
        bad = place.bad()
        failures = run(place.table.put([entries[0], bad, *entries[1:]]))
        assert list(failures) == [bad.slot]
        assert run(place.table.read({})) == by_slot(entries)
        assert run(place.table.drop([entries[0], bad])) == {}
        assert run(place.table.read({})) == by_slot(entries[1:])
