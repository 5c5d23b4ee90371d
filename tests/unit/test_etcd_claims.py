# SPDX-License-Identifier: Apache-2.0
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Family, Prefix
from loden.lease import Lease, Leg
from loden.stores.etcd.claims import claim_key, ranges

CLAIMS = b"/p/loden/claims/"

# Few addresses, so that many overlap.
IPV4 = st.builds(
    lambda bits, length: Prefix.of((0x0A05_0000 | bits).to_bytes(4, "big"), length),
    st.integers(0, 0xFFFF),
    st.integers(8, 31),
)
IPV6 = st.builds(
    lambda bits, length: Prefix.of((0xFC << 120 | bits << 64).to_bytes(16, "big"), length),
    st.integers(0, 0xFFFF),
    st.integers(32, 127),
)


def meets(claimed: Prefix, lease: Lease) -> bool:
    """Whether a lease's comparisons see a claim, as etcd would."""
    key = claim_key(CLAIMS, claimed)
    return any(start <= key < end if end else key == start for start, end in ranges(CLAIMS, lease))


def lease_of(subnet: Prefix) -> Lease:
    return Lease.make({subnet.family: Leg(subnet)})


def test_key_spells_the_bits() -> None:
    assert claim_key(CLAIMS, Prefix.parse("10.5.0.0/16")) == CLAIMS + b"4/0000101000000101"
    assert claim_key(CLAIMS, Prefix.parse("8000::/1")) == CLAIMS + b"6/1"


@given(st.one_of(IPV4, IPV6), st.one_of(IPV4, IPV6))
def test_claim_is_met_exactly_where_subnets_overlap(one: Prefix, other: Prefix) -> None:
    assert meets(one, lease_of(other)) == one.overlaps(other)


@given(IPV4, IPV6, st.one_of(IPV4, IPV6))
def test_either_half_of_a_dual_stack_lease_meets_claims(ipv4: Prefix, ipv6: Prefix, claimed: Prefix) -> None:
    lease = Lease(Leg(ipv4), Leg(ipv6))
    assert meets(claimed, lease) == (claimed.overlaps(ipv4) or claimed.overlaps(ipv6))


@given(IPV4, IPV6)
def test_comparisons_fit_into_one_transaction(ipv4: Prefix, ipv6: Prefix) -> None:
    """etcd allows 128, and two more are about the key itself."""
    assert len(list(ranges(CLAIMS, Lease(Leg(ipv4), Leg(ipv6))))) <= 126
    assert ipv4.family is Family.IPV4
