# SPDX-License-Identifier: Apache-2.0
"""The fake that stands in for the kernel keeps the contract of tables."""

import errno

import msgspec
import pytest

from loden.address import Prefix
from loden.tables.entries import Route
from tests.contract.table import Place, TableContract
from tests.unit.fake_table import FakeTable


class FakePlace(msgspec.Struct):
    table: FakeTable

    def entry(self, number: int) -> Route:
        return Route(Prefix(bytes((10, 5, number, 0)), 24), "eth0")

    def changed(self, number: int) -> Route:
        return msgspec.structs.replace(self.entry(number), device="eth1")

    def bad(self) -> Route:
        bad = self.entry(99)
        self.table.refused[bad.slot] = errno.EINVAL
        return bad


class TestFake(TableContract):
    @pytest.fixture
    def place(self) -> Place:
        return FakePlace(FakeTable(Route))
