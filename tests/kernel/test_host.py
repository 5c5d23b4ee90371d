# SPDX-License-Identifier: Apache-2.0
"""What the host has, and where it would send packets."""

import pytest

from loden.address import Family, format_address, parse_address
from loden.interface import Hop, HostFacts
from loden.tables.host import find_hops, read_host
from tests.kernel.kernel import Kernel, ip, run


def hop(kernel: Kernel, address: str) -> Hop | None:
    packed = parse_address(address)
    return find_hops(kernel.requests, [packed])[packed]


def facts(kernel: Kernel) -> HostFacts:
    return run(read_host(kernel.requests))


@pytest.mark.parametrize(
    ("peer", "router", "far", "source"),
    [
        ("192.0.2.9", "192.0.2.254", "198.51.100.7", "192.0.2.1"),
        ("2001:db8::9", "2001:db8::fe", "2001:db8:1::7", "2001:db8::1"),
    ],
    ids=["IPv4", "IPv6"],
)
def test_hops_on_link_behind_a_router_and_nowhere(
    kernel: Kernel, peer: str, router: str, far: str, source: str
) -> None:
    near = hop(kernel, peer)
    assert near is not None
    assert (near.device, near.via) == ("eth0", None)
    assert hop(kernel, far) is None
    ip(f"route add {far} via {router} dev eth0")
    behind = hop(kernel, far)
    assert behind is not None
    assert (behind.device, behind.via) == ("eth0", parse_address(router))
    assert behind.source is None or format_address(behind.source) == source
    assert hop(kernel, source) is None  # our own


def test_refused_destinations_have_no_hop(kernel: Kernel) -> None:
    ip("route add unreachable 198.51.100.0/24")
    ip("route add blackhole 203.0.113.0/24")
    assert hop(kernel, "198.51.100.7") is None
    assert hop(kernel, "203.0.113.7") is None


def test_policy_rules_count(kernel: Kernel) -> None:
    ip("route add 198.51.100.0/24 via 192.0.2.254 dev eth0 table 100")
    ip("rule add to 198.51.100.0/24 lookup 100")
    found = hop(kernel, "198.51.100.7")
    assert found is not None
    assert found.via == parse_address("192.0.2.254")


def test_a_route_over_a_router_of_the_other_family(kernel: Kernel) -> None:
    ip("route add 198.51.100.0/24 via inet6 2001:db8::fe dev eth0")
    found = hop(kernel, "198.51.100.7")
    assert found is not None
    assert found.via == parse_address("2001:db8::fe")


def test_a_thousand_lookups_are_answered_in_order(kernel: Kernel) -> None:
    ip("route add 198.51.100.0/24 via 192.0.2.254 dev eth0")
    addresses = [bytes((192, 0, 2, 9)), bytes((198, 51, 100, 7)), bytes((203, 0, 113, 1))] * 400
    unique = [bytes((192, 0, 2, n)) for n in range(2, 250)] + [bytes((203, 0, 113, n)) for n in range(250)]
    found = find_hops(kernel.requests, addresses + unique)
    assert found[bytes((192, 0, 2, 9))] is not None
    behind = found[bytes((198, 51, 100, 7))]
    assert behind is not None
    assert behind.via is not None
    assert [found[address] is None for address in unique] == [False] * 248 + [True] * 250


def test_links_addresses_and_default_routes(kernel: Kernel) -> None:
    ip("route add default via 192.0.2.254 dev eth0 metric 50")
    ip("route add default via 192.0.2.253 dev eth0 metric 10")
    ip("-6 route add default via 2001:db8::fe dev eth0")
    found = facts(kernel)
    eth0 = next(link for link in found.links if link.name == "eth0")
    assert (eth0.kind, eth0.mtu, eth0.is_up, eth0.is_loopback, len(eth0.mac)) == (
        "veth",
        1500,
        True,
        False,
        6,
    )
    assert next(link for link in found.links if link.name == "lo").is_loopback
    assert parse_address("192.0.2.1") in [address.address for address in found.addresses]
    assert [(route.family, route.index, route.metric) for route in found.default_routes] == [
        (Family.IPV4, eth0.index, 10),
        (Family.IPV4, eth0.index, 50),
        (Family.IPV6, eth0.index, 1024),
    ]


def test_multipath_default_route_gives_each_of_its_ways(kernel: Kernel) -> None:
    ip("link add eth1 type veth peer name wire1")
    ip("link set eth1 up")
    ip("address add 198.51.100.1/24 dev eth1")
    ip("route add default nexthop via 192.0.2.254 dev eth0 nexthop via 198.51.100.254 dev eth1")
    found = facts(kernel)
    names = {link.index: link.name for link in found.links}
    assert [names[route.index] for route in found.default_routes] == ["eth0", "eth1"]
