# SPDX-License-Identifier: Apache-2.0
"""What becomes of leases and watches when members of etcd die, stop, lose each other, or are full."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import msgspec
import pytest

from loden.errors import Conflict, StoreError, StoreUnavailable
from loden.stores import open_store
from loden.stores.access import Access
from loden.stores.base import Changes, Snapshot, Store
from loden.stores.etcd.messages import Grant
from loden.stores.etcd.place import parse_location
from loden.stores.etcd.store import EtcdStore
from tests.contract.store import holder, ipv4_range, lease, missed, run, untimed
from tests.stores.etcd_cluster import Cluster, needs_etcd
from tests.stores.history import History, violations
from tests.stores.simulated import Relay, SimulatedHost, wait_for

pytestmark = needs_etcd


@pytest.fixture
def alone() -> Iterator[Cluster]:
    """A member that a test may break."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    """Three members that elect a new leader fast. Who kills one starts it again."""
    with Cluster(3, fast=True) as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def opened(*urls: str) -> AsyncIterator[list[Store]]:
    stores = [open_store(url) for url in urls]
    try:
        yield stores
    finally:
        for store in stores:
            await store.close()


async def persist(store: Store, work: str) -> object:
    """Read until it works, as every caller does."""
    while True:
        try:
            return await getattr(store, work)()
        except StoreUnavailable:
            await asyncio.sleep(0.05)


class Follower:
    """A consumer of a watch that starts again where it was after each failure, as the agent does."""

    def __init__(self, store: Store, start: Snapshot) -> None:
        self._store = store
        self.known = dict(start.records)
        self.revision = start.revision
        self.failures = 0
        self.snapshots = 0

    async def run(self) -> None:
        while True:
            try:
                async with aclosing(self._store.watch(self.revision)) as events:
                    async for event in events:
                        self._take(event)
            except StoreUnavailable:
                self.failures += 1
                await asyncio.sleep(0.05)

    def _take(self, event: Changes | Snapshot) -> None:
        self.revision = event.revision
        self.snapshots += isinstance(event, Snapshot)
        changes = missed(self.known, event) if isinstance(event, Snapshot) else event
        self.known.update(changes.written)
        for key in changes.removed:
            self.known.pop(key, None)


@contextlib.asynccontextmanager
async def following(store: Store) -> AsyncIterator[Follower]:
    follower = Follower(store, await store.snapshot())
    async with asyncio.TaskGroup() as group:
        task = group.create_task(follower.run())
        yield follower
        task.cancel()


async def caught_up(follower: Follower, store: Store) -> None:
    """Return when the follower knows what the store holds."""
    wanted = untimed((await store.snapshot()).records)
    await wait_for("it knows everything", lambda: untimed(follower.known) == wanted)


def test_end_that_cannot_be_asked_for_is_one_error(etcd: Cluster) -> None:
    """And not one for each of those who ask at once."""

    class Forgetful(EtcdStore):
        async def _time_to_live(self, number: int, *, keys: bool = False) -> Grant:
            raise StoreUnavailable("ask etcd: it is gone")

    async def work() -> None:
        url = etcd.url("/ends")
        async with opened(url) as (one,):
            for number in (1, 2):
                await one.create(lease(f"10.5.{number}.0/24"), holder=holder(str(number)))
            other = Forgetful(parse_location(url.partition("://")[2]), access=Access(), ttl_s=500)
            with pytest.raises(StoreUnavailable, match="it is gone"):
                await other.with_ends(await other.snapshot())
            await other.close()

    run(work)


def test_member_killed_and_started_again(alone: Cluster) -> None:
    """Nothing is lost: neither leases nor what a watch has to tell."""

    async def work() -> None:
        async with opened(alone.url(), alone.url()) as (one, two):
            held = await one.create(lease(), holder=holder("a"))
            async with following(two) as follower:
                alone.members[0].kill()
                with pytest.raises(StoreUnavailable, match=r"(reach|ask) etcd"):
                    await one.replace(held)
                alone.members[0].start()
                await asyncio.to_thread(alone.members[0].wait_ready)
                await persist(one, "snapshot")
                renewed = await one.replace(held)
                assert renewed.revision == held.revision
                await one.create(lease("10.5.35.0/24", public="192.0.2.2"), holder=holder("b"))
                await caught_up(follower, one)
                assert follower.failures
                assert not follower.snapshots

    run(work)


def test_leader_of_three_killed(three: Cluster) -> None:
    """Writes go on with another member, the watch goes on where it was, and held leases are renewed."""

    async def work() -> None:
        url = three.url("/leader/network")
        async with opened(url, url, url) as (one, two, three_):
            held = await one.create(lease(), holder=holder("a"))
            async with following(two) as follower, following(three_) as other:
                leader = three.leader()
                leader.kill()
                for number in range(2, 12):
                    record = lease(f"10.5.{number}.0/24", public=f"192.0.2.{number}")
                    while True:
                        try:
                            await one.create(record, holder=holder(str(number)))
                        except StoreUnavailable:
                            await asyncio.sleep(0.05)
                        except Conflict:
                            break  # the try before came through, and its answer did not
                        else:
                            break
                while True:
                    with contextlib.suppress(StoreUnavailable):
                        assert (await one.replace(held)).lease == held.lease
                        break
                await caught_up(follower, one)
                await caught_up(other, one)
                assert len(follower.known) == 11
                assert follower.snapshots == other.snapshots == 0
                leader.start()
                await asyncio.to_thread(leader.wait_ready)

    run(work)


def test_member_that_lost_the_others_hands_its_clients_on(three: Cluster) -> None:
    """It still takes connections, and has no leader: with require-leader a watch notices (COMPAT §2.7)."""

    async def work() -> None:
        url = three.url("/lonely/network")
        followers = three.leader()
        away = [member for member in three.members if member is not followers][:1]
        async with opened(*[url] * 6) as stores, contextlib.AsyncExitStack() as stack:
            known = [await stack.enter_async_context(following(store)) for store in stores[:-1]]
            away[0].pause()
            try:
                writer = stores[-1]
                while True:
                    with contextlib.suppress(StoreUnavailable):
                        await writer.create(lease(), holder=holder("a"))
                        break
            except Conflict:
                pass
            finally:
                away[0].resume()
            for follower in known:
                await caught_up(follower, writer)

    run(work)


def test_compaction_while_a_watch_was_away_is_bridged_by_a_snapshot(alone: Cluster) -> None:
    """W10: also what changed behind a key that stayed is told, and a removal."""

    async def work() -> None:
        async with opened(alone.url(), alone.url()) as (one, two):
            moved = await one.create(lease("10.5.1.0/24", public="192.0.2.1"), holder=holder("a"))
            gone = await one.create(lease("10.5.2.0/24", public="192.0.2.2"), holder=holder("b"))
            start = await two.snapshot()
            await one.delete(gone)
            moved = await one.replace(
                msgspec.structs.replace(moved, lease=lease("10.5.1.0/24", public="192.0.2.77"))
            )
            alone.ctl("compact", str(moved.revision))
            async with aclosing(two.watch(start.revision)) as events:
                event = await anext(events)
                assert isinstance(event, Snapshot)
                changes = missed(start.records, event)
                assert untimed(changes.written) == untimed({moved.key: moved})
                assert changes.removed == {gone.key}
                await one.create(lease("10.5.3.0/24", public="192.0.2.3"), holder=holder("c"))
                after = await anext(events)
                assert isinstance(after, Changes)
                assert after.written.keys() == {"10.5.3.0-24"}

    run(work)


def test_etcd_put_back_from_an_older_copy_is_bridged_by_a_snapshot(alone: Cluster) -> None:
    """Its revisions go backwards: a watch for what was to come would wait for ever."""

    async def work() -> None:
        (member,) = alone.members
        copy = str(alone.directory / "copy.db")
        async with opened(alone.url()) as (store,):
            old = await store.create(lease("10.5.1.0/24", public="192.0.2.1"), holder=holder("a"))
            alone.ctl("snapshot", "save", copy)
            for number in range(2, 6):
                subnet, public = f"10.5.{number}.0/24", f"192.0.2.{number}"
                await store.create(lease(subnet, public=public), holder=holder(str(number)))
            async with following(store) as follower:
                await caught_up(follower, store)
                before = follower.revision
                alone.put_back(member, copy)
                await wait_for("it hears of it", lambda: follower.known.keys() == {old.key})
                assert follower.snapshots == 1
                assert follower.revision < before
                await persist(store, "snapshot")
                new = await store.create(lease("10.5.9.0/24", public="192.0.2.9"), holder=holder("i"))
                await wait_for("it hears what is new", lambda: new.key in follower.known)

    run(work)


def test_compaction_under_a_watch_that_keeps_up_costs_nothing(alone: Cluster) -> None:
    async def work() -> None:
        async with opened(alone.url(), alone.url()) as (one, two), following(two) as follower:
            for number in range(1, 6):
                record = await one.create(
                    lease(f"10.5.{number}.0/24", public=f"192.0.2.{number}"), holder=None
                )
                await caught_up(follower, one)
                alone.ctl("compact", str(record.revision))
            assert follower.snapshots == follower.failures == 0

    run(work)


def test_listing_that_is_compacted_between_its_pages_begins_again(
    alone: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        monkeypatch.setattr("loden.stores.etcd.store._PAGE", 3)
        async with opened(alone.url(), alone.url()) as (one, two):
            for number in range(1, 8):
                await one.create(lease(f"10.5.{number}.0/24", public=f"192.0.2.{number}"), holder=holder("a"))
            client = two._client  # type: ignore[attr-defined]
            call, calls = client.call, []

            async def compacting(path: str, message: bytes, **options: object) -> bytes:
                calls.append(path)
                if len(calls) == 2:  # the second page
                    record = await one.create(lease("10.5.99.0/24", public="192.0.2.99"), holder=holder("b"))
                    alone.ctl("compact", str(record.revision))
                answer: bytes = await call(path, message, **options)
                return answer

            monkeypatch.setattr(client, "call", compacting)
            snapshot = await two.snapshot()
            assert len(snapshot.records) == 8
            assert all(record.holder for record in snapshot.records.values())

    run(work)


def test_slow_consumer_gets_everything(alone: Cluster) -> None:
    """More than may wait here, and more than etcd sends at once; others' watches on the connection go on."""

    async def work() -> None:
        async with opened(alone.url(), alone.url()) as (one, two):
            start = await two.snapshot()
            data = b'{"x":"%s"}' % (b"y" * 60_000)
            async with aclosing(two.watch(start.revision)) as events, following(two) as quick:
                record = await one.create(lease(data=data), holder=holder("a"))
                first = await anext(events)
                assert isinstance(first, Changes)
                for number in range(60):
                    changed = lease(public=f"192.0.2.{number + 2}", data=data)
                    record = await one.replace(msgspec.structs.replace(record, lease=changed), extend=False)
                await one.create(lease("10.5.99.0/24", public="192.0.2.99"), holder=holder("z"))
                await caught_up(quick, one)
                revisions = [first.revision]
                while True:
                    event = await anext(events)
                    revisions.append(event.revision)
                    if isinstance(event, Changes) and "10.5.99.0-24" in event.written:
                        break
                assert revisions == sorted(revisions)
                assert len(revisions) <= 63

    run(work)


def fill(cluster: Cluster) -> None:
    """Put until etcd takes no more."""
    for number in range(100):
        cluster.ctl("put", f"/fill/{number}", text="x" * 1_000_000)


def test_full_database_refuses_new_leases_and_renews_old_ones() -> None:
    """Its quota is used up: what to do is said, nobody loses a lease, and watches go on."""

    async def work(cluster: Cluster) -> None:
        async with opened(cluster.url(), cluster.url()) as (one, two), following(two) as follower:
            held = await one.create(lease(), holder=holder("a"))
            with pytest.raises(AssertionError, match="database space exceeded"):
                await asyncio.to_thread(fill, cluster)
            with pytest.raises(StoreUnavailable, match=r"space exceeded.*etcdctl alarm disarm"):
                await one.create(lease("10.5.9.0/24", public="192.0.2.9"), holder=holder("b"))
            renewed = await one.replace(held)
            assert renewed.expires is not None
            assert held.expires is not None
            assert renewed.expires > held.expires
            await one.delete(renewed)
            await wait_for("the removal is heard", lambda: not follower.known)

    with Cluster(1, "--quota-backend-bytes", "8000000") as cluster:
        run(lambda: work(cluster))


def test_etcd_stopped_for_longer_than_the_leases_last(alone: Cluster) -> None:
    """SIGSTOP: connections stay and nobody answers. Each host lets go in time, and takes its subnet again."""

    async def work() -> None:
        history, urls = History(), [alone.url(ttl_s=3)] * 5
        async with opened(*urls) as stores:
            hosts = [
                SimulatedHost(number, store, history, ipv4_range(6))
                for number, store in enumerate(stores, start=1)
            ]
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(host.run()) for host in hosts]
                await wait_for("all have leases", lambda: all(host.believed for host in hosts))
                before = [host.believed for host in hosts]
                alone.members[0].pause()
                try:
                    await wait_for("all have let go", lambda: not any(host.believed for host in hosts))
                finally:
                    alone.members[0].resume()
                await wait_for("all have leases again", lambda: all(host.believed for host in hosts))
                assert len({host.believed for host in hosts}) == 5
                assert [host.believed for host in hosts] == before
                for task in tasks:
                    task.cancel()
            assert violations(history.events, bound_s=max(host.worst_lag_s for host in hosts)) == []

    run(work)


def test_partitioned_host_lets_go_before_another_gets_its_subnet(alone: Cluster) -> None:
    """Of one subnet. Who is cut off stops before its lease ends, and leaves a newer owner alone (W22)."""

    async def work() -> None:
        history, narrow = History(), ipv4_range(1)
        relay = Relay(*alone.members[0].client.split(":"))
        async with relay.running() as through:
            url = f"etcd://{through}/coreos.com/network?ttl=3"
            async with opened(url, alone.url(ttl_s=3)) as (cut_off, other):
                one = SimulatedHost(1, cut_off, history, narrow)
                two = SimulatedHost(2, other, history, narrow)
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(one.run())]
                    await wait_for("the first has it", lambda: one.believed)
                    tasks.append(group.create_task(two.run()))
                    relay.cut()
                    await wait_for("the second has it", lambda: two.believed)
                    assert one.believed is None
                    owner = two.keeper
                    relay.mend()
                    await wait_for("the first knows", lambda: one.keeper is not None and one.keeper._is_lost)
                    await asyncio.sleep(1)
                    assert two.believed is not None
                    assert owner is not None
                    assert owner.is_held
                    for task in tasks:
                        task.cancel()
                lag_s = max(one.worst_lag_s, two.worst_lag_s)
                assert violations(history.events, bound_s=lag_s) == []

    run(work)


def test_no_two_hosts_own_one_subnet_whatever_happens(three: Cluster) -> None:
    """Hosts crash and return, wires break, members stop and die; the history of it all is checked."""

    async def work() -> None:
        history, chance = History(), random.Random(7)
        range_ = ipv4_range(6)  # for eight hosts: what is free is wanted by somebody, at once
        async with contextlib.AsyncExitStack() as stack:
            wires, hosts = [], []
            for number in range(1, 9):
                relays = [Relay(*member.client.split(":")) for member in three.members]
                ends = [await stack.enter_async_context(relay.running()) for relay in relays]
                (store,) = await stack.enter_async_context(
                    opened(f"etcd://{','.join(ends)}/chaos/network?ttl=2")
                )
                wires.append(relays)
                hosts.append(SimulatedHost(number, store, history, range_))
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(host.run()) for host in hosts]
                for _ in range(16):
                    await asyncio.sleep(chance.uniform(0.1, 0.6))
                    which = chance.randrange(len(hosts))
                    match chance.choice(["crash", "cut", "cut", "drop", "pause", "kill"]):
                        case "crash":
                            tasks[which].cancel()
                            await asyncio.gather(tasks[which], return_exceptions=True)
                            tasks[which] = group.create_task(hosts[which].run())
                        case "cut":
                            for relay in wires[which]:
                                relay.cut()
                                asyncio.get_running_loop().call_later(chance.uniform(2, 5), relay.mend)
                        case "drop":
                            for relay in wires[which]:
                                relay.drop()
                        case "pause":
                            # Long enough for another leader. Where a leader sleeps until leases seem over to
                            # it, Debian 12's etcd ends them when it wakes (etcd's issue 15247).
                            member = chance.choice(three.members)
                            member.pause()
                            await asyncio.sleep(chance.uniform(0.3, 0.7))
                            member.resume()
                        case "kill":
                            member = chance.choice(three.members)
                            member.kill()
                            await asyncio.sleep(0.3)
                            member.start()
                            await asyncio.to_thread(member.wait_ready)
                for relay in itertools.chain(*wires):
                    relay.mend()
                await wait_for("all are taken", lambda: sum(1 for host in hosts if host.believed) == 6)
                assert len({host.believed for host in hosts if host.believed}) == 6
                assert any(not event.begins for event in history.events), "nothing happened"
                for task in tasks:
                    task.cancel()
            assert violations(history.events, bound_s=max(host.worst_lag_s for host in hosts)) == []

    run(work, most_s=120)


def test_renewal_by_a_leader_that_is_none_any_more_does_not_count(alone: Cluster) -> None:
    """A leader that was stopped keeps leases alive when it goes on, and nobody else knows of it."""

    async def work() -> None:
        async with opened(alone.url()) as (store,):
            assert isinstance(store, EtcdStore)
            held = await store.create(lease(), holder=holder("a"))
            lease_call = store._lease_call

            async def of_another_term(path: str, number: int, *, keys: bool = False) -> Grant:
                kept = await lease_call(path, number, keys=keys)
                return msgspec.structs.replace(kept, term=kept.term - 1)

            store._lease_call = of_another_term  # type: ignore[method-assign]
            renewed = await store.replace(held)
            assert renewed.revision > held.revision, (
                "it was written again instead, which the cluster confirms"
            )
            assert held.expires is not None
            assert renewed.expires is not None
            assert renewed.expires > held.expires
            store._lease_call = lease_call  # type: ignore[method-assign]
            assert (await store.replace(renewed)).revision == renewed.revision

    run(work)


def test_cluster_made_anew_is_no_later_state_of_the_old_one() -> None:
    """Its revisions are higher already, and say nothing of what was seen in the other."""

    async def work(old: Cluster, new: Cluster) -> None:
        relay = Relay(*old.members[0].client.split(":"))
        async with relay.running() as through, opened(f"etcd://{through}", new.url()) as (one, two):
            await one.create(lease(), holder=holder("a"))
            seen = await one.snapshot()
            for number in range(2, 9):
                await two.create(lease(f"10.5.{number}.0/24", public=f"192.0.2.{number}"), holder=None)
            relay.lead_to(*new.members[0].client.split(":"))
            event = None
            while event is None:
                with contextlib.suppress(StoreUnavailable):
                    async with aclosing(one.watch(seen.revision)) as events:
                        event = await anext(events)
            assert isinstance(event, Snapshot)
            assert len(event.records) == 7

    with Cluster() as old, Cluster(token="another") as new:
        run(lambda: work(old, new))


def test_answer_that_got_lost_is_found_out(alone: Cluster) -> None:
    """The write came through and its answer did not: a look finds it, and no etcd lease stays behind."""

    async def work() -> None:
        async with opened(alone.url()) as (one,):
            record = await one.create(lease(), holder=holder("a"))
            wanted = msgspec.structs.replace(record, lease=lease(public="192.0.2.9"))
            client = one._client  # type: ignore[attr-defined]
            call = client.call

            async def losing(path: str, message: bytes, **options: object) -> bytes:
                answer: bytes = await call(path, message, **options)
                if path.endswith("Txn"):
                    raise StoreUnavailable("ask etcd: the answer got lost")
                return answer

            client.call = losing
            with pytest.raises(StoreUnavailable):
                await one.replace(wanted)
            client.call = call
            (found,) = (await one.snapshot()).records.values()
            assert found.lease == wanted.lease
            with pytest.raises(Conflict):
                await one.replace(wanted)
            again = await one.replace(msgspec.structs.replace(found, holder=holder("a2")))
            assert untimed((await one.snapshot()).records) == untimed({again.key: again})
            assert len(alone.leases()) == 1

    run(work)


def test_endpoint_that_is_down_is_passed_over(alone: Cluster) -> None:
    async def work() -> None:
        url = f"etcd://127.0.0.1:1,{alone.endpoints},127.0.0.1:9/coreos.com/network"
        for _ in range(4):  # each handle begins with another one
            async with opened(url) as (store,):
                assert await store.get_network() is None

    run(work)


def test_error_names_every_endpoint_that_was_tried() -> None:
    async def work() -> None:
        async with opened("etcd://127.0.0.1:1,no.such.host.invalid:2379") as (store,):
            with pytest.raises(StoreError, match=r"running there") as caught:
                await store.get_network()
            assert "127.0.0.1:1: Connection refused" in str(caught.value)
            # What is said of it depends on whether a name server answers at all.
            said = str(caught.value).partition("no.such.host.invalid:2379: ")[2]
            assert said.startswith(("Name or service not known", "Temporary failure in name resolution"))

    run(work)
