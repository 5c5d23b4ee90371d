# SPDX-License-Identifier: Apache-2.0
"""The tables of a cloud, on one that is in memory."""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Hashable, Sequence
from typing import TypeVar

import pytest

from loden.address import Prefix
from loden.errors import CloudError, CloudUnavailable, ForeignRoute, LodenError, RoutesFull, StoreUnavailable
from loden.network import parse_network
from loden.tables.cloud_calls import CloudCalls
from loden.tables.cloud_plan import Census
from loden.tables.cloud_tables import CloudRouteTable, CloudSettingTable, Terms
from loden.tables.entries import CloudRoute, CloudSetting
from tests.unit.fake_cloud import Account

T = TypeVar("T")

RANGES = parse_network(b'{"Network": "10.5.0.0/16"}').ranges
GRACE_S = 600.0
A, B, C, GONE = (Prefix.parse(f"10.5.{number}.0/24") for number in (1, 2, 3, 9))


def run(work: Awaitable[T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(bounded())


class Host:
    """One host of a cluster that shares an account and a store."""

    def __init__(self, world: "World", name: str, own: Prefix, limit: int | None) -> None:
        self.world = world
        self.name = name
        self.own = own
        self.store_error: LodenError | None = None
        self.is_held = True
        self.table = CloudRouteTable(
            CloudCalls(world.account.host(name)),
            RANGES,
            self._take_census,
            terms=Terms(limit=limit, grace_s=GRACE_S),
            is_held=lambda: self.is_held,
            clock=lambda: world.now_s,
        )

    async def _take_census(self) -> Census:
        if self.store_error is not None:
            raise self.store_error
        leases = self.world.leases
        mine = {subnet for subnet, holder in leases.items() if holder == self.name}
        return Census(
            live=frozenset(leases),
            own=frozenset(mine),
            holders=frozenset(leases.values()),
            me=self.name if mine else "",
            addresses=self.world.addresses,
        )

    def look(self) -> None:
        """What the reconciler does when it looks: read, put what is missing, drop what nobody wants."""
        wanted: dict[Hashable, CloudRoute] = {self.own: CloudRoute(self.own)}

        async def work() -> None:
            found = await self.table.read(wanted)
            missing = [entry for slot, entry in wanted.items() if found.get(slot) != entry]
            self.failures = dict(await self.table.put(missing))
            self.failures |= await self.table.drop(
                [entry for slot, entry in found.items() if slot not in wanted]
            )

        run(work())


class World:
    def __init__(self) -> None:
        self.account = Account()
        self.now_s = 1000.0
        self.leases: dict[Prefix, str] = {}
        self.addresses: dict[Prefix, bytes] = {}

    def host(self, name: str, own: Prefix, *, limit: int | None = None) -> Host:
        self.leases[own] = name
        return Host(self, name, own, limit)

    @property
    def routes(self) -> dict[Prefix, str]:
        return self.account.routes


@pytest.fixture
def world() -> World:
    return World()


class TestOwnRoute:
    def test_is_added_once_with_one_listing(self, world: World) -> None:
        host = world.host("a", A)
        host.look()
        assert world.routes == {A: "a"}
        assert world.account.journal == ["attach a", "list a", "add a 10.5.1.0/24"]

    def test_that_stands_costs_one_listing_and_no_write(self, world: World) -> None:
        host = world.host("a", A)
        host.look()
        world.account.journal.clear()
        host.look()
        assert world.account.journal == ["list a"]

    def test_that_somebody_removed_is_put_back(self, world: World) -> None:
        host = world.host("a", A)
        host.look()
        world.routes.clear()
        host.look()
        assert world.routes == {A: "a"}

    def test_of_another_subnet_of_ours_goes(self, world: World) -> None:
        world.account.routes[B] = "a"
        world.host("a", A).look()
        assert world.routes == {A: "a"}

    def test_that_the_cloud_is_still_making_is_waited_for(self, world: World) -> None:
        host = world.host("a", A)
        host.look()
        world.account.unsettled.add(A)
        host.look()
        assert isinstance(host.failures[A], CloudUnavailable)
        world.account.unsettled.clear()
        host.look()
        assert host.failures == {}

    def test_foreign_route_in_its_place_is_named_and_left(self, world: World) -> None:
        world.account.routes[A] = "gateway"
        world.account.foreign.add(A)
        host = world.host("a", A)
        host.look()
        assert isinstance(host.failures[A], ForeignRoute)
        assert "10.5.1.0/24 via gateway in t is somebody else's" in str(host.failures[A])
        assert world.routes == {A: "gateway"}
        assert not world.account.called("replace")
        assert not world.account.called("remove")

    def test_dead_hosts_route_is_taken_over(self, world: World) -> None:
        world.account.routes[A] = "b"
        world.host("a", A).look()
        assert world.routes == {A: "a"}
        assert world.account.called("replace")
        assert not world.account.called("remove")

    def test_unknown_route_is_asked_for_first(self, world: World) -> None:
        world.account.routes[A] = "x"
        world.account.unknown.add(A)
        host = world.host("a", A)
        host.look()
        assert isinstance(host.failures[A], ForeignRoute)
        world.addresses[A] = b"\xc6\x12\x00\x09"
        host.look()
        assert world.routes == {A: "a"}
        assert world.account.called("identify") == [
            "identify a 10.5.1.0/24 None",
            f"identify a 10.5.1.0/24 {world.addresses[A]!r}",
        ]

    def test_of_a_lease_that_has_ended_is_not_added_again(self, world: World) -> None:
        """Who cannot renew stops announcing; the others may have removed the route already."""
        host = world.host("a", A)
        host.look()
        host.is_held = False
        world.routes.clear()
        host.look()
        assert world.routes == {}
        assert "this host's lease for it has ended" in str(host.failures[A])
        host.is_held = True
        host.look()
        assert world.routes == {A: "a"}


class TestRace:
    def test_somebody_faster_is_found_out_and_replaced_by_who_holds_the_lease(self, world: World) -> None:
        host = world.host("a", A)
        world.account.before["add"] = lambda: world.routes.update({A: "b"})
        host.look()
        assert world.routes == {A: "a"}
        assert host.failures == {}

    def test_two_hosts_that_want_one_range_the_store_decides(self, world: World) -> None:
        late, owner = world.host("late", A), world.host("owner", A)
        owner.look()
        for _ in range(3):
            late.look()
            owner.look()
            assert world.routes == {A: "owner"}
        assert "no lease of this host" in str(late.failures[A])
        assert not world.account.called("replace")

    def test_without_the_store_no_other_hosts_route_is_touched(self, world: World) -> None:
        host = world.host("a", A)
        world.account.routes[A] = "b"
        host.store_error = StoreUnavailable("read store: closed")
        host.look()
        assert world.routes == {A: "b"}
        assert str(host.failures[A]) == "read store: closed"


class TestRoutesOfHostsThatAreGone:
    @pytest.fixture
    def hosts(self, world: World) -> list[Host]:
        made = [world.host(name, own) for name, own in (("a", A), ("b", B), ("c", C))]
        for host in made:
            host.look()
        world.account.routes[GONE] = "gone"
        return made

    def after(self, world: World, hosts: Sequence[Host], passed_s: float) -> None:
        """Everybody looks once a minute."""
        until = world.now_s + passed_s
        while world.now_s < until:
            world.now_s += 60.0
            for host in hosts:
                host.look()

    def test_go_after_the_grace_period_removed_by_one(self, world: World, hosts: list[Host]) -> None:
        self.after(world, hosts, 60.0)  # seen for the first time
        self.after(world, hosts, GRACE_S - 60.0)
        assert GONE in world.routes
        self.after(world, hosts, 60.0)
        assert GONE not in world.routes
        assert len(world.account.called("remove")) == 1

    def test_stay_while_a_lease_lives(self, world: World, hosts: list[Host]) -> None:
        world.leases[GONE] = "gone"
        self.after(world, hosts, 5 * GRACE_S)
        assert world.routes[GONE] == "gone"

    def test_of_a_host_that_returned_get_the_whole_time_again(self, world: World, hosts: list[Host]) -> None:
        self.after(world, hosts, GRACE_S)
        world.leases[GONE] = "gone"
        self.after(world, hosts, 60.0)
        del world.leases[GONE]
        self.after(world, hosts, GRACE_S)
        assert GONE in world.routes
        self.after(world, hosts, 60.0)
        assert GONE not in world.routes

    def test_are_left_by_who_cannot_read_the_store(
        self, world: World, hosts: list[Host], caplog: pytest.LogCaptureFixture
    ) -> None:
        for host in hosts:
            host.store_error = StoreUnavailable("read store: closed")
        with caplog.at_level(logging.ERROR):
            self.after(world, hosts, 10 * GRACE_S)
        assert world.routes[GONE] == "gone"
        assert caplog.text.count("reading the leases for the cloud's routes fails") == len(hosts)

    def test_are_left_by_who_holds_no_lease(self, world: World, hosts: list[Host]) -> None:
        """A store that lost everything would otherwise empty the table."""
        world.leases.clear()
        self.after(world, hosts, 10 * GRACE_S)
        assert world.routes == {A: "a", B: "b", C: "c", GONE: "gone"}

    def test_are_removed_by_the_next_when_the_first_cannot(self, world: World, hosts: list[Host]) -> None:
        self.after(world, hosts, GRACE_S + 60.0)
        remover = world.account.called("remove")[0].split()[1]
        world.account.routes[GONE] = "gone"
        world.account.journal.clear()
        rest = [host for host in hosts if host.name != remover]
        self.after(world, rest, GRACE_S)
        assert GONE in world.routes
        self.after(world, rest, 2 * GRACE_S)
        assert GONE not in world.routes
        assert len(world.account.called("remove")) == 1

    def test_whose_subnet_is_taken_again_meanwhile_stay(self, world: World, hosts: list[Host]) -> None:
        self.after(world, hosts, GRACE_S)

        def take() -> None:
            world.leases[GONE] = "new"

        world.account.unknown.add(GONE)
        world.addresses[GONE] = b"\xc6\x12\x00\x09"
        world.account.before["identify"] = take  # between the decision and the removal
        self.after(world, hosts, 3 * GRACE_S)
        assert world.account.called("identify")
        assert world.routes[GONE] == "gone"

    def test_that_nobody_can_tell_to_be_ours_stay(self, world: World, hosts: list[Host]) -> None:
        world.account.unknown.add(GONE)
        self.after(world, hosts, 5 * GRACE_S)
        assert world.routes[GONE] == "gone"
        assert len(world.account.called("identify")) == len(hosts)  # and not at each look
        world.addresses[GONE] = b"\xc6\x12\x00\x09"
        self.after(world, hosts, 3600.0)
        assert GONE not in world.routes

    def test_of_many_go_without_one_host_doing_all(self, world: World, hosts: list[Host]) -> None:
        gone = [Prefix.parse(f"10.5.{number}.0/24") for number in range(100, 140)]
        world.account.routes.update(dict.fromkeys(gone, "gone"))
        self.after(world, hosts, GRACE_S + 60.0)
        assert set(world.routes) == {A, B, C}
        removers = {line.split()[1] for line in world.account.called("remove")}
        assert removers == {"a", "b", "c"}
        assert len(world.account.called("remove")) == 41


class TestQuota:
    def fill(self, world: World, count: int) -> None:
        others = [Prefix.parse(f"10.9.{number}.0/24") for number in range(count)]
        world.account.routes.update(dict.fromkeys(others, "others"))

    def test_is_not_asked_for_while_there_is_room(self, world: World) -> None:
        self.fill(world, 7)
        world.host("a", A).look()
        assert not world.account.called("limit")

    def test_nearly_full_is_said_once_with_how_to_raise_it(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.fill(world, 8)
        host = world.host("a", A)
        for _ in range(3):
            host.look()
        assert len(world.account.called("limit")) == 1
        assert (
            caplog.text.count(
                "cloud routes nearly full table=t routes=8: the quota usually is 10; ask for more"
            )
            == 1
        )

    def test_of_the_account_counts_where_it_can_be_read(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.fill(world, 9)
        world.account.limit = 100
        world.host("a", A).look()
        assert "nearly full" not in caplog.text

    def test_that_cannot_be_read_leaves_the_usual_one(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.fill(world, 9)
        world.account.errors["limit"] = CloudError("read", "quota", "not for you")
        host = world.host("a", A)
        host.look()
        assert world.routes[A] == "a"
        assert "routes=9: the quota usually is 10" in caplog.text

    def test_full_says_how_many_of_how_many(self, world: World) -> None:
        self.fill(world, 10)
        world.account.errors["add"] = RoutesFull("add", "route", "no", code="LimitExceeded")
        host = world.host("a", A)
        host.look()
        assert str(host.failures[A]) == (
            "add cloud route 10.5.1.0/24 via this host: t holds 10 routes, the quota usually is 10 "
            "[LimitExceeded] (ask for more)"
        )

    def test_route_limit_overrides_what_the_cloud_has(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.fill(world, 5)
        host = world.host("a", A, limit=5)
        host.look()
        assert "t holds 5 routes, RouteLimit says 5" in str(host.failures[A])
        assert not world.account.called("add")
        assert not world.account.called("limit")
        assert "nearly full" in caplog.text
        del world.routes[next(iter(world.routes))]  # somebody makes room
        host.look()
        assert host.failures == {}


class TestSettings:
    ENTRY = CloudSetting("check", "off")

    def test_are_read_changed_and_read_as_they_are(self) -> None:
        account = Account()
        table = CloudSettingTable(CloudCalls(account.host("a")))
        wanted = {self.ENTRY.slot: self.ENTRY}
        assert run(table.read(wanted)) == {"check": CloudSetting("check", "on")}
        assert run(table.put([self.ENTRY])) == {}
        assert run(table.read(wanted)) == wanted
        assert run(table.drop([self.ENTRY])) == {}
        assert account.settings["a"]["check"] == "off"

    def test_failure_is_reported_for_the_entry(self) -> None:
        account = Account()
        account.errors["change"] = CloudError("change", "check", "not allowed", hint="do it by hand")
        table = CloudSettingTable(CloudCalls(account.host("a")))
        assert str(run(table.put([self.ENTRY]))["check"]) == "change check: not allowed (do it by hand)"


class TestCalls:
    def test_that_hang_end_at_the_deadline_and_the_next_one_works(self) -> None:
        account = Account()
        cloud = account.host("a")
        calls = CloudCalls(cloud, deadline_s=0.05, attach_s=0.05)
        account.stuck = threading.Event()
        with pytest.raises(CloudUnavailable, match=r"read metadata of Nimbus: no answer within 0.05 s"):
            run(calls.call("list routes", lambda cloud: cloud.list_routes()))
        account.stuck.set()
        account.stuck = None
        assert run(calls.call("list routes", lambda cloud: cloud.list_routes())).tables == ("t",)
        calls.close()

    def test_attach_once_and_say_what_was_found(self) -> None:
        account = Account()
        said: list[str] = []
        cloud = account.host("a")
        calls = CloudCalls(cloud, attached=said.append)
        for _ in range(2):
            run(calls.call("list routes", lambda cloud: cloud.list_routes()))
        assert said == ["host a"]
        assert account.journal == ["attach a", "list a", "list a"]
        other = account.host("b")
        calls.change(other)
        run(calls.call("list routes", lambda cloud: cloud.list_routes()))
        assert said == ["host a", "host b"]
        calls.close()

    def test_cloud_that_comes_while_another_is_being_attached_is_attached_too(self) -> None:
        account = Account()
        calls = CloudCalls(account.host("a"))
        account.before["attach"] = lambda: calls.change(account.host("b"))
        run(calls.call("list routes", lambda cloud: cloud.list_routes()))
        run(calls.call("list routes", lambda cloud: cloud.list_routes()))
        assert account.journal == ["attach a", "list a", "attach b", "list b"]
        calls.close()

    def test_answer_that_lacks_something_is_an_error_of_that_call(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        calls = CloudCalls(Account().host("a"))
        answer: dict[str, str] = {}
        with pytest.raises(CloudError, match="read colour: the answer is not as expected: KeyError"):
            run(calls.call("read colour", lambda _: answer["colour"]))
        assert "cloud.answer_misread doing='read colour'" in caplog.text
        calls.close()

    def test_bug_in_a_cloud_is_not_swallowed(self) -> None:
        calls = CloudCalls(Account().host("a"))
        with pytest.raises(ZeroDivisionError):
            run(calls.call("divide", lambda _: 1 // 0))
        calls.close()
