# SPDX-License-Identifier: Apache-2.0
"""A table in memory that behaves as the kernel does, and as badly as a test wants."""

import asyncio
from collections.abc import Callable, Hashable, Mapping, Sequence

from loden.errors import KernelError
from loden.tables.base import LOOK, Failures
from loden.tables.entries import Entry
from loden.tables.netlink import Message


class FakeTable:
    """Entries of one type in a dictionary.

    Args:
        entry_type: the type.
        journal: gets a line for every call; several tables may share one.
    """

    def __init__(self, entry_type: type[Entry], journal: list[str] | None = None) -> None:
        self.entry_type = entry_type
        self.journal: list[str] = [] if journal is None else journal
        self.standing: dict[Hashable, Entry] = {}
        self.refused: dict[Hashable, int] = {}  # slots that cannot be put or dropped, with the errno
        self.unreadable = 0  # the errno with which reading fails
        self.unusable = 0  # the errno with which a change fails as a whole
        self.in_the_middle: Callable[[], None] | None = None  # called once, half-way through a change
        self.stuck: asyncio.Event | None = None  # a change does not end before this is set

    async def read(self, wanted: Mapping[Hashable, Entry]) -> dict[Hashable, Entry]:
        self._note("read", [])
        await asyncio.sleep(0)
        if self.unreadable:
            raise KernelError("dump", self.entry_type.__name__, self.unreadable)
        return {
            slot: wanted[slot] if wanted.get(slot) == entry else entry
            for slot, entry in self.standing.items()
        }

    async def put(self, entries: Sequence[Entry]) -> Failures:
        return await self._change("put", entries)

    async def drop(self, entries: Sequence[Entry]) -> Failures:
        return await self._change("drop", entries)

    def heard(self, message: Message, wanted: Mapping[Hashable, Entry]) -> Hashable | None:
        """The message's buffer names a slot's place in the order of what is wanted; empty means to look."""
        if message.kind != hash(self.entry_type.__name__) % 1000:
            return None
        slot = list(wanted)[message.start] if message.buffer else LOOK
        return slot if slot is LOOK or self.standing.get(slot) != wanted[slot] else None

    def message(self, place: int = 0, *, look: bool = False) -> Message:
        """A notification for :meth:`heard`."""
        return Message(hash(self.entry_type.__name__) % 1000, b"" if look else b".", place, 0)

    async def _change(self, verb: str, entries: Sequence[Entry]) -> Failures:
        if entries:
            self._note(verb, entries)
        if self.unusable:
            raise KernelError("dump", self.entry_type.__name__, self.unusable)
        failures: Failures = {}
        for place, entry in enumerate(entries):
            if place == len(entries) // 2:
                await self._pause()
            errno = self.refused.get(entry.slot)
            if errno and (verb == "put" or entry.slot in self.standing):
                failures[entry.slot] = KernelError("add" if verb == "put" else "delete", str(entry), errno)
            elif verb == "put":
                self.standing[entry.slot] = entry
            else:
                self.standing.pop(entry.slot, None)
        return failures

    async def _pause(self) -> None:
        await asyncio.sleep(0)
        if self.stuck is not None:
            await self.stuck.wait()
        act, self.in_the_middle = self.in_the_middle, None
        if act is not None:
            act()

    def _note(self, verb: str, entries: Sequence[Entry]) -> None:
        self.journal.append(" ".join([verb, self.entry_type.__name__, *map(str, entries)]))
