# SPDX-License-Identifier: Apache-2.0
import pytest

from loden.address import Family, parse_address
from loden.errors import ConfigError
from loden.interface import HostAddress, HostFacts, Link, Underlay
from loden.network import parse_network
from loden.plan import require_apart

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
