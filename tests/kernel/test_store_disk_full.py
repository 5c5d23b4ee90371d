# SPDX-License-Identifier: Apache-2.0
"""The SQLite store on file systems that are full or read-only, in a mount namespace of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FULL = """
import asyncio, os, sys
from pathlib import Path
from loden.errors import StoreUnavailable
from loden.stores.sqlite import SqliteStore
from tests.contract.store import lease

async def main():
    directory = Path(sys.argv[1])
    store = SqliteStore(directory / "loden.db", ttl_s=86_400)
    kept = await store.create(lease("10.5.1.0/24"), holder=None)
    filler = os.open(directory / "filler", os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(filler, bytes(1024))
    except OSError:
        pass
    written = {kept.key: kept}
    try:
        for number in range(2, 256):
            record = await store.create(lease(f"10.5.{number}.0/24"), holder=None)
            written[record.key] = record
        raise AssertionError("the disk never filled up")
    except StoreUnavailable as error:
        assert "the disk is full" in error.message, error
        assert str(directory) in error.message and "free some space" in error.hint, error
    assert (await store.snapshot()).records == written
    os.close(filler)
    (directory / "filler").unlink()
    again = await store.replace(kept)
    assert (await store.snapshot()).records[kept.key] == again
    await store.close()

    late = SqliteStore(directory / "late" / "loden.db", ttl_s=86_400)
    filler = os.open(directory / "filler", os.O_CREAT | os.O_WRONLY)
    try:
        while True:
            os.write(filler, bytes(1024))
    except OSError:
        os.close(filler)
    try:
        await late.snapshot()
        raise AssertionError("a store fitted on a full disk")
    except StoreUnavailable as error:
        assert "No space left" in error.message, error
    assert not list((directory / "late").glob("*"))
    (directory / "filler").unlink()
    await late.snapshot()
    await late.close()

asyncio.run(main())
"""

READ_ONLY = """
import asyncio, subprocess, sys
from pathlib import Path
from loden.errors import StoreUnusable
from loden.stores.sqlite import SqliteStore
from tests.contract.store import lease

async def main():
    directory = Path(sys.argv[1])
    store = SqliteStore(directory / "loden.db", ttl_s=86_400)
    await store.create(lease(), holder=None)
    await store.close()
    subprocess.run(["mount", "-o", "remount,bind,ro", str(directory)], check=True)
    for path in (directory / "loden.db", directory / "new" / "loden.db"):
        store = SqliteStore(path, ttl_s=86_400)
        try:
            await store.create(lease("10.5.1.0/24"), holder=None)
            raise AssertionError("it wrote")
        except StoreUnusable as error:
            assert str(path) in error.message and error.hint, error
        await store.close()

asyncio.run(main())
"""


@pytest.mark.kernel
@pytest.mark.parametrize("script", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_store_on_a_bad_file_system_says_so_and_loses_nothing(script: str, tmp_path: Path) -> None:
    command = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], check=False).returncode:
        pytest.skip("no mount namespaces: neither root nor user namespaces")
    done = subprocess.run(
        [
            *command,
            "sh",
            "-c",
            'mount -t tmpfs -o size=400k tmpfs "$1" && exec "$2" -c "$3" "$1"',
            "sh",
            str(tmp_path),
            sys.executable,
            script,
        ],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
