# SPDX-License-Identifier: Apache-2.0
"""Real packets through each firewall: the address that the receiver sees, for every pair of the table.

::

    own   10.5.1.2 ──┐                       ┌── peer     192.0.2.2, container 10.5.2.2
    own2  10.5.1.3 ──┴── host ──192.0.2.1────┘
                          └─────198.51.100.1──── outside  198.51.100.2
"""

import asyncio
import itertools
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from loden.address import Family, Prefix, format_address, parse_address
from loden.firewall.iptables import Iptables
from loden.firewall.nftables import Nftables
from loden.firewall.programs import Kind, Tool, find_programs
from loden.firewall.rules import FirewallOptions, RuleSet, make_rules
from loden.lab.namespaces import inside
from tests.contract.firewall import KEPT, MASQUERADED, Packet, Setup, network_of, reference

CLUSTER = {Family.IPV4: Prefix.parse("10.5.0.0/16"), Family.IPV6: Prefix.parse("fd00:5::/48")}
OWN = {Family.IPV4: Prefix.parse("10.5.1.0/24"), Family.IPV6: Prefix.parse("fd00:5:0:1::/64")}
OUTSIDE = (Prefix.parse("198.51.100.0/24"), Prefix.parse("2001:db8:9::/64"))
NETWORK = network_of(*CLUSTER.values())

MODES = {
    "on": FirewallOptions(masquerade=True),
    "plain ports": FirewallOptions(masquerade=True, is_fully_random=False),
    "off": FirewallOptions(),
    "excluded": FirewallOptions(masquerade=True, exclude=OUTSIDE),
}

#: For each namespace beside the host, which has a device of that name to it, its own commands.
WIRES = {
    "own": """
        address add 10.5.1.2/32 dev eth0
        address add fd00:5:0:1::2/128 dev eth0 nodad
        """,
    "own2": """
        address add 10.5.1.3/32 dev eth0
        address add fd00:5:0:1::3/128 dev eth0 nodad
        """,
    "peer": """
        address add 192.0.2.2/24 dev eth0
        address add 10.5.2.2/32 dev eth0
        address add 2001:db8:2::2/64 dev eth0 nodad
        address add fd00:5:0:2::2/128 dev eth0 nodad
        """,
    "outside": """
        address add 198.51.100.2/24 dev eth0
        address add 2001:db8:9::2/64 dev eth0 nodad
        """,
}
HOST = """
    address add 10.5.1.1/32 dev own
    address add fd00:5:0:1::1/128 dev own nodad
    address add 10.5.1.1/32 dev own2
    address add fd00:5:0:1::1/128 dev own2 nodad
    address add 192.0.2.1/24 dev peer
    address add 2001:db8:2::1/64 dev peer nodad
    address add 198.51.100.1/24 dev outside
    address add 2001:db8:9::1/64 dev outside nodad
    route add 10.5.1.2/32 dev own
    route add fd00:5:0:1::2/128 dev own
    route add 10.5.1.3/32 dev own2
    route add fd00:5:0:1::3/128 dev own2
    route add 10.5.2.0/24 via 192.0.2.2
    route add fd00:5:0:2::/64 via 2001:db8:2::2
    """
GATEWAYS = {
    "own": ("10.5.1.1", "fd00:5:0:1::1"),
    "own2": ("10.5.1.1", "fd00:5:0:1::1"),
    "peer": ("192.0.2.1", "2001:db8:2::1"),
    "outside": ("198.51.100.1", "2001:db8:9::1"),
}

#: Where packets come from: the namespace, and the address by family.
SOURCES = {
    "own container": ("own", "10.5.1.2", "fd00:5:0:1::2"),
    "peer container": ("peer", "10.5.2.2", "fd00:5:0:2::2"),
    "own host": ("host", "198.51.100.1", "2001:db8:9::1"),
    "peer host": ("peer", "192.0.2.2", "2001:db8:2::2"),
    "outside": ("outside", "198.51.100.2", "2001:db8:9::2"),
}
#: Where they go, and the host's own addresses on the way there.
DESTINATIONS = {
    "own container": ("own2", ("10.5.1.3", "fd00:5:0:1::3"), ("10.5.1.1", "fd00:5:0:1::1")),
    "peer container": ("peer", ("10.5.2.2", "fd00:5:0:2::2"), ("192.0.2.1", "2001:db8:2::1")),
    "outside": ("outside", ("198.51.100.2", "2001:db8:9::2"), ("198.51.100.1", "2001:db8:9::1")),
}
#: Who sends to a group on which device, with which addresses, and who listens; the host sends with its
#: address in the cluster too.
MULTICASTS = (
    ("own", "eth0", "10.5.1.2", "fd00:5:0:1::2", "host"),
    ("peer", "eth0", "10.5.2.2", "fd00:5:0:2::2", "host"),
    ("outside", "eth0", "198.51.100.2", "2001:db8:9::2", "host"),
    ("host", "outside", "198.51.100.1", "2001:db8:9::1", "outside"),
    ("host", "outside", "10.5.1.1", "fd00:5:0:1::1", "outside"),
)
GROUPS = {Family.IPV4: "239.1.2.3", Family.IPV6: "ff05::1:3"}

PORT, MARKED_PORT, GROUP_PORT = 9000, 9001, 9002
#: Another bit beside kube-proxy's: the mask counts (W18).
MARK = 0xC000
_source_ports = itertools.count(
    20000
)  # a new flow for every packet: connections are masqueraded, not packets


class Case(NamedTuple):
    """One packet, and whether the table masquerades it to which address."""

    sender: str
    receiver: str
    port: int
    packet: Packet
    masqueraded: str


def cases() -> Iterator[Case]:
    for family, sent, gone in itertools.product(Family, SOURCES.values(), DESTINATIONS.values()):
        column = 0 if family is Family.IPV4 else 1
        if sent[0] == gone[0]:
            continue  # stays on one machine that is not ours
        addresses = parse_address(sent[1 + column]), parse_address(gone[1][column])
        for port, mark in ((PORT, 0), (MARKED_PORT, MARK)):
            yield Case(sent[0], gone[0], port, Packet(*addresses, mark), gone[2][column])


def ip(namespace: str, text: str) -> None:
    subprocess.run(["ip", "-n", namespace, "-batch", "-"], input=text, text=True, check=True)


@pytest.fixture(scope="module")
def sockets() -> Iterator[dict[tuple[str, Family, int], socket.socket]]:
    """The namespaces, wired, with a socket for every receiver."""
    names = ("host", *WIRES)
    with ExitStack() as stack:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
            inside(name, set_switches)
        for name, commands in WIRES.items():
            ip("host", f"link add {name} type veth peer name eth0 netns {name}\nlink set {name} up")
            ip(name, f"link set lo up\nlink set eth0 up\n{commands}")
        ip("host", HOST)
        for name, gateways in GATEWAYS.items():
            ip(name, "".join(f"route add default via {gateway} dev eth0 onlink\n" for gateway in gateways))
        mark = f"meta mark set {MARK:#x}"
        hooks = "".join(
            f"chain {hook} {{ type {kind} hook {hook} priority mangle; udp dport {MARKED_PORT} {mark}; }}\n"
            for hook, kind in (("prerouting", "filter"), ("output", "route"))
        )
        nft("host", f"table inet service {{\n{hooks}}}")
        yield {
            (name, family, port): stack.enter_context(inside(name, partial(listen, family, port)))
            for name in names
            for family in Family
            for port in (PORT, MARKED_PORT, GROUP_PORT)
        }


def set_switches() -> None:
    for name, value in (
        ("ipv4/ip_forward", 1),
        ("ipv6/conf/all/forwarding", 1),
        ("ipv4/conf/all/rp_filter", 0),
    ):
        Path("/proc/sys/net", name).write_text(str(value))


def nft(namespace: str, script: str) -> None:
    subprocess.run(["ip", "netns", "exec", namespace, "nft", "-f", "-"], input=script, text=True, check=True)


def listen(family: Family, port: int) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_DGRAM)
    opened.settimeout(5)
    if family is Family.IPV6:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    opened.bind(("", port))
    if port == GROUP_PORT:
        for index, name in socket.if_nameindex():
            if name != "lo":
                join(opened, family, index)
    return opened


def join(opened: socket.socket, family: Family, index: int) -> None:
    group = parse_address(GROUPS[family])
    if family is Family.IPV4:
        opened.setsockopt(
            socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + bytes(4) + struct.pack("=i", index)
        )
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + struct.pack("=i", index))


def send(source: bytes, destination: bytes, port: int, *, device: str = "") -> None:
    """Send one datagram of a new flow from an address of the namespace that the thread is in."""
    family = Family.of(source)
    with socket.socket(family, socket.SOCK_DGRAM) as opened:
        opened.bind((format_address(source), next(_source_ports)))
        if device:
            index = struct.pack("=i", socket.if_nametoindex(device))
            if family is Family.IPV4:
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(8) + index)
            else:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        opened.sendto(b"?", (format_address(destination), port))


async def write(kind: Kind, sets: tuple[RuleSet, ...]) -> None:
    """Make rules stand with one tool."""
    (program,) = (program for program in await find_programs() if program.kind is kind)
    tool: Tool = Nftables(program) if kind is Kind.NFT else Iptables(program)
    for change in await tool.difference(sets):
        await change.apply()
    assert await tool.difference(sets) == []


@pytest.fixture(params=list(Kind))
def kind(request: pytest.FixtureRequest) -> Iterator[Kind]:
    found: Kind = request.param
    yield found
    nothing = tuple(RuleSet(one.family, one.purpose) for one in make_rules(FirewallOptions(), NETWORK, OWN))
    inside("host", lambda: asyncio.run(write(found, nothing)))


@pytest.mark.parametrize("mode", MODES)
def test_receiver_sees_the_address_that_the_table_says(
    sockets: dict[tuple[str, Family, int], socket.socket], kind: Kind, mode: str
) -> None:
    told = MODES[mode]
    inside("host", lambda: asyncio.run(write(kind, make_rules(told, NETWORK, OWN))))
    wrong = []
    verdicts = set()
    for case in cases():
        source, destination, _ = case.packet
        family = Family.of(source)
        verdict = reference(Setup(CLUSTER[family], OWN[family], told), case.packet)
        verdicts.add(verdict)
        expected = case.masqueraded if verdict == MASQUERADED else format_address(source)
        inside(case.sender, partial(send, source, destination, case.port))
        _, seen = sockets[case.receiver, family, case.port].recvfrom(64)
        if seen[0] != expected:
            wrong.append(f"{case.packet}: {seen[0]} and not {expected}")
    assert wrong == []
    assert verdicts == ({KEPT, MASQUERADED} if told.masquerade else {KEPT})


@pytest.mark.parametrize("mode", ["on", "off"])
def test_group_sees_the_sender(
    sockets: dict[tuple[str, Family, int], socket.socket], kind: Kind, mode: str
) -> None:
    inside("host", lambda: asyncio.run(write(kind, make_rules(MODES[mode], NETWORK, OWN))))
    for sender, device, ipv4, ipv6, receiver in MULTICASTS:
        for family, address in ((Family.IPV4, ipv4), (Family.IPV6, ipv6)):
            packed, group = parse_address(address), parse_address(GROUPS[family])
            inside(sender, partial(send, packed, group, GROUP_PORT, device=device))
            assert sockets[receiver, family, GROUP_PORT].recvfrom(64)[1][0] == address
