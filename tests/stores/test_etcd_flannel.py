# SPDX-License-Identifier: Apache-2.0
"""Beside flannel's nodes: every row of COMPAT §2.2 to §2.8, with ``etcdctl`` in flannel's place.

What flannel would write is put here byte for byte, and what flannel would read is compared byte for byte.
Each test names the row that it is about.
"""

import asyncio
import base64
import itertools
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from random import Random
from typing import Any

import msgspec
import pytest

from loden.address import Family, Prefix, parse_address
from loden.errors import Conflict, NoFreeSubnet
from loden.lease import Lease, Leg
from loden.network import Range, parse_network
from loden.stores import open_store
from loden.stores.acquire import Claim, acquire
from loden.stores.base import Changes, Holder, Record, Snapshot, Store
from tests.contract.store import PATIENCE_S, Watcher, ipv4_range, lease, missed, run, untimed
from tests.stores.etcd_cluster import Cluster, needs_etcd

pytestmark = needs_etcd

_numbers = itertools.count()
ME = Holder("boot-1/1", "me")
VXLAN = (
    '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
    '"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
)


class Flannel:
    """A cluster of flannel's nodes: their keys, as ``etcdctl`` puts and gets them."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.prefix = f"/flannel{next(_numbers)}/network"
        self.url = cluster.url(self.prefix)

    def grant(self, ttl_s: int = 86_400) -> str:
        return self.cluster.ctl("lease", "grant", str(ttl_s)).split()[1]

    def put(self, key: str, value: str = VXLAN, *, lease: str = "") -> None:
        """Unconditionally, as flannel renews (§2.4)."""
        flags = ("--lease", lease) if lease else ()
        self.cluster.ctl("put", f"{self.prefix}/subnets/{key}", text=value, flags=flags)

    def put_raw(self, path: str, value: str = VXLAN) -> None:
        self.cluster.ctl("put", self.prefix + path, text=value)

    def delete(self, key: str) -> None:
        self.cluster.ctl("del", f"{self.prefix}/subnets/{key}")

    def get(self, key: str) -> dict[str, Any] | None:
        """What etcd holds under a lease's key: value, lease, mod_revision, version."""
        found = json.loads(self.cluster.ctl("get", f"{self.prefix}/subnets/{key}", "-w", "json")).get(
            "kvs", []
        )
        return self._read(found[0]) if found else None

    def list(self) -> dict[str, dict[str, Any]]:
        """What flannel lists: every key that begins with ``P/subnets`` (§2.7), whole."""
        found = json.loads(self.cluster.ctl("get", f"{self.prefix}/subnets", "--prefix", "-w", "json"))
        return {base64.b64decode(kv["key"]).decode(): self._read(kv) for kv in found.get("kvs", [])}

    def _read(self, kv: dict[str, Any]) -> dict[str, Any]:
        return {**kv, "value": base64.b64decode(kv["value"]).decode(), "lease": kv.get("lease", 0)}

    def time_to_live(self, lease: int) -> int:
        found = json.loads(self.cluster.ctl("lease", "timetolive", f"{lease:x}", "-w", "json"))
        return int(found["ttl"])

    @asynccontextmanager
    async def store(self, count: int = 1) -> AsyncIterator[Any]:
        stores = [open_store(self.url) for _ in range(count)]
        try:
            yield stores[0] if count == 1 else stores
        finally:
            for store in stores:
                await store.close()

    def snapshot(self) -> Snapshot:
        async def work() -> Snapshot:
            async with self.store() as store:
                found: Snapshot = await store.snapshot()
                return found

        return run(work)

    def acquire(self, claim: Claim, **options: Any) -> Record:
        async def work() -> Record:
            async with self.store() as store:
                return await acquire(store, claim, rng=Random(1), **options)

        return run(work)


@pytest.fixture
def flannel(etcd: Cluster) -> Iterator[Flannel]:
    found = Flannel(etcd)
    yield found
    etcd.ctl("del", found.prefix, "--prefix")


def claim(
    public: str = "192.168.64.3",
    *,
    range_: Range | None = None,
    ipv6: bool = False,
    previous: Sequence[str] = (),
    holder: Holder = ME,
    backend: str = "vxlan",
) -> Claim:
    ranges = [range_ or ipv4_range()]
    addresses = {Family.IPV4: parse_address(public)}
    if ipv6:
        first, last = Prefix.parse("fc00:0:0:1::/64"), Prefix.parse("fc00:0:0:ffff::/64")
        ranges.append(Range(Prefix.parse("fc00::/48"), 64, first, last))
        addresses[Family.IPV6] = parse_address("fd00::1")
    data = b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}' if backend == "vxlan" else None
    return Claim(
        ranges=tuple(ranges),
        public=addresses,
        previous=tuple(map(Prefix.parse, previous)),
        holder=holder,
        make=lambda subnets: Lease.make({f: Leg(s, addresses[f], data) for f, s in subnets.items()}, backend),
    )


# §2.1, §2.2: keys


@pytest.mark.parametrize(
    ("lease_", "key"),
    [
        (lease(), "10.5.34.0-24"),
        (lease(ipv6="fc00:0:0:1::/64"), "10.5.34.0-24&fc00:0:0:1::-64"),
        (Lease(ipv6=Leg(Prefix.parse("fc00:0:0:1::/64"))), "0.0.0.0-0&fc00:0:0:1::-64"),
    ],
    ids=["IPv4", "dual stack", "IPv6 only"],
)
def test_2_2_key_names(flannel: Flannel, lease_: Lease, key: str) -> None:
    async def work() -> None:
        async with flannel.store() as store:
            await store.create(lease_, holder=ME)

    run(work)
    assert list(flannel.list()) == [f"{flannel.prefix}/subnets/{key}"]


@pytest.mark.parametrize(
    ("prefix", "is_cleaned"),
    [("//x///network/", "/x/network"), ("/x/./y/../network", "/x/network"), ("/x", "/x"), ("/", "")],
)
def test_2_1_prefix_is_cleaned(etcd: Cluster, prefix: str, is_cleaned: str) -> None:
    async def work() -> None:
        store = open_store(f"etcd://{etcd.endpoints}{prefix}")
        try:
            await store.put_network(b"{}")
        finally:
            await store.close()

    before = set(etcd.keys("/"))
    run(work)
    wanted = f"{is_cleaned}/config" if prefix != "/" else "/coreos.com/network/config"
    assert set(etcd.keys("/")) - before == {wanted}
    etcd.ctl("del", wanted)


@pytest.mark.parametrize(
    "key",
    ["10.5.1.0-24", "a/b/10.5.1.0-24", "x10.5.1.0-24", "10.5.1.0-24&fc00:0:0:1::-64", "0.0.0.0-0&fc00::-64"],
)
def test_2_2_keys_that_flannel_reads_are_leases(flannel: Flannel, key: str) -> None:
    """The pattern is anchored at the end only."""
    flannel.put(key)
    snapshot = flannel.snapshot()
    assert snapshot.records.keys() == {key}
    assert not snapshot.malformed


@pytest.mark.parametrize(
    "key",
    [
        *("10.5.1.0-32", "10.5.1.0-24x", "10.5.1.0", "10.5.1-24", "10.5.1.256-24", "10.5.1.0-", "-24", "x"),
        *("10.5.1.0-24&", "10.5.1.0-24&FC00::-64", "10.5.1.0-24&fc00::-128", "10.5.1.0-24&fc00:::-64"),
        *("0.0.0.0-0", "ä", "a\nb"),
    ],
)
def test_2_2_keys_that_are_none_harm_nobody(flannel: Flannel, key: str) -> None:
    """W1: flannel's own nodes withdraw every peer here."""
    flannel.put("10.5.7.0-24")
    flannel.put(key)
    snapshot = flannel.snapshot()
    assert snapshot.records.keys() == {"10.5.7.0-24"}
    (name,) = snapshot.malformed
    assert name == key
    assert key.partition("\n")[0] in snapshot.malformed[name].replace("\\n", "\n")


# §2.3: values


VALUES = {
    "vxlan": (lease("10.5.1.0/24", public="192.168.64.3"), VXLAN),
    "vxlan dual": (
        Lease(
            Leg(
                Prefix.parse("10.5.1.0/24"),
                parse_address("192.168.64.3"),
                b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}',
            ),
            Leg(
                Prefix.parse("fc00:0:0:1::/64"),
                parse_address("fd00::1"),
                b'{"VNI":1,"VtepMAC":"5a:3c:91:07:0e:2b"}',
            ),
            "vxlan",
        ),
        '{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::1","BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},'
        '"BackendV6Data":{"VNI":1,"VtepMAC":"5a:3c:91:07:0e:2b"}}',
    ),
    "host-gw": (
        Lease(Leg(Prefix.parse("10.5.1.0/24"), parse_address("10.0.0.5")), backend_type="host-gw"),
        '{"PublicIP":"10.0.0.5","PublicIPv6":null,"BackendType":"host-gw"}',
    ),
    "ipip": (
        Lease(Leg(Prefix.parse("10.5.1.0/24"), parse_address("10.0.0.5")), backend_type="ipip"),
        '{"PublicIP":"10.0.0.5","PublicIPv6":null,"BackendType":"ipip"}',
    ),
    "ipsec": (
        Lease(Leg(Prefix.parse("10.5.1.0/24"), parse_address("10.0.0.5")), backend_type="ipsec"),
        '{"PublicIP":"10.0.0.5","PublicIPv6":null,"BackendType":"ipsec"}',
    ),
    "wireguard": (
        Lease(
            Leg(
                Prefix.parse("10.5.1.0/24"), parse_address("10.0.0.5"), b'{"PublicKey":"a+b/c=","Port":51820}'
            ),
            backend_type="wireguard",
        ),
        '{"PublicIP":"10.0.0.5","PublicIPv6":null,"BackendType":"wireguard",'
        '"BackendData":{"PublicKey":"a+b/c=","Port":51820}}',
    ),
    "extension": (
        Lease(
            Leg(Prefix.parse("10.5.1.0/24"), parse_address("10.0.0.5"), b'"0a:..."'), backend_type="extension"
        ),
        '{"PublicIP":"10.0.0.5","PublicIPv6":null,"BackendType":"extension","BackendData":"0a:..."}',
    ),
    "udp, alloc": (
        Lease(Leg(Prefix.parse("10.5.1.0/24"), parse_address("10.0.0.5"))),
        '{"PublicIP":"10.0.0.5","PublicIPv6":null}',
    ),
    "no public address": (
        Lease(Leg(Prefix.parse("10.5.1.0/24"))),
        '{"PublicIP":"0.0.0.0","PublicIPv6":null}',
    ),
}


@pytest.mark.parametrize("name", VALUES)
def test_2_3_values_are_flannels_byte_for_byte(flannel: Flannel, name: str) -> None:
    lease_, value = VALUES[name]

    async def work() -> Record:
        async with flannel.store() as store:
            record: Record = await store.create(lease_, holder=ME)
            return record

    record = run(work)
    found = flannel.get(record.key)
    assert found is not None
    assert found["value"] == value


@pytest.mark.parametrize("name", VALUES)
def test_2_3_values_of_flannels_nodes_are_read(flannel: Flannel, name: str) -> None:
    lease_, value = VALUES[name]
    flannel.put(lease_.key, value)
    (record,) = flannel.snapshot().records.values()
    assert record.lease == lease_
    assert record.holder is None


def test_2_3_value_of_an_old_node_has_no_ipv6_field(flannel: Flannel) -> None:
    flannel.put("10.5.1.0-24", '{"PublicIP":"10.0.0.5","BackendType":"host-gw"}')
    (record,) = flannel.snapshot().records.values()
    assert record.lease == VALUES["host-gw"][0]


@pytest.mark.parametrize(
    "value",
    [
        *("", "null", "[]", "{", "{}{}", '"x"', "7", '{"PublicIP":7}', '{"PublicIP":"10.0.0"}'),
        *('{"PublicIP":"fd00::1"}', '{"PublicIP":"10.0.0.5","PublicIPv6":"10.0.0.5"}'),
        *('{"PublicIP":"10.0.0.5","BackendType":7}', '{"PublicIP":"10.0.0.5","BackendData":}'),
    ],
)
def test_2_3_values_that_are_none_harm_nobody(flannel: Flannel, value: str) -> None:
    """W1: named once with the key, and the subnet counts as taken."""
    flannel.put("10.5.7.0-24")

    async def work() -> None:
        async with flannel.store() as store:
            start = await store.snapshot()
            if value:
                await asyncio.to_thread(flannel.put, "10.5.1.0-24", value)
            else:
                await asyncio.to_thread(
                    flannel.cluster.ctl, "put", f"{flannel.prefix}/subnets/10.5.1.0-24", ""
                )
            async with aclosing(store.watch(start.revision)) as events:
                event = await anext(events)
            assert isinstance(event, Changes)
            assert not event.written
            assert not event.removed
            assert event.malformed.keys() == {"10.5.1.0-24"}
            assert "10.5.1.0-24" in event.malformed["10.5.1.0-24"]
            snapshot = await store.snapshot()
            assert snapshot.records.keys() == {"10.5.7.0-24"}
            assert snapshot.malformed == event.malformed
            with pytest.raises(NoFreeSubnet):
                await acquire(store, claim("192.0.2.9", range_=ipv4_range(1)), rng=Random(1))

    run(work)


def test_2_3_empty_object_is_a_lease_without_address(flannel: Flannel) -> None:
    flannel.put("10.5.1.0-24", "{}")
    (record,) = flannel.snapshot().records.values()
    assert record.lease == Lease(Leg(Prefix.parse("10.5.1.0/24")))


# §2.4: lifetime


def test_2_4_lease_lasts_a_day_and_is_created_where_none_is(flannel: Flannel) -> None:
    record = flannel.acquire(claim())
    found = flannel.get(record.key)
    assert found is not None
    assert found["version"] == 1
    assert 86_390 < flannel.time_to_live(found["lease"]) <= 86_400


def test_2_4_lost_creation_leaves_nothing_behind(flannel: Flannel) -> None:
    """The fresh etcd lease is revoked, at the latest when the handle is closed; nobody gives up (W2)."""
    flannel.put("10.5.34.0-24")

    async def work() -> None:
        async with flannel.store() as store:
            with pytest.raises(Conflict, match=r"10\.5\.34\.0-24: it exists"):
                await store.create(lease(), holder=ME)

    before = flannel.cluster.leases()
    run(work)
    assert flannel.cluster.leases() == before


def test_2_4_renewal_is_in_place_and_wakes_nobody(flannel: Flannel) -> None:
    """§13.3 asks for no deletion; there is not even a write, and so no request of each other node (W25)."""

    async def work() -> None:
        async with flannel.store() as store:
            record = await acquire(store, claim(), rng=Random(1))
            before = await asyncio.to_thread(flannel.get, record.key)
            renewed = await store.replace(record)
            assert await asyncio.to_thread(flannel.get, record.key) == before
            assert before is not None
            assert renewed.expires is not None
            assert record.expires is not None
            assert renewed.expires >= record.expires

    run(work)


def test_2_4_write_under_the_same_key_revokes_the_lease_before(flannel: Flannel) -> None:
    """W23: flannel leaves one behind with each renewal and each restart."""
    before = set(flannel.cluster.leases())
    for number in range(3):
        flannel.acquire(claim(holder=Holder("boot-1/1", f"restart {number}")))
        assert len(set(flannel.cluster.leases()) - before) == 1


def test_2_4_lease_of_a_flannel_node_is_taken_over_with_its_etcd_lease(flannel: Flannel) -> None:
    """Loden in flannel's place on a host: same subnet, in place; the old etcd lease, empty now, goes."""
    old = flannel.grant()
    flannel.put("10.5.34.0-24", lease=old)
    record = flannel.acquire(claim())
    assert record.key == "10.5.34.0-24"
    found = flannel.get(record.key)
    assert found is not None
    assert found["version"] == 2
    assert f"{found['lease']:x}" != old
    assert old not in flannel.cluster.leases()


def test_2_4_etcd_lease_that_holds_somebody_elses_key_is_not_revoked(flannel: Flannel) -> None:
    old = flannel.grant()
    flannel.put("10.5.34.0-24", lease=old)
    flannel.put("10.5.99.0-24", VALUES["host-gw"][1], lease=old)
    flannel.acquire(claim())
    assert old in flannel.cluster.leases()
    assert flannel.get("10.5.99.0-24") is not None


def test_2_4_renewal_over_a_newer_claim_is_refused(flannel: Flannel) -> None:
    """W22: flannel's put would overwrite it."""

    async def work() -> None:
        async with flannel.store() as store:
            record = await acquire(store, claim(), rng=Random(1))
            thief = VALUES["host-gw"][1]
            await asyncio.to_thread(flannel.put, record.key, thief)
            for work in (store.replace, store.delete):
                with pytest.raises(Conflict):
                    await work(record)
            found = await asyncio.to_thread(flannel.get, record.key)
            assert found is not None
            assert found["value"] == thief
            (now,) = (await store.snapshot()).records.values()
            assert now.holder is None, "the one who wrote last keeps no holder; ours is void"

    run(work)


def test_2_4_deletion_takes_everything_along(flannel: Flannel) -> None:
    before = flannel.cluster.leases()

    async def work() -> None:
        async with flannel.store() as store:
            await store.delete(await acquire(store, claim(ipv6=True), rng=Random(1)))

    run(work)
    assert flannel.cluster.keys(flannel.prefix) == []
    assert flannel.cluster.leases() == before


# §2.5: reservations


def test_2_5_reservation_stays_one_when_its_host_uses_it(flannel: Flannel) -> None:
    """W3: flannel turns it into a lease of a day."""
    flannel.put("10.5.34.0-24")
    record = flannel.acquire(claim())
    assert record.key == "10.5.34.0-24"
    assert record.is_reservation
    found = flannel.get(record.key)
    assert found is not None
    assert found["lease"] == 0


def test_2_5_reservation_of_another_is_let_alone(flannel: Flannel) -> None:
    flannel.put("10.5.1.0-24", VALUES["host-gw"][1])
    with pytest.raises(NoFreeSubnet):
        flannel.acquire(claim(range_=ipv4_range(1)))


# §2.6: acquisition


def test_2_6_3_listing_asks_once_for_all(flannel: Flannel) -> None:
    """W25: flannel asks once more for each lease."""
    for number in range(20):
        flannel.put(f"10.5.{number + 1}.0-24", VALUES["host-gw"][1])

    async def work() -> None:
        async with flannel.store() as store:
            await acquire(store, claim("192.0.2.9"), rng=Random(1))
            assert store.calls <= 1 + 3

    run(work)


def test_2_6_4_lease_under_our_address_is_taken_again(flannel: Flannel) -> None:
    flannel.put("10.5.7.0-24", VXLAN.replace("192.168.64.3", "192.168.64.4"))
    flannel.put("10.5.9.0-24")
    assert flannel.acquire(claim()).key == "10.5.9.0-24"


@pytest.mark.parametrize("key", ["10.5.34.0-25", "10.6.34.0-24", "10.5.34.0-24&fc00:0:0:1::-64"])
def test_2_6_4_lease_under_our_address_that_does_not_fit_goes(flannel: Flannel, key: str) -> None:
    flannel.put(key, lease=flannel.grant())
    record = flannel.acquire(claim())
    assert record.key != key
    assert [one.rpartition("/")[2] for one in flannel.list()] == [record.key]


def test_2_6_5_previous_subnet_is_taken_where_it_is_free_and_fits(flannel: Flannel) -> None:
    assert flannel.acquire(claim(previous=["10.5.77.0/24"])).key == "10.5.77.0-24"
    flannel.put("10.5.78.0-24", VALUES["host-gw"][1])
    for previous in ("10.5.78.0/24", "10.9.1.0/24", "10.5.79.0/25"):
        key = flannel.acquire(claim("192.0.2.9", previous=[previous], holder=Holder("b/2", "b"))).key
        assert key != previous.replace("/", "-")
        flannel.delete(key)


def test_2_6_6_allocation_skips_what_overlaps(flannel: Flannel) -> None:
    for key in ("10.5.0.0-23", "10.5.2.128-25", "10.5.4.0-22", "10.5.3.0-24&fc00:0:0:1::-64"):
        flannel.put(key, VALUES["host-gw"][1])
    assert flannel.acquire(claim(range_=ipv4_range(8))).key == "10.5.8.0-24"


def test_2_6_7_flannel_that_was_faster_is_seen_after_our_write(flannel: Flannel) -> None:
    """W7: between our look and our write a flannel node takes what overlaps; its key excludes nothing."""

    async def work() -> None:
        async with flannel.store() as store:
            snapshot = store.snapshot
            writes: list[int] = []

            async def outrun() -> Snapshot:
                found: Snapshot = await snapshot()
                if not writes:
                    writes.append(1)
                    await asyncio.to_thread(flannel.put, "10.5.0.0-23", VALUES["host-gw"][1])
                return found

            store.snapshot = outrun
            record = await acquire(
                store, claim(previous=["10.5.1.0/24"], range_=ipv4_range(3)), rng=Random(1)
            )
            assert record.key in ("10.5.2.0-24", "10.5.3.0-24")
            assert len(await asyncio.to_thread(flannel.list)) == 2

    run(work)


def test_2_6_7_one_family_of_a_dual_stack_node_excludes_ours(flannel: Flannel) -> None:
    """W7, atomically where the IPv4 half is the same: flannel's two transactions would both succeed."""
    flannel.put("10.5.34.0-24&fc00:0:0:9::-64", VALUES["host-gw"][1])

    async def work() -> None:
        async with flannel.store() as store:
            for wanted in (lease(), lease(ipv6="fc00:0:0:1::/64")):
                with pytest.raises(Conflict):
                    await store.create(wanted, holder=ME)

    run(work)


def test_2_6_backend_that_changed_keeps_the_subnet(flannel: Flannel) -> None:
    flannel.put("10.5.34.0-24")
    record = flannel.acquire(claim(backend="host-gw"))
    found = flannel.get("10.5.34.0-24")
    assert record.key == "10.5.34.0-24"
    assert found is not None
    assert found["value"] == '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}'


# §2.7: watching peers, with the table of the lease watcher


async def follow(flannel: Flannel, store: Store, *steps: tuple[str, ...]) -> list[Changes]:
    """What a watch says of some steps of flannel's nodes."""
    watcher = Watcher(store, await store.snapshot())
    async with asyncio.TaskGroup() as group:
        group.create_task(watcher.until(lambda w: "10.5.255.0-24" in w.known))
        for verb, *words in steps:
            await asyncio.to_thread(getattr(flannel, verb), *words)
        await asyncio.to_thread(flannel.put, "10.5.255.0-24", VALUES["host-gw"][1])
    assert all(isinstance(event, Changes) for event in watcher.seen)
    return [event for event in watcher.seen if isinstance(event, Changes)]


def test_2_7_put_is_an_addition_and_the_next_put_an_update(flannel: Flannel) -> None:
    async def work() -> None:
        async with flannel.store() as store:
            moved = VXLAN.replace("192.168.64.3", "192.168.64.9")
            first, second, _ = await follow(
                flannel, store, ("put", "10.5.1.0-24"), ("put", "10.5.1.0-24", moved)
            )
            assert first.written["10.5.1.0-24"].lease != second.written["10.5.1.0-24"].lease
            assert not first.removed | second.removed

    run(work)


def test_2_7_deletion_is_a_removal_also_of_what_nobody_knew(flannel: Flannel) -> None:
    async def work() -> None:
        async with flannel.store() as store:
            _, gone, _ = await follow(flannel, store, ("put", "10.5.1.0-24"), ("delete", "10.5.1.0-24"))
            assert gone.removed == {"10.5.1.0-24"}
            assert not gone.written

    run(work)


def test_2_7_event_that_cannot_be_read_is_that_events_trouble_alone(flannel: Flannel) -> None:
    """W1: flannel takes it for an empty snapshot and removes every peer."""
    flannel.put("10.5.7.0-24")

    async def work() -> None:
        async with flannel.store() as store:
            events = await follow(
                flannel,
                store,
                ("put", "10.5.1.0-24", "{"),
                ("put", "no key"),
                ("put_raw", "/subnets-x/10.5.2.0-24"),
                ("put_raw", "/subnetsx"),
                ("put_raw", "/loden/other", "x"),
                ("put_raw", "/loden/holders/10.5.7.0-24", "x"),
            )
            malformed = {key for event in events for key in event.malformed}
            assert malformed == {"10.5.1.0-24", "no key", "subnets-x/10.5.2.0-24", "subnetsx"}
            assert not any(event.removed for event in events)
            assert {key for event in events for key in event.written} == {"10.5.255.0-24"}
            assert "10.5.7.0-24" in (await store.snapshot()).records

    run(work)


def test_2_7_snapshot_tells_what_changed_behind_a_key(flannel: Flannel) -> None:
    """W10: "a known lease whose attributes changed yields nothing" at flannel's nodes."""
    for number in (1, 2, 3):
        flannel.put(f"10.5.{number}.0-24")
    before = flannel.snapshot()
    flannel.put("10.5.1.0-24", VXLAN.replace("c6:d2", "c6:d3"))
    flannel.delete("10.5.2.0-24")
    flannel.put("10.5.4.0-24")
    changes = missed(before.records, flannel.snapshot())
    assert changes.written.keys() == {"10.5.1.0-24", "10.5.4.0-24"}
    assert changes.removed == {"10.5.2.0-24"}


def test_2_7_node_of_flannels_is_told_of_nothing_but_leases(flannel: Flannel) -> None:
    """§13.4: nothing else of ours begins with ``P/subnets``."""
    record = flannel.acquire(claim(ipv6=True))
    assert list(flannel.list()) == [f"{flannel.prefix}/subnets/{record.key}"]
    others = [key for key in flannel.cluster.keys(flannel.prefix) if "/subnets" not in key]
    assert len(others) == 3
    assert all(key.startswith(f"{flannel.prefix}/loden/") for key in others)


def test_2_7_revisions_are_no_further_than_what_was_told(flannel: Flannel) -> None:
    """etcd says how far the store is, and has events in hand yet: who resumes there loses them."""

    async def work() -> None:
        async with flannel.store(2) as (one, two):
            start = await two.snapshot()
            for number in range(1, 8):
                await one.create(lease(f"10.5.{number}.0/24", public=f"192.0.2.{number}"), holder=ME)
            revision = start.revision
            known: dict[str, Record] = {}
            while len(known) < 7:  # each time from where the last event left off
                async with aclosing(two.watch(revision)) as events:
                    event = await anext(events)
                    assert isinstance(event, Changes)
                    assert event.revision == max(record.revision for record in event.written.values())
                    revision = event.revision
                    known.update(event.written)

    run(work)


# §2.8: the own lease


def test_2_8_key_that_extends_our_own_is_not_our_own(flannel: Flannel) -> None:
    """Flannel watches its key as a prefix: the removal of a dual-stack key would count as its own's."""
    record = flannel.acquire(claim(previous=["10.5.34.0/24"]))
    flannel.put("10.5.34.0-24&fc00:0:0:1::-64", VALUES["host-gw"][1])

    async def work() -> None:
        async with flannel.store() as store:
            first, *_ = await follow(flannel, store, ("delete", "10.5.34.0-24&fc00:0:0:1::-64"))
            assert first.removed == {"10.5.34.0-24&fc00:0:0:1::-64"}
            assert record.key in (await store.snapshot()).records

    run(work)


def test_2_8_lease_that_was_deleted_by_hand_can_be_taken_again(flannel: Flannel) -> None:
    """Its claim and its holder stay until the etcd lease ends; they keep nobody out."""
    record = flannel.acquire(claim(ipv6=True, previous=["10.5.34.0/24", "fc00:0:0:7::/64"]))
    flannel.delete(record.key)
    for holder in (ME, Holder("boot-2/1", "another")):
        again = flannel.acquire(claim(ipv6=True, previous=["10.5.34.0/24", "fc00:0:0:7::/64"], holder=holder))
        assert again.key == record.key
        flannel.delete(again.key)
    assert flannel.acquire(claim(previous=["10.5.34.0/24"])).key == "10.5.34.0-24"


# Bad input beyond §2


def test_network_with_arrays_alone_is_refused_with_the_key_to_write() -> None:
    """flannel v0.20.0 to v0.24.4 read them."""
    found = parse_network(b'{"Network": "10.5.0.0/16", "Networks": ["10.5.0.0/16"]}')
    assert any(note.startswith("Networks: no longer read") for note in found.notes)


def test_holder_that_cannot_be_read_costs_the_holder_alone(flannel: Flannel) -> None:
    record = flannel.acquire(claim())
    flannel.cluster.ctl(
        "txn",
        text=f'\nput {flannel.prefix}/subnets/{record.key} "{{}}"\n'
        f'put {flannel.prefix}/loden/holders/{record.key} "[]"\n\n\n',
    )
    snapshot = flannel.snapshot()
    assert snapshot.records[record.key].holder is None
    assert snapshot.malformed.keys() == {f"loden/holders/{record.key}"}


def test_etcdctl_sees_what_loden_sees(flannel: Flannel) -> None:
    """The two ways to read in these tests agree."""
    record = flannel.acquire(claim())
    found = flannel.get(record.key)
    assert found is not None
    assert found["mod_revision"] == record.revision
    assert untimed(flannel.snapshot().records) == untimed({record.key: record})
    assert msgspec.json.decode(found["value"])["PublicIP"] == "192.168.64.3"
    assert PATIENCE_S > 0
