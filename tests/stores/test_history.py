# SPDX-License-Identifier: Apache-2.0
"""The checker catches what it is there to catch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Prefix
from tests.stores.history import Event, History, beliefs, violations

SUBNET = Prefix.parse("10.5.1.0/24")
INSIDE = Prefix.parse("10.5.1.128/25")
ELSEWHERE = Prefix.parse("10.5.2.0/24")


def begin(at_s: float, host: str, subnet: Prefix = SUBNET) -> Event:
    return Event(at_s, host, True, subnet)


def end(at_s: float, host: str, subnet: Prefix = SUBNET) -> Event:
    return Event(at_s, host, False, subnet)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [begin(0, "a"), begin(1, "b", ELSEWHERE)],
        [begin(0, "a"), end(5, "a"), begin(5, "b")],
        [begin(0, "a"), end(5, "a"), begin(6, "a"), end(9, "a"), begin(9, "b")],
        [begin(0, "a"), begin(3, "a", ELSEWHERE), end(4, "a"), begin(5, "b")],
    ],
)
def test_orderly_histories_pass(events: list[Event]) -> None:
    assert violations(events, bound_s=0) == []


@pytest.mark.parametrize(
    ("events", "for_s"),
    [
        ([begin(0, "a"), begin(1, "b")], float("inf")),
        ([begin(0, "a"), begin(1, "b"), end(4, "a")], 3),
        ([begin(0, "a"), begin(1, "b"), end(4, "b"), end(9, "a")], 3),
        ([begin(0, "a"), begin(2, "b", INSIDE), end(2.5, "a")], 0.5),
        ([begin(0, "a"), end(1, "a"), begin(2, "b"), begin(3, "a"), end(5, "b")], 2),
    ],
)
def test_two_owners_at_one_time_are_caught(events: list[Event], for_s: float) -> None:
    (found,) = violations(events, bound_s=0)
    assert found.for_s == for_s
    assert {found.one.host, found.other.host} == {"a", "b"}


def test_overlap_within_the_bound_passes_and_beyond_it_does_not() -> None:
    events = [begin(0, "a"), begin(10, "b"), end(10.5, "a")]
    assert violations(events, bound_s=0.5) == []
    assert len(violations(events, bound_s=0.49)) == 1


def test_three_owners_are_three_violations() -> None:
    assert len(violations([begin(0, "a"), begin(0, "b"), begin(0, "c")], bound_s=0)) == 3


@pytest.mark.parametrize(
    "events",
    [
        [end(0, "a")],
        [begin(0, "a"), begin(1, "a")],
        [begin(0, "a"), end(1, "a"), end(2, "a")],
        [begin(0, "a"), end(1, "a", INSIDE)],
        [begin(1, "a"), end(0, "a")],
    ],
)
def test_record_that_contradicts_itself_is_refused(events: list[Event]) -> None:
    with pytest.raises(ValueError, match="Event"):
        violations(events, bound_s=0)


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 20), st.integers(1, 6), st.integers(0, 2)),
        max_size=12,
    )
)
def test_checker_agrees_with_asking_at_every_moment(spans: list[tuple[str, int, int, int]]) -> None:
    """A slow reference: at each half second, who believes what?"""
    owned: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for host, from_s, for_s, number in spans:
        mine = owned.setdefault((host, number), [])
        if all(from_s + for_s < other or other + length < from_s for other, length in mine):
            mine.append((from_s, for_s))
    subnets = [Prefix.parse(f"10.5.{number}.0/24") for number in range(3)]
    events = []
    for (host, number), mine in owned.items():
        for from_s, for_s in mine:
            events += [begin(from_s, host, subnets[number]), end(from_s + for_s, host, subnets[number])]
    events.sort(key=lambda event: (event.at_s, event.begins))
    moments = [half / 2 + 0.25 for half in range(60)]
    slow = any(
        one.host != other.host
        and one.subnet == other.subnet
        and one.from_s < now < one.to_s
        and other.from_s < now < other.to_s
        for one in beliefs(events)
        for other in beliefs(events)
        for now in moments
    )
    assert bool(violations(events, bound_s=0)) == slow


def test_history_records_in_order() -> None:
    history = History()
    history.begin(1, "a", SUBNET)
    history.end(2, "a", SUBNET)
    (belief,) = beliefs(history.events)
    assert (belief.host, belief.from_s, belief.to_s) == ("a", 1, 2)
