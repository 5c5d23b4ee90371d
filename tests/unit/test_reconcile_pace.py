# SPDX-License-Identifier: Apache-2.0
"""How often the loop reads and tries again, for tables that are slow and shared by many hosts."""

import asyncio
import errno
from collections.abc import Coroutine
from contextlib import suppress
from itertools import pairwise
from typing import Any

import pytest

from loden.address import Prefix
from loden.reconcile import Pace, Reconciler
from loden.tables.entries import CloudRoute, CloudSetting
from tests.contract.table import run
from tests.unit.fake_table import FakeTable
from tests.unit.virtual_time import VirtualTime

ROUTE = CloudRoute(Prefix.parse("10.5.1.0/24"))
SETTING = CloudSetting("check", "off")
PACE = Pace(look_s=300.0, retry_first_s=2.0, retry_most_s=300.0, spread=0.2)


class World:
    def __init__(self) -> None:
        self.loop = VirtualTime()
        self.routes = FakeTable(CloudRoute)
        self.settings = FakeTable(CloudSetting)
        self.reconciler = Reconciler([self.routes, self.settings], clock=self.loop.time, pace=PACE, place="X")
        self.reconciler.want("own", [ROUTE, SETTING])
        self.times: list[float] = []

    def run_for(self, seconds: float) -> None:
        async def bounded() -> None:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self.reconciler.run()

        self._complete(bounded())

    def _complete(self, work: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(work)

    def count(self, verb: str) -> int:
        return sum(line.startswith(f"{verb} CloudRoute") for line in self.routes.journal)


@pytest.fixture
def world() -> World:
    return World()


def test_one_reading_an_interval_and_none_after_a_change(world: World) -> None:
    world.run_for(3600.0)
    assert world.count("put") == 1
    assert 10 <= world.count("read") <= 16  # an hour of 300 s, each a fifth longer or shorter


def test_intervals_differ_from_each_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    read, times = world.routes.read, []

    async def noting(wanted: Any) -> Any:
        times.append(world.loop.time())
        return await read(wanted)

    monkeypatch.setattr(world.routes, "read", noting)
    world.run_for(3600.0)
    gaps = [late - early for early, late in pairwise(times)]
    assert all(240.0 <= gap <= 360.0 for gap in gaps)
    assert len({round(gap) for gap in gaps}) > 3


def test_failure_is_tried_again_with_growing_pauses_of_random_length(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.routes.refused[ROUTE.slot] = errno.EBUSY
    put, times = world.routes.put, []

    async def noting(entries: Any) -> Any:
        times.append(world.loop.time())
        return await put(entries)

    monkeypatch.setattr(world.routes, "put", noting)
    world.run_for(250.0)
    gaps = [late - early for early, late in pairwise(times)]
    for gap, nominal in zip(gaps, (2.0, 4.0, 8.0, 16.0, 32.0, 64.0), strict=False):
        assert nominal * 0.8 <= gap <= nominal * 1.2 + 0.01
    assert len(gaps) >= 5


def test_reading_that_fails_names_the_place(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.routes.unreadable = errno.EIO
    world.run_for(60.0)
    assert "reading X fails, trying again" in caplog.text


def test_what_failed_and_is_found_as_wanted_has_failed_no_more() -> None:
    table = FakeTable(CloudRoute)
    reconciler = Reconciler([table], pace=PACE)
    reconciler.want("own", [ROUTE])
    table.refused[ROUTE.slot] = errno.EBUSY
    run(reconciler.look())
    assert reconciler.failures("own")
    assert reconciler.has_settled
    table.standing[ROUTE.slot] = ROUTE  # somebody else made it
    table.journal.clear()
    run(reconciler.look())
    assert reconciler.failures("own") == []
    assert table.journal == ["read CloudRoute"]


def test_what_an_owner_goes_on_to_want_is_not_put_again() -> None:
    table = FakeTable(CloudRoute)
    reconciler = Reconciler([table], pace=PACE)
    other = CloudRoute(Prefix.parse("10.5.2.0/24"))
    reconciler.want("own", [ROUTE])
    run(reconciler.look())
    table.journal.clear()
    reconciler.want("own", [ROUTE, other])
    run(reconciler.settle())
    assert table.journal == [f"put CloudRoute {other}"]
