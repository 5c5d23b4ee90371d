# SPDX-License-Identifier: Apache-2.0
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Prefix
from loden.network import parse_network
from loden.tables.cloud import Listed, Listing, Owner
from loden.tables.cloud_plan import (
    Add,
    Census,
    Identify,
    Refuse,
    Remove,
    Replace,
    Step,
    Wait,
    is_due,
    is_subnet,
    steps_to_stand,
    strays,
    turn,
    without_lease,
)

RANGES = parse_network(b'{"Network": "10.5.0.0/16"}').ranges
DST = Prefix.parse("10.5.1.0/24")
GRACE_S = 600.0


def route(
    owner: Owner,
    dst: Prefix = DST,
    *,
    table: str = "t",
    handle: str = "",
    usable: bool = True,
    settled: bool = True,
) -> Listed:
    return Listed(table, dst, "target", owner, handle=handle, is_usable=usable, is_settled=settled)


def listing(*routes: Listed, tables: tuple[str, ...] = ("t",)) -> Listing:
    return Listing(tables, routes, {table: len(routes) for table in tables})


def census(*keys: str, me: str = "a", live: frozenset[Prefix] = frozenset()) -> Census:
    return Census(live=live, holders=frozenset(keys), me=me)


SELF, FABRIC = route(Owner.SELF), route(Owner.FABRIC)
OLD = route(Owner.FABRIC, handle="old")


class TestSteps:
    @pytest.mark.parametrize(
        ("found", "steps"),
        [
            ((), [Add("t", DST)]),
            ((SELF,), []),
            ((route(Owner.SELF, usable=False),), [Replace(route(Owner.SELF, usable=False))]),
            ((route(Owner.SELF, settled=False),), [Wait(route(Owner.SELF, settled=False))]),
            ((FABRIC,), [Replace(FABRIC)]),
            ((route(Owner.FOREIGN),), [Refuse(route(Owner.FOREIGN))]),
            ((SELF, route(Owner.FOREIGN)), [Refuse(route(Owner.FOREIGN))]),
            ((route(Owner.UNKNOWN),), [Identify(route(Owner.UNKNOWN))]),
            ((SELF, OLD), [Remove(OLD)]),
            ((FABRIC, OLD), [Remove(OLD), Replace(FABRIC)]),
            ((route(Owner.FOREIGN, Prefix.parse("10.5.0.0/16")),), [Add("t", DST)]),
        ],
    )
    def test_follow_from_what_is_listed(self, found: tuple[Listed, ...], steps: list[Step]) -> None:
        assert steps_to_stand(DST, listing(*found)) == steps

    def test_each_table_has_its_own(self) -> None:
        found = listing(route(Owner.SELF, table="t2"), tables=("t1", "t2", "t3"))
        assert steps_to_stand(DST, found) == [Add("t1", DST), Add("t3", DST)]

    def test_are_printed_as_one_line_each(self) -> None:
        assert str(Add("t", DST)) == "add 10.5.1.0/24 via this host in t"
        assert str(Remove(OLD)) == "remove 10.5.1.0/24 via target in t"
        assert str(Replace(FABRIC)).startswith("replace 10.5.1.0/24 via target in t")


class TestStrays:
    @pytest.mark.parametrize(
        "text",
        ["10.5.0.0/16", "10.5.1.0/25", "10.6.1.0/24", "0.0.0.0/0", "10.5.0.0/24", "fd00::/64"],
    )
    def test_other_shapes_are_nobody_of_ours(self, text: str) -> None:
        """COMPAT §8.3: flannel removes a user's own routes to the instance."""
        dst = Prefix.parse(text)
        assert not is_subnet(dst, RANGES)
        assert strays(listing(route(Owner.SELF, dst), route(Owner.FABRIC, dst)), RANGES, ()) == []

    def test_are_what_is_neither_wanted_nor_foreign(self) -> None:
        others = [Prefix.parse(f"10.5.{number}.0/24") for number in (2, 3, 4)]
        found = listing(
            SELF,
            route(Owner.FABRIC, others[0]),
            route(Owner.UNKNOWN, others[1]),
            route(Owner.FOREIGN, others[2]),
        )
        assert [one.dst for one in strays(found, RANGES, [DST])] == others[:2]

    def test_have_no_lease_unless_one_overlaps(self) -> None:
        wide = Prefix.parse("10.5.0.0/20")
        assert without_lease([FABRIC], census(live=frozenset([wide]))) == []
        assert without_lease([FABRIC], census(live=frozenset([Prefix.parse("10.5.2.0/24")]))) == [FABRIC]


class TestTurns:
    @given(st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=20), st.integers(1, 250))
    def test_every_holder_has_another_one(self, keys: set[str], number: int) -> None:
        dst = Prefix.parse(f"10.5.{number}.0/24")
        turns = [turn(census(*keys, me=key), dst) for key in keys]
        assert sorted(turns, key=str) == sorted(range(len(keys)), key=str)

    def test_are_spread_over_the_holders(self) -> None:
        keys = [f"10.5.{number}.0-24" for number in range(1, 11)]
        subnets = [Prefix.parse(f"10.5.{number}.0/24") for number in range(20, 220)]
        first = Counter(key for dst in subnets for key in keys if turn(census(*keys, me=key), dst) == 0)
        assert sum(first.values()) == 200
        assert len(first) == 10

    def test_who_holds_no_lease_never_has_one(self) -> None:
        assert turn(census("b", "c", me="a"), DST) is None
        assert turn(census("b", "c", me=""), DST) is None
        assert not is_due(census(me=""), DST, absent_s=1e9, grace_s=GRACE_S)

    def test_come_one_grace_period_after_the_other(self) -> None:
        keys = ("a", "b", "c")
        views = {turn(census(*keys, me=key), DST): census(*keys, me=key) for key in keys}
        for place in range(3):
            view = views[place]
            assert not is_due(view, DST, absent_s=GRACE_S * (place + 1) - 1, grace_s=GRACE_S)
            assert is_due(view, DST, absent_s=GRACE_S * (place + 1), grace_s=GRACE_S)
