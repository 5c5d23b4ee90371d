# SPDX-License-Identifier: Apache-2.0
"""The decision, without a store; the steps are in the contract of stores."""

from random import Random

import msgspec
import pytest

from loden.address import Family, Prefix, parse_address
from loden.errors import NoFreeSubnet
from loden.lease import Lease, Leg
from loden.network import Range
from loden.stores.acquire import Ask, Claim, Create, Drop, Reuse, decide, this_host
from loden.stores.base import Holder, Record, Snapshot
from tests.contract.store import missed

ME = Holder("boot-1/1", "me")
OTHER = Holder("boot-2/1", "other")
V4 = Range(
    network=Prefix.parse("10.5.0.0/16"),
    subnet_length=24,
    first=Prefix.parse("10.5.1.0/24"),
    last=Prefix.parse("10.5.255.0/24"),
)
V6 = Range(
    network=Prefix.parse("fc00::/48"),
    subnet_length=64,
    first=Prefix.parse("fc00:0:0:1::/64"),
    last=Prefix.parse("fc00:0:0:ffff::/64"),
)
PUBLIC4, PUBLIC6 = parse_address("192.0.2.1"), parse_address("fd00::1")


def claim(*ranges: Range, previous: tuple[str, ...] = ()) -> Claim:
    families = [range_.family for range_ in ranges]
    public = {Family.IPV4: PUBLIC4, Family.IPV6: PUBLIC6}
    return Claim(
        ranges=ranges,
        public={family: public[family] for family in families},
        previous=tuple(map(Prefix.parse, previous)),
        holder=ME,
        make=lambda subnets: Lease.make({family: Leg(subnet) for family, subnet in subnets.items()}),
    )


def record(
    *subnets: str,
    public: bytes | None = PUBLIC4,
    public6: bytes | None = PUBLIC6,
    holder: Holder | None = ME,
    expires: float | None = 1.0,
) -> Record:
    legs = {}
    for subnet in map(Prefix.parse, subnets):
        legs[subnet.family] = Leg(subnet, public if subnet.family is Family.IPV4 else public6)
    lease = Lease.make(legs)
    return Record(lease.key, lease, 1, expires, holder)


def snapshot(*records: Record) -> Snapshot:
    return Snapshot(7, {found.key: found for found in records})


def chosen(state: Snapshot, wanted: Claim) -> dict[Family, Prefix]:
    decision = decide(state, wanted, Random(1))
    assert isinstance(decision, Create)
    assert decision.revision == state.revision
    return dict(decision.subnets)


def test_own_lease_is_reused_at_once() -> None:
    own = record("10.5.9.0/24")
    other = record("10.5.8.0/24", public=b"\1\1\1\1", holder=OTHER)
    assert decide(snapshot(other, own), claim(V4), Random(1)) == Reuse(own)


def test_of_several_leases_under_our_address_a_reservation_and_then_our_own_counts() -> None:
    stray = record("10.5.7.0/24", holder=None)
    own = record("10.5.9.0/24")
    assert decide(snapshot(stray, own), claim(V4), Random(1)) == Reuse(own)
    reserved = record("10.5.10.0/24", holder=None, expires=None)
    assert decide(snapshot(stray, own, reserved), claim(V4), Random(1)) == Reuse(reserved)


def test_lease_without_a_holder_is_reused_at_once() -> None:
    """A flannel node's, from before we took over its host; or a reservation."""
    own = record("10.5.9.0/24", holder=None)
    assert decide(snapshot(own), claim(V4), Random(1)) == Reuse(own)


def test_lease_of_another_holder_is_asked_for() -> None:
    """W33."""
    theirs = record("10.5.9.0/24", holder=OTHER)
    assert decide(snapshot(theirs), claim(V4), Random(1)) == Ask(theirs, Reuse(theirs))


def test_misfit_of_another_holder_is_asked_for_too() -> None:
    theirs = record("10.6.9.0/24", holder=OTHER)
    assert decide(snapshot(theirs), claim(V4), Random(1)) == Ask(theirs, Drop(theirs))


@pytest.mark.parametrize(
    "subnets",
    [("10.6.0.0/24",), ("10.5.9.0/25",), ("10.5.0.0/24",), ("10.5.9.0/24", "fc00:0:0:5::/64")],
)
def test_own_lease_that_does_not_fit_is_dropped(subnets: tuple[str, ...]) -> None:
    own = record(*subnets)
    assert decide(snapshot(own), claim(V4), Random(1)) == Drop(own)


def test_own_lease_without_a_family_that_is_wanted_is_dropped() -> None:
    own = record("10.5.9.0/24")
    assert decide(snapshot(own), claim(V4, V6), Random(1)) == Drop(own)


def test_reservation_that_does_not_fit_is_left_alone() -> None:
    reserved = record("10.6.0.0/24", holder=None, expires=None)
    assert isinstance(decide(snapshot(reserved), claim(V4), Random(1)), Create)


def test_ipv6_only_hosts_are_told_apart() -> None:
    """W6: all of them have the IPv4 address 0.0.0.0."""
    other = record("fc00:0:0:5::/64", public6=parse_address("fd00::2"), holder=OTHER)
    own = record("fc00:0:0:6::/64")
    assert decide(snapshot(other, own), claim(V6), Random(1)) == Reuse(own)
    assert isinstance(decide(snapshot(other), claim(V6), Random(1)), Create)


def test_host_with_a_new_address_keeps_its_subnet() -> None:
    """W33: flannel gives it another one."""
    own = record("10.5.9.0/24", public=parse_address("192.0.2.77"))
    assert decide(snapshot(own), claim(V4), Random(1)) == Reuse(own)


def test_reservation_for_an_address_that_we_had_is_not_ours() -> None:
    reserved = record("10.5.9.0/24", public=parse_address("192.0.2.77"), expires=None)
    assert isinstance(decide(snapshot(reserved), claim(V4), Random(1)), Create)


def test_previous_subnet_is_taken_again() -> None:
    assert chosen(snapshot(), claim(V4, previous=("10.5.77.0/24",))) == {
        Family.IPV4: Prefix.parse("10.5.77.0/24")
    }


@pytest.mark.parametrize("previous", ["10.6.0.0/24", "10.5.77.0/25", "10.5.8.0/24"])
def test_previous_subnet_that_is_taken_or_does_not_fit_is_not(previous: str) -> None:
    other = record("10.5.8.128/25", public=b"\1\1\1\1", holder=OTHER)
    subnets = chosen(snapshot(other), claim(V4, previous=(previous,)))
    assert subnets[Family.IPV4] != Prefix.parse(previous)


def test_previous_subnet_is_kept_when_the_other_family_comes() -> None:
    subnets = chosen(snapshot(), claim(V4, V6, previous=("10.5.77.0/24",)))
    assert subnets[Family.IPV4] == Prefix.parse("10.5.77.0/24")
    assert subnets[Family.IPV6].length == 64


def test_exhausted_range_is_an_error() -> None:
    everything = record("10.5.0.0/16", public=b"\1\1\1\1", holder=OTHER)
    with pytest.raises(NoFreeSubnet):
        decide(snapshot(everything), claim(V4), Random(1))


def test_this_host_is_the_same_each_time() -> None:
    assert this_host() == this_host()
    assert "/" in this_host().id


def test_difference_is_what_changed_attributes_included() -> None:
    """W10, W1."""
    same, moved, gone, odd = (record(f"10.5.{n}.0/24") for n in (1, 2, 3, 4))
    new = record("10.5.5.0/24")
    now = msgspec.structs.replace(moved, lease=record("10.5.2.0/24", public=b"\2\2\2\2").lease)
    changes = missed(
        {found.key: found for found in (same, moved, gone, odd)},
        Snapshot(9, {found.key: found for found in (same, now, new)}, {odd.key: "not read"}),
    )
    assert changes.revision == 9
    assert changes.written == {now.key: now, new.key: new}
    assert changes.removed == {gone.key}
    assert changes.malformed == {odd.key: "not read"}
