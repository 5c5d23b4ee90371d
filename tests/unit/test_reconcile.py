# SPDX-License-Identifier: Apache-2.0
"""The reconciler, with tables and a clock that do what the test says."""

import asyncio
import errno
import logging
from collections.abc import Awaitable
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Prefix
from loden.errors import KernelError, errno_of
from loden.reconcile import Reconciler
from loden.tables.entries import Entry, Neighbour, Route, TunLink
from tests.contract.table import run
from tests.unit.fake_table import FakeTable

LINK = TunLink("flannel.1", 1472)  # what all else stands on


def neighbour(number: int, mac: int = 0) -> Neighbour:
    return Neighbour("flannel.1", bytes((10, 5, number, 0)), bytes((2, 0, 0, 0, mac, number)))


def route(number: int, device: str = "flannel.1") -> Route:
    return Route(Prefix(bytes((10, 5, number, 0)), 24), device)


class World:
    """Three tables that depend on each other in order, a reconciler and its clock."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.journal: list[str] = []
        self.links = FakeTable(TunLink, self.journal)
        self.neighbours = FakeTable(Neighbour, self.journal)
        self.routes = FakeTable(Route, self.journal)
        self.tables = (self.links, self.neighbours, self.routes)
        self.reconciler = Reconciler(self.tables, clock=lambda: self.now_s)

    def want(self, owner: str, *entries: Entry) -> None:
        self.reconciler.want(owner, entries)

    def settle(self, *, after_s: float = 0.0) -> None:
        self.now_s += after_s
        run(self.reconciler.settle())

    def look(self) -> None:
        run(self.reconciler.look())

    def plant(self, *entries: Entry) -> None:
        """Put entries there as somebody else."""
        for entry in entries:
            table = next(table for table in self.tables if table.entry_type is type(entry))
            table.standing[entry.slot] = entry

    @property
    def standing(self) -> set[Entry]:
        return {entry for table in self.tables for entry in table.standing.values()}

    def said(self) -> list[str]:
        """What was done since the last time, readings left out."""
        lines = [line for line in self.journal if not line.startswith("read")]
        self.journal.clear()
        return lines


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(autouse=True)
def everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def logged(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(word)]


class TestOrder:
    def test_puts_go_down_the_tables_and_drops_come_back_up(self, world: World) -> None:
        world.want("own", LINK)
        world.want("peer", route(9), neighbour(9))
        world.settle()
        stack = [f"TunLink {LINK}", f"Neighbour {neighbour(9)}", f"Route {route(9)}"]
        assert world.said() == [f"put {entry}" for entry in stack]
        world.want("peer")
        world.want("own")
        world.settle()
        assert world.said() == [f"drop {entry}" for entry in reversed(stack)]
        assert world.standing == set()

    def test_the_new_way_stands_before_the_old_one_goes(self, world: World) -> None:
        world.want("peer", neighbour(9), route(9))
        world.settle()
        world.said()
        world.want("peer", route(9, "eth0"))
        world.settle()
        assert world.said() == [f"put Route {route(9, 'eth0')}", f"drop Neighbour {neighbour(9)}"]

    def test_look_reads_each_table_when_those_before_it_are_mended(self, world: World) -> None:
        world.want("own", LINK)
        world.want("peer", route(9))
        world.plant(neighbour(77))
        world.look()
        assert world.journal == [
            "read TunLink", f"put TunLink {LINK}",
            "read Neighbour",
            "read Route", f"put Route {route(9)}",
            f"drop Neighbour {neighbour(77)}",
        ]  # fmt: skip

    def test_nothing_to_do_does_nothing(self, world: World) -> None:
        world.want("peer", route(9))
        world.look()
        world.said()
        world.want("peer", route(9))
        world.settle()
        world.look()
        assert world.said() == []


class TestOwners:
    def test_what_an_owner_wanted_before_goes(self, world: World) -> None:
        world.want("peer", neighbour(9), route(9))
        world.want("peer", route(10))
        world.settle()
        assert world.standing == {route(10)}
        assert world.reconciler.owners == {"peer"}
        world.want("peer")
        assert world.reconciler.owners == frozenset()

    def test_two_owners_of_one_entry_keep_it_until_both_let_go(self, world: World) -> None:
        shared = route(9)
        for first, second in ((shared, shared), (route(9), route(9))):
            world.want("one", first)
            world.want("two", second)
            world.settle()
            world.want("one")
            world.settle()
            assert world.standing == {shared}
            world.want("two")
            world.settle()
            assert world.standing == set()

    def test_contested_slot_stays_with_the_first_and_is_inherited(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.want("one", route(9, "eth1"))
        world.want("two", route(9, "eth2"))
        world.want("three", route(9, "eth3"))
        world.settle()
        assert world.standing == {route(9, "eth1")}
        assert len(logged(caplog, "contested")) == 2
        assert "owner='two'" in logged(caplog, "contested")[0]
        world.want("two")
        world.settle()
        assert world.standing == {route(9, "eth1")}
        world.want("one")
        world.settle()
        assert world.standing == {route(9, "eth3")}
        world.want("three")
        world.settle()
        assert world.standing == set()

    @given(
        st.lists(
            st.tuples(
                st.sampled_from("abc"),
                st.dictionaries(st.integers(1, 4), st.sampled_from(["eth0", "eth1"])),
            ),
            max_size=12,
        )
    )
    def test_what_stands_is_the_union_of_what_is_wanted(
        self, changes: list[tuple[str, dict[int, str]]]
    ) -> None:
        world = World()
        wanted: dict[str, list[Route]] = {}
        for owner, devices in changes:
            wanted[owner] = [route(number, device) for number, device in devices.items()]
            world.want(owner, *wanted[owner])
            world.settle()
            every = [entry for entries in wanted.values() for entry in entries]
            assert set(world.routes.standing) == {entry.slot for entry in every}
            assert world.standing <= set(every)


class TestFailures:
    def test_bad_entry_delays_no_other_and_is_tried_again_with_growing_pauses(self, world: World) -> None:
        world.routes.refused[route(9).slot] = errno.EINVAL
        world.want("peers", *(route(number) for number in range(8, 12)))
        world.settle()
        assert world.standing == {route(8), route(10), route(11)}
        world.said()
        tries: list[float] = []
        for _ in range(1000):
            world.settle(after_s=0.1)
            if world.said():
                tries.append(world.now_s)
        gaps = [round(late - early, 1) for early, late in pairwise(tries)]
        assert gaps[:6] == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4]
        assert gaps[-1] == pytest.approx(30.0, abs=0.2)

    def test_each_entry_has_a_pause_of_its_own(self, world: World) -> None:
        world.routes.refused[route(9).slot] = errno.EINVAL
        world.want("one", route(9))
        world.settle()
        for _ in range(6):
            world.settle(after_s=5.0)
        world.routes.refused[route(10).slot] = errno.EINVAL
        world.want("two", route(10))
        world.settle()
        del world.routes.refused[route(10).slot]
        world.settle(after_s=0.1)
        assert world.standing == {route(10)}

    def test_failure_is_said_once_and_so_is_its_end(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.routes.refused = {route(number).slot: errno.EINVAL for number in range(1, 101)}
        world.want("peers", *(route(number) for number in range(1, 101)))
        for _ in range(5):
            world.settle(after_s=40.0)
        (said,) = logged(caplog, "refused")
        assert "count=100" in said
        assert said.count("Invalid argument") == 3
        assert "and 97 more" in said
        world.routes.refused.clear()
        world.settle(after_s=40.0)
        (mended,) = logged(caplog, "mended")
        assert "count=100" in mended
        assert world.reconciler.statistics.failing == 0

    def test_another_reason_is_said_again(self, world: World, caplog: pytest.LogCaptureFixture) -> None:
        world.want("peer", route(9))
        for reason in (errno.EINVAL, errno.EINVAL, errno.ENETDOWN):
            world.routes.refused[route(9).slot] = reason
            world.settle(after_s=40.0)
        assert len(logged(caplog, "refused")) == 2

    def test_what_fails_is_counted_listed_and_found_by_owner(self, world: World) -> None:
        world.routes.refused[route(9).slot] = errno.EINVAL
        world.want("one", route(9), neighbour(9))
        world.want("two", route(10))
        world.settle()
        assert world.reconciler.statistics.failing == 1
        assert world.reconciler.statistics.wanted == 3
        (reason,) = world.reconciler.failures("one")
        assert isinstance(reason, KernelError)
        assert reason.errno == errno.EINVAL
        assert world.reconciler.failures("two") == world.reconciler.failures("nobody") == []
        assert list(world.reconciler.problems) == [str(route(9))]

    def test_wanting_the_same_again_neither_hastens_nor_forgets(self, world: World) -> None:
        world.routes.refused[route(9).slot] = errno.EINVAL
        world.want("peer", route(9))
        world.settle()
        world.want("peer", route(9))
        world.said()
        world.settle()
        assert world.said() == []
        world.settle(after_s=0.1)
        assert world.said() == [f"put Route {route(9)}"]

    def test_failing_entry_that_nobody_wants_any_more_is_dropped(self, world: World) -> None:
        world.routes.refused[route(9).slot] = errno.EINVAL
        world.want("peer", route(9))
        world.settle()
        world.want("peer")
        world.routes.refused.clear()
        world.settle()
        assert world.reconciler.statistics.failing == 0
        world.settle(after_s=60.0)
        assert world.standing == set()

    def test_refused_drop_is_tried_again(self, world: World) -> None:
        world.want("peer", route(9))
        world.settle()
        world.routes.refused[route(9).slot] = errno.EBUSY
        world.want("peer")
        world.settle()
        assert world.standing == {route(9)}
        world.routes.refused.clear()
        world.settle(after_s=0.1)
        assert world.standing == set()

    def test_change_to_what_fails_hastens_the_next_try(self, world: World) -> None:
        """Whoever was in the way may have gone."""
        world.routes.refused[route(9).slot] = errno.EEXIST
        world.want("peer", route(9))
        for _ in range(10):
            world.settle(after_s=31.0)
        del world.routes.refused[route(9).slot]
        world.reconciler.hear(world.routes.message())
        world.settle(after_s=0.2)
        assert world.standing == {route(9)}
        assert world.reconciler.statistics.drifted == 0

    def test_table_that_cannot_be_worked_with_fails_what_was_asked_of_it(self, world: World) -> None:
        world.want("own", LINK)
        world.want("peer", route(9))
        world.links.unusable = errno.ENOBUFS
        world.settle()
        assert world.standing == {route(9)}
        assert [errno_of(error) for error in world.reconciler.failures("own")] == [errno.ENOBUFS]
        world.settle()
        assert world.reconciler.failures("own")
        world.links.unusable = 0
        world.settle(after_s=1.0)
        assert not world.reconciler.failures("own")
        assert world.standing == {LINK, route(9)}

    def test_what_stood_is_dropped_though_another_was_wanted_in_between(self, world: World) -> None:
        world.want("peer", neighbour(9))
        world.settle()
        world.said()
        world.want("peer", neighbour(9, mac=1))
        world.want("peer")
        world.settle()
        assert world.said() == [f"drop Neighbour {neighbour(9)}"]


class TestDrift:
    def test_what_was_heard_to_have_drifted_is_put_back_and_counted(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.want("peers", route(9), route(10))
        world.settle()
        world.said()
        world.routes.standing.clear()
        world.reconciler.hear(world.routes.message(1))
        world.reconciler.hear(world.routes.message(1))
        world.settle()
        assert world.said() == [f"put Route {route(10)}"]
        assert world.reconciler.statistics.drifted == 1
        (said,) = logged(caplog, "drift")
        assert str(route(10)) in said
        assert "somebody changed or removed" in said

    def test_what_is_as_wanted_is_no_drift(self, world: World) -> None:
        world.want("peer", route(9))
        world.settle()
        world.said()
        world.reconciler.hear(world.routes.message())
        world.settle()
        assert world.said() == []

    def test_somebody_who_undoes_ours_at_once_does_not_make_us_spin(self, world: World) -> None:
        world.want("peer", route(9))
        world.settle()
        world.said()
        for _ in range(100):
            world.routes.standing.clear()
            world.reconciler.hear(world.routes.message())
            world.settle(after_s=0.01)
        assert len(world.said()) <= 6

    def test_drift_is_repaired_while_leases_keep_changing(self, world: World) -> None:
        world.want("peer", route(9))
        world.settle()
        world.routes.standing.clear()
        world.reconciler.hear(world.routes.message())
        for number in range(20):
            world.want("other", route(100 + number))
            world.settle(after_s=0.05)
        assert route(9) in world.standing

    def test_what_a_look_finds_missing_is_drift_but_not_in_the_first(self, world: World) -> None:
        world.want("peers", route(9), route(10))
        world.look()
        assert world.reconciler.statistics.drifted == 0
        del world.routes.standing[route(9).slot]
        world.plant(route(10, "eth0"))
        world.look()
        assert world.standing == {route(9), route(10)}
        assert world.reconciler.statistics.drifted == 2
        assert world.reconciler.statistics.looks == 2

    def test_what_was_never_put_yet_is_no_drift(self, world: World) -> None:
        world.look()
        world.want("peer", route(9))
        world.look()
        assert world.standing == {route(9)}
        assert world.reconciler.statistics.drifted == 0

    def test_what_fails_is_no_drift(self, world: World) -> None:
        world.routes.refused[route(9).slot] = errno.EINVAL
        world.want("peer", route(9))
        world.look()
        world.look()
        assert world.reconciler.statistics.drifted == 0

    def test_drift_that_a_look_mended_is_not_mended_again(self, world: World) -> None:
        world.want("peer", route(9))
        world.look()
        world.routes.standing.clear()
        world.reconciler.hear(world.routes.message())
        world.look()
        world.said()
        world.settle(after_s=1.0)
        assert world.said() == []
        assert world.reconciler.statistics.drifted == 1


class TestGarbage:
    def test_only_a_look_removes_what_nobody_wants(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.plant(route(77), neighbour(77))
        world.want("peer", route(9))
        world.settle()
        assert world.standing == {route(77), neighbour(77), route(9)}
        world.look()
        assert world.standing == {route(9)}
        assert [line.partition(":")[0] for line in logged(caplog, "garbage")] == [
            f"garbage count=1 entries='{neighbour(77)}'".partition(":")[0],
            f"garbage count=1 entries='{route(77)}'",
        ]

    def test_what_was_let_go_before_the_look_is_no_garbage(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.want("peer", route(9))
        world.look()
        world.want("peer")
        world.look()
        assert world.standing == set()
        assert logged(caplog, "garbage") == []

    def test_garbage_that_is_wanted_before_it_is_dropped_stays(self, world: World) -> None:
        world.want("own", LINK)
        world.plant(route(77))
        world.links.in_the_middle = lambda: world.want("peer", route(77))
        world.look()
        world.settle()
        assert world.standing == {LINK, route(77)}

    def test_every_look_lets_tables_tidy_up(self, world: World) -> None:
        world.look()
        assert world.journal == ["read TunLink", "read Neighbour", "read Route"]


class TestConcurrency:
    def test_what_is_wanted_during_a_change_is_not_lost(self, world: World) -> None:
        world.want("one", *(route(number) for number in range(10)))

        def meanwhile() -> None:
            world.want("one", route(3, "eth0"))
            world.want("two", route(99))

        world.routes.in_the_middle = meanwhile
        world.settle()
        world.settle()
        assert world.standing == {route(3, "eth0"), route(99)}

    def test_what_is_wanted_during_a_look_is_not_lost(self, world: World) -> None:
        world.want("own", LINK)
        world.want("one", route(1))
        world.links.in_the_middle = lambda: world.want("two", neighbour(2), route(2))
        world.routes.in_the_middle = lambda: world.want("three", neighbour(3), route(3))
        world.look()
        world.settle()
        assert world.standing == {LINK, route(1), neighbour(2), route(2), neighbour(3), route(3)}

    def test_change_cancelled_half_way_is_finished_by_the_next_look(self, world: World) -> None:
        async def cancel_in_the_middle(work: Awaitable[None]) -> None:
            world.routes.stuck = asyncio.Event()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.001):
                    await work
            world.routes.stuck = None

        world.want("peers", *(route(number) for number in range(10)))
        run(cancel_in_the_middle(world.reconciler.settle()))
        assert 0 < len(world.standing) < 10
        world.want("peers", *(route(number) for number in range(5, 15)))
        run(cancel_in_the_middle(world.reconciler.look()))
        world.look()
        world.settle()
        assert world.standing == {route(number) for number in range(5, 15)}


class TestRun:
    """The loop itself, in real time, without a single pause of note."""

    def running(self, world: World, *awaited: Awaitable[None]) -> None:
        async def work() -> None:
            async with asyncio.TaskGroup() as group:
                task = group.create_task(world.reconciler.run())
                for one in awaited:
                    await one
                task.cancel()

        run(work())

    async def until_idle(self) -> None:
        for _ in range(100):
            await asyncio.sleep(0)

    def test_the_first_thing_is_a_look(self, world: World) -> None:
        world.plant(route(77))
        world.want("own", LINK)
        world.settle()
        world.said()
        world.want("peer", route(9))
        self.running(world, self.until_idle())
        assert world.standing == {LINK, route(9)}
        assert world.reconciler.statistics.looks == 1
        assert world.said() == [f"put Route {route(9)}", f"drop Route {route(77)}"]

    def test_what_is_wanted_later_is_settled_without_a_look(self, world: World) -> None:
        async def later() -> None:
            await self.until_idle()
            world.want("peer", route(9))
            await self.until_idle()

        self.running(world, later())
        assert world.standing == {route(9)}
        assert world.reconciler.statistics.looks == 1

    def test_looks_are_a_minute_apart(self, world: World) -> None:
        async def wait() -> None:
            for pause_s, looks in ((0.0, 1), (59.0, 1), (1.5, 2), (59.0, 2), (1.5, 3)):
                world.now_s += pause_s
                world.reconciler.want("waker", [route(int(world.now_s) % 250)])
                await self.until_idle()
                assert world.reconciler.statistics.looks == looks

        self.running(world, wait())

    def test_notification_that_can_mean_anything_leads_to_a_look(self, world: World) -> None:
        async def wait() -> None:
            world.want("own", LINK)
            await self.until_idle()
            world.now_s += 1.0
            world.links.standing.clear()
            world.reconciler.hear(world.links.message(look=True))
            await self.until_idle()

        self.running(world, wait())
        assert world.standing == {LINK}
        assert world.reconciler.statistics.looks == 2

    def test_failing_look_is_tried_again_and_said_once(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        world.want("peer", route(9))
        world.neighbours.unreadable = errno.EINTR

        async def wait() -> None:
            for _ in range(3):
                await self.until_idle()
                world.now_s += 40.0
                world.reconciler.look_soon()
            world.neighbours.unreadable = 0
            world.now_s += 40.0
            world.reconciler.look_soon()
            await self.until_idle()

        self.running(world, wait())
        assert world.standing == {route(9)}
        assert len(logged(caplog, "reading the kernel's tables fails")) == 1
        assert len(logged(caplog, "reading the kernel's tables works again")) == 1

    def test_device_that_was_put_leads_to_a_look(self, world: World) -> None:
        """Made anew, it took along all that stood on it."""

        async def wait() -> None:
            await self.until_idle()
            world.want("own", LINK)
            await self.until_idle()
            world.now_s += 1.0
            world.want("waker", route(1))
            await self.until_idle()

        self.running(world, wait())
        assert world.reconciler.statistics.looks == 2

    def test_device_that_cannot_be_put_does_not(self, world: World) -> None:
        world.links.refused[LINK.slot] = errno.EOPNOTSUPP

        async def wait() -> None:
            await self.until_idle()
            world.want("own", LINK)
            for _ in range(20):
                await self.until_idle()
                world.now_s += 2.0
                world.want("waker", route(int(world.now_s) % 250))

        self.running(world, wait())
        assert world.reconciler.statistics.looks == 1
