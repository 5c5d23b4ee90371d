# SPDX-License-Identifier: Apache-2.0
import pytest

from loden.address import Family, Prefix, parse_address
from loden.errors import ConfigError, PeerUnreachable
from loden.interface import HostAddress, HostFacts, Link, Underlay
from loden.lease import Leg
from loden.network import parse_network
from loden.plan import host_networks, require_apart, require_harmless

ETH0 = Underlay(
    name="eth0",
    index=2,
    mtu=1500,
    addresses={Family.IPV4: parse_address("192.0.2.7")},
    public={Family.IPV4: parse_address("192.0.2.7")},
)


def host(link: Link, address: str, length: int) -> HostFacts:
    """A host with its underlay, and one more interface."""
    return HostFacts(
        links=(Link(2, "eth0"), link),
        addresses=(
            HostAddress(2, parse_address("192.0.2.7"), 24),
            HostAddress(link.index, parse_address(address), length),
        ),
    )


@pytest.mark.parametrize("kind", ["", "bond", "vlan"])
def test_network_that_another_interface_is_in_is_refused(kind: str) -> None:
    network = parse_network(b'{"Network": "10.5.0.0/16"}')
    with pytest.raises(ConfigError, match=r"10\.5\.0\.0/16 overlaps 10\.0\.0\.0/8, the network of eth1"):
        require_apart(network, ETH0, host(Link(3, "eth1", kind=kind), "10.0.0.5", 8))


def test_containers_own_bridge_is_in_the_network_by_right() -> None:
    network = parse_network(b'{"Network": "10.5.0.0/16"}')
    require_apart(network, ETH0, host(Link(3, "cni0", kind="bridge"), "10.5.9.1", 24))
    require_apart(network, ETH0, host(Link(3, "eth1"), "198.51.100.1", 24))


@pytest.mark.parametrize(
    ("subnet", "reason"),
    [
        ("128.0.0.0/1", "wider than the whole network"),
        ("192.0.0.0/15", "wider than the whole network"),
        ("192.0.0.0/16", r"overlaps 192\.0\.2\.0/24, the network of eth0"),
        ("192.0.2.128/25", r"overlaps 192\.0\.2\.0/24, the network of eth0"),
        ("198.51.100.0/31", r"overlaps 198\.51\.100\.0/24, the network of eth1"),
        ("203.0.113.0/24", r"the peer's own address 203\.0\.113\.9 is in it"),
        ("127.5.0.0/16", "no host has such addresses"),
        ("255.255.255.0/24", "no host has such addresses"),
    ],
)
def test_peer_whose_route_would_take_away_what_is_not_the_containers_is_refused(
    subnet: str, reason: str
) -> None:
    network = parse_network(b'{"Network": "10.5.0.0/16"}')
    near = tuple(host_networks(ETH0, host(Link(3, "eth1"), "198.51.100.1", 24)))
    with pytest.raises(PeerUnreachable, match=reason):
        require_harmless(Leg(Prefix.parse(subnet), parse_address("203.0.113.9")), network, near)


@pytest.mark.parametrize("subnet", ["10.5.9.0/24", "10.6.0.0/24", "192.0.3.0/24"])
def test_peer_of_another_configuration_is_served(subnet: str) -> None:
    network = parse_network(b'{"Network": "10.5.0.0/16"}')
    near = tuple(host_networks(ETH0, host(Link(3, "cni0", kind="bridge"), "10.5.9.1", 24)))
    require_harmless(Leg(Prefix.parse(subnet), parse_address("203.0.113.9")), network, near)
