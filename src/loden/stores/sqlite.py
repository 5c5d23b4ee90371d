# SPDX-License-Identifier: Apache-2.0
"""The embedded store: one SQLite file that any number of agents on one machine share, without a server.

*Durable.* Write-ahead log with ``synchronous=FULL``: a claim that was reported and then lost in a power
failure would give two hosts one subnet.

*One thread.* SQLite blocks, on its locks for seconds. Each handle keeps its connection in a worker thread of
its own, so that the event loop never waits.

*Time.* Leases end on the boot clock, so that no step of the wall clock ends one. Beside it stands the wall
clock's view, and the first to open the store after a reboot sets all ends anew from it.

*Watch.* Who commits touches the file, and inotify wakes the others. (An inotify watch on the log would be
simpler and wrong: the log is written before the commit can be seen.) Every watch also looks by itself now and
then, for writers that died between commit and touch.

Nothing here may open() the file beside SQLite: closing any descriptor of it drops the process's POSIX locks.
"""

import asyncio
import logging
import os
import sqlite3
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from loden.errors import ConfigError
from loden.lease import Lease
from loden.stores import sqlite_leases as leases
from loden.stores.access import Access
from loden.stores.base import Changes, Holder, Record, Snapshot
from loden.stores.clock import Clock, SystemClock
from loden.stores.inotify import FileWatch
from loden.stores.sqlite_file import open_database, transaction, translated

_log = logging.getLogger(__name__)

T = TypeVar("T")

# How often a watch looks by itself. Where it cannot be woken it must be quick all the same: a holder that
# sees a question too late loses its lease (loden.stores.acquire).
_LOOK_S = 2.0
_LOOK_UNWOKEN_S = 0.05


def open_location(location: str, *, ttl_s: float, create: bool, access: Access) -> "SqliteStore":
    """The store at an absolute path; see :class:`loden.stores.Opener`.

    Raises:
        ConfigError: the path is not absolute.
    """
    del access  # the file system says who may
    if not location.strip("/") or not location.startswith("/"):
        raise ConfigError(
            "store",
            f"'sqlite://{location}' does not name an absolute path",
            hint="for example sqlite:///var/lib/loden/loden.db",
        )
    return SqliteStore(Path("/" + location.lstrip("/")), ttl_s=ttl_s, create=create)


class SqliteStore:
    """A handle to the store in a file. The methods are those of :class:`loden.stores.base.Store`.

    Args:
        path: the file, absolute. It and its directory are made at the first use.
        ttl_s: how long a lease lasts after a write, in seconds.
        create: make the file where there is none.
        clock: what ends leases.
        history: for how many revisions removals are remembered; a watch from further back gets a snapshot.
    """

    def __init__(
        self,
        path: Path,
        *,
        ttl_s: float,
        create: bool = True,
        clock: Clock | None = None,
        history: int = 10_000,
    ) -> None:
        self._path = path
        self._ttl_s = ttl_s
        self._create = create
        self._clock = clock or SystemClock()
        self._history = history
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loden-sqlite")
        self._db: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._wakes: set[asyncio.Event] = set()
        self._is_closed = False

    @property
    def ttl_s(self) -> float:
        return self._ttl_s

    async def get_network(self) -> bytes | None:
        def read(db: sqlite3.Connection) -> bytes | None:
            (text,) = db.execute("SELECT network FROM state").fetchone()
            return None if text is None else bytes(text)

        return await self._run(read)

    async def put_network(self, text: bytes) -> None:
        def write(db: sqlite3.Connection) -> None:
            db.execute("UPDATE state SET network = ?", (text,))

        await self._write(write)

    async def watch_network(self) -> AsyncGenerator[bytes | None, None]:
        last = await self.get_network()
        yield last
        with self._waking() as (wake, look_s):
            while not self._is_closed:
                wake.clear()
                if (text := await self.get_network()) != last:
                    last = text
                    yield text
                with suppress(TimeoutError):
                    async with asyncio.timeout(look_s):
                        await wake.wait()

    async def with_ends(self, snapshot: Snapshot) -> Snapshot:
        return snapshot

    async def snapshot(self) -> Snapshot:
        def read(db: sqlite3.Connection) -> Snapshot:
            with transaction(db, "DEFERRED"):
                return leases.snapshot(db, self._clock.since_boot_s())

        return await self._run(read)

    async def create(self, lease: Lease, *, holder: Holder | None, reserve: bool = False) -> Record:
        return await self._write(
            lambda db: leases.create(
                db, lease, holder=holder, end=leases.End() if reserve else self._end_from_now()
            )
        )

    async def replace(self, record: Record, *, extend: bool = True) -> Record:
        return await self._write(
            lambda db: leases.replace(db, record, end=self._end_from_now(), extend=extend)
        )

    async def delete(self, record: Record) -> None:
        await self._write(lambda db: leases.delete(db, record, history=self._history))

    async def watch(self, revision: int) -> AsyncGenerator[Changes | Snapshot, None]:
        await self._run(leases.current_revision)  # the file's directory must be there to be watched
        with self._waking() as (wake, look_s):
            while not self._is_closed:
                wake.clear()
                news, left_s = await self._run(partial(self._look, since=revision))
                if news is not None:
                    revision = news.revision
                    yield news
                    continue
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(look_s, left_s)):
                        await wake.wait()

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for wake in self._wakes:
            wake.set()
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        finally:
            self._thread.shutdown(wait=False)

    def _end_from_now(self) -> leases.End:
        return leases.End(self._clock.since_boot_s() + self._ttl_s, self._clock.wall_s() + self._ttl_s)

    @contextmanager
    def _waking(self) -> Iterator[tuple[asyncio.Event, float]]:
        """An event that is set when the store may have changed, and when this handle is closed.

        Beside it how often to look all the same, in seconds.
        """
        wake = asyncio.Event()
        self._wakes.add(wake)
        try:
            watch = FileWatch(self._path, wake.set)
        except OSError as error:
            _log.warning(
                "store.watch_polls store=%s look_s=%s reason=%s; raise fs.inotify.max_user_instances",
                self._path,
                _LOOK_UNWOKEN_S,
                error,
            )
            watch = None
        try:
            yield wake, _LOOK_UNWOKEN_S if watch is None else _LOOK_S
        finally:
            self._wakes.discard(wake)
            if watch is not None:
                watch.close()

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do some work on the connection, in the worker thread."""

        def run() -> T:
            with translated(self._path):
                return work(self._connected())

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    async def _write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do some work as a transaction that others are told of."""
        return await self._run(partial(self._commit, work))

    # The rest runs in the worker thread.

    def _commit(self, work: Callable[[sqlite3.Connection], T], db: sqlite3.Connection) -> T:
        with transaction(db, "IMMEDIATE"):
            leases.expire(db, self._clock.since_boot_s(), history=self._history)
            done = work(db)
        with suppress(
            OSError
        ):  # it is committed whatever happens to the file; watches look by themselves too
            os.utime(self._path)
        return done

    def _look(self, db: sqlite3.Connection, *, since: int) -> tuple[Changes | Snapshot | None, float]:
        """What a watch has to tell, and how long until the next lease ends, in seconds."""
        now_s = self._clock.since_boot_s()
        if leases.has_expired(db, now_s):
            self._commit(lambda _: None, db)
        with transaction(db, "DEFERRED"):
            news = leases.changes(db, since, history=self._history, now_s=now_s)
            deadline = leases.next_deadline(db)
        return news, float("inf") if deadline is None else max(0.0, deadline - now_s)

    def _connected(self) -> sqlite3.Connection:
        """The connection, opened at the first use, and anew when somebody deleted or replaced the file."""
        if self._db is not None and _identity(self._path) != self._file:
            _log.warning("store.replaced store=%s; opening it anew", self._path)
            self._disconnect()
        if self._db is None:
            self._db = open_database(self._path, create=self._create, ttl_s=self._ttl_s, clock=self._clock)
            self._file = _identity(self._path)
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
