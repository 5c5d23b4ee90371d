# SPDX-License-Identifier: Apache-2.0
"""The keeper on the store in memory, in virtual time: days pass in milliseconds."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from random import Random

import msgspec
import pytest

from loden.address import Family, Prefix, parse_address
from loden.errors import Conflict, StoreUnavailable, StoreUnusable
from loden.keeper import Keeper
from loden.lease import Lease, Leg
from loden.network import Range
from loden.stores.acquire import Claim, acquire
from loden.stores.base import Changes, Holder, Record, Snapshot
from loden.stores.memory import MemoryStore
from tests.unit.virtual_time import LoopClock, run

DAY_S = 86_400.0
HOUR_S = 3_600.0
ME, OTHER = Holder("boot/1", "me"), Holder("boot/2", "other")
NETWORK = Prefix.parse("10.5.0.0/16")
RANGE = Range(NETWORK, 24, Prefix.parse("10.5.1.0/24"), Prefix.parse("10.5.255.0/24"))
NARROW = Range(NETWORK, 24, Prefix.parse("10.5.1.0/24"), Prefix.parse("10.5.1.0/24"))


class Failing(MemoryStore):
    """A store that can be away."""

    error: Exception | None = None
    calls = 0

    async def _check(self) -> None:
        self.calls += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error

    async def snapshot(self) -> Snapshot:
        await self._check()
        return await super().snapshot()

    async def replace(self, record: Record, *, extend: bool = True) -> Record:
        await self._check()
        return await super().replace(record, extend=extend)


class World:
    """A keeper that runs, with a watch that feeds it."""

    def __init__(self, range_: Range = RANGE, *, margin_s: float = HOUR_S) -> None:
        self.clock = LoopClock()
        self.store = Failing("keeper", ttl_s=DAY_S, clock=self.clock)
        self.taken: list[Record] = []
        self.let_go_s: list[float] = []
        self.range = range_
        self.margin_s = margin_s
        self.hears = True
        self.last = 1  # byte of our address

    def claim(self, previous: Sequence[Prefix] = (), holder: Holder = ME, last: int | None = None) -> Claim:
        address = parse_address(f"192.0.2.{last or self.last}")
        return Claim(
            ranges=(self.range,),
            public={Family.IPV4: address},
            previous=tuple(previous),
            holder=holder,
            make=lambda subnets: Lease.make({f: Leg(s, address) for f, s in subnets.items()}, "host-gw"),
        )

    @asynccontextmanager
    async def guarded(self) -> AsyncIterator[Keeper]:
        """A keeper whose end is watched; it looks every few seconds, so that days take a while."""

        def let_go() -> None:
            self.let_go_s.append(self.clock.since_boot_s())

        async with self.running() as keeper, asyncio.TaskGroup() as group:
            guard = group.create_task(keeper.guard(let_go))
            yield keeper
            guard.cancel()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Keeper]:
        record = await acquire(self.store, self.claim(), rng=Random(1))
        keeper = Keeper(self.store, record, self.claim, margin_s=self.margin_s, clock=self.clock)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(keeper.keep(self.taken.append)),
                group.create_task(self._feed(keeper, record.revision)),
            ]
            yield keeper
            for task in tasks:
                task.cancel()

    async def _feed(self, keeper: Keeper, revision: int) -> None:
        async with aclosing(self.store.watch(revision)) as events:
            async for news in events:
                if self.hears:
                    keeper.hear(news)


def in_world(
    test: Callable[[World], Awaitable[None]], range_: Range = RANGE, *, margin_s: float = HOUR_S
) -> None:
    async def work() -> None:
        await test(World(range_, margin_s=margin_s))

    run(work())


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


def test_lease_is_renewed_before_its_end_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            first = keeper.record
            await asyncio.sleep(30 * DAY_S)
            (record,) = (await world.store.snapshot()).records.values()
            assert (record.key, record.holder, record.lease) == (first.key, ME, first.lease)
            assert record.expires is not None
            assert record.expires > world.clock.since_boot_s() + HOUR_S - 1
            writes = world.store.state.revision - first.revision
            assert 30 <= writes <= 32  # one in 23 hours
        assert not world.taken

    in_world(test)
    assert not errors(caplog)


def test_margin_longer_than_the_lease_is_half_of_it() -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            first = keeper.record.revision
            await asyncio.sleep(10 * DAY_S + 60)
            assert world.store.state.revision - first == 20

    in_world(test, margin_s=2 * DAY_S)


def test_reservation_is_accepted_and_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            reserved = await world.store.replace(msgspec.structs.replace(keeper.record, expires=None))
            await asyncio.sleep(10 * DAY_S)
            assert keeper.record == reserved
            assert world.store.state.revision == reserved.revision

    in_world(test)
    assert not errors(caplog)


def test_released_lease_is_taken_again_with_its_subnet(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            before = keeper.record
            await world.store.delete(before)
            await asyncio.sleep(1)
            assert [record.lease for record in world.taken] == [before.lease]
            assert keeper.record.revision > before.revision

    in_world(test)
    assert len(errors(caplog)) == 1
    assert "it was released or ran out; taking it again" in errors(caplog)[0]


def test_release_that_the_watch_missed_is_seen_at_the_renewal(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        world.hears = False
        async with world.running() as keeper:
            before = keeper.record
            await world.store.delete(before)
            await asyncio.sleep(DAY_S)
            assert [record.lease for record in world.taken] == [before.lease]

    in_world(test)
    assert len(errors(caplog)) == 1


def test_renewal_that_loses_its_race_takes_what_it_finds(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        world.hears = False  # as where a write came through and its answer did not
        async with world.running() as keeper:
            written = await world.store.replace(keeper.record)
            await asyncio.sleep(DAY_S)
            assert keeper.record.key == written.key
            assert keeper.record.revision > written.revision
        assert not world.taken

    in_world(test)
    assert not errors(caplog)


def test_lease_stolen_while_suspended_makes_way_for_another(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            before = keeper.record
            world.clock.suspend(2 * DAY_S)
            subnet = next(before.lease.legs).subnet
            thief = Lease.make({Family.IPV4: Leg(subnet, parse_address("192.0.2.9"))})
            stolen = await world.store.create(thief, holder=OTHER)
            await asyncio.sleep(120)
            (taken,) = world.taken
            assert taken.key != before.key
            assert (await world.store.snapshot()).records[stolen.key] == stolen

    in_world(test)
    assert "host 'other' took it while this host was silent" in errors(caplog)[0]
    assert "containers started before" in errors(caplog)[1]
    assert len(errors(caplog)) == 2


def test_suspended_for_longer_than_the_lease_takes_it_again(caplog: pytest.LogCaptureFixture) -> None:
    """The loop does not see the time pass: a timer of 23 hours would sleep through the end."""

    async def test(world: World) -> None:
        world.hears = False
        async with world.running() as keeper:
            before = keeper.record
            world.clock.suspend(2 * DAY_S)
            await asyncio.sleep(61)
            assert [record.key for record in world.taken] == [before.key]

    in_world(test)
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("jump_s", [-10 * DAY_S, 10 * DAY_S])
def test_jump_of_the_wall_clock_changes_nothing(caplog: pytest.LogCaptureFixture, jump_s: float) -> None:
    async def test(world: World) -> None:
        async with world.running():
            world.clock.wall_s_offset = jump_s
            await asyncio.sleep(3 * DAY_S)
            assert len((await world.store.snapshot()).records) == 1
        assert not world.taken

    in_world(test)
    assert not errors(caplog)


@pytest.mark.parametrize("kind", [StoreUnavailable, StoreUnusable])
def test_store_away_for_hours_is_said_once(
    caplog: pytest.LogCaptureFixture, kind: type[StoreUnavailable]
) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            before = keeper.record
            await asyncio.sleep(22 * HOUR_S)
            world.store.error = kind("use store: it is away")
            calls = world.store.calls
            await asyncio.sleep(90 * 60)
            assert world.store.calls - calls < 100  # every half minute of the half hour it was due
            world.store.error = None
            await asyncio.sleep(60)
            assert keeper.record.lease == before.lease
            assert keeper.record.revision > before.revision
        assert not world.taken

    in_world(test)
    assert errors(caplog) == ["keeping the lease fails, trying again: use store: it is away"]


def test_store_away_beyond_the_end_takes_the_lease_again(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            before = keeper.record
            world.store.error = StoreUnavailable("use store: it is away")
            await asyncio.sleep(2 * DAY_S)
            assert keeper.record == before
            world.store.error = None
            await asyncio.sleep(60)
            assert [record.lease for record in world.taken] == [before.lease]

    in_world(test)
    assert len(errors(caplog)) == 2  # away, and lost


@pytest.mark.parametrize("kind", [StoreUnavailable, StoreUnusable])
def test_loss_is_not_forgotten_while_the_store_is_away(
    caplog: pytest.LogCaptureFixture, kind: type[StoreUnavailable]
) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            before = keeper.record
            await world.store.delete(before)
            world.store.error = kind("use store: it is away")
            await asyncio.sleep(HOUR_S)
            assert not world.taken
            world.store.error = None
            await asyncio.sleep(60)
            assert [record.lease for record in world.taken] == [before.lease]

    in_world(test)
    assert len(errors(caplog)) == 2


def test_full_range_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            before = keeper.record
            world.hears = False
            await world.store.delete(before)
            rival = Lease.make({Family.IPV4: Leg(next(before.lease.legs).subnet)})
            taken = await world.store.create(rival, holder=OTHER, reserve=True)
            world.clock.suspend(DAY_S)  # due now
            await asyncio.sleep(HOUR_S)
            assert not world.taken
            await world.store.delete(taken)
            await asyncio.sleep(60)
            assert [record.lease for record in world.taken] == [before.lease]

    in_world(test, NARROW)
    assert len(errors(caplog)) == 2


def test_contender_is_answered_and_named_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            for _ in range(5):
                asked = await world.store.replace(
                    msgspec.structs.replace(keeper.record, contender=OTHER), extend=False
                )
                await asyncio.sleep(1)
                assert keeper.record.contender is None
                assert keeper.record.revision > asked.revision
            assert keeper.record.holder == ME
        assert not world.taken

    in_world(test)
    assert len(errors(caplog)) == 1
    assert "lease contended" in errors(caplog)[0]
    assert "contender='other'" in errors(caplog)[0]
    assert "--public-ip" in errors(caplog)[0]


def test_question_is_answered_also_after_a_failure() -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            await world.store.replace(msgspec.structs.replace(keeper.record, contender=OTHER), extend=False)
            world.store.error = StoreUnavailable("use store: it is away")
            await asyncio.sleep(0.1)
            world.store.error = None
            await asyncio.sleep(2)
            assert keeper.record.contender is None

    in_world(test)


def test_old_news_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        world.hears = False
        async with world.running() as keeper:
            first = keeper.record
            second = await world.store.replace(first)
            keeper.hear(Changes(second.revision, written={second.key: second}))
            await asyncio.sleep(1)
            assert keeper.record == second
            writes = world.store.state.revision
            keeper.hear(Changes(first.revision, written={first.key: first}))
            await asyncio.sleep(1)
            keeper.hear(Changes(first.revision, removed=frozenset([first.key])))
            await asyncio.sleep(1)
            keeper.hear(Snapshot(first.revision, {}))
            await asyncio.sleep(1)
            keeper.hear(Changes(second.revision + 5, removed=frozenset(["10.5.99.0-24"])))
            await asyncio.sleep(1)
            assert keeper.record == second
            assert world.store.state.revision == writes
        assert not world.taken

    in_world(test)
    assert not errors(caplog)


def test_store_put_back_from_a_copy_that_lacks_the_lease_gets_it_again() -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            before = keeper.record
            await world.store.replace(before)
            await asyncio.sleep(1)
            world.store.state.rows.clear()
            world.store.state.revision = 0
            keeper.hear(await world.store.snapshot())
            await asyncio.sleep(1)
            assert [record.lease for record in world.taken] == [before.lease]
            assert keeper.record.key in (await world.store.snapshot()).records

    in_world(test)


def test_store_put_back_from_an_old_copy_is_renewed_into() -> None:
    async def test(world: World) -> None:
        world.hears = False
        async with world.running() as keeper:
            copy = dict(world.store.state.rows)
            for _ in range(3):
                await asyncio.sleep(0.9 * DAY_S)
            world.store.state.rows = {
                key: (*row[:3], world.clock.since_boot_s() + HOUR_S, *row[4:]) for key, row in copy.items()
            }
            world.store.state.revision = next(iter(copy.values()))[2]
            calls = world.store.calls
            await asyncio.sleep(DAY_S)
            (record,) = (await world.store.snapshot()).records.values()
            assert keeper.record == record
            assert world.store.calls - calls < 10

    in_world(test)


def test_claim_that_changed_is_written_also_after_a_failure() -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            world.last = 2  # the host's address is another now
            world.store.error = StoreUnavailable("use store: it is away")
            keeper.publish_again()
            await asyncio.sleep(1)
            world.store.error = None
            await asyncio.sleep(HOUR_S)
            assert [leg.public for leg in keeper.record.lease.legs] == [parse_address("192.0.2.2")]

    in_world(test)


def test_removal_that_only_a_snapshot_tells_is_heard() -> None:
    async def test(world: World) -> None:
        world.hears = False
        async with world.running() as keeper:
            before = keeper.record
            await world.store.delete(before)
            keeper.hear(await world.store.snapshot())
            await asyncio.sleep(1)
            assert [record.lease for record in world.taken] == [before.lease]

    in_world(test)


def test_value_that_somebody_edited_is_written_again(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.running() as keeper:
            before = keeper.record
            subnet = next(before.lease.legs).subnet
            edited = Lease.make({Family.IPV4: Leg(subnet, parse_address("192.0.2.77"))}, "host-gw")
            await world.store.replace(msgspec.structs.replace(before, lease=edited))
            await asyncio.sleep(1)
            assert [record.lease for record in world.taken] == [before.lease]
            (record,) = (await world.store.snapshot()).records.values()
            assert (record.lease, record.holder) == (before.lease, ME)

    in_world(test)
    assert "somebody changed it in the store" in errors(caplog)[0]


def test_lost_compare_and_swap_of_an_answer_is_looked_up() -> None:
    async def test(world: World) -> None:
        world.hears = False
        async with world.running() as keeper:
            asked = await world.store.replace(
                msgspec.structs.replace(keeper.record, contender=OTHER), extend=False
            )
            newer = await world.store.replace(asked, extend=False)
            with pytest.raises(Conflict):
                await world.store.replace(asked)
            keeper.hear(Changes(asked.revision, written={asked.key: asked}))
            await asyncio.sleep(1)
            assert keeper.record.contender is None
            assert keeper.record.revision > newer.revision

    in_world(test)


def test_same_subnet_under_another_key_is_no_change(caplog: pytest.LogCaptureFixture) -> None:
    """A key may have bits behind the prefix length; whoever writes the lease anew leaves them out."""

    async def test(world: World) -> None:
        key = "10.5.9.7-24"
        world.store.state.revision += 1
        world.store.state.write((key, b'{"PublicIP":"192.0.2.1"}', 1, None, None, None))
        async with world.running() as keeper:
            assert keeper.record.key == key
            await world.store.delete(keeper.record)
            await asyncio.sleep(HOUR_S)
            assert str(keeper.record.lease) == "10.5.9.0/24"
            assert keeper.record.key == "10.5.9.0-24"
        assert not [error for error in errors(caplog) if "subnet changed" in error]

    in_world(test)


def test_host_lets_go_before_its_lease_ends_and_takes_it_again(caplog: pytest.LogCaptureFixture) -> None:
    """A holder that cannot renew acts as the owner no more, before somebody else may be it."""

    async def test(world: World) -> None:
        async with world.guarded() as keeper:
            before = keeper.record
            assert before.expires is not None
            world.store.error = StoreUnavailable("use store: it is away")
            await asyncio.sleep(before.expires - world.clock.since_boot_s() - 60)
            assert not world.let_go_s
            assert keeper.is_held
            await asyncio.sleep(60)
            (at_s,) = world.let_go_s
            assert before.expires - 30 <= at_s <= before.expires - 25
            assert keeper.has_let_go
            assert not keeper.is_held
            await asyncio.sleep(HOUR_S)
            assert len(world.let_go_s) == 1
            assert not world.taken
            world.store.error = None
            await asyncio.sleep(60)
            assert [record.key for record in world.taken] == [before.key]
            assert keeper.is_held
            assert not keeper.has_let_go

    in_world(test)
    assert sum("lease let go" in error for error in errors(caplog)) == 1


def test_lease_renewed_after_it_was_let_go_is_held_again(caplog: pytest.LogCaptureFixture) -> None:
    """The store is back before the lease has ended: it still is ours."""

    async def test(world: World) -> None:
        async with world.guarded() as keeper:
            before = keeper.record
            assert before.expires is not None
            world.store.error = StoreUnavailable("use store: it is away")
            await asyncio.sleep(before.expires - world.clock.since_boot_s() - 28)
            assert keeper.has_let_go
            world.store.error = None
            keeper.hear(Changes(before.revision, {before.key: before}))  # as any news of it would
            await asyncio.sleep(1)
            assert keeper.is_held
            assert not keeper.has_let_go
            assert [record.key for record in world.taken] == [before.key]

    in_world(test)
    assert "lease held again" in caplog.text


def test_lease_that_another_took_is_let_go_at_once(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.guarded() as keeper:
            before = keeper.record
            taken = await world.store.replace(msgspec.structs.replace(before, holder=OTHER))
            await asyncio.sleep(0.5)
            assert taken.holder == OTHER
            (at_s,) = world.let_go_s
            assert at_s < 0.5

    in_world(test, NARROW)
    assert "lease let go" in caplog.text


def test_lease_that_was_released_is_not_let_go(caplog: pytest.LogCaptureFixture) -> None:
    """It is taken again in the same breath; withdrawing everything would only lose packets."""

    async def test(world: World) -> None:
        async with world.guarded() as keeper:
            await world.store.delete(keeper.record)
            await asyncio.sleep(10)
            assert keeper.is_held

    in_world(test)
    assert "lease let go" not in caplog.text


def test_lost_lease_that_cannot_be_taken_again_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        async with world.guarded() as keeper:
            world.store.error = StoreUnavailable("use store: it is away")
            await world.store.delete(keeper.record)
            await asyncio.sleep(1)
            assert world.let_go_s
            world.store.error = None
            await asyncio.sleep(60)
            assert keeper.is_held

    in_world(test)


def test_reservation_is_never_let_go() -> None:
    async def test(world: World) -> None:
        async with world.guarded() as keeper:
            await world.store.replace(msgspec.structs.replace(keeper.record, expires=None))
            await asyncio.sleep(1)
            world.store.error = StoreUnavailable("use store: it is away")
            await asyncio.sleep(2 * DAY_S)
            assert keeper.is_held
        assert not world.let_go_s

    in_world(test)


def test_end_that_only_the_store_knows_leaves_ours_standing() -> None:
    """Somebody else wrote our lease as it was, under an etcd lease of their own."""

    async def test(world: World) -> None:
        world.hears = False
        async with world.running() as keeper:
            before = keeper.record
            again = msgspec.structs.replace(before, revision=before.revision + 1, expires=math.inf)
            keeper.hear(Changes(again.revision, {again.key: again}))
            await asyncio.sleep(1)
            assert keeper.record.revision == again.revision
            assert keeper.record.expires == before.expires

    in_world(test)


def test_range_that_was_moved_leaves_a_running_lease_where_it_is() -> None:
    """It is written again, for another address, though new leases come from elsewhere now."""

    async def test(world: World) -> None:
        async with world.running() as keeper:
            before = keeper.record
            last = Prefix.parse("10.5.255.0/24")
            world.range = Range(NETWORK, 24, last, last)
            world.last = 7
            keeper.publish_again()
            await asyncio.sleep(1)
            assert keeper.record.key == before.key != "10.5.255.0-24"
            assert keeper.record.lease != before.lease
            await world.store.delete(keeper.record)
            await asyncio.sleep(1)
            assert keeper.record.key == "10.5.255.0-24"

    in_world(test)


def test_lost_lease_that_the_store_does_not_answer_for_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    """It hangs instead of failing; meanwhile anybody may take what nobody holds."""

    async def test(world: World) -> None:
        async with world.guarded() as keeper:
            hangs = asyncio.Event()

            async def hang() -> Snapshot:
                await hangs.wait()
                return await MemoryStore.snapshot(world.store)

            world.store.snapshot = hang  # type: ignore[method-assign]
            before = keeper.record
            await world.store.delete(before)
            await asyncio.sleep(1.9)
            assert not world.let_go_s
            await asyncio.sleep(0.2)
            assert len(world.let_go_s) == 1
            hangs.set()
            await asyncio.sleep(1)
            assert keeper.is_held
            assert [record.key for record in world.taken] == [before.key]

    in_world(test)
    assert "it is not ours any more" in caplog.text
