# SPDX-License-Identifier: Apache-2.0
"""What a host makes of the store, for its cloud."""

import asyncio
from collections.abc import Coroutine
from typing import Any, ClassVar, TypeVar

import pytest

from loden.address import Family, Prefix, parse_address
from loden.backends.base import Host
from loden.backends.cloud import CloudBackend, CloudOptions
from loden.cloud_routes import CloudRoutes
from loden.errors import CloudError
from loden.interface import HostFacts, Underlay
from loden.lease import Lease, Leg
from loden.network import parse_network
from loden.stores.base import Holder, Record
from loden.stores.memory import MemoryStore
from loden.tables.cloud import Cloud
from loden.tables.entries import CloudSetting
from tests.unit.fake_cloud import Account

T = TypeVar("T")

NETWORK = parse_network(b'{"Network": "10.5.0.0/16", "Backend": {"Type": "nimbus"}}')
OWN, OTHER = Prefix.parse("10.5.1.0/24"), Prefix.parse("10.5.2.0/24")
ADDRESS = parse_address("198.18.0.1")


class Nimbus(CloudBackend):
    """The smallest backend of a cloud that there can be."""

    type_name: ClassVar[str] = "nimbus"
    settings: ClassVar[tuple[CloudSetting, ...]] = (CloudSetting("check", "off"),)
    account: ClassVar[Account]
    host_name: ClassVar[str] = "me"

    def open(self) -> Cloud:
        return self.account.host(self.host_name)


@pytest.fixture
def account() -> Account:
    Nimbus.account = Account()
    return Nimbus.account


@pytest.fixture
def store(request: pytest.FixtureRequest) -> MemoryStore:
    return MemoryStore(request.node.nodeid, ttl_s=86_400.0)


def backend(**options: int) -> Nimbus:
    own = {Family.IPV4: ADDRESS}
    host = Host(NETWORK, Underlay("eth0", 2, 1500, own, own), HostFacts(()))
    return Nimbus(host, CloudOptions(**options))


def lease(subnet: Prefix, public: str = "198.18.0.1") -> Lease:
    return Lease.make({Family.IPV4: Leg(subnet, parse_address(public))})


def run(work: Coroutine[Any, Any, T]) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(20):
            return await work

    return asyncio.run(bounded())


async def joined(store: MemoryStore, **options: int) -> tuple[CloudRoutes, Record]:
    record = await store.create(lease(OWN), holder=Holder("me"))
    made = backend(**options)
    routes = CloudRoutes(made, NETWORK, store)
    routes.stand(record, made.own_entries(next(iter(record.lease.legs))))
    return routes, record


def test_runs_until_all_stands_and_tells_who_waits(account: Account, store: MemoryStore) -> None:
    async def work() -> None:
        routes, _ = await joined(store)
        assert not routes.is_standing
        async with asyncio.TaskGroup() as group:
            running = group.create_task(routes.run())
            await routes.wait_standing()
            running.cancel()
        assert account.routes == {OWN: "me"}
        assert account.settings["me"] == {"check": "off"}

    run(work())


def test_waits_as_long_as_something_fails_and_says_what(account: Account, store: MemoryStore) -> None:
    account.errors["change"] = CloudError("change", "check", "not allowed")

    async def work() -> None:
        routes, _ = await joined(store, check_interval=1)
        async with asyncio.TaskGroup() as group:
            running = group.create_task(routes.run())
            waiting = group.create_task(routes.wait_standing())
            await routes._reconciler.wait_pass()
            assert routes.problem == "change check: not allowed"
            assert list(routes.problems.values()) == [routes.problem]
            assert not waiting.done()
            account.errors.clear()
            await waiting
            running.cancel()
        assert routes.problem == ""

    run(work())


def test_range_that_changes_is_looked_after(account: Account, store: MemoryStore) -> None:
    """Of a host that is gone; this one was started before the range reached so far."""

    async def work() -> None:
        routes, _ = await joined(store)
        account.routes[Prefix.parse("10.5.77.0/24")] = "gone"
        routes.use_network(parse_network(b'{"Network": "10.5.0.0/16", "SubnetMax": "10.5.9.0"}'))
        assert not [line for line in await routes.preview() if "10.5.77.0/24" in line]
        routes.use_network(NETWORK)
        assert [line for line in await routes.preview() if "remove 10.5.77.0/24" in line]

    run(work())


def test_census_knows_its_own_lease_from_one_in_its_place(account: Account, store: MemoryStore) -> None:
    async def work() -> None:
        routes, record = await joined(store)
        own = await routes._take_census()
        assert (own.me, own.own) == ("10.5.1.0-24", frozenset([OWN]))
        await store.delete(record)
        assert (await routes._take_census()).me == ""
        await store.create(lease(OWN, "198.18.0.9"), holder=Holder("another"))
        taken = await routes._take_census()
        assert (taken.me, taken.own) == ("", frozenset())
        assert OWN in taken.live

    run(work())


def test_census_counts_what_cannot_be_read_as_taken(account: Account, store: MemoryStore) -> None:
    async def work() -> None:
        routes, _ = await joined(store)
        store.state.write((OTHER_KEY, b"nonsense", store.state.revision, None, "", ""))
        census = await routes._take_census()
        assert OTHER in census.live

    run(work())


OTHER_KEY = "10.5.2.0-24"


def test_only_hosts_that_remove_routes_have_a_turn(account: Account, store: MemoryStore) -> None:
    async def work() -> None:
        routes, _ = await joined(store)
        await store.create(lease(OTHER, "198.18.0.2"), holder=None)  # flannel's, or reserved
        census = await routes._take_census()
        assert census.holders == {"10.5.1.0-24"}
        assert OTHER in census.live

    run(work())


def test_addresses_are_remembered_when_a_lease_ends(account: Account, store: MemoryStore) -> None:
    async def work() -> None:
        routes, _ = await joined(store)
        other = await store.create(lease(OTHER, "198.18.0.2"), holder=Holder("other"))
        routes.take(await store.snapshot())
        await store.delete(other)
        census = await routes._take_census()
        assert OTHER not in census.live
        assert census.addresses[OTHER] == parse_address("198.18.0.2")

    run(work())


def test_another_address_of_the_host_is_another_access_to_the_cloud(
    account: Account, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        routes, _ = await joined(store)
        await routes._reconciler.look()
        monkeypatch.setattr(Nimbus, "host_name", "me-again")
        routes.use(backend())
        await routes._reconciler.look()
        assert account.routes == {OWN: "me-again"}
        assert account.called("attach") == ["attach me", "attach me-again"]

    run(work())


def test_preview_says_what_would_be_done_and_does_nothing(account: Account, store: MemoryStore) -> None:
    gone, foreign = Prefix.parse("10.5.9.0/24"), Prefix.parse("10.5.8.0/24")
    account.routes.update({OTHER: "me", gone: "gone", foreign: "gateway"})
    account.foreign.add(foreign)

    async def work() -> list[str]:
        routes, _ = await joined(store)
        return await routes.preview()

    assert run(work()) == [
        "add 10.5.1.0/24 via this host in t",
        "remove 10.5.2.0/24 via me in t",
        "remove 10.5.9.0/24 via gone in t: no host has a lease for it; one of the hosts does it, "
        "600 s or more after it first saw that",
        "change cloud setting check=off: it is on",
    ]
    assert not [line for line in account.journal if line.split()[0] in ("add", "replace", "remove", "change")]


def test_preview_of_what_is_as_it_should_be_is_empty(account: Account, store: MemoryStore) -> None:
    account.routes[OWN] = "me"
    account.settings["me"] = {"check": "off"}

    async def work() -> list[str]:
        routes, _ = await joined(store)
        return await routes.preview()

    assert run(work()) == []


def test_preview_names_what_is_in_the_way(account: Account, store: MemoryStore) -> None:
    account.routes[OWN] = "gateway"
    account.foreign.add(OWN)
    account.settings["me"] = {"check": "off"}

    async def work() -> list[str]:
        routes, _ = await joined(store)
        return await routes.preview()

    assert run(work()) == ["refuse: 10.5.1.0/24 via gateway in t is somebody else's"]
