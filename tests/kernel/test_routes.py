# SPDX-License-Identifier: Apache-2.0
"""Routes and the nexthop objects behind them, as ``ip`` shows them (COMPAT §7.2, §7.3)."""

import errno
import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from loden.address import Prefix, format_address
from loden.tables import netlink
from loden.tables.entries import Route
from loden.tables.netlink import Monitor
from loden.tables.nexthops import FIRST
from loden.tables.routes import RouteTable
from tests.kernel.kernel import BOTH, Kernel, Names, ip, leave_route, run

IPV4 = BOTH[0]


@pytest.fixture
def standing(either: Kernel, names: Names) -> Kernel:
    """The own device stands and the routes have been read once, as after an agent's start."""
    assert run(either.devices.put([names.link()])) == {}
    assert run(either.routes.read({})) == {}
    return either


def shown(names: Names, dst: Prefix) -> list[dict[str, Any]]:
    found = json.loads(ip(f"-json -details {names.flag} route show to exact {dst}"))
    assert isinstance(found, list)
    return found


def nexthops() -> dict[int, dict[str, Any]]:
    return {one["id"]: one for one in json.loads(ip("-json -details nexthop show"))}


def put(kernel: Kernel, *entries: Route) -> dict[Any, Any]:
    return run(kernel.routes.put(entries))


def test_kernel_has_nexthop_objects_and_they_are_used(kernel: Kernel) -> None:
    assert not kernel.routes.uses_nexthop_objects
    run(kernel.routes.read({}))
    assert kernel.routes.uses_nexthop_objects


def test_route_to_a_peer_is_what_flannel_writes(standing: Kernel, names: Names) -> None:
    route = names.peer(9)[2]
    assert put(standing, route) == {}
    (found,) = shown(names, route.dst)
    assert (found["gateway"], found["dev"], found["protocol"]) == (
        format_address(route.dst.address), names.device, "76",
    )  # fmt: skip
    assert (found["type"], found["scope"]) == ("unicast", "global")
    assert "onlink" in found["flags"]
    assert ("nhid" in found) == standing.routes.uses_nexthop_objects


def test_direct_route_is_what_flannel_writes(standing: Kernel, names: Names) -> None:
    route = names.direct(9)
    assert put(standing, route) == {}
    (found,) = shown(names, route.dst)
    assert (found["gateway"], found["dev"]) == (format_address(names.remote(9)), "eth0")
    assert "onlink" not in found["flags"]


def test_route_without_router_is_put_and_dropped(standing: Kernel, names: Names) -> None:
    route = Route(names.subnet(9), "eth0")
    assert put(standing, route) == {}
    (found,) = shown(names, route.dst)
    assert "gateway" not in found
    assert run(standing.routes.read({})) == {route.dst: route}
    assert run(standing.routes.drop([route])) == {}
    assert shown(names, route.dst) == []


def test_the_kernel_sends_packets_that_way(standing: Kernel, names: Names) -> None:
    put(standing, names.peer(9)[2])
    inside = format_address(names.subnet(9).gateway)
    assert f"dev {names.device}" in ip(f"{names.flag} route get {inside}")


def test_each_route_has_a_nexthop_of_its_own_and_it_goes_with_the_route(kernel: Kernel, names: Names) -> None:
    run(kernel.devices.put([names.link()]))
    run(kernel.routes.read({}))
    routes = [names.peer(number)[2] for number in (2, 3, 4)]
    put(kernel, *routes)
    assert sorted(nexthops()) == [FIRST, FIRST + 1, FIRST + 2]
    assert all(one["protocol"] == "76" and "onlink" in one["flags"] for one in nexthops().values())
    run(kernel.routes.drop(routes[:2]))
    assert sorted(nexthops()) == [FIRST + 2]


def test_changed_route_is_never_away(standing: Kernel, witness: Monitor, names: Names) -> None:
    """From over the device to direct, to another router and back: replaced, nothing is deleted first.

    Not back for IPv6: the kernel takes no on-link router that it can reach another way.
    """
    put(standing, names.peer(9)[2])
    while witness.receive():
        pass
    back = [names.peer(9)[2]] if names is IPV4 else []
    for route in (names.direct(9), names.direct(10), *back):
        assert put(standing, msgspec.structs.replace(route, dst=names.subnet(9))) == {}
    heard = witness.receive() or []
    assert heard
    assert not {netlink.RTM_DELROUTE, netlink.RTM_DELNEXTHOP} & {message.kind for message in heard}


def test_route_changes_between_router_and_none(standing: Kernel, names: Names) -> None:
    for route in (names.direct(9), Route(names.subnet(9), "eth0"), names.peer(9)[2]):
        assert put(standing, route) == {}
        assert run(standing.routes.read({})) == {route.dst: route}
        assert len(shown(names, route.dst)) == 1


def test_next_start_adopts_what_stands_and_touches_nothing(standing: Kernel, names: Names) -> None:
    routes: dict[Hashable, Route] = {names.subnet(number): names.peer(number)[2] for number in range(2, 52)}
    put(standing, *routes.values())
    before = (ip(f"-details {names.flag} route"), nexthops())
    again = RouteTable(standing.requests, standing.devices, nexthop_objects=None if nexthops() else False)
    found = run(again.read(routes))
    assert found == routes
    assert all(found[dst] is routes[dst] for dst in routes)
    assert run(again.drop([])) == {}
    assert (ip(f"-details {names.flag} route"), nexthops()) == before


@pytest.mark.parametrize(("first", "then"), [(False, None), (None, False)], ids=["upgrade", "downgrade"])
def test_routes_of_the_other_form_are_adopted(
    underlay: None, request: pytest.FixtureRequest, names: Names, first: bool | None, then: bool | None
) -> None:
    """An agent that was started on another kernel, or is of another version."""
    del underlay
    kernel = Kernel(nexthop_objects=first)
    request.addfinalizer(kernel.close)
    run(kernel.devices.put([names.link()]))
    run(kernel.routes.read({}))
    route = names.peer(9)[2]
    put(kernel, route)
    again = RouteTable(kernel.requests, kernel.devices, nexthop_objects=then)
    assert run(again.read({route.dst: route})) == {route.dst: route}
    changed = names.direct(9)
    assert run(again.put([changed])) == {}
    assert run(again.read({})) == {changed.dst: changed}
    assert len(shown(names, route.dst)) == 1


def test_five_thousand_are_listed_as_they_were_put(kernel: Kernel, names: Names) -> None:
    run(kernel.devices.put([names.link()]))
    run(kernel.routes.read({}))
    wanted: dict[Hashable, Route] = {names.subnet(number): names.peer(number)[2] for number in range(2, 5002)}
    assert put(kernel, *wanted.values()) == {}
    assert run(kernel.routes.read(wanted)) == wanted
    assert run(kernel.routes.drop(list(wanted.values()))) == {}
    assert run(kernel.routes.read({})) == {}
    assert nexthops() == {}


def test_one_bad_route_among_a_thousand_fails_alone(standing: Kernel, names: Names) -> None:
    routes = [names.peer(number)[2] for number in range(2, 1002)]
    unreachable = names.link(name="x").local[:-1] + b"\xfe" if names is IPV4 else names.subnet(3).address
    bad = Route(names.subnet(5000), "eth0", bytes((203, 0, 113, 9)) if names is IPV4 else unreachable)
    failures = put(standing, *routes[:500], bad, *routes[500:])
    assert list(failures) == [bad.dst]
    assert str(bad) in str(failures[bad.dst])
    assert "the next hop is not on the network of eth0" in failures[bad.dst].hint
    assert run(standing.routes.read({})) == {route.dst: route for route in routes}


class TestOthers:
    """What is not ours is never touched."""

    def foreign(self, names: Names) -> Route:
        return Route(names.subnet(9), "eth0", names.remote(77))

    def test_routes_of_other_protocols_metrics_and_tables_are_not_ours(
        self, standing: Kernel, names: Names
    ) -> None:
        via = format_address(names.remote(9))
        one, two, three = (names.subnet(number) for number in (2, 3, 4))
        ip(f"{names.flag} route add {one} via {via} dev eth0 proto static")
        ip(f"{names.flag} route add {two} via {via} dev eth0 proto 76 metric 7")
        ip(f"{names.flag} route add {three} via {via} dev eth0 proto 76 table 100")
        ip(f"{names.flag} route add blackhole {names.subnet(5)} proto 76")
        before = ip(f"{names.flag} route show table all")
        assert run(standing.routes.read({})) == {}
        run(standing.routes.drop([names.direct(2)]))
        assert ip(f"{names.flag} route show table all") == before

    def test_foreign_route_to_the_same_destination_is_named(self, standing: Kernel, names: Names) -> None:
        leave_route(self.foreign(names), "proto static")
        before = shown(names, names.subnet(9))
        route = names.peer(9)[2]
        failures = put(standing, route, names.peer(10)[2])
        assert {slot: error.errno for slot, error in failures.items()} == {route.dst: errno.EEXIST}
        said = str(failures[route.dst])
        assert f"via {format_address(names.remote(77))} dev eth0 of protocol 4 is in the way" in said
        assert f"ip route delete {route.dst}" in said
        assert shown(names, names.subnet(9)) == before
        assert run(standing.routes.read({})).keys() == {names.subnet(10)}
        assert run(standing.routes.drop([route])) == {}
        assert shown(names, names.subnet(9)) == before

    def test_foreign_route_with_another_metric_stands_beside_ours(
        self, standing: Kernel, names: Names
    ) -> None:
        via = format_address(names.remote(77))
        ip(f"{names.flag} route add {names.subnet(9)} via {via} dev eth0 proto static metric 5000")
        route = names.direct(9)
        assert put(standing, route) == {}
        assert len(shown(names, route.dst)) == 2
        assert run(standing.routes.drop([route])) == {}
        (left,) = shown(names, route.dst)
        assert left["metric"] == 5000

    def test_nexthops_in_our_range_are_passed_over(self, kernel: Kernel, names: Names) -> None:
        run(kernel.devices.put([names.link()]))
        via = format_address(names.remote(77))
        for number in (FIRST, FIRST + 2):
            ip(f"nexthop add id {number} via {via} dev eth0")
        before = nexthops()
        run(kernel.routes.read({}))
        routes = [names.peer(number)[2] for number in range(2, 6)]
        assert put(kernel, *routes) == {}
        assert {number: nexthops()[number] for number in before} == before
        assert sorted(nexthops().keys() - before.keys()) == [FIRST + 1, FIRST + 3, FIRST + 4, FIRST + 5]
        run(kernel.routes.drop(routes))
        assert nexthops() == before

    def test_nexthop_taken_since_the_listing_is_not_overwritten(self, kernel: Kernel, names: Names) -> None:
        run(kernel.devices.put([names.link()]))
        run(kernel.routes.read({}))
        ip(f"nexthop add id {FIRST} via {format_address(names.remote(77))} dev eth0")
        before = nexthops()
        routes = [names.peer(number)[2] for number in (2, 3)]
        assert put(kernel, *routes) == {}
        assert run(kernel.routes.read({})) == {route.dst: route for route in routes}
        run(kernel.routes.drop(routes))
        assert nexthops() == before

    def test_a_route_that_ours_gave_way_to_is_replaced(self, standing: Kernel, names: Names) -> None:
        """Somebody replaced ours: that is drift, also where nobody heard of it."""
        route = names.direct(9)
        put(standing, route)
        leave_route(self.foreign(names), "proto static")
        assert run(standing.routes.read({route.dst: route})) == {}
        assert put(standing, route) == {}
        (found,) = shown(names, route.dst)
        assert found["gateway"] == format_address(names.remote(9))


class TestFlannels:
    """What an agent of flannel left is taken over (COMPAT §13.13)."""

    def leave(self, names: Names, number: int) -> Route:
        route = names.peer(number)[2]
        leave_route(route)
        return route

    def test_its_routes_on_our_device_become_ours_or_go(self, standing: Kernel, names: Names) -> None:
        wanted, vanished = self.leave(names, 9), self.leave(names, 10)
        assert run(standing.routes.read({wanted.dst: wanted})) == {vanished.dst: vanished}
        assert put(standing, wanted) == {}
        assert run(standing.routes.drop([vanished])) == {}
        (found,) = shown(names, wanted.dst)
        assert found["protocol"] == "76"
        assert run(standing.routes.drop([wanted])) == {}
        assert shown(names, wanted.dst) == []
        assert shown(names, vanished.dst) == []

    def test_its_direct_route_to_the_same_place_becomes_ours(self, standing: Kernel, names: Names) -> None:
        route = names.direct(9)
        ip(f"{names.flag} route add {route.dst} via {format_address(names.remote(9))} dev eth0")
        assert put(standing, route) == {}
        assert run(standing.routes.read({})) == {route.dst: route}
        assert len(shown(names, route.dst)) == 1

    def test_routes_of_a_person_over_our_device_stay(self, standing: Kernel, names: Names) -> None:
        self.leave(names, 9)
        base = format_address(names.subnet(9).address)
        elsewhere = "198.51.100.0/24" if names is IPV4 else "2001:db8:77::/48"
        ip(f"{names.flag} route add {elsewhere} via {base} dev {names.device} onlink")
        assert run(standing.routes.read({})).keys() == {names.subnet(9)}


def test_all_is_well_without_ipv6(kernel: Kernel) -> None:
    """A host whose IPv6 is switched off."""
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1", encoding="ascii")
    run(kernel.stand(*IPV4.own(), *IPV4.peer(9)))
    assert run(kernel.routes.read({})) == {IPV4.subnet(9): IPV4.peer(9)[2]}
