# SPDX-License-Identifier: Apache-2.0
"""Leases in the SQLite store: each function is one step on a connection, inside the caller's transaction.

Every function that writes moves the store's revision on. None blocks on anything but the disk.
"""

import sqlite3
from collections.abc import Iterable

import msgspec

from loden.errors import Conflict
from loden.lease import Lease, Leg, encode_value, parse_key
from loden.stores.base import Changes, Holder, Record, Snapshot
from loden.stores.rows import encode_holder, read_rows

# Text, as people like to see it in the sqlite3 shell; bytes, as the decoder wants it.
_READ = "SELECT key, CAST(value AS BLOB), revision, deadline, holder, contender FROM leases"


class End(msgspec.Struct, frozen=True):
    """When a lease ends, on the boot clock and on the wall clock, in seconds; both None: never."""

    boot_s: float | None = None
    wall_s: float | None = None


def current_revision(db: sqlite3.Connection) -> int:
    """The revision of the last write.

    Raises:
        sqlite3.DatabaseError: somebody emptied the table that holds it.
    """
    found = db.execute("SELECT revision FROM state").fetchone()
    if found is None:
        raise sqlite3.DatabaseError("its table state is empty")
    return int(found[0])


def snapshot(db: sqlite3.Connection, now_s: float) -> Snapshot:
    """Every lease that has not ended by *now_s* on the boot clock. The ended stay: readers need not write."""
    rows = db.execute(f"{_READ} WHERE deadline IS NULL OR deadline > ?", (now_s,))
    records, malformed = read_rows(rows)
    return Snapshot(current_revision(db), records, malformed)


def changes(db: sqlite3.Connection, since: int, *, history: int, now_s: float) -> Changes | Snapshot | None:
    """What happened after a revision; None if nothing did, a snapshot if that is not known any more."""
    revision = current_revision(db)
    if revision == since:
        return None
    if not revision - history <= since < revision:
        return snapshot(db, now_s)
    records, malformed = read_rows(db.execute(f"{_READ} WHERE revision > ?", (since,)))
    removed = db.execute("SELECT key FROM tombstones WHERE revision > ?", (since,))
    return Changes(revision, records, frozenset(key for (key,) in removed), malformed)


def create(db: sqlite3.Connection, lease: Lease, *, holder: Holder | None, end: End) -> Record:
    """Write a lease where none is.

    Raises:
        MalformedLease: nobody could read it back, and so nobody could release it.
        Conflict: the key exists, or one of the subnets overlaps a claim.
    """
    key = lease.key
    parse_key(key)
    if db.execute("SELECT 1 FROM leases WHERE key = ?", (key,)).fetchone():
        raise Conflict(f"create lease {key}: it exists")
    for leg in lease.legs:
        _claim(db, key, leg)
    db.execute("DELETE FROM tombstones WHERE key = ?", (key,))
    return _put(db, Record(key, lease, 0, holder=holder), end)


def replace(db: sqlite3.Connection, record: Record, *, end: End, extend: bool) -> Record:
    """Write a record where it still has the revision that its reader saw (see ``Store.replace``).

    Raises:
        Conflict: the record is gone or was written since.
    """
    was = _require_unchanged(db, record, "replace")
    if was.boot_s is None or record.expires is None:
        end = End()
    elif not extend:
        end = was
    return _put(db, record, end)


def delete(db: sqlite3.Connection, record: Record, *, history: int) -> None:
    """Remove a record where it still has the revision that its reader saw.

    Raises:
        Conflict: the record is gone or was written since.
    """
    _require_unchanged(db, record, "delete")
    db.execute("DELETE FROM leases WHERE key = ?", (record.key,))
    _bury(db, [record.key], history=history)


def has_expired(db: sqlite3.Connection, now_s: float) -> bool:
    """Whether a lease has ended by *now_s* on the boot clock and is still there."""
    return db.execute("SELECT 1 FROM leases WHERE deadline <= ? LIMIT 1", (now_s,)).fetchone() is not None


def expire(db: sqlite3.Connection, now_s: float, *, history: int) -> None:
    """Remove every lease that has ended by *now_s* on the boot clock."""
    gone = [key for (key,) in db.execute("DELETE FROM leases WHERE deadline <= ? RETURNING key", (now_s,))]
    if gone:
        _bury(db, gone, history=history)


def next_deadline(db: sqlite3.Connection) -> float | None:
    """When the next lease ends, on the boot clock; None if none ever does."""
    (deadline,) = db.execute("SELECT min(deadline) FROM leases WHERE deadline IS NOT NULL").fetchone()
    return None if deadline is None else float(deadline)


def _next_revision(db: sqlite3.Connection) -> int:
    db.execute("UPDATE state SET revision = revision + 1")
    return current_revision(db)


def _put(db: sqlite3.Connection, record: Record, end: End) -> Record:
    record = msgspec.structs.replace(record, revision=_next_revision(db), expires=end.boot_s)
    db.execute(
        "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            record.key,
            encode_value(record.lease).decode(),
            record.revision,
            end.boot_s,
            end.wall_s,
            encode_holder(record.holder),
            encode_holder(record.contender),
        ),
    )
    return record


def _require_unchanged(db: sqlite3.Connection, record: Record, verb: str) -> End:
    row = db.execute(
        "SELECT deadline, wall_deadline FROM leases WHERE key = ? AND revision = ?",
        (record.key, record.revision),
    ).fetchone()
    if row is None:
        raise Conflict(f"{verb} lease {record.key}: it is gone, or somebody else wrote it")
    return End(*row)


def _claim(db: sqlite3.Connection, key: str, leg: Leg) -> None:
    """Take a subnet's addresses. As claims never overlap, only the last that begins before our end can do."""
    family, first = leg.subnet.family, leg.subnet.address
    last = leg.subnet.last.to_bytes(family.size, "big")
    before = db.execute(
        "SELECT key, last FROM claims WHERE family = ? AND first <= ? ORDER BY first DESC LIMIT 1",
        (family, last),
    ).fetchone()
    if before is not None and before[1] >= first:
        raise Conflict(f"create lease {key}: {leg.subnet} overlaps lease {before[0]}")
    db.execute("INSERT INTO claims VALUES (?, ?, ?, ?)", (family, first, last, key))


def _bury(db: sqlite3.Connection, keys: Iterable[str], *, history: int) -> None:
    """What removing a lease leaves: no claim, and a tombstone for as long as a watch may ask for it."""
    revision = _next_revision(db)
    for key in keys:
        db.execute("DELETE FROM claims WHERE key = ?", (key,))
        db.execute("INSERT OR REPLACE INTO tombstones VALUES (?, ?)", (key, revision))
    db.execute("DELETE FROM tombstones WHERE revision <= ?", (revision - history,))
