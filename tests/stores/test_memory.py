# SPDX-License-Identifier: Apache-2.0
from random import Random

import pytest

from loden.lease import Lease
from loden.stores import open_store
from loden.stores.acquire import acquire
from loden.stores.base import Holder, Record
from loden.stores.memory import MemoryStore
from tests.contract.store import StoreContract, claim, holder, lease, run
from tests.stores.fakes import FakeClock


class MemoryPlace:
    def __init__(self, name: str) -> None:
        self._name = name
        self._anchor = MemoryStore(name, ttl_s=86_400)

    def open(self, *, ttl_s: float = 86_400, history: int = 10_000) -> MemoryStore:
        return MemoryStore(self._name, ttl_s=ttl_s, history=history)

    def plant(self, key: str, value: bytes) -> None:
        state = self._anchor.state
        state.revision += 1
        state.write((key, value, state.revision, None, None, None))


@pytest.fixture
def place(request: pytest.FixtureRequest) -> MemoryPlace:
    return MemoryPlace(request.node.nodeid)


class TestMemoryStore(StoreContract):
    pass


def test_names_have_states_of_their_own() -> None:
    async def work() -> None:
        one, same, other = (open_store(f"memory://{name}") for name in ("x", "x", "y"))
        await one.create(lease(), holder=None)
        assert len((await same.snapshot()).records) == 1
        assert not (await other.snapshot()).records

    run(work)


def test_lease_ends_on_the_boot_clock() -> None:
    async def work() -> None:
        clock = FakeClock()
        store = MemoryStore("clock", ttl_s=100, clock=clock)
        await store.create(lease(), holder=holder("a"))
        clock.wall += 1e6
        assert (await store.snapshot()).records
        clock.advance(100)
        assert not (await store.snapshot()).records

    run(work)


class OutrunStore(MemoryStore):
    """Another host with the same address writes its lease between our look and our write."""

    has_lost = False

    async def create(self, lease: Lease, *, holder: Holder | None, reserve: bool = False) -> Record:
        if not self.has_lost:
            self.has_lost = True
            await acquire(self, claim("first"), rng=Random(1))
        return await super().create(lease, holder=holder, reserve=reserve)


def test_two_hosts_that_take_one_address_at_once_do_not_both_keep_it() -> None:
    """W33: the second to write gives its new lease up, and asks for the first one's."""

    async def work() -> None:
        store = OutrunStore("outrun", ttl_s=100)
        record = await acquire(store, claim("second"), rng=Random(2), answer_s=0.01)
        assert (await store.snapshot()).records == {record.key: record}
        assert store.state.tombstones
        assert record.holder == holder("second")  # nobody answered for the first

    run(work)
