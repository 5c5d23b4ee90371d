# SPDX-License-Identifier: Apache-2.0
"""A store in this process's memory: for tests, and as the shortest reading of what a store does.

Handles of one name share one state, as long as any of them lives.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from weakref import WeakValueDictionary

import msgspec

from loden.errors import Conflict
from loden.lease import Lease, encode_value, parse_key
from loden.stores.access import Access
from loden.stores.base import Changes, Holder, Record, Snapshot
from loden.stores.clock import Clock, SystemClock
from loden.stores.rows import Row, encode_holder, read_rows


class State:
    """What the handles of one name share."""

    def __init__(self) -> None:
        self.revision = 0
        self.network: bytes | None = None
        self.rows: dict[str, Row] = {}
        self.tombstones: dict[str, int] = {}
        self.wakes: set[asyncio.Event] = set()

    def write(self, row: Row) -> None:
        """Put a row in its key's place."""
        self.rows[row[0]] = row
        self.tombstones.pop(row[0], None)
        self.moved()

    def remove(self, key: str) -> None:
        """Take a row away."""
        self.revision += 1
        del self.rows[key]
        self.tombstones[key] = self.revision
        self.moved()

    def moved(self) -> None:
        """Tell every watch."""
        for wake in self.wakes:
            wake.set()


_states: WeakValueDictionary[str, State] = WeakValueDictionary()


def open_location(location: str, *, ttl_s: float, create: bool, access: Access) -> "MemoryStore":
    """The store of a name; see :class:`loden.stores.Opener`. It is always created."""
    del create, access
    return MemoryStore(location, ttl_s=ttl_s)


class MemoryStore:
    """A handle to a store in memory. The methods are those of :class:`loden.stores.base.Store`.

    Args:
        name: handles of the same name share one state.
        ttl_s: how long a lease lasts after a write, in seconds.
        clock: what ends leases.
        history: for how many revisions removals are remembered; a watch from further back gets a snapshot.
    """

    def __init__(self, name: str, *, ttl_s: float, clock: Clock | None = None, history: int = 10_000) -> None:
        self.state = _states.setdefault(name, State())
        self._ttl_s = ttl_s
        self._clock = clock or SystemClock()
        self._history = history
        self._wakes: set[asyncio.Event] = set()
        self._is_closed = False

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    async def get_network(self) -> bytes | None:
        return self.state.network

    async def put_network(self, text: bytes) -> None:
        self.state.network = text
        self.state.moved()

    async def watch_network(self) -> AsyncGenerator[bytes | None, None]:
        last: bytes | None = b""
        with self._waking() as wake:
            while not self._is_closed:
                wake.clear()
                if self.state.network != last:
                    last = self.state.network
                    yield last
                    continue
                await wake.wait()

    async def with_ends(self, snapshot: Snapshot) -> Snapshot:
        return snapshot

    async def snapshot(self) -> Snapshot:
        self._expire()
        records, malformed = read_rows(self.state.rows.values())
        return Snapshot(self.state.revision, records, malformed)

    async def create(self, lease: Lease, *, holder: Holder | None, reserve: bool = False) -> Record:
        self._expire()
        key = lease.key
        parse_key(key)
        records, malformed = read_rows(self.state.rows.values())
        if key in records or key in malformed:
            raise Conflict(f"create lease {key}: it exists")
        for other in records.values():
            if any(mine.subnet.overlaps(leg.subnet) for mine in lease.legs for leg in other.lease.legs):
                raise Conflict(f"create lease {key}: it overlaps lease {other.key}")
        return self._put(Record(key, lease, 0, None if reserve else self._end_from_now(), holder))

    async def replace(self, record: Record, *, extend: bool = True) -> Record:
        expires = self._require_unchanged(record, "replace")
        if expires is None or record.expires is None:
            expires = None
        elif extend:
            expires = self._end_from_now()
        return self._put(msgspec.structs.replace(record, expires=expires))

    async def delete(self, record: Record) -> None:
        self._require_unchanged(record, "delete")
        self.state.remove(record.key)

    async def watch(self, revision: int) -> AsyncGenerator[Changes | Snapshot, None]:
        with self._waking() as wake:
            while not self._is_closed:
                wake.clear()
                self._expire()
                news = self._news(revision)
                if news is not None:
                    revision = news.revision
                    yield news
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._wait_s()):
                        await wake.wait()

    async def close(self) -> None:
        self._is_closed = True
        for wake in self._wakes:
            wake.set()

    @contextmanager
    def _waking(self) -> Iterator[asyncio.Event]:
        """An event that is set when the state may have changed, and when this handle is closed."""
        wake = asyncio.Event()
        self._wakes.add(wake)
        self.state.wakes.add(wake)
        try:
            yield wake
        finally:
            self._wakes.discard(wake)
            self.state.wakes.discard(wake)

    def _end_from_now(self) -> float:
        return self._clock.since_boot_s() + self._ttl_s

    def _expire(self) -> None:
        now_s = self._clock.since_boot_s()
        for key in [key for key, row in self.state.rows.items() if row[3] is not None and row[3] <= now_s]:
            self.state.remove(key)

    def _wait_s(self) -> float | None:
        """How long until the next lease ends; None if none ever does."""
        ends = [row[3] for row in self.state.rows.values() if row[3] is not None]
        return max(0.0, min(ends) - self._clock.since_boot_s()) if ends else None

    def _require_unchanged(self, record: Record, verb: str) -> float | None:
        self._expire()
        row = self.state.rows.get(record.key)
        if row is None or row[2] != record.revision:
            raise Conflict(f"{verb} lease {record.key}: it is gone, or somebody else wrote it")
        return row[3]

    def _put(self, record: Record) -> Record:
        self.state.revision += 1
        record = msgspec.structs.replace(record, revision=self.state.revision)
        self.state.write(
            (
                record.key,
                encode_value(record.lease),
                record.revision,
                record.expires,
                encode_holder(record.holder),
                encode_holder(record.contender),
            )
        )
        return record

    def _news(self, since: int) -> Changes | Snapshot | None:
        revision = self.state.revision
        if revision == since:
            return None
        if not revision - self._history <= since < revision:
            records, malformed = read_rows(self.state.rows.values())
            return Snapshot(revision, records, malformed)
        records, malformed = read_rows(row for row in self.state.rows.values() if row[2] > since)
        removed = frozenset(key for key, at in self.state.tombstones.items() if at > since)
        return Changes(revision, records, removed, malformed)
