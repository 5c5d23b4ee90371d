# SPDX-License-Identifier: Apache-2.0
"""Properties of allocation while others write: hosts of ours, and flannel's, which ask nobody."""

import asyncio
import itertools
from collections.abc import Collection, Coroutine
from contextlib import suppress
from itertools import combinations
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from loden.address import Family, Prefix, parse_address
from loden.errors import Conflict, NoFreeSubnet
from loden.lease import Lease, Leg, encode_value
from loden.network import Range
from loden.stores import open_store
from loden.stores.acquire import Claim, acquire
from loden.stores.base import Holder, Record, Store
from loden.stores.etcd import messages
from loden.stores.etcd.store import EtcdStore
from tests.contract.store import run
from tests.stores.etcd_cluster import Cluster, needs_etcd

_numbers = itertools.count()

#: What a host may be told about subnets; both at once where somebody changes SubnetLen meanwhile.
LENGTHS = st.sampled_from([24, 25, 26])


#: Which families a host takes part with: clusters change from one to the other.
FAMILIES = st.sampled_from([(Family.IPV4,), (Family.IPV4, Family.IPV6), (Family.IPV6,)])


def ranges(length: int, families: Collection[Family]) -> tuple[Range, ...]:
    """Sixteen /24 at most, so that hosts meet."""
    network = Prefix.parse("10.5.0.0/16")
    first = Prefix.of(parse_address("10.5.16.0"), length)
    last = Prefix.from_int(Family.IPV4, Prefix.parse("10.5.31.0/24").last, length)
    ipv6 = Range(
        Prefix.parse("fc00::/48"), 64, Prefix.parse("fc00:0:0:1::/64"), Prefix.parse("fc00:0:0:14::/64")
    )
    found = {Family.IPV4: Range(network, length, first, last), Family.IPV6: ipv6}
    return tuple(found[family] for family in families)


def claim(number: int, length: int, families: Collection[Family]) -> Claim:
    own = {Family.IPV4: parse_address(f"192.0.2.{number}"), Family.IPV6: parse_address(f"fd00::{number}")}
    addresses = {family: own[family] for family in families}
    return Claim(
        ranges=ranges(length, families),
        public=addresses,
        previous=(),
        holder=Holder(f"boot/{number}", f"host{number}"),
        make=lambda subnets: Lease.make({f: Leg(s, addresses[f]) for f, s in subnets.items()}),
    )


async def flannel_takes(store: EtcdStore, number: int) -> str | None:
    """A flannel node's own creation: nothing but its key is looked at (COMPAT §2.4)."""
    lease = Lease(Leg(Prefix.parse(f"10.5.{16 + number % 16}.0/24"), parse_address(f"198.51.100.{number}")))
    key = store._keys.subnet(lease.key)
    answer = await store._txn(
        [messages.equal(messages.Target.VERSION, key, 0)], [messages.op_put(key, encode_value(lease))]
    )
    return lease.key if answer.succeeded else None


async def take(store: Store, wanted: Claim, *, then_release: bool) -> Record | None:
    with suppress(NoFreeSubnet):
        record = await acquire(store, wanted, rng=Random(wanted.holder.id))
        if not then_release:
            return record
        with suppress(Conflict):
            await store.delete(record)
    return None


@needs_etcd
@given(
    hosts=st.lists(st.tuples(LENGTHS, FAMILIES), min_size=2, max_size=12),
    released=st.sets(st.integers(0, 11)),
    flannels=st.sets(st.integers(0, 15), max_size=6),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=15)
def test_leases_never_overlap_whoever_writes(
    etcd: Cluster,
    *,
    hosts: list[tuple[int, tuple[Family, ...]]],
    released: set[int],
    flannels: set[int],
    seed: int,
) -> None:
    async def work() -> None:
        prefix = f"/races/{next(_numbers)}"
        stores = [open_store(etcd.url(prefix)) for _ in range(4)]
        assert isinstance(stores[0], EtcdStore)
        writes: list[Coroutine[None, None, Record | str | None]] = [
            take(stores[number % 4], claim(number + 1, length, families), then_release=number in released)
            for number, (length, families) in enumerate(hosts)
        ]
        writes += [flannel_takes(stores[0], number) for number in flannels]
        Random(seed).shuffle(writes)
        try:
            done = await asyncio.gather(*writes)
            records = (await stores[0].snapshot()).records
        finally:
            for store in stores:
                await store.close()
        taken = [one for one in done if isinstance(one, Record)]
        for record in taken:
            assert records[record.key].holder == record.holder, "what was reported stands"
        for key in (one for one in done if isinstance(one, str)):
            assert records[key].holder is None, "what flannel wrote nobody touched"
        ours = [record for record in records.values() if record.holder is not None]
        assert len(ours) == len(taken)
        for one, other in combinations(ours, 2):
            for leg in one.lease.legs:
                assert not any(leg.subnet.overlaps(it.subnet) for it in other.lease.legs), (one, other)
        wide = {range_.family: range_ for range_ in ranges(24, tuple(Family))}
        for leg in (leg for record in taken for leg in record.lease.legs):
            range_ = wide[leg.subnet.family]
            assert range_.first.first <= leg.subnet.first <= leg.subnet.last <= range_.last.last

    run(work)


@given(
    hosts=st.lists(st.tuples(LENGTHS, FAMILIES), min_size=2, max_size=20),
    released=st.sets(st.integers(0, 19)),
    seed=st.integers(0, 1 << 16),
)
@settings(max_examples=50)
def test_leases_never_overlap_in_memory(
    *, hosts: list[tuple[int, tuple[Family, ...]]], released: set[int], seed: int
) -> None:
    """The same, many more times, on the store whose steps are easiest to follow."""

    async def work() -> None:
        store = open_store(f"memory://races{next(_numbers)}")
        writes = [
            take(store, claim(number + 1, length, families), then_release=number in released)
            for number, (length, families) in enumerate(hosts)
        ]
        Random(seed).shuffle(writes)
        done = await asyncio.gather(*writes)
        records = (await store.snapshot()).records
        assert {one.key for one in done if one is not None} == set(records)
        for one, other in combinations(records.values(), 2):
            for leg in one.lease.legs:
                assert not any(leg.subnet.overlaps(it.subnet) for it in other.lease.legs)

    run(work)
