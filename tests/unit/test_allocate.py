# SPDX-License-Identifier: Apache-2.0
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Family, Prefix
from loden.errors import NoFreeSubnet
from loden.network import Range
from loden.stores.allocate import allocate, fits


def make_range(network: str, first: str, last: str) -> Range:
    least, most = Prefix.parse(first), Prefix.parse(last)
    return Range(network=Prefix.parse(network), subnet_length=least.length, first=least, last=most)


SMALL = make_range("10.5.0.0/24", "10.5.0.32/28", "10.5.0.208/28")  # 12 of 16
BOTH = [SMALL, make_range("fc00::/48", "fc00:0:0:1::/64", "fc00:0:0:c::/64")]


def free_by_counting(range_: Range, taken: list[Prefix]) -> list[Prefix]:
    """The slow and obvious way."""
    size = range_.first.size
    slots = (
        Prefix.from_int(range_.family, base, range_.subnet_length)
        for base in range(range_.first.first, range_.last.first + 1, size)
    )
    return [slot for slot in slots if not any(slot.overlaps(other) for other in taken)]


@st.composite
def taken_in(draw: st.DrawFn, range_: Range) -> list[Prefix]:
    """Prefixes of many lengths in and around a range, overlapping as they like, some of the other family."""
    net = range_.network
    inside = st.builds(
        lambda at, length: Prefix.from_int(range_.family, net.first + at * (net.size >> 8), length),
        st.integers(0, 255),
        st.integers(net.length - 1, range_.family.bits),
    )
    around = st.builds(
        lambda at: Prefix.from_int(
            range_.family, range_.first.first + at * range_.first.size, range_.subnet_length
        ),
        st.integers(-2, 14),
    )
    elsewhere = st.sampled_from([Prefix.parse("10.5.0.64/28"), Prefix.parse("fc00:0:0:3::/64")])
    return draw(st.lists(st.one_of(inside, around, elsewhere), max_size=20))


@pytest.mark.parametrize("range_", BOTH, ids=str)
@given(data=st.data(), seed=st.integers())
def test_allocate_agrees_with_counting(range_: Range, data: st.DataObject, seed: int) -> None:
    taken = data.draw(taken_in(range_))
    free = free_by_counting(range_, taken)
    if free:
        assert allocate(range_, taken, Random(seed)) in free
    else:
        with pytest.raises(NoFreeSubnet):
            allocate(range_, taken, Random(seed))


@given(st.data())
def test_allocate_reaches_every_free_subnet_equally(data: st.DataObject) -> None:
    """The n-th number drawn is the n-th free subnet: then any chance that is fair is fair here."""
    taken = data.draw(taken_in(SMALL))
    free = free_by_counting(SMALL, taken)

    class Nth(Random):
        at = 0

        def randrange(self, start: int, stop: int | None = None, step: int = 1) -> int:
            assert (start, stop, step) == (len(free), None, 1)
            return self.at

    for at, expected in enumerate(free):
        rng = Nth()
        rng.at = at
        assert allocate(SMALL, taken, rng) == expected


def test_allocate_draws_from_beyond_the_first_hundred() -> None:
    """W28."""
    range_ = make_range("10.5.0.0/16", "10.5.1.0/24", "10.5.255.0/24")
    rng = Random(1)
    drawn = Counter(allocate(range_, [], rng).address[2] for _ in range(2000))
    assert sum(drawn[third] for third in range(101, 256)) > 1000
    assert min(drawn) == 1
    assert max(drawn) == 255


def test_allocate_does_not_count_through_a_huge_range() -> None:
    range_ = make_range("fc00::/16", "fc00:0:0:1::/64", "fc00:ffff:ffff:ffff::/64")  # 2^48 of them
    taken = [Prefix.from_int(Family.IPV6, range_.first.first + (n << 64), 64) for n in range(1000)]
    found = allocate(range_, taken, Random(1))
    assert fits(range_, found)
    assert found not in taken


def test_allocate_finds_the_last_one() -> None:
    taken = free_by_counting(SMALL, [])
    last = taken.pop(7)
    assert allocate(SMALL, taken, Random(1)) == last


def test_allocate_of_a_full_range_says_how_full_and_what_to_do() -> None:
    taken = free_by_counting(SMALL, [])
    with pytest.raises(NoFreeSubnet, match=r"/28 of 10\.5\.0\.0/24: all 12 subnets .*SubnetMax.*release"):
        allocate(SMALL, taken, Random(1))


def test_allocate_of_a_reversed_range_finds_nothing() -> None:
    """COMPAT §1.2: Min ≤ Max is not checked with the configuration."""
    with pytest.raises(NoFreeSubnet):
        allocate(make_range("10.5.0.0/16", "10.5.9.0/24", "10.5.3.0/24"), [], Random(1))


@pytest.mark.parametrize(
    ("subnet", "does"),
    [
        ("10.5.0.32/28", True),
        ("10.5.0.208/28", True),
        ("10.5.0.16/28", False),
        ("10.5.0.224/28", False),
        ("10.5.0.32/29", False),
        ("fc00::/28", False),
    ],
)
def test_fits_is_length_and_bounds(subnet: str, does: bool) -> None:
    assert fits(SMALL, Prefix.parse(subnet)) is does
