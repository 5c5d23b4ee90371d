# SPDX-License-Identifier: Apache-2.0
"""The interface changes under a running agent: address, MTU, the interface itself (users' pain 2 and 3)."""

import pytest

from loden.address import format_address
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import Host, Hosts, wait_until
from tests.end_to_end.talk import Talk, connection
from tests.end_to_end.test_agent_edges import run

VXLAN = '{"Network": "10.5.0.0/16"}'
HOST_GW = '{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}'


def readdress(host: Host, text: str) -> None:
    host.ip(f"address delete {host.address}/24 dev eth0")
    host.ip(f"address add {text}/24 dev eth0")


def remotes(hosts: Hosts, backend: str, host: Host) -> list[str]:
    """The underlay addresses that a host sends to, for its peers."""
    lines = host.fdb() if backend == VXLAN else host.routes()
    return [line.split()[2] for line in lines]


def wait_mtu(host: Host, mtu: int) -> None:
    line = f"FLANNEL_MTU={mtu}\n"
    wait_until(line, lambda: line in host.subnet_file.read_text())


@pytest.mark.parametrize("network", [VXLAN, HOST_GW], ids=["vxlan", "host-gw"])
def test_address_that_changes_is_followed_and_connections_survive(
    make_hosts: MakeHosts, network: str
) -> None:
    hosts = make_hosts(count=3)
    agents = hosts.up(network)
    one, other = hosts[0], hosts[1]
    subnet = other.subnet
    seen = format_address(one.container().address)
    with connection(one.container(), other.container(), seen) as ends, Talk("a connection", *ends) as talk:
        talk.require_alive("its start")
        readdress(other, "198.18.0.77")
        agents[1].wait_line("interface changed", other.address, "198.18.0.77")
        wait_until("the peers", lambda: "198.18.0.77" in remotes(hosts, network, one))
        talk.require_alive("the change")
    assert other.subnet == subnet
    assert other.address not in remotes(hosts, network, one)
    assert format_address(next(hosts.leases()[subnet].lease.legs).public or b"") == "198.18.0.77"
    hosts.require_all_reached()
    assert len(agents[1].lines("interface changed")) == 1


def test_mtu_is_followed_by_device_and_subnet_file(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    agents = hosts.up(VXLAN)
    one = hosts[0]
    for mtu in (1400, 9000):
        one.ip(f"link set eth0 mtu {mtu}")
        wait_mtu(one, mtu - 50)
        assert f"mtu {mtu - 50} " in one.ip("link show flannel.1")
    assert len(agents[0].lines("interface changed", "MTU")) == 2
    hosts.require_all_reached()


def test_interface_without_address_for_a_while_keeps_what_stands(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    agents = hosts.up(VXLAN)
    one = hosts[0]
    before = one.state()
    one.ip(f"address delete {one.address}/24 dev eth0")
    agents[0].wait_line("following the host fails", "no usable IPv4 address", "--iface")
    assert one.state() == before
    one.ip(f"address add {one.address}/24 dev eth0")
    agents[0].wait_line("following the host works again")
    assert one.state() == before
    assert not agents[0].lines("interface changed")
    hosts.require_all_reached()


@pytest.mark.parametrize(
    ("network", "ranges"),
    [
        ('{"Network": "198.18.0.0/16"}', "198.18.0.0/16 overlaps 198.18.0.0/24"),
        (
            '{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "2001:db8::/48"}',
            "2001:db8::/48 overlaps 2001:db8::/64",
        ),
    ],
    ids=["IPv4", "IPv6"],
)
def test_cluster_network_that_the_host_is_in_is_refused(
    make_hosts: MakeHosts, network: str, ranges: str
) -> None:
    (host,) = hosts = make_hosts(count=1)
    host.ip("address add 2001:db8::5/64 dev eth0 nodad")
    hosts.put_network(network)
    agent = host.start("--iface", "eth0", "--ip-masq")
    agent.wait_line(f"{ranges}, the network of eth0", "give the containers a range that no host is in")
    assert not host.subnet_file.exists()
    assert hosts.leases() == {}
    assert "flannel" not in host.ip("link show")
    assert run(host, "nft", "list", "ruleset") == ""
    hosts.put_network(VXLAN)
    agent.wait_ready()


def test_default_route_over_several_ways_chooses_an_interface_and_says_why(make_hosts: MakeHosts) -> None:
    """W47: flannel refuses an ECMP route. A bridge is there that has an address, and is not taken."""
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    host.ip("link add docker0 type bridge")
    host.ip("address add 172.17.0.1/16 dev docker0")
    host.ip("link set docker0 up")
    host.ip("route add default nexthop via 198.18.0.253 dev eth0 nexthop via 198.18.0.254 dev eth0")
    agent = host.start("--ip-masq=false").wait_ready()
    agent.wait_line("interface eth0: it has the default route")
    assert f"local {host.address} dev eth0" in host.ip("-d link show flannel.1")


def test_interface_without_an_address_of_a_family_is_waited_for(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network('{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}')
    host.ip("link set eth0 addrgenmode none")
    host.ip("-6 address flush dev eth0")
    agent = host.start()
    agent.wait_line("choose an interface: eth0: it has no usable IPv6 address", f"eth0 ({host.address}")
    assert not host.subnet_file.exists()
    host.ip("address add 2001:db8::5/64 dev eth0 nodad")
    agent.wait_ready()
    assert "FLANNEL_IPV6_SUBNET=" in host.subnet_file.read_text()
