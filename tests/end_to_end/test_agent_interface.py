# SPDX-License-Identifier: Apache-2.0
"""The interface changes under a running agent: address, MTU, the interface itself (users' pain 2 and 3)."""

import socket

import pytest

from loden.address import format_address
from loden.lab import namespaces
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import Host, Hosts, wait_until

VXLAN = '{"Network": "10.5.0.0/16"}'
HOST_GW = '{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}'


def connect(one: Host, other: Host) -> tuple[socket.socket, socket.socket]:
    """A TCP connection between the containers of two hosts."""
    source, target = one.container(), other.container()
    address = format_address(target.address)
    listener = namespaces.inside(target.namespace, lambda: socket.create_server((address, 4000)))
    with listener:
        near = namespaces.inside(
            source.namespace, lambda: socket.create_connection((address, 4000), timeout=10)
        )
        far, _ = listener.accept()
    far.settimeout(10)
    return near, far


def require_alive(near: socket.socket, far: socket.socket) -> None:
    near.sendall(b"request")
    assert far.recv(7) == b"request"
    far.sendall(b"answer")
    assert near.recv(6) == b"answer"


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
    near, far = connect(one, other)
    with near, far:
        require_alive(near, far)
        readdress(other, "198.18.0.77")
        agents[1].wait_line("interface changed", other.address, "198.18.0.77")
        wait_until("the peers", lambda: "198.18.0.77" in remotes(hosts, network, one))
        require_alive(near, far)
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


def test_cluster_network_that_the_host_is_in_is_refused(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network('{"Network": "198.18.0.0/16"}')
    agent = host.start()
    agent.wait_line("198.18.0.0/16 overlaps 198.18.0.0/24, the network of eth0")
    assert not host.subnet_file.exists()
    assert "flannel" not in host.ip("link show")
    hosts.put_network(VXLAN)
    agent.wait_ready()
