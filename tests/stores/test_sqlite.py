# SPDX-License-Identifier: Apache-2.0
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from loden.stores.sqlite import SqliteStore
from tests.contract.store import StoreContract


class SqlitePlace:
    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, *, ttl_s: float = 86_400, history: int = 10_000) -> SqliteStore:
        return SqliteStore(self.path, ttl_s=ttl_s, history=history)

    def plant(self, key: str, value: bytes) -> None:
        with closing(sqlite3.connect(self.path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            db.execute("UPDATE state SET revision = revision + 1")
            db.execute(
                "INSERT INTO leases (key, value, revision) SELECT ?, ?, revision FROM state",
                (key, value.decode()),
            )
            db.execute("COMMIT")
        self.path.touch()


@pytest.fixture
def place(tmp_path: Path) -> SqlitePlace:
    return SqlitePlace(tmp_path / "store" / "loden.db")


class TestSqliteStore(StoreContract):
    pass
