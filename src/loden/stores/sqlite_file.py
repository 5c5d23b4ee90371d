# SPDX-License-Identifier: Apache-2.0
"""The SQLite store's file: how it is made, opened and checked, and what its failures mean to a person."""

import errno as errnos
import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from loden.errors import StoreError, StoreUnavailable, StoreUnusable
from loden.stores.clock import Clock

_APPLICATION_ID = 0x4C6F6465  # "Lode", what file(1) and we know a store by
_VERSION = 1

# Longer than a hundred agents that start at once need, each with a few synced commits.
_BUSY_S = 10.0

# Revisions start at the nanosecond of the file's birth, so that a watch of a file that was deleted and made
# anew finds itself either ahead or hopelessly behind, and is given a snapshot.
_SCHEMA = f"""
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_VERSION};
CREATE TABLE state (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    revision INTEGER NOT NULL,
    boot_id TEXT NOT NULL, -- the boot that deadlines count from
    network BLOB           -- the network configuration
) STRICT;
CREATE TABLE leases (
    key TEXT PRIMARY KEY,  -- flannel's, as value
    value TEXT NOT NULL,
    revision INTEGER NOT NULL,
    deadline REAL,         -- seconds since boot; null for a reservation
    wall_deadline REAL,    -- the same in seconds since 1970, for after a reboot
    holder TEXT,           -- JSON, as contender
    contender TEXT
) STRICT, WITHOUT ROWID;
CREATE INDEX leases_by_revision ON leases (revision);
CREATE INDEX leases_by_deadline ON leases (deadline) WHERE deadline IS NOT NULL;
CREATE TABLE claims (      -- the address ranges of all leases, which never overlap
    family INTEGER NOT NULL,
    first BLOB NOT NULL,
    last BLOB NOT NULL,
    key TEXT NOT NULL,
    PRIMARY KEY (family, first)
) STRICT, WITHOUT ROWID;
CREATE INDEX claims_by_key ON claims (key);
CREATE TABLE tombstones (  -- removed keys, for watches
    key TEXT PRIMARY KEY,
    revision INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX tombstones_by_revision ON tombstones (revision);
"""


def open_database(path: Path, *, create: bool, ttl_s: float, clock: Clock) -> sqlite3.Connection:
    """A connection to a store's file, checked, with its deadlines on this boot's clock.

    It blocks. The connection belongs to the calling thread, is in autocommit mode and is the caller's to
    close.

    Args:
        path: the file, absolute.
        create: make the file, and its directory, where there is none.
        ttl_s: the longest that a lease can have left after a reboot, whatever the wall clock says.
        clock: says when now is, and in which boot.

    Raises:
        StoreUnusable: no such file, or it is no store of this version.
        sqlite3.Error, OSError: anything else; see :func:`translated`.
    """
    if not path.exists():
        if not create:
            raise StoreUnusable(
                f"open store {path}: no such file",
                hint="start an agent first (loden run), or name another store with --store",
            )
        _make(path, clock)
    # Never mode=rwc: SQLite would make an empty file where ours vanished meanwhile.
    name = str(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    db = sqlite3.connect(f"file:{name}?mode=rw", uri=True, timeout=_BUSY_S, isolation_level=None)
    try:
        # A text that is not UTF-8 makes its own row malformed, and does not keep all others from being read.
        db.text_factory = _decode
        db.execute("PRAGMA synchronous = FULL")
        _require_ours(db, path)
        _rebase_deadlines(db, ttl_s=ttl_s, clock=clock)
    except BaseException:
        db.close()
        raise
    return db


def _decode(text: bytes) -> str:
    return text.decode(errors="replace")


def _make(path: Path, clock: Clock) -> None:
    """A new store, whole or not at all, however many try at once: written aside, synced, linked in place."""
    import tempfile  # noqa: PLC0415 - 6 ms that only the first agent on a machine should spend

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with closing(sqlite3.connect(":memory:")) as blank:
        blank.executescript(_SCHEMA)
        blank.execute(
            "INSERT INTO state VALUES (1, ?, ?, NULL)", (int(clock.wall_s() * 1e9), clock.boot_id())
        )
        blank.commit()
        image = bytearray(blank.serialize())
    # Read and write version 2 in the file's header: write-ahead log. Switching an existing file over takes an
    # exclusive lock that does not wait, which agents that start together would trip over.
    image[18:20] = b"\x02\x02"
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".new") as file:
        file.write(image)
        file.flush()
        os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(file.name, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _require_ours(db: sqlite3.Connection, path: Path) -> None:
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application_id != _APPLICATION_ID:
        raise StoreUnusable(
            f"open store {path}: the file is not a Loden store",
            hint="name another file with --store, or move this one away",
        )
    if version != _VERSION:
        raise StoreUnusable(
            f"open store {path}: its format is version {version}, and this is Loden for version {_VERSION}",
            hint="run the same release of Loden for every agent on this machine",
        )


def _rebase_deadlines(db: sqlite3.Connection, *, ttl_s: float, clock: Clock) -> None:
    """After a reboot the boot clock starts anew; what each lease had left is known by the wall clock."""
    boot_id = clock.boot_id()
    if db.execute("SELECT boot_id FROM state").fetchone() == (boot_id,):
        return
    with transaction(db, "IMMEDIATE"):
        if db.execute("SELECT boot_id FROM state").fetchone() == (boot_id,):
            return  # another agent was first
        db.execute(
            "UPDATE leases SET deadline = :now + min(max(wall_deadline - :wall, 0.0), :ttl)"
            " WHERE deadline IS NOT NULL",
            {"now": clock.since_boot_s(), "wall": clock.wall_s(), "ttl": ttl_s},
        )
        db.execute("UPDATE state SET boot_id = ?", (boot_id,))


@contextmanager
def transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    """A transaction that is committed at the end of the block, or rolled back when it raises.

    Args:
        db: in autocommit mode.
        kind: ``DEFERRED`` to read, ``IMMEDIATE`` to write.
    """
    if kind == "IMMEDIATE":
        _begin_immediate(db)
    else:
        db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # after a full disk SQLite has rolled back by itself
            db.execute("ROLLBACK")
        raise


def _begin_immediate(db: sqlite3.Connection) -> None:
    """Wait for the write lock, at random.

    SQLite's own wait ends in steps of 100 ms that all waiters take together, one or two of them with success:
    fifty agents that start at once took four seconds, and take a fifth of one like this.
    """
    give_up = time.monotonic() + _BUSY_S
    db.execute("PRAGMA busy_timeout = 0")
    try:
        while True:
            try:
                db.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                    raise
            time.sleep(random.uniform(0.001, 0.015))
    finally:
        db.execute(f"PRAGMA busy_timeout = {int(_BUSY_S * 1000)}")


# What waiting can mend, by SQLite's primary result code; all others need a person.
_PASSING = {
    sqlite3.SQLITE_BUSY: "another process holds its lock",
    sqlite3.SQLITE_LOCKED: "another process holds its lock",
    sqlite3.SQLITE_PROTOCOL: "too many processes open it at once",
    sqlite3.SQLITE_FULL: "the disk is full",
    sqlite3.SQLITE_IOERR: "the disk failed",
    sqlite3.SQLITE_NOMEM: "no memory",
    sqlite3.SQLITE_INTERRUPT: "interrupted",
}
_PASSING_ERRNOS = {
    errnos.EAGAIN,
    errnos.EBUSY,
    errnos.EDQUOT,
    errnos.EINTR,
    errnos.EIO,
    errnos.EMFILE,
    errnos.ENFILE,
    errnos.ENOMEM,
    errnos.ENOSPC,
}
_MOVE_AWAY = (
    "stop the agents, move {path} away and start them again: each takes its subnet back from its subnet.env;"
    " the network configuration and reservations must be written again"
)
_HINTS = {
    sqlite3.SQLITE_FULL: "free some space on the file system of {path}",
    sqlite3.SQLITE_IOERR: "see the kernel's log about the file system of {path}",
    sqlite3.SQLITE_CORRUPT: _MOVE_AWAY,
    sqlite3.SQLITE_NOTADB: "name another file with --store, or, if it was a store once, " + _MOVE_AWAY,
    sqlite3.SQLITE_READONLY: "run as the user that owns {path}, or mount its file system read-write",
    sqlite3.SQLITE_CANTOPEN: "{path} must be a file, and with its directory be writable for this user",
    sqlite3.SQLITE_PERM: "{path} and its directory must be writable for this user",
    sqlite3.SQLITE_ERROR: _MOVE_AWAY,
}


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """The one place where errors of SQLite and of the file system become ours.

    Args:
        path: of the store, for the message.

    Raises:
        StoreUnavailable: the same call may work later.
        StoreUnusable: it will not.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _translate(error, path) from error
    except OSError as error:
        kind = StoreUnavailable if error.errno in _PASSING_ERRNOS else StoreUnusable
        raise kind(
            f"open store {path}: {error.strerror or error}",
            hint=f"{path.parent} must be a directory that this user may write to, with some space left",
        ) from error


def _translate(error: sqlite3.Error, path: Path) -> StoreError:
    # Extended codes keep the primary one in their low byte. Errors of the Python module have no code at all.
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_MISUSE) & 0xFF
    hint = _HINTS.get(code, "").format(path=path)
    if code in _PASSING:
        return StoreUnavailable(f"use store {path}: {_PASSING[code]}; {error}", hint=hint)
    return StoreUnusable(f"use store {path}: {error}", hint=hint)
