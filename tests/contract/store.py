# SPDX-License-Identifier: Apache-2.0
"""What every store must do, whatever keeps it: subclass :class:`StoreContract`, give it a ``place``."""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from random import Random
from typing import Protocol, TypeVar

import msgspec
import pytest

from loden.address import Family, Prefix, parse_address
from loden.errors import Conflict, DuplicateAddress, MalformedLease, NoFreeSubnet
from loden.lease import Lease, Leg
from loden.network import Range
from loden.stores.acquire import Claim, acquire, answer
from loden.stores.base import Changes, Holder, Record, Snapshot, Store
from loden.stores.changes import difference

T = TypeVar("T")

#: Nobody waits for so long unless something is broken.
PATIENCE_S = 20.0


class Place(Protocol):
    """Somewhere that a store can be, empty at first."""

    def open(self, *, ttl_s: float = 86_400, history: int = 10_000) -> Store:
        """One more handle to the store there."""
        ...

    def plant(self, key: str, value: bytes) -> None:
        """Put something there without asking the store, as a broken or foreign writer would."""
        ...


def run(work: Callable[[], Awaitable[T]], *, most_s: float = PATIENCE_S) -> T:
    """Run a test's coroutine in an event loop of its own, and fail rather than hang."""

    async def bounded() -> T:
        async with asyncio.timeout(most_s):
            return await work()

    return asyncio.run(bounded())


@asynccontextmanager
async def handles(place: Place, count: int = 1, *, ttl_s: float = 86_400) -> AsyncIterator[list[Store]]:
    """Some handles to one store, closed in the end."""
    stores = [place.open(ttl_s=ttl_s) for _ in range(count)]
    try:
        yield stores
    finally:
        for store in stores:
            await store.close()


def lease(
    subnet: str = "10.5.34.0/24",
    *,
    public: str = "192.0.2.1",
    data: bytes | None = b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}',
    ipv6: str = "",
) -> Lease:
    leg6 = Leg(Prefix.parse(ipv6), parse_address("fd00::1")) if ipv6 else None
    return Lease(Leg(Prefix.parse(subnet), parse_address(public), data), leg6, "vxlan")


def holder(name: str) -> Holder:
    return Holder(f"boot/{name}", name)


def ipv4_range(count: int = 255) -> Range:
    """So many /24, from 10.5.1.0/24 on."""
    return Range(
        network=Prefix.parse("10.5.0.0/16"),
        subnet_length=24,
        first=Prefix.parse("10.5.1.0/24"),
        last=Prefix.parse(f"10.5.{count}.0/24"),
    )


def claim(
    name: str,
    *,
    public: str = "192.0.2.1",
    previous: tuple[str, ...] = (),
    range_: Range | None = None,
    data: bytes = b"{}",
) -> Claim:
    address = parse_address(public)

    def make(subnets: dict[Family, Prefix]) -> Lease:
        return Lease(ipv4=Leg(subnets[Family.IPV4], address, data), backend_type="vxlan")

    return Claim(
        ranges=(range_ or ipv4_range(),),
        public={Family.IPV4: address},
        previous=tuple(Prefix.parse(text) for text in previous),
        holder=holder(name),
        make=make,
    )


def untimed(records: Mapping[str, Record]) -> dict[str, Record]:
    """Records without the time that they end at, which a store may keep from those who do not hold them."""
    return {
        key: record if record.expires is None else msgspec.structs.replace(record, expires=math.inf)
        for key, record in records.items()
    }


def missed(known: Mapping[str, Record], snapshot: Snapshot) -> Changes:
    """What a consumer that knows some records missed, as a watch would have told it."""
    leases, removed = difference({key: record.lease for key, record in known.items()}, snapshot)
    written = {key: record for key, record in snapshot.records.items() if known.get(key) != record}
    assert leases.keys() <= written.keys()
    return Changes(snapshot.revision, written, removed, snapshot.malformed)


class Watcher:
    """A consumer of a watch: it keeps what it knows, as an agent does."""

    def __init__(self, store: Store, start: Snapshot) -> None:
        self._store = store
        self._start = start
        self.known: dict[str, Record] = dict(start.records)
        self.seen: list[Changes | Snapshot] = []

    async def until(self, is_reached: Callable[["Watcher"], bool]) -> None:
        """Follow the store until something holds."""
        async with aclosing(self._store.watch(self._start.revision)) as events:
            async for event in events:
                self.seen.append(event)
                changes = event if isinstance(event, Changes) else missed(self.known, event)
                self.known.update(changes.written)
                for key in changes.removed:
                    self.known.pop(key, None)
                if is_reached(self):
                    return


class StoreContract:
    """The suite. Each test has a store of its own."""

    def test_network_is_none_then_what_was_put(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2) as (one, two):
                assert await one.get_network() is None
                await one.put_network(b'{"Network": "10.5.0.0/16"}')
                assert await two.get_network() == b'{"Network": "10.5.0.0/16"}'

        run(work)

    def test_watched_network_is_told_now_and_when_it_changes(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2) as (one, two):
                async with aclosing(two.watch_network()) as texts:
                    assert await anext(texts) is None
                    for text in (b"{}", b'{"Network": "10.5.0.0/16"}'):
                        await one.put_network(text)
                        assert await anext(texts) == text
                async with aclosing(one.watch_network()) as texts:
                    assert await anext(texts) == b'{"Network": "10.5.0.0/16"}'

        run(work)

    def test_watched_network_ends_when_its_handle_is_closed(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place) as (store,):
                started = asyncio.Event()

                async def consume() -> list[bytes | None]:
                    texts = []
                    async for text in store.watch_network():
                        started.set()
                        texts.append(text)
                    return texts

                async with asyncio.TaskGroup() as tasks:
                    consumer = tasks.create_task(consume())
                    await started.wait()
                    await store.close()
                assert consumer.result() == [None]

        run(work)

    def test_ends_are_told_when_they_are_asked_for(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2, ttl_s=500) as (one, two):
                held = await one.create(lease("10.5.1.0/24"), holder=holder("a"))
                reserved = await one.create(lease("10.5.2.0/24"), holder=None, reserve=True)
                records = (await two.with_ends(await two.snapshot())).records
                assert held.expires is not None
                assert records[held.key].expires == pytest.approx(held.expires, abs=5)
                assert records[reserved.key].is_reservation

        run(work)

    def test_create_is_seen_whole_by_another_handle(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2) as (one, two):
                record = await one.create(lease(ipv6="fc00:0:0:1::/64"), holder=holder("a"))
                snapshot = await two.snapshot()
                assert snapshot.records.keys() == {"10.5.34.0-24&fc00:0:0:1::-64"}
                found = snapshot.records[record.key]
                assert found.lease == lease(ipv6="fc00:0:0:1::/64")
                assert found.revision == record.revision == snapshot.revision
                assert found.holder == holder("a")
                assert found.contender is None
                assert found.expires is not None

        run(work)

    def test_create_of_an_existing_key_conflicts(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2) as (one, two):
                first = await one.create(lease(), holder=holder("a"))
                with pytest.raises(Conflict, match=r"10\.5\.34\.0-24"):
                    await two.create(lease(public="192.0.2.2"), holder=holder("b"))
                assert untimed((await two.snapshot()).records) == untimed({first.key: first})

        run(work)

    @pytest.mark.parametrize("other", ["10.5.34.128/25", "10.5.34.0/25", "10.5.32.0/22", "10.5.34.0/23"])
    def test_create_that_overlaps_conflicts(self, place: Place, other: str) -> None:
        """W7: subnets of different lengths."""

        async def work() -> None:
            async with handles(place) as (store,):
                await store.create(lease(), holder=None)
                with pytest.raises(Conflict):
                    await store.create(lease(other), holder=None)
                await store.create(lease("10.5.33.0/24"), holder=None)
                await store.create(lease("10.5.35.0/24"), holder=None)

        run(work)

    @pytest.mark.parametrize("subnet", ["0.0.0.0/0", "10.5.34.7/32"])
    def test_create_of_what_nobody_could_read_back_is_refused(self, place: Place, subnet: str) -> None:
        """It would keep its addresses from everybody, and nobody could release it."""

        async def work() -> None:
            async with handles(place) as (store,):
                with pytest.raises(MalformedLease):
                    await store.create(lease(subnet), holder=None, reserve=True)
                assert not (await store.snapshot()).malformed
                await store.create(lease(), holder=None)

        run(work)

    def test_leases_of_ipv6_alone_stand_side_by_side(self, place: Place) -> None:
        """W6: the IPv4 half of their keys is the same zero."""

        async def work() -> None:
            async with handles(place) as (store,):
                for number in (1, 2):
                    leg = Leg(Prefix.parse(f"fc00:0:0:{number}::/64"), parse_address(f"fd00::{number}"))
                    await store.create(Lease(ipv6=leg), holder=holder(str(number)))
                assert len((await store.snapshot()).records) == 2
                with pytest.raises(Conflict):
                    await store.create(Lease(ipv6=Leg(Prefix.parse("fc00:0:0:2::/64"))), holder=None)

        run(work)

    def test_create_with_one_half_taken_conflicts_and_claims_nothing(self, place: Place) -> None:
        """W7: two dual-stack leases with the same IPv4 subnet or the same IPv6 one."""

        async def work() -> None:
            async with handles(place) as (store,):
                await store.create(lease(ipv6="fc00:0:0:1::/64"), holder=None)
                for taken in (lease(ipv6="fc00:0:0:2::/64"), lease("10.5.9.0/24", ipv6="fc00:0:0:1::/64")):
                    with pytest.raises(Conflict):
                        await store.create(taken, holder=None)
                await store.create(lease("10.5.9.0/24", ipv6="fc00:0:0:2::/64"), holder=None)

        run(work)

    def test_racing_creates_have_one_winner(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 5) as stores:
                results = await asyncio.gather(
                    *(store.create(lease(), holder=holder(str(i))) for i, store in enumerate(stores)),
                    return_exceptions=True,
                )
                assert sum(isinstance(result, Record) for result in results) == 1
                assert sum(isinstance(result, Conflict) for result in results) == 4

        run(work)

    def test_replace_writes_lease_holder_and_contender(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2) as (one, two):
                old = await one.create(lease(), holder=holder("a"))
                wanted = msgspec.structs.replace(
                    old, lease=lease(public="192.0.2.9"), holder=holder("b"), contender=holder("c")
                )
                new = await two.replace(wanted)
                assert new.revision > old.revision
                assert (new.lease, new.holder, new.contender) == (
                    lease(public="192.0.2.9"),
                    holder("b"),
                    holder("c"),
                )
                assert untimed((await one.snapshot()).records) == untimed({new.key: new})

        run(work)

    def test_replace_of_what_somebody_else_wrote_conflicts(self, place: Place) -> None:
        """W22: a renewal after a partition must not overwrite a newer claim."""

        async def work() -> None:
            async with handles(place, 2) as (one, two):
                old = await one.create(lease(), holder=holder("a"))
                new = await two.replace(msgspec.structs.replace(old, holder=holder("b")))
                with pytest.raises(Conflict):
                    await one.replace(old)
                with pytest.raises(Conflict):
                    await one.delete(old)
                assert untimed((await one.snapshot()).records) == untimed({new.key: new})

        run(work)

    def test_replace_of_what_is_gone_conflicts(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place) as (store,):
                old = await store.create(lease(), holder=None)
                await store.delete(old)
                with pytest.raises(Conflict):
                    await store.replace(old)
                with pytest.raises(Conflict):
                    await store.delete(old)
                again = await store.create(lease(), holder=None)
                with pytest.raises(Conflict):
                    await store.replace(old)
                assert untimed((await store.snapshot()).records) == untimed({again.key: again})

        run(work)

    def test_replace_extends_only_when_asked(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place) as (store,):
                old = await store.create(lease(), holder=None)
                kept = await store.replace(old, extend=False)
                extended = await store.replace(kept)
                assert old.expires is not None
                assert kept.expires == pytest.approx(old.expires, abs=1)
                assert extended.expires is not None
                assert extended.expires >= old.expires

        run(work)

    def test_reservation_stays_one_when_its_host_writes(self, place: Place) -> None:
        """W3: it is not turned into a lease that ends."""

        async def work() -> None:
            async with handles(place) as (store,):
                reserved = await store.create(lease(), holder=None, reserve=True)
                assert reserved.is_reservation
                used = await store.replace(msgspec.structs.replace(reserved, holder=holder("a"), expires=1.0))
                assert used.is_reservation
                assert (await store.snapshot()).records[used.key].is_reservation

        run(work)

    def test_lease_becomes_a_reservation(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place) as (store,):
                old = await store.create(lease(), holder=holder("a"))
                assert (await store.replace(msgspec.structs.replace(old, expires=None))).is_reservation

        run(work)

    def test_watch_tells_creation_change_and_removal(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2) as (one, two):
                watcher = Watcher(two, await two.snapshot())
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(watcher.until(lambda w: w.known.keys() == {"10.5.2.0-24"}))
                    first = await one.create(lease("10.5.1.0/24"), holder=holder("a"))
                    second = await one.create(lease("10.5.2.0/24"), holder=holder("b"))
                    moved = await one.replace(
                        msgspec.structs.replace(second, lease=lease("10.5.2.0/24", public="192.0.2.77"))
                    )
                    await one.delete(first)
                assert untimed(watcher.known) == untimed({moved.key: moved})

        run(work)

    def test_watch_tells_its_own_handle_too(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place) as (store,):
                watcher = Watcher(store, await store.snapshot())
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(watcher.until(lambda w: bool(w.known)))
                    await store.create(lease(), holder=None)

        run(work)

    def test_watch_from_an_earlier_revision_loses_nothing(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2) as (one, two):
                gone = await one.create(lease("10.5.1.0/24"), holder=None)
                start = await two.snapshot()
                await one.delete(gone)
                back = await one.create(lease("10.5.1.0/24", public="192.0.2.5"), holder=None)
                new = await one.create(lease("10.5.2.0/24"), holder=None)
                watcher = Watcher(two, start)
                await watcher.until(lambda w: len(w.known) == 2)
                assert untimed(watcher.known) == untimed({back.key: back, new.key: new})
                for event in watcher.seen:
                    assert isinstance(event, Changes)
                    assert not event.removed & event.written.keys()

        run(work)

    def test_watch_from_a_forgotten_revision_gives_a_snapshot(self, place: Place) -> None:
        async def work() -> None:
            store = place.open(history=3)
            try:
                gone = await store.create(lease("10.5.1.0/24"), holder=None)
                start = await store.snapshot()
                await store.delete(gone)
                for number in range(2, 8):
                    await store.create(lease(f"10.5.{number}.0/24"), holder=None)
                watcher = Watcher(store, start)
                await watcher.until(lambda w: len(w.known) == 6)
                assert isinstance(watcher.seen[0], Snapshot)
                assert gone.key not in watcher.known
            finally:
                await store.close()

        run(work)

    def test_watch_from_the_future_gives_a_snapshot(self, place: Place) -> None:
        """The store was deleted and made anew, or restored from a backup."""

        async def work() -> None:
            async with handles(place) as (store,):
                record = await store.create(lease(), holder=None)
                async with aclosing(store.watch(record.revision + 1000)) as events:
                    event = await anext(events)
                assert event == await store.snapshot()
                assert isinstance(event, Snapshot)

        run(work)

    def test_watch_ends_when_its_handle_is_closed(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place) as (store,):
                revision = (await store.snapshot()).revision
                started = asyncio.Event()

                async def consume() -> list[Changes | Snapshot]:
                    started.set()
                    return [event async for event in store.watch(revision)]

                async with asyncio.TaskGroup() as tasks:
                    consumer = tasks.create_task(consume())
                    await started.wait()
                    await store.close()
                assert consumer.result() == []
                await store.close()

        run(work)

    def test_lease_ends_and_watchers_are_told(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2, ttl_s=0.2) as (one, two):
                kept = await one.create(lease("10.5.1.0/24"), holder=None, reserve=True)
                ended = await one.create(lease("10.5.2.0/24"), holder=holder("a"))
                watcher = Watcher(two, await two.snapshot())
                assert watcher.known.keys() == {kept.key, ended.key}
                await watcher.until(lambda w: ended.key not in w.known)
                assert untimed((await one.snapshot()).records) == untimed({kept.key: kept})
                with pytest.raises(Conflict):
                    await one.replace(ended)
                await two.create(lease("10.5.2.0/24"), holder=holder("b"))

        run(work)

    def test_malformed_key_or_value_concerns_itself_alone(self, place: Place) -> None:
        """W1."""

        async def work() -> None:
            async with handles(place) as (store,):
                start = await store.snapshot()
                good = await store.create(lease(), holder=None)
                place.plant("10.5.77.0-24", b'{"PublicIP":"not an address","PublicIPv6":null}')
                place.plant("10.5.78.0-33", b'{"PublicIP":"192.0.2.1","PublicIPv6":null}')
                place.plant("10.5.79.0-24", b'{"PublicIP":"192.0.2.1","BackendData":' + b"[" * 90_000)
                snapshot = await store.snapshot()
                assert untimed(snapshot.records) == untimed({good.key: good})
                assert snapshot.malformed.keys() == {"10.5.77.0-24", "10.5.78.0-33", "10.5.79.0-24"}
                assert "not an address" in snapshot.malformed["10.5.77.0-24"]
                watcher = Watcher(store, start)
                await watcher.until(lambda w: any(event.malformed for event in w.seen))
                assert untimed(watcher.known) == untimed({good.key: good})

        run(work)

    def test_acquire_takes_what_is_free_and_finds_it_again(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place) as (store,):
                first = await acquire(store, claim("a"), rng=Random(1))
                again = await acquire(store, claim("a", data=b'{"VNI":2}'), rng=Random(2))
                assert again.key == first.key
                assert again.lease.ipv4 is not None
                assert again.lease.ipv4.data == b'{"VNI":2}'
                assert again.revision > first.revision

        run(work)

    def test_hundred_hosts_at_once_take_a_hundred_subnets(self, place: Place) -> None:
        """W2, W28: there are no more than a hundred, so that nearly all of them lose races."""

        async def work() -> None:
            range_ = ipv4_range(100)
            async with handles(place, 4) as stores:
                records = await asyncio.gather(
                    *(
                        acquire(
                            stores[number % 4],
                            claim(str(number), public=f"192.0.2.{number}", range_=range_),
                            rng=Random(number),
                        )
                        for number in range(100)
                    )
                )
                assert len({record.key for record in records}) == 100
                with pytest.raises(NoFreeSubnet):
                    await acquire(stores[0], claim("z", public="192.0.2.200", range_=range_), rng=Random(99))

        run(work)

    @pytest.mark.parametrize("families", [(Family.IPV6,), (Family.IPV4, Family.IPV6)], ids=["ipv6", "dual"])
    def test_hosts_at_once_share_no_half_and_find_their_own_again(
        self, place: Place, families: tuple[Family, ...]
    ) -> None:
        """W6: of IPv6 alone, all have the same IPv4 address, which is none. W7: each family for itself."""
        count = 20
        ranges = {
            Family.IPV4: ipv4_range(count),
            Family.IPV6: Range(
                network=Prefix.parse("fc00::/48"),
                subnet_length=64,
                first=Prefix.parse("fc00:0:0:1::/64"),
                last=Prefix.parse(f"fc00:0:0:{count:x}::/64"),
            ),
        }

        def wanted(number: int) -> Claim:
            public = {
                Family.IPV4: parse_address(f"192.0.2.{number}"),
                Family.IPV6: parse_address(f"fd00::{number}"),
            }
            return Claim(
                ranges=tuple(ranges[family] for family in families),
                public={family: public[family] for family in families},
                previous=(),
                holder=holder(str(number)),
                make=lambda subnets: Lease.make(
                    {f: Leg(it, public[f]) for f, it in subnets.items()}, "vxlan"
                ),
            )

        async def work() -> None:
            async with handles(place, 4) as stores:

                async def take_all() -> list[Record]:
                    claims = [wanted(number + 1) for number in range(count)]
                    return await asyncio.gather(
                        *(acquire(stores[i % 4], it, rng=Random(i)) for i, it in enumerate(claims))
                    )

                records = await take_all()
                for family in families:
                    legs = [record.lease.leg(family) for record in records]
                    assert len({leg.subnet for leg in legs if leg is not None}) == count
                assert [record.key for record in await take_all()] == [record.key for record in records]
                assert len((await stores[0].snapshot()).records) == count

        run(work)

    def test_reservation_is_used_by_its_host_and_stays(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place) as (store,):
                await store.create(lease("10.5.9.0/24", public="192.0.2.9"), holder=None, reserve=True)
                record = await acquire(store, claim("a", public="192.0.2.9"), rng=Random(1))
                assert record.key == "10.5.9.0-24"
                assert record.is_reservation

        run(work)

    def test_duplicate_address_is_refused_while_the_holder_answers(self, place: Place) -> None:
        """W33: nothing is stolen, and both hosts are named."""

        async def live(store: Store, record: Record, me: Holder) -> None:
            async with aclosing(store.watch(record.revision)) as events:
                async for event in events:
                    written = event.written if isinstance(event, Changes) else event.records
                    if record.key in written and await answer(store, written[record.key], me):
                        return

        async def work() -> None:
            async with handles(place, 2) as (one, two):
                held = await acquire(one, claim("oldhost"), rng=Random(1))
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(live(one, held, holder("oldhost")))
                    with pytest.raises(DuplicateAddress, match=r"oldhost.*newhost.*--public-ip"):
                        await acquire(two, claim("newhost"), rng=Random(2), answer_s=PATIENCE_S)
                (record,) = (await two.snapshot()).records.values()
                assert (record.key, record.holder, record.contender) == (held.key, holder("oldhost"), None)

        run(work)

    def test_lease_of_a_silent_holder_is_taken_over(self, place: Place) -> None:
        async def work() -> None:
            async with handles(place, 2) as (one, two):
                held = await acquire(one, claim("dead"), rng=Random(1))
                record = await acquire(two, claim("heir"), rng=Random(2), answer_s=0.02)
                assert (record.key, record.holder, record.contender) == (held.key, holder("heir"), None)
                assert untimed((await one.snapshot()).records) == untimed({record.key: record})

        run(work)
