# SPDX-License-Identifier: Apache-2.0
"""What happens to the SQLite store when files, clocks, processes and disks misbehave."""

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing, contextmanager
from pathlib import Path

import pytest

from loden.errors import StoreError, StoreUnavailable, StoreUnusable
from loden.stores import sqlite, sqlite_file
from loden.stores.acquire import acquire
from loden.stores.base import Record, Snapshot
from loden.stores.sqlite import SqliteStore
from tests.contract.store import Watcher, claim, handles, holder, lease, run
from tests.stores.fakes import FakeClock
from tests.stores.test_sqlite import SqlitePlace

CREATE = """
import asyncio, sys
from pathlib import Path
from loden.errors import Conflict
from loden.stores.sqlite import SqliteStore
from tests.contract.store import lease

async def main():
    store = SqliteStore(Path(sys.argv[1]), ttl_s=86_400)
    try:
        await store.create(lease(public=sys.argv[2]), holder=None)
        print("won")
    except Conflict:
        print("lost")
    finally:
        await store.close()

sys.stdin.read(1)
asyncio.run(main())
"""

HALF_WRITTEN = """
import sys
from pathlib import Path
from loden.stores.clock import SystemClock
from loden.stores import sqlite_file, sqlite_leases
from tests.contract.store import lease

db = sqlite_file.open_database(Path(sys.argv[1]), create=True, ttl_s=86_400, clock=SystemClock())
with sqlite_file.transaction(db, "IMMEDIATE"):
    sqlite_leases.create(db, lease(), holder=None, end=sqlite_leases.End())
    print("written", flush=True)
    sys.stdin.read()
"""

WRITE_ALWAYS = """
import asyncio, sys
from pathlib import Path
from loden.stores.sqlite import SqliteStore
from tests.contract.store import lease

async def main():
    store = SqliteStore(Path(sys.argv[1]), ttl_s=86_400)
    while True:
        for number in range(256):
            record = await store.create(lease(f"10.9.{number}.0/24"), holder=None)
            print(number, flush=True)
            await store.delete(record)

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store" / "loden.db"


@contextmanager
def python(script: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """Another process, which is gone at the end of the block."""
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_use(path: Path, *, create: bool = True) -> Snapshot:
    """Open a store, look and close it."""

    async def work() -> Snapshot:
        store = SqliteStore(path, ttl_s=86_400, create=create)
        try:
            return await store.snapshot()
        finally:
            await store.close()

    return run(work)


def test_processes_that_race_from_nothing_have_one_winner(path: Path) -> None:
    with (
        python(CREATE, path, "192.0.2.1") as one,
        python(CREATE, path, "192.0.2.2") as two,
        python(CREATE, path, "192.0.2.3") as three,
    ):
        processes = (one, two, three)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("g")
            process.stdin.flush()
        assert sorted(process.communicate()[0].strip() for process in processes) == ["lost", "lost", "won"]
    assert len(first_use(path).records) == 1
    assert [found.name for found in path.parent.iterdir()] == [path.name]


def test_fifty_agents_that_start_at_once_all_get_a_subnet(path: Path) -> None:
    async def one(number: int) -> Record:
        store = SqliteStore(path, ttl_s=86_400)
        try:
            mine = claim(str(number), public=f"192.0.2.{number}")
            return await acquire(store, mine, rng=random.Random(number))
        finally:
            await store.close()

    async def work() -> list[Record]:
        return await asyncio.gather(*(one(number) for number in range(50)))

    assert len({record.key for record in run(work)}) == 50


def test_watch_hears_another_process_without_looking(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_LOOK_S", 10_000.0)

    async def work() -> None:
        async with handles(SqlitePlace(path)) as (store,):
            watcher = Watcher(store, await store.snapshot())
            with python(CREATE, path, "192.0.2.1") as process:
                assert process.stdin is not None
                process.stdin.write("g")
                process.stdin.flush()
                await watcher.until(lambda w: w.known.keys() == {"10.5.34.0-24"})

    run(work)


def test_watch_finds_what_a_writer_did_not_announce(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_LOOK_S", 0.02)
    monkeypatch.setattr(os, "utime", lambda _: None)

    async def work() -> None:
        async with handles(SqlitePlace(path), 2) as (one, two):
            watcher = Watcher(two, await two.snapshot())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(watcher.until(lambda w: bool(w.known)))
                await one.create(lease(), holder=None)

    run(work)


def test_watch_without_inotify_still_looks(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(sqlite, "_LOOK_S", 10_000.0)
    monkeypatch.setattr(sqlite, "FileWatch", refuse)

    async def work() -> None:
        async with handles(SqlitePlace(path), 2) as (one, two):
            watcher = Watcher(two, await two.snapshot())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(watcher.until(lambda w: bool(w.known)))
                await one.create(lease(), holder=None)

    run(work)
    assert "fs.inotify.max_user_instances" in caplog.text


def test_kill_in_the_middle_of_a_transaction_leaves_nothing_of_it(path: Path) -> None:
    with python(HALF_WRITTEN, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
        process.wait()

    async def work() -> None:
        async with handles(SqlitePlace(path)) as (store,):
            assert not (await store.snapshot()).records
            await store.create(lease(), holder=None)

    run(work)


def test_kill_at_any_moment_leaves_a_sound_store(path: Path) -> None:
    rng = random.Random(1)
    for _ in range(4):
        with python(WRITE_ALWAYS, path) as process:
            assert process.stdout is not None
            for _ in range(rng.randrange(1, 20)):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.wait()

        async def clear() -> None:
            async with handles(SqlitePlace(path)) as (store,):
                for record in (await store.snapshot()).records.values():
                    await store.delete(record)

        with closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            keys = db.execute("SELECT key FROM leases ORDER BY key").fetchall()
            assert db.execute("SELECT key FROM claims ORDER BY key").fetchall() == keys
        run(clear)


def test_files_are_for_their_owner_alone(path: Path) -> None:
    first_use(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_looking_does_not_make_a_store(path: Path) -> None:
    with pytest.raises(StoreUnusable, match=r"loden\.db: no such file.*loden run"):
        first_use(path, create=False)
    assert not path.parent.exists()


def _no_database(path: Path) -> None:
    path.write_text("this is not a database, however long one looks at it\n" * 100)


def _empty(path: Path) -> None:
    path.touch()


def _directory(path: Path) -> None:
    path.mkdir()


def _another_application(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")


def _newer_version(path: Path) -> None:
    first_use(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")


def _trampled(path: Path) -> None:
    first_use(path)
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)


def _truncated(path: Path) -> None:
    first_use(path)
    os.truncate(path, 5000)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_no_database, "not a database.*move"),
        (_empty, "not a Loden store"),
        (_directory, "must be a file"),
        (_another_application, "not a Loden store"),
        (_newer_version, "version 99.*same release"),
        (_trampled, "malformed.*move .* away"),
        (_truncated, "malformed.*move .* away"),
    ],
)
def test_unusable_file_is_named_with_what_to_do(path: Path, spoil: Callable[[Path], None], says: str) -> None:
    path.parent.mkdir()
    spoil(path)
    before = None if path.is_dir() else path.read_bytes()
    with pytest.raises(StoreUnusable, match=says) as caught:
        first_use(path)
    assert str(path) in str(caught.value)
    assert before is None or path.read_bytes() == before


def test_store_whose_state_somebody_deleted_is_unusable(path: Path) -> None:
    first_use(path)
    with closing(sqlite3.connect(path)) as db:
        db.execute("DELETE FROM state")
        db.commit()
    with pytest.raises(StoreUnusable, match="table state is empty"):
        first_use(path)


@pytest.mark.parametrize("column", ["key", "value", "holder", "contender"])
def test_text_that_is_not_utf8_concerns_its_own_row_alone(path: Path, column: str) -> None:
    async def act() -> Snapshot:
        store = SqliteStore(path, ttl_s=86_400)
        kept = await store.create(lease(public="192.0.2.1"), holder=holder("a"))
        with closing(sqlite3.connect(path)) as db:
            values = {"key": "10.5.250.0-24", "value": '{"PublicIP":"192.0.2.2"}'}
            db.execute(
                "INSERT INTO leases (key, value, revision) SELECT :key, :value, revision FROM state", values
            )
            db.execute(f"UPDATE leases SET {column} = CAST(x'ff' AS TEXT) WHERE key = :key", values)
            db.commit()
        snapshot = await store.snapshot()
        await store.close()
        assert snapshot.records.get(kept.key) == kept
        return snapshot

    assert run(act).malformed


def test_directory_that_is_a_file_is_unusable(path: Path) -> None:
    path.parent.touch()
    with pytest.raises(StoreUnusable, match="must be a directory"):
        first_use(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write whatever the mode says; see tests/kernel")
def test_directory_that_may_not_be_written_is_unusable(path: Path) -> None:
    path.parent.mkdir(mode=0o500)
    with pytest.raises(StoreUnusable, match="may write"):
        first_use(path)


def test_lock_that_stays_is_unavailable_and_the_store_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_BUSY_S", 0.01)

    async def work() -> None:
        async with handles(SqlitePlace(path)) as (store,):
            await store.snapshot()
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                with pytest.raises(StoreUnavailable, match="another process holds its lock"):
                    await store.create(lease(), holder=None)
                assert not (await store.snapshot()).records
            await store.create(lease(), holder=None)

    run(work)


def test_waiting_for_a_lock_leaves_the_event_loop_free(path: Path) -> None:
    async def work() -> None:
        async with handles(SqlitePlace(path)) as (store,):
            await store.snapshot()
            with closing(sqlite3.connect(path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                async with asyncio.TaskGroup() as tasks:
                    writing = tasks.create_task(store.create(lease(), holder=None))
                    await asyncio.sleep(0)
                    assert not writing.done()
                    other.execute("ROLLBACK")  # by this very thread, or never
            assert writing.result().key in (await store.snapshot()).records

    run(work)


def test_deleted_file_is_made_anew_and_watchers_learn(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_LOOK_S", 0.02)

    async def work() -> None:
        async with handles(SqlitePlace(path)) as (store,):
            await store.create(lease(), holder=None)
            watcher = Watcher(store, await store.snapshot())
            shutil.rmtree(path.parent)
            await watcher.until(lambda w: not w.known)
            assert isinstance(watcher.seen[0], Snapshot)
            await store.create(lease(), holder=None)

    run(work)


@pytest.mark.parametrize("jump_s", [-1e9, -3600.0, 3600.0, 1e9])
def test_wall_clock_jump_ends_no_lease_and_lengthens_none(path: Path, jump_s: float) -> None:
    async def work() -> None:
        clock = FakeClock()
        store = SqliteStore(path, ttl_s=100, clock=clock)
        try:
            record = await store.create(lease(), holder=holder("a"))
            clock.wall += jump_s
            clock.advance(99)
            assert (await store.snapshot()).records == {record.key: record}
            clock.advance(1)
            assert not (await store.snapshot()).records
            await store.create(lease(), holder=holder("b"))
        finally:
            await store.close()

    run(work)


@pytest.mark.parametrize(
    ("down_s", "left_s"), [(30.0, 70.0), (100.0, 0.0), (1e6, 0.0), (-1e9, 100.0), (-10.0, 100.0)]
)
def test_reboot_leaves_each_lease_what_it_had(path: Path, down_s: float, left_s: float) -> None:
    """A clock that is behind after the reboot, as without a battery, gives a lease its full time at most."""

    async def work() -> None:
        clock = FakeClock(since_boot_s=50_000.0)
        before = SqliteStore(path, ttl_s=100, clock=clock)
        kept = await before.create(lease("10.5.1.0/24"), holder=None, reserve=True)
        record = await before.create(lease("10.5.2.0/24"), holder=holder("a"))
        await before.close()
        clock.reboot(down_s=down_s)
        after = SqliteStore(path, ttl_s=100, clock=clock)
        try:
            records = (await after.snapshot()).records
            assert records[kept.key] == kept
            if left_s:
                assert records[record.key].expires == pytest.approx(clock.boot_s + left_s)
            else:
                assert record.key not in records
        finally:
            await after.close()

    run(work)


def test_cancelled_write_happened_or_not_and_the_handle_goes_on(path: Path) -> None:
    async def work() -> None:
        async with handles(SqlitePlace(path)) as (store,):
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(store.create(lease(), holder=None))
                await asyncio.sleep(0)
                writing.cancel()
            assert (await store.snapshot()).records.keys() <= {"10.5.34.0-24"}
            await store.create(lease("10.5.1.0/24"), holder=None)

    run(work)


def test_watch_that_is_left_lets_go_of_its_file(path: Path) -> None:
    async def work() -> None:
        async with handles(SqlitePlace(path)) as (store,):
            record = await store.create(lease(), holder=None)
            before = len(os.listdir("/proc/self/fd"))
            for _ in range(5):
                async with aclosing(store.watch(record.revision - 1)) as events:
                    await anext(events)
            assert len(os.listdir("/proc/self/fd")) == before

    run(work)


def _sqlite_error_classes() -> list[type[sqlite3.Error]]:
    return [
        found
        for found in vars(sqlite3).values()
        if isinstance(found, type) and issubclass(found, sqlite3.Error)
    ]


@pytest.mark.parametrize("kind", _sqlite_error_classes())
def test_every_error_of_sqlite_becomes_ours(kind: type[sqlite3.Error], path: Path) -> None:
    with pytest.raises(StoreError) as caught, sqlite_file.translated(path):
        raise kind("so it said")
    assert caught.value.__cause__ is not None
    assert str(path) in str(caught.value)
