# SPDX-License-Identifier: Apache-2.0
"""Real packets through each firewall: the address that the receiver sees, for every pair of the table.

::

    own   10.5.1.2 ──┐                       ┌── peer     192.0.2.2, container 10.5.2.2
    own2  10.5.1.3 ──┴── host ──192.0.2.1────┘
                          └─────198.51.100.1──── outside  198.51.100.2
"""

import asyncio
import itertools
import shutil
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
from loden.firewall.keeper import Firewall
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
    link set lo up
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
    "own host, as its containers' gateway": ("host", "10.5.1.1", "fd00:5:0:1::1"),
    "peer host": ("peer", "192.0.2.2", "2001:db8:2::2"),
    "outside": ("outside", "198.51.100.2", "2001:db8:9::2"),
}
#: Where they go, and the host's own addresses on the way there; none where they do not leave it.
DESTINATIONS = {
    "own container": ("own2", ("10.5.1.3", "fd00:5:0:1::3"), ("10.5.1.1", "fd00:5:0:1::1")),
    "peer container": ("peer", ("10.5.2.2", "fd00:5:0:2::2"), ("192.0.2.1", "2001:db8:2::1")),
    "own host": ("host", ("192.0.2.1", "2001:db8:2::1"), None),
    "own host, as its containers' gateway": ("host", ("10.5.1.1", "fd00:5:0:1::1"), None),
    "peer host": ("peer", ("192.0.2.2", "2001:db8:2::2"), ("192.0.2.1", "2001:db8:2::1")),
    "outside": ("outside", ("198.51.100.2", "2001:db8:9::2"), ("198.51.100.1", "2001:db8:9::1")),
}
HOST_ADDRESSES = (
    ("10.5.1.1", "192.0.2.1", "198.51.100.1"),
    ("fd00:5:0:1::1", "2001:db8:2::1", "2001:db8:9::1"),
)
#: The devices on which the host routes packets to a group, and sends its own.
GROUP_DEVICES = ("own", "own2", "peer", "outside")
GROUPS = {Family.IPV4: "239.1.2.3", Family.IPV6: "ff05::1:3"}

PORT, MARKED_PORT, GROUP_PORT = 9000, 9001, 9002
#: Another bit beside kube-proxy's: the mask counts (W18).
MARK = 0xC000
_source_ports = itertools.count(
    20000
)  # a new flow for every packet: connections are masqueraded, not packets


class Case(NamedTuple):
    """One packet, and the address that the host has on its way; None where that ends on the host."""

    sender: str
    receiver: str
    port: int
    packet: Packet
    masqueraded: str | None

    def expected(self, verdict: str) -> tuple[str, ...]:
        """What the receiver may see."""
        if verdict != MASQUERADED:
            return (format_address(self.packet.source),)
        if self.masqueraded is not None:
            return (self.masqueraded,)
        if self.sender != "host":
            return (format_address(self.packet.source),)  # what came in does not leave, and stays as it is
        column = 0 if Family.of(self.packet.source) is Family.IPV4 else 1
        return HOST_ADDRESSES[column]  # to itself it is itself, whichever of its addresses the kernel takes


def cases() -> Iterator[Case]:
    for family, sent, gone in itertools.product(Family, SOURCES.values(), DESTINATIONS.values()):
        column = 0 if family is Family.IPV4 else 1
        if sent[0] == gone[0] != "host":
            continue  # stays on one machine that is not ours
        addresses = parse_address(sent[1 + column]), parse_address(gone[1][column])
        for port, mark in ((PORT, 0), (MARKED_PORT, MARK)):
            yield Case(sent[0], gone[0], port, Packet(*addresses, mark), gone[2] and gone[2][column])


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
        stack.enter_context(inside("host", route_ipv4_groups))
        stack.enter_context(inside("host", route_ipv6_groups))
        yield {
            (name, family, port): stack.enter_context(inside(name, partial(listen, name, family, port)))
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


def listen(name: str, family: Family, port: int) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_DGRAM)
    opened.settimeout(5)
    if family is Family.IPV6:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    opened.bind(("", port))
    if port == GROUP_PORT and name != "host":  # which would hear again what it passes on
        join(opened, family, socket.if_nametoindex("eth0"))
    return opened


def join(opened: socket.socket, family: Family, index: int) -> None:
    group = parse_address(GROUPS[family])
    if family is Family.IPV4:
        opened.setsockopt(
            socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group + bytes(4) + struct.pack("=i", index)
        )
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + struct.pack("=i", index))


def send(source: bytes, destination: bytes, port: int, *, device: str = "", payload: bytes = b"?") -> None:
    """Send one datagram of a new flow from an address of the namespace that the thread is in."""
    family = Family.of(source)
    with socket.socket(family, socket.SOCK_DGRAM) as opened:
        opened.bind((format_address(source), next(_source_ports)))
        if device:
            index = struct.pack("=i", socket.if_nametoindex(device))
            if family is Family.IPV4:
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, bytes(8) + index)
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
            else:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, 0)
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 8)
        opened.sendto(payload, (format_address(destination), port))


# <linux/mroute.h>, <linux/mroute6.h>: a daemon for multicast routes asks for the same with these.
_MRT_INIT, _MRT_ADD_VIF, _MRT_ADD_MFC = 200, 202, 204
_VIFF_USE_IFINDEX = 8


def group_routes(column: int) -> Iterator[tuple[bytes, int, list[int]]]:
    """For each sender elsewhere: its address, and the places in GROUP_DEVICES of its way in and out."""
    for sender, *addresses in SOURCES.values():
        if sender != "host":
            out = {"own2", "peer", "outside"} - {sender}
            yield (
                parse_address(addresses[column]),
                GROUP_DEVICES.index(sender),
                [place for place, name in enumerate(GROUP_DEVICES) if name in out],
            )


def route_ipv4_groups() -> socket.socket:
    """Have the kernel pass packets to the group on, for as long as the socket is open."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_IGMP)
    opened.setsockopt(socket.IPPROTO_IP, _MRT_INIT, 1)
    for place, name in enumerate(GROUP_DEVICES):
        # struct vifctl { u16 number; u8 flags, threshold; u32 limit; int index; u32 remote; }
        device = struct.pack("=HBBIiI", place, _VIFF_USE_IFINDEX, 1, 0, socket.if_nametoindex(name), 0)
        opened.setsockopt(socket.IPPROTO_IP, _MRT_ADD_VIF, device)
    for source, came, out in group_routes(0):
        # struct mfcctl { u32 origin, group; u16 parent; u8 ttls[32]; u32 packets, bytes, wrong; int expire; }
        least = bytes(1 if place in out else 255 for place in range(32))
        route = struct.pack(
            "=4s4sH32s2xIIIi", source, parse_address(GROUPS[Family.IPV4]), came, least, *4 * [0]
        )
        opened.setsockopt(socket.IPPROTO_IP, _MRT_ADD_MFC, route)
    return opened


def route_ipv6_groups() -> socket.socket:
    """The same for IPv6."""
    opened = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    opened.setsockopt(socket.IPPROTO_IPV6, _MRT_INIT, 1)
    for place, name in enumerate(GROUP_DEVICES):
        # struct mif6ctl { u16 number; u8 flags, threshold; u16 index; u32 limit; }
        device = struct.pack("=HBBH2xI", place, 0, 1, socket.if_nametoindex(name), 0)
        opened.setsockopt(socket.IPPROTO_IPV6, _MRT_ADD_VIF, device)
    for source, came, out in group_routes(1):
        # struct mf6cctl { sockaddr_in6 origin, group; u16 parent; u32 out[8]; }
        addresses = [
            struct.pack("=HHI16sI", socket.AF_INET6, 0, 0, address, 0)
            for address in (source, parse_address(GROUPS[Family.IPV6]))
        ]
        bits = struct.pack("=8I", sum(1 << place for place in out), *7 * [0])
        opened.setsockopt(
            socket.IPPROTO_IPV6, _MRT_ADD_MFC, b"".join((*addresses, struct.pack("=H2x", came), bits))
        )
    return opened


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
        expected = case.expected(verdict)
        inside(case.sender, partial(send, source, destination, case.port))
        _, seen = sockets[case.receiver, family, case.port].recvfrom(64)
        if seen[0] not in expected:
            wrong.append(f"{case.packet}: {seen[0]} and not {' or '.join(expected)}")
    assert wrong == []
    assert verdicts == ({KEPT, MASQUERADED} if told.masquerade else {KEPT})


@pytest.mark.parametrize("mode", MODES)
def test_group_sees_the_sender(
    sockets: dict[tuple[str, Family, int], socket.socket], kind: Kind, mode: str
) -> None:
    """Of packets that the host passes on, and of its own."""
    inside("host", lambda: asyncio.run(write(kind, make_rules(MODES[mode], NETWORK, OWN))))
    for (sender, *addresses), family in itertools.product(SOURCES.values(), Family):
        address = addresses[0 if family is Family.IPV4 else 1]
        source, group = parse_address(address), parse_address(GROUPS[family])
        if sender == "host":
            for device in ("own2", "peer", "outside"):
                inside(sender, partial(send, source, group, GROUP_PORT, device=device))
                assert sockets[device, family, GROUP_PORT].recvfrom(64)[1][0] == address
        else:
            inside(sender, partial(send, source, group, GROUP_PORT, device="eth0"))
            for receiver in {"own2", "peer", "outside"} - {sender}:
                assert sockets[receiver, family, GROUP_PORT].recvfrom(64)[1][0] == address


# FORWARD chains that drop

_FOREIGN = "*nat\n-A POSTROUTING -d 192.0.2.99 -j ACCEPT\nCOMMIT\n"
#: From, to: what passes the host on its way from or to containers.
PASSING = (
    ("own container", "own container"),
    ("own container", "peer container"),
    ("peer container", "own container"),
    ("own container", "outside"),
    ("outside", "own container"),
)


@pytest.fixture
def clean_host(sockets: object) -> Iterator[None]:
    del sockets
    yield
    for kind in (Kind.IPTABLES_NFT, Kind.IPTABLES_LEGACY):
        for program in (kind, kind.replace("iptables", "ip6tables")):
            in_host(program, "-P", "FORWARD", "ACCEPT")
            for table in ("filter", "nat"):
                in_host(program, "-t", table, "-F")
                in_host(program, "-t", table, "-X")
    for table in ("ip flannel-ipv4", "ip6 flannel-ipv6"):
        nft("host", f"add table {table}\ndelete table {table}")


def in_host(*command: str, text: str = "") -> None:
    subprocess.run(["ip", "netns", "exec", "host", *command], input=text, text=True, check=True)


async def start(*, enable_nftables: bool) -> str:
    """What the start of an agent does; the tool it takes."""
    firewall = Firewall(enable_nftables=enable_nftables)
    try:
        firewall.want(make_rules(FirewallOptions(), NETWORK, OWN))
        await firewall.settle()
        return firewall.statistics.tool
    finally:
        firewall.close()


@pytest.mark.usefixtures("clean_host")
@pytest.mark.parametrize(
    ("kind", "dropping", "has_iptables"),
    [
        *((kind, dropping, True) for kind in Kind for dropping in (Kind.IPTABLES_NFT, Kind.IPTABLES_LEGACY)),
        (Kind.NFT, Kind.IPTABLES_NFT, False),
    ],
)
def test_containers_packets_pass_where_forward_drops(
    sockets: dict[tuple[str, Family, int], socket.socket],
    kind: Kind,
    dropping: Kind,
    has_iptables: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Docker gives FORWARD the policy DROP, in whichever iptables it uses."""
    if not has_iptables:
        (tmp_path / "nft").symlink_to(shutil.which("nft") or "nft")
    if kind is not Kind.NFT:
        in_host(f"{kind}-restore", "--noflush", text=_FOREIGN)
    for program in (dropping, dropping.replace("iptables", "ip6tables")):
        in_host(program, "-P", "FORWARD", "DROP")
    pass_through(sockets, b"dropped", receive=False)
    with monkeypatch.context() as context:
        if not has_iptables:
            context.setenv("PATH", str(tmp_path))
        tool = inside("host", lambda: asyncio.run(start(enable_nftables=kind is Kind.NFT)))
    assert tool == kind
    pass_through(sockets, b"passed", receive=True)


def pass_through(
    sockets: dict[tuple[str, Family, int], socket.socket], payload: bytes, *, receive: bool
) -> None:
    """Send what passes the host; the first that each receiver gets is this and nothing from before."""
    for (source, target), family in itertools.product(PASSING, Family):
        column = 0 if family is Family.IPV4 else 1
        sender, receiver = SOURCES[source], DESTINATIONS[target]
        addresses = parse_address(sender[1 + column]), parse_address(receiver[1][column])
        inside(sender[0], partial(send, *addresses, PORT, payload=payload))
        if receive:
            assert sockets[receiver[0], family, PORT].recv(64) == payload
