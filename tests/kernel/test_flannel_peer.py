# SPDX-License-Identifier: Apache-2.0
"""Packets between our tables and a node that was set up by hand with what flannel writes (COMPAT §7.3)."""

import socket
from collections.abc import Iterator

import pytest

from loden.address import Family, format_address
from loden.lab.namespaces import inside
from loden.tables.entries import format_mac
from tests.kernel.kernel import BOTH, Kernel, Names, command, ip, run

IPV4 = BOTH[0]
PEER = 9
PORT = 7007


def flannel_commands(names: Names) -> list[str]:
    """What flannel does on host 9 for itself and for us, who are host 1."""
    own, ours = format_address(names.subnet(PEER).address), format_address(names.subnet(1).address)
    local, remote = format_address(names.remote(PEER)), format_address(names.local)
    device, mac, our_mac = names.device, format_mac(names.mac(PEER)), format_mac(names.mac(1))
    return [
        f"ip address add {local}/{24 if names is IPV4 else 64} dev wire nodad",
        f"ip link add {device} address {mac} mtu {names.mtu} txqueuelen 0"
        f" type vxlan id 1 local {local} dev wire dstport 8472 nolearning",
        f"ip link set {device} up",
        f"ip address add {own}/{names.family.bits} dev {device} nodad",
        f"ip neighbour replace {ours} lladdr {our_mac} nud permanent dev {device}",
        f"bridge fdb replace {our_mac} dev {device} dst {remote} self permanent",
        f"ip {names.flag} route replace {names.subnet(1)} via {ours} dev {device} onlink",
    ]


@pytest.fixture
def peer(kernel: Kernel, names: Names) -> Iterator[str]:
    """The namespace of the flannel node, at the other end of the wire."""
    del kernel
    ip("netns add flannel-node")
    ip("link set wire netns flannel-node")
    inside_peer = "ip netns exec flannel-node "
    command(f"{inside_peer}ip link set wire up")
    for line in flannel_commands(names):
        command(inside_peer + line.replace(" nodad", "" if names is IPV4 else " nodad"))
    yield "flannel-node"
    ip("netns delete flannel-node")


def udp_socket(family: Family, address: bytes) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_DGRAM)
    opened.settimeout(20)
    opened.bind((format_address(address), PORT))
    return opened


def test_packets_reach_the_flannel_node_and_come_back(kernel: Kernel, peer: str, names: Names) -> None:
    run(kernel.stand(*names.own(), *names.peer(PEER)))
    here, there = names.subnet(1).address, names.subnet(PEER).address
    with (
        udp_socket(names.family, here) as ours,
        inside(peer, lambda: udp_socket(names.family, there)) as theirs,
    ):
        largest = names.mtu - (28 if names is IPV4 else 48)
        for size in (1, largest):
            ours.sendto(bytes(size), (format_address(there), PORT))
            data, sender = theirs.recvfrom(65536)
            assert (len(data), sender[0]) == (size, format_address(here))
            theirs.sendto(data, sender)
            assert len(ours.recv(65536)) == size
