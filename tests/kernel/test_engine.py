# SPDX-License-Identifier: Apache-2.0
"""The packet engine between real TUN devices and sockets.

wire-1                                       wire-2
  10.5.1.0 ── flannel0 ── engine ── eth0 ══════ eth0 ── engine, or a plain peer that keeps no rule ── 10.5.2.0
"""

import errno
import hashlib
import os
import random
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from bench._tunnel import (
    PORT,
    SIDES,
    Side,
    engine_on,
    loops,
    open_tun,
    open_udp,
    other_of,
    packets_program,
    peer_of,
    run_ip,
    wire,
)
from loden.address import Family, format_address
from loden.lab.namespaces import inside
from loden.tables.engine import Engine, Peer, drop_reasons
from tests import packets
from tests.kernel.kernel import PATIENCE_S, command
from tests.packets import Ip4, Ip6, Raw, Udp

ONE, TWO = SIDES
UDP_SEGMENT = 103  # <linux/udp.h>
IP_MTU_DISCOVER, IP_PMTUDISC_DONT, IP_PMTUDISC_DO, IP_PMTUDISC_PROBE = 10, 0, 2, 3  # <linux/in.h>
IP_MTU, IPV6_MTU, IPV6_MTU_DISCOVER = 14, 24, 23
IP_RECVERR, IP_RECVTTL, IPV6_RECVERR = 11, 12, 25
FAST_PER_MS, PACE_MS = 30, 20  # native/engine/worker.c
FAMILIES = pytest.mark.parametrize("family", list(Family), ids=str)
OUTER = pytest.mark.parametrize("outer", list(Family), ids=lambda family: f"over-{family}")


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test opens, closed behind it; the wire last."""
    if not Path("/dev/net/tun").exists():
        pytest.skip("needs /dev/net/tun")
    with wire(), ExitStack() as opened:
        yield opened


@pytest.fixture
def engines(stack: ExitStack) -> tuple[Engine, Engine]:
    """The engine on both sides."""
    return engine_on(ONE, stack), engine_on(TWO, stack)


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what others bring about; fail rather than hang."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def tunnel_address(side: Side, family: Family = Family.IPV4) -> str:
    return format_address(side.subnet(family).address)


def opened(side: Side, kind: socket.SocketKind, family: Family = Family.IPV4, port: int = 0) -> socket.socket:
    """A socket on the tunnel's address of a side."""
    found = inside(side.namespace, lambda: socket.socket(family, kind))
    found.settimeout(PATIENCE_S)
    found.bind((tunnel_address(side, family), port))
    return found


def udp_pair(stack: ExitStack, family: Family = Family.IPV4) -> tuple[socket.socket, socket.socket]:
    """Two sockets, one on each side, connected to each other."""
    one, two = (stack.enter_context(opened(side, socket.SOCK_DGRAM, family)) for side in SIDES)
    one.connect(two.getsockname())
    two.connect(one.getsockname())
    return one, two


def transfer(
    source: Side,
    target: Side,
    *,
    size: int,
    addresses: Callable[[Side], str] = tunnel_address,
    on_half: Callable[[], None] = lambda: None,
) -> None:
    """Send bytes over TCP and compare them; *on_half* is called when half of them have come."""
    data = random.Random(size).randbytes(1 << 16) * (size >> 16)
    family = Family.IPV6 if ":" in addresses(source) else Family.IPV4
    with ExitStack() as stack:
        open_tcp = lambda: socket.socket(family, socket.SOCK_STREAM)  # noqa: E731 - called in two namespaces
        listener = stack.enter_context(inside(target.namespace, open_tcp))
        sender = stack.enter_context(inside(source.namespace, open_tcp))
        listener.bind((addresses(target), 0))
        listener.listen()
        sender.settimeout(PATIENCE_S)
        sender.bind((addresses(source), 0))
        sender.connect(listener.getsockname())
        receiver = stack.enter_context(listener.accept()[0])
        receiver.settimeout(PATIENCE_S)

        def send() -> None:
            sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        digest, received = hashlib.sha256(), 0
        while part := receiver.recv(1 << 20):
            if received < size // 2 <= received + len(part):
                on_half()
            received += len(part)
            digest.update(part)
        thread.join()
    assert received == len(data)
    assert digest.digest() == hashlib.sha256(data).digest()


@FAMILIES
@OUTER
def test_tcp_arrives_whole_both_ways(stack: ExitStack, family: Family, outer: Family) -> None:
    one, two = engine_on(ONE, stack, outer=outer), engine_on(TWO, stack, outer=outer)
    transfer(ONE, TWO, size=16 << 20, addresses=lambda side: tunnel_address(side, family))
    transfer(TWO, ONE, size=4 << 20, addresses=lambda side: tunnel_address(side, family))
    sent, received = one.counters(), two.counters()
    assert sent["segments"] > 10_000  # super-packets came in and were cut
    assert sent["udp_sends"] < sent["tx_packets"] / 4
    assert received["merged"] > 10_000
    assert received["tun_writes"] < received["rx_packets"] / 4
    assert {name: sent[name] for name in drop_reasons() if sent[name] and name != "no_route"} == {}


class BadWire:
    """A relay on the second side that loses every 100th datagram and holds some back.

    Each engine takes it for the other one.
    """

    def __init__(self, stack: ExitStack) -> None:
        self._chance = random.Random(6)
        self._ends = [
            stack.enter_context(inside(TWO.namespace, lambda port=port: open_udp(Family.IPV4, port)))  # type: ignore[misc]
            for port in (9101, 9102)
        ]
        for end, side in zip(self._ends, SIDES, strict=True):
            end.connect((format_address(side.wire()), PORT))
            end.settimeout(0.01)
        self.lost = self.held = 0
        self._is_over = threading.Event()
        for source, target in (self._ends, self._ends[::-1]):
            thread = threading.Thread(target=self._relay, args=(source, target))
            thread.start()
            stack.callback(thread.join)
        stack.callback(self._is_over.set)

    def _relay(self, source: socket.socket, target: socket.socket) -> None:
        held: list[bytes] = []
        while not self._is_over.is_set():
            try:
                packet = source.recv(65536)
            except TimeoutError:
                continue
            if self._chance.random() < 0.01:
                self.lost += 1
            elif self._chance.random() < 0.05:
                held.append(packet)
                self.held += 1
            else:
                target.send(packet)
                if held and self._chance.random() < 0.2:
                    target.send(held.pop(0))


@FAMILIES
def test_tcp_arrives_whole_under_loss_and_reordering(
    engines: tuple[Engine, Engine], stack: ExitStack, family: Family
) -> None:
    bad = BadWire(stack)
    for port, side, engine in zip((9101, 9102), SIDES, engines, strict=True):
        subnet = other_of(side).subnet(family)
        engine.change([Peer(subnet.address, subnet.length, TWO.wire(), port)], ())
    transfer(ONE, TWO, size=2 << 20, addresses=lambda side: tunnel_address(side, family))
    assert bad.lost > 0
    assert bad.held > 0
    assert engines[1].counters()["merged"] > 0


def test_tcp_arrives_whole_without_offloads_on_the_wire(engines: tuple[Engine, Engine]) -> None:
    if subprocess.run(["which", "ethtool"], capture_output=True, check=False).returncode != 0:
        pytest.skip("ethtool is not installed")
    for side in SIDES:
        command(f"ip netns exec {side.namespace} ethtool -K eth0 gso off tso off gro off")
    transfer(ONE, TWO, size=8 << 20)
    assert engines[1].counters()["merged"] > 0


def test_tcp_arrives_whole_over_several_queues(stack: ExitStack) -> None:
    engine_on(ONE, stack, queues=3)
    engine_on(TWO, stack, queues=2)
    threads = [threading.Thread(target=transfer, args=(ONE, TWO), kwargs={"size": 2 << 20}) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    transfer(TWO, ONE, size=2 << 20)


@FAMILIES
def test_datagrams_of_every_size_arrive(
    engines: tuple[Engine, Engine], stack: ExitStack, family: Family
) -> None:
    one, two = udp_pair(stack, family)
    for size in (0, 1, 2, 63, 64, 65, 1399, 1424, 1425, 1444, 1445, 9000, 30001, 60000):
        data = random.Random(size).randbytes(size)
        one.send(data)
        assert two.recv(65536) == data
        two.send(data)
        assert one.recv(65536) == data
    assert engines[0].peer_counters()[0 if family is Family.IPV4 else 1].tx_packets > 14


@FAMILIES
@pytest.mark.parametrize("size", [1, 64, 777, 1400])
def test_datagrams_in_a_row_arrive_each_by_itself(
    engines: tuple[Engine, Engine], stack: ExitStack, family: Family, size: int
) -> None:
    """The sender's kernel hands over a super-packet, and the receiver's takes one."""
    one, two = udp_pair(stack, family)
    one.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
    count = min(40, 60000 // size)
    data = random.Random(size).randbytes(size * count - size // 2)
    one.send(data)
    assert [two.recv(65536) for _ in range(count)] == [data[n : n + size] for n in range(0, len(data), size)]
    assert engines[0].counters()["segments"] == count
    until(lambda: engines[1].counters()["merged"] == count)  # counted behind the write that we have seen


def test_echo_requests_are_answered(engines: tuple[Engine, Engine]) -> None:
    del engines
    for size in (0, 1, 57, 1400, 5000):
        raw = inside(
            ONE.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        )
        with raw:
            raw.settimeout(PATIENCE_S)
            data = random.Random(size).randbytes(size)
            message = struct.pack("!BBHHH", 8, 0, 0, 7, size) + data
            message = message[:2] + packets.checksum(message).to_bytes(2, "big") + message[4:]
            raw.sendto(message, (tunnel_address(TWO), 0))
            while (answer := raw.recv(65536)[20:])[:1] != b"\0":
                pass
            assert answer[4:] == message[4:]


# A plain peer: one bare packet in each datagram, as flannel sends it


@contextmanager
def plain_peer(port: int = PORT, family: Family = Family.IPV4) -> Iterator[socket.socket]:
    """A socket on the second side where an engine would be; the test is the tunnel."""
    with inside(TWO.namespace, lambda: open_udp(family, port)) as found:
        found.settimeout(PATIENCE_S)
        found.connect((format_address(ONE.wire(family)), PORT))
        yield found


def test_plain_peer_gets_bare_packets_one_hop_further(stack: ExitStack) -> None:
    engine_on(ONE, stack)
    peer = stack.enter_context(plain_peer())
    sender = stack.enter_context(opened(ONE, socket.SOCK_DGRAM))
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 9)
    for size in (0, 1, 1400):
        sender.sendto(bytes(size), ("10.5.2.9", 53))
        packet = peer.recv(65536)
        parsed = packets.parse(packet)
        assert isinstance(parsed, Ip4)
        assert (parsed.ttl, parsed.target, parsed.source) == (8, bytes((10, 5, 2, 9)), ONE.subnet().address)
        assert parsed.inner == Udp(source=sender.getsockname()[1], payload=bytes(size))
        assert parsed.bytes() == packet  # its checksums are right


def test_packets_of_a_plain_peer_arrive_one_hop_further(stack: ExitStack) -> None:
    engine_on(ONE, stack)
    peer = stack.enter_context(plain_peer())
    receiver = stack.enter_context(opened(ONE, socket.SOCK_DGRAM, port=53))
    receiver.setsockopt(socket.IPPROTO_IP, IP_RECVTTL, 1)
    for options in (b"", bytes.fromhex("94040000")):
        packet = Ip4(
            source=bytes((10, 5, 2, 9)),
            target=ONE.subnet().address,
            ttl=9,
            options=options,
            inner=Udp(payload=b"hello"),
        )
        peer.send(packet.bytes() + b"padding")
        data, (control,), _, where = receiver.recvmsg(100, 100)
        assert (data, where) == (b"hello", ("10.5.2.9", 40000))
        assert control == (socket.IPPROTO_IP, socket.IP_TTL, struct.pack("=i", 8))


def test_last_hop_is_dropped_silently_both_ways(stack: ExitStack) -> None:
    engine = engine_on(ONE, stack)
    peer = stack.enter_context(plain_peer())
    sender = stack.enter_context(opened(ONE, socket.SOCK_DGRAM))
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
    sender.sendto(b"", ("10.5.2.9", 53))
    until(lambda: engine.counters()["ttl"] == 1)
    peer.send(Ip4(source=bytes((10, 5, 2, 9)), ttl=1, inner=Udp()).bytes())
    until(lambda: engine.counters()["ttl"] == 2)
    assert engine.counters()["icmp"] == 0


def test_tcp_arrives_whole_at_a_peer_that_moves_one_packet_at_a_time(stack: ExitStack) -> None:
    engine_on(ONE, stack)
    program = stack.enter_context(packets_program())
    (tun,) = inside(TWO.namespace, lambda: open_tun("flannel0", plain=True))
    udp = stack.enter_context(inside(TWO.namespace, lambda: open_udp(Family.IPV4, PORT)))
    run_ip(
        [
            "link set flannel0 mtu 1472 up",
            "address add 10.5.2.0/32 dev flannel0",
            "route add 10.5.0.0/16 dev flannel0",
        ],
        TWO,
    )
    words = ("loop", tun, udp.fileno(), format_address(ONE.wire()), PORT)
    running = subprocess.Popen((program, *map(str, words)), pass_fds=(tun, udp.fileno()))
    stack.callback(running.wait)
    stack.callback(running.kill)
    os.close(tun)
    transfer(ONE, TWO, size=4 << 20)
    transfer(TWO, ONE, size=4 << 20)


# Who may send what


def test_datagram_of_nobody_and_packet_from_elsewhere_are_dropped_and_counted_apart(stack: ExitStack) -> None:
    engine = engine_on(ONE, stack)
    known, unknown = stack.enter_context(plain_peer()), stack.enter_context(plain_peer(9999))
    right = Ip4(source=bytes((10, 5, 2, 9)), target=ONE.subnet().address, inner=Udp(payload=b"x")).bytes()
    unknown.send(right)
    until(lambda: engine.counters()["unknown_peer"] == 1)
    for source in ((10, 5, 1, 0), (10, 5, 3, 1), (8, 8, 8, 8)):
        known.send(Ip4(source=bytes(source), target=ONE.subnet().address, inner=Udp(payload=b"x")).bytes())
    known.send(Ip6(target=ONE.subnet(Family.IPV6).address, inner=Udp(payload=b"x")).bytes())
    until(lambda: engine.counters()["spoofed"] == 4)
    known.send(right)
    until(lambda: engine.counters()["rx_packets"] == 1)
    assert engine.counters()["unknown_peer"] == 1
    assert engine.peer_counters()[0][4:] == (1, len(right))


def test_openness_of_flannel_can_be_had(stack: ExitStack) -> None:
    engine = engine_on(ONE, stack, allow_unknown=True)
    unknown = stack.enter_context(plain_peer(9999))
    receiver = stack.enter_context(opened(ONE, socket.SOCK_DGRAM, port=53))
    set_sysctl(ONE, "ipv4/conf/all/rp_filter", "0")
    for source in ((10, 5, 2, 9), (10, 5, 77, 1)):
        unknown.send(Ip4(source=bytes(source), target=ONE.subnet().address, inner=Udp(payload=b"x")).bytes())
        assert receiver.recvfrom(9) == (b"x", (format_address(bytes(source)), 40000))
    assert engine.counters()["unknown_peer"] == 0


def set_sysctl(side: Side, name: str, value: str) -> None:
    inside(side.namespace, lambda: Path("/proc/sys/net", name).write_text(value))


def test_peers_behind_one_address_are_told_apart_by_port(stack: ExitStack) -> None:
    engine = engine_on(ONE, stack)
    ports = {9001: bytes((10, 5, 31, 0)), 9002: bytes((10, 5, 32, 0))}
    engine.change([Peer(subnet, 24, TWO.wire(), port) for port, subnet in ports.items()], ())
    peers = {port: stack.enter_context(plain_peer(port)) for port in ports}
    sender = stack.enter_context(opened(ONE, socket.SOCK_DGRAM))
    for port, subnet in ports.items():
        sender.sendto(b"", (format_address(subnet[:3] + b"\x05"), 1))
        assert packets.parse(peers[port].recv(99)).target == subnet[:3] + b"\x05"
    peers[9001].send(Ip4(source=bytes((10, 5, 32, 5)), inner=Udp()).bytes())
    until(lambda: engine.counters()["spoofed"] == 1)
    peers[9002].send(Ip4(source=bytes((10, 5, 32, 5)), inner=Udp()).bytes())
    until(lambda: engine.counters()["rx_packets"] == 1)


# Bad input


def bad_packets(count: int) -> list[bytes]:
    """Packets that were right, with bytes changed, cut off, lengths that lie."""
    chance = random.Random(5)
    right = [
        Ip4(source=bytes((10, 5, 2, 9)), inner=Udp(payload=bytes(64))).bytes(),
        Ip4(source=bytes((10, 5, 2, 9)), inner=packets.Tcp(payload=bytes(64))).bytes(),
        Ip4(source=bytes((10, 5, 2, 9)), options=bytes.fromhex("94040000"), inner=Udp()).bytes(),
        Ip6(source=TWO.subnet(Family.IPV6).address, inner=Udp(payload=bytes(64))).bytes(),
        Ip6(
            source=TWO.subnet(Family.IPV6).address,
            extensions=((0, bytes([0, 5, 2, 0, 0, 1, 0])), (44, bytes([0, 0, 1, 0, 0, 0, 7]))),
            inner=Raw(protocol=17, payload=bytes(20)),
        ).bytes(),
    ]
    found = [b"", b"\x40", b"\x45" * 20, b"\x60" * 40, bytes(65507)]
    while len(found) < count:
        packet = bytearray(chance.choice(right))
        for _ in range(chance.randrange(4)):
            packet[chance.randrange(min(len(packet), 48))] = chance.randrange(256)
        del packet[chance.choice([len(packet), len(packet), chance.randrange(len(packet))]) :]
        if len(packet) >= 20 and packet[0] == 0x45 and chance.random() < 0.6:
            packet[10:12] = bytes(2)
            packet[10:12] = packets.checksum(bytes(packet[:20])).to_bytes(2, "big")
        found.append(bytes(packet))
    return found


def verdict(packet: bytes) -> str:
    """The counter that the reference expects to grow."""
    try:
        found = packets.check(packet)
        source = packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]
        if not any(TWO.subnet(family).holds(source) for family in Family):
            return "spoofed"
        packets.forward(packet[: found.length])
    except packets.Dropped as reason:
        return str(reason)
    return "rx_packets"


def test_storm_of_bad_packets_is_dropped_each_for_its_reason(stack: ExitStack) -> None:
    engine = engine_on(ONE, stack)
    peer = stack.enter_context(plain_peer())
    storm = bad_packets(5000)
    peer.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)  # some are larger than the wire
    wanted = dict.fromkeys((*drop_reasons(), "rx_packets"), 0)
    for number, packet in enumerate(storm):
        wanted[verdict(packet)] += 1
        peer.send(packet)
        if number % 50 == 0:  # no faster than it is taken in: nothing may be lost on the way
            until(lambda seen=number + 1: engine.counters()["udp_packets"] == seen)  # type: ignore[misc]
    until(lambda: engine.counters()["udp_packets"] == len(storm))
    counts = engine.counters()
    # What the kernel's own stack does with packets that only look right is its own affair.
    counts["rx_packets"] += counts["refused"]
    assert {name: counts[name] for name in wanted if name not in ("no_route", "refused")} == {
        name: wanted[name] for name in wanted if name not in ("no_route", "refused")
    }
    assert (
        min(
            wanted[name]
            for name in ("truncated", "version", "header", "length", "checksum", "options", "ttl")
        )
        > 0
    )
    assert engine.failure() is None


def test_socket_that_hears_of_unreachable_ports_goes_on(stack: ExitStack) -> None:
    """Nobody listens at the peer: its kernel says so, again and again, and other peers do not suffer."""
    engine = inside(ONE.namespace, lambda: bare_engine(lambda udp: udp.setsockopt(0, IP_RECVERR, 1)))
    stack.callback(engine.stop)
    start_on_one(
        engine,
        [Peer(bytes((10, 5, 2, 0)), 24, TWO.wire(), PORT), Peer(bytes((10, 5, 3, 0)), 24, TWO.wire(), 9)],
    )
    peer = stack.enter_context(plain_peer())
    sender = stack.enter_context(opened(ONE, socket.SOCK_DGRAM))
    set_sysctl(TWO, "ipv4/icmp_ratelimit", "0")
    for number in range(200):
        sender.sendto(b"", ("10.5.3.1", 1))
        sender.sendto(struct.pack("=I", number), ("10.5.2.1", 1))
        assert peer.recv(99)[28:] == struct.pack("=I", number)
    until(lambda: refusals(TWO) > 0)
    assert engine.failure() is None


def test_full_socket_that_hears_of_unreachable_ports_waits_for_room(stack: ExitStack) -> None:
    """An error wakes whoever waits for room; it is no reason to give up what waits with it."""

    def prepare(udp: socket.socket) -> None:
        udp.setsockopt(0, IP_RECVERR, 1)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10_000)

    engine = inside(ONE.namespace, lambda: bare_engine(prepare))
    stack.callback(engine.stop)
    start_on_one(
        engine,
        [Peer(bytes((10, 5, 2, 0)), 24, TWO.wire(), PORT), Peer(bytes((10, 5, 3, 0)), 24, TWO.wire(), 9)],
    )
    command("ip netns exec wire-1 tc qdisc add dev eth0 root tbf rate 100mbit burst 16k limit 1000000")
    set_sysctl(TWO, "ipv4/icmp_ratelimit", "0")
    with suppress(FileNotFoundError):  # of the whole machine in older kernels
        set_sysctl(TWO, "ipv4/icmp_msgs_per_sec", "1000000")
    stack.enter_context(plain_peer())
    sender = stack.enter_context(opened(ONE, socket.SOCK_DGRAM))
    for number in range(3000):  # 30 of them take 3 ms
        target = "10.5.3.1" if number % 10 == 5 else "10.5.2.1"
        sender.sendto(b"" if number % 10 == 5 else bytes(1400), (target, 1))
        if number % 30 == 0:
            time.sleep(0.01)
    until(lambda: engine.counters()["tun_packets"] >= 3000)
    assert refusals(TWO) > 0
    assert engine.counters()["full"] <= 15  # 5 ms can be too short where processors are


def refusals(side: Side) -> int:
    """How often the kernel of a side has said that nobody listens."""
    lines = inside(side.namespace, lambda: Path("/proc/thread-self/net/snmp").read_text()).splitlines()
    names, values = (line.split() for line in lines if line.startswith("Icmp:"))
    return int(values[names.index("OutDestUnreachs")])


def bare_engine(
    prepare: Callable[[socket.socket], object], *, families: Sequence[Family] = (Family.IPV4,)
) -> Engine:
    """An engine on a new device, with sockets that the test prepares; in the caller's namespace."""
    tun = open_tun("flannel0")
    udp = [open_udp(family, PORT) for family in families]
    for one in udp:
        prepare(one)
    try:
        return Engine(tun, [one.fileno() for one in udp], source4=ONE.subnet().address)
    finally:
        for fd in tun:
            os.close(fd)
        for one in udp:
            one.close()


def start_on_one(engine: Engine, peers: Sequence[Peer]) -> None:
    run_ip(
        [
            "link set flannel0 mtu 1472 up",
            "address add 10.5.1.0/32 dev flannel0",
            "route add 10.5.0.0/16 dev flannel0 src 10.5.1.0",
        ],
        ONE,
    )
    engine.change(peers, ())
    engine.start()


# No way, and no room


@FAMILIES
def test_sender_without_a_route_is_told(stack: ExitStack, family: Family) -> None:
    engine = engine_on(ONE, stack)
    sender = stack.enter_context(opened(ONE, socket.SOCK_DGRAM, family))
    if family is Family.IPV4:
        sender.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
    else:
        sender.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
    sender.connect(("10.5.77.1" if family is Family.IPV4 else "fd00:5:0:77::1", 53))
    sender.send(b"anybody?")
    with pytest.raises(OSError, match=r"is unreachable|No route to host"):
        sender.recv(1)
    until(lambda: engine.counters()["no_route"] >= 1)  # counted behind the write that we have heard of
    assert engine.counters()["icmp"] >= 1


def test_flood_without_a_route_is_not_answered_packet_by_packet(stack: ExitStack) -> None:
    engine = engine_on(ONE, stack)
    sender = stack.enter_context(opened(ONE, socket.SOCK_DGRAM))
    while engine.counters()["icmp_limited"] == 0:
        sender.sendto(b"", ("10.5.77.1", 53))
    counts = engine.counters()
    assert counts["no_route"] >= counts["icmp"] + counts["icmp_limited"]


def test_peer_without_a_socket_of_its_family_is_counted(stack: ExitStack) -> None:
    engine = inside(ONE.namespace, lambda: bare_engine(lambda udp: None))
    stack.callback(engine.stop)
    start_on_one(engine, [Peer(bytes((10, 5, 2, 0)), 24, TWO.wire(Family.IPV6), PORT)])
    stack.enter_context(opened(ONE, socket.SOCK_DGRAM)).sendto(b"", ("10.5.2.1", 1))
    until(lambda: engine.counters()["no_socket"] == 1)


def too_big_for(sender: socket.socket, size: int, family: Family) -> int:
    """Send a packet that may not be fragmented until the kernel refuses it; the MTU that it knows then."""
    level = socket.IPPROTO_IP if family is Family.IPV4 else socket.IPPROTO_IPV6
    sender.setsockopt(level, IP_MTU_DISCOVER if family is Family.IPV4 else IPV6_MTU_DISCOVER, IP_PMTUDISC_DO)
    sender.send(bytes(size))

    def is_refused() -> bool:
        try:
            sender.send(bytes(size))
        except OSError as error:
            return error.errno == errno.EMSGSIZE
        return False

    until(is_refused)
    sender.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # what came meanwhile is known
    return sender.getsockopt(level, IP_MTU if family is Family.IPV4 else IPV6_MTU)


@FAMILIES
def test_sender_is_told_the_mtu_of_a_peer(
    engines: tuple[Engine, Engine], stack: ExitStack, family: Family
) -> None:
    one, two = udp_pair(stack, family)
    engines[0].change([peer_of(TWO, family, mtu=1300)], ())
    assert too_big_for(one, 1400, family) == 1300
    assert select.select([engines[0].fileno()], [], [], PATIENCE_S)[0]
    until(lambda: engines[0].counters()["icmp"] >= 1)  # as above
    assert engines[0].counters()["too_big"] >= 1
    one.send(b"still there")
    assert two.recv(99) == b"still there"
    transfer(ONE, TWO, size=4 << 20, addresses=lambda side: tunnel_address(side, family))


def test_flood_of_packets_that_are_too_big_does_not_keep_the_listener_awake(
    engines: tuple[Engine, Engine], stack: ExitStack
) -> None:
    one, _ = udp_pair(stack)
    one.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)  # it goes on, whatever it hears
    engines[0].change([peer_of(TWO, Family.IPV4, mtu=1000)], ())
    while engines[0].counters()["too_big"] < 3000:
        with suppress(OSError):  # what ICMP said about those before
            one.send(bytes(1400))
    told = int.from_bytes(os.read(engines[0].fileno(), 8), sys.byteorder)
    assert 0 < told < 3000


def test_packet_that_may_be_fragmented_arrives_at_a_peer_with_a_small_mtu(
    engines: tuple[Engine, Engine], stack: ExitStack
) -> None:
    one, two = udp_pair(stack)
    one.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
    engines[0].change([peer_of(TWO, Family.IPV4, mtu=500)], ())
    for size in (400, 1400, 9001):
        data = random.Random(size).randbytes(size)
        one.send(data)
        assert two.recv(65536) == data
    until(lambda: engines[0].counters()["fragments"] >= 3 + 7 * 3)
    one.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
    one.send(bytes(3000))  # a super-packet, cut and fragmented
    assert [len(two.recv(65536)) for _ in range(3)] == [1000, 1000, 1000]
    assert engines[0].counters()["too_big"] == 0


@OUTER
def test_underlay_that_takes_less_is_noticed(stack: ExitStack, outer: Family) -> None:
    one, two = engine_on(ONE, stack, outer=outer), engine_on(TWO, stack, outer=outer)
    del two
    overhead = 28 if outer is Family.IPV4 else 48
    run_ip([f"route add {format_address(TWO.wire(outer))} dev eth0 mtu lock 1300"], ONE)
    sender, receiver = udp_pair(stack)
    assert too_big_for(sender, 1400, Family.IPV4) == 1300 - overhead
    assert select.select([one.fileno()], [], [], PATIENCE_S)[0]
    sender.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
    sender.send(bytes(1400))
    assert receiver.recv(65536) == bytes(1400)
    assert one.counters()["fragments"] == 2 or one.counters()["fragments"] == 0  # the kernel knows by now
    transfer(ONE, TWO, size=4 << 20)


def test_row_that_the_path_refuses_arrives_in_its_order(
    engines: tuple[Engine, Engine], stack: ExitStack
) -> None:
    """The kernel takes no such message: each datagram goes by itself, in fragments."""
    run_ip([f"route add {format_address(TWO.wire())} dev eth0 mtu lock 1300"], ONE)
    one, two = udp_pair(stack)
    one.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
    one.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1400)
    for number in range(3):  # the second and third are read as the first was
        data = random.Random(number).randbytes(1400 * 7 + 5)
        one.send(data)
        assert [two.recv(65536) for _ in range(8)] == [data[n : n + 1400] for n in range(0, len(data), 1400)]
    assert engines[0].counters()["fragments"] >= 2 * 7


def test_full_socket_drops_and_nobody_hangs(stack: ExitStack) -> None:
    """A wire of 64 kbit/s, and a socket that holds little: what does not fit is dropped, as a device does."""
    engine = inside(
        ONE.namespace,
        lambda: bare_engine(lambda udp: udp.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)),
    )
    stack.callback(engine.stop)
    start_on_one(engine, [peer_of(TWO, Family.IPV4)])
    command("ip netns exec wire-1 tc qdisc add dev eth0 root tbf rate 64kbit burst 2000 limit 100000")
    sender = stack.enter_context(opened(ONE, socket.SOCK_DGRAM))
    while engine.counters()["full"] == 0:
        sender.sendto(bytes(1000), ("10.5.2.1", 1))
    engine.change([peer_of(TWO, Family.IPV4, mtu=1000)], ())
    engine.stop()
    assert engine.failure() is None


def test_device_that_is_down_refuses_and_comes_back(engines: tuple[Engine, Engine], stack: ExitStack) -> None:
    one, two = udp_pair(stack)
    run_ip(["link set flannel0 down"], TWO)
    one.send(b"lost")
    until(lambda: engines[1].counters()["refused"] >= 1)
    run_ip(["link set flannel0 up", "route add 10.5.0.0/16 dev flannel0 src 10.5.2.0"], TWO)
    one.send(b"not lost")
    assert two.recv(99) == b"not lost"
    assert engines[1].failure() is None


# Life


def test_engine_can_be_stopped_and_started_under_a_connection(engines: tuple[Engine, Engine]) -> None:
    def restart() -> None:
        for engine in engines:
            engine.stop()
        for engine in engines:
            engine.start()

    transfer(ONE, TWO, size=8 << 20, on_half=restart)


def test_removed_device_ends_the_workers_and_they_say_so(
    engines: tuple[Engine, Engine], stack: ExitStack
) -> None:
    one, _ = udp_pair(stack)
    stopped = threading.Event()

    def flood() -> None:
        while not stopped.is_set():
            try:
                one.send(bytes(1000))
            except OSError:
                return

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        until(lambda: engines[1].counters()["rx_packets"] > 1000)
        for side, engine in zip(SIDES, engines, strict=True):
            run_ip(["link del flannel0"], side)
            assert select.select([engine.fileno()], [], [], PATIENCE_S)[0]
            until(lambda engine=engine: engine.failure() is not None)  # type: ignore[misc]
            failure = engine.failure()
            assert failure is not None
            assert failure.errno == errno.EBADFD
            assert "the TUN device" in failure.what
            engine.stop()
    finally:
        stopped.set()
        thread.join()


def run_until_end(stack: ExitStack, program: Path, what: str, on: socket.socket, *words: str) -> None:
    """``bench/packets.c`` on a socket, until the stack ends."""
    on.settimeout(None)
    running = subprocess.Popen(
        (str(program), what, str(on.fileno()), *words), pass_fds=(on.fileno(),), stdout=subprocess.DEVNULL
    )
    stack.callback(running.wait)
    stack.callback(running.kill)


def bulk(stack: ExitStack, program: Path, source: Side, target: Side) -> None:
    """A connection that carries what it can, until the stack ends."""
    listener = stack.enter_context(opened(target, socket.SOCK_STREAM))
    listener.listen()
    sender = stack.enter_context(opened(source, socket.SOCK_STREAM))
    sender.connect(listener.getsockname())
    receiver = stack.enter_context(listener.accept()[0])
    run_until_end(stack, program, "push", sender, "3600")
    run_until_end(stack, program, "pull", receiver, "3600")


def test_control_is_never_starved(engines: tuple[Engine, Engine], stack: ExitStack) -> None:
    """flannel's proxy reads no command while packets come (COMPAT W27); here both directions are full."""
    program = stack.enter_context(packets_program())
    for source, target in (SIDES, SIDES[::-1]):
        bulk(stack, program, source, target)
    sender, receiver = udp_pair(stack)
    run_until_end(stack, program, "flood", sender, "3600", "0", "64", "1")
    run_until_end(stack, program, "sink", receiver, "3600")
    many = [Peer(bytes((10, 200 + (n >> 8), n & 255, 0)), 24, TWO.wire(), n % 5000 + 1) for n in range(5000)]
    until(lambda: all(engine.counters()["rx_packets"] > 10_000 for engine in engines))
    for number in range(60):
        before = [engine.counters() for engine in engines]
        for engine in engines:
            if number % 2:
                engine.change((), [(peer.prefix, peer.length) for peer in many])
            else:
                engine.change(many, ())
            assert len(engine.peers()) == (2 if number % 2 else 5002)
            # No more tables than there are workers that may read one, and the one in use.
            assert engine.counters()["tables"] <= 1 + 3
        for engine, past in zip(engines, before, strict=True):
            until(lambda engine=engine, past=past: engine.counters()["rx_packets"] > past["rx_packets"])  # type: ignore[misc]
    assert [engine.failure() for engine in engines] == [None, None]
    drops = {name for name in drop_reasons() if any(engine.counters()[name] for engine in engines)}
    assert drops <= {"no_route", "full"}, "no packet was lost to a change"
    for engine in engines:
        engine.stop()
        assert engine.counters()["tables"] == 1


def workers() -> list[int]:
    """Thread ids of the workers that carry packets over IPv4: a transmitter and a receiver on each side."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # another thread, which has ended
            if (task / "comm").read_text() in ("loden-tx-0\n", "loden-rx-0\n"):
                found.append(int(task.name))
    assert len(found) == 4
    return found


def policies() -> set[int]:
    """How they are scheduled."""
    return {os.sched_getscheduler(worker) for worker in workers()}


def be_busy(stack: ExitStack, receiver: Engine) -> None:
    """Carry so many packets, until the stack ends, that workers have noticed."""
    bulk(stack, stack.enter_context(packets_program()), ONE, TWO)
    begin = [time.monotonic(), receiver.counters()["rx_packets"]]

    def was_busy() -> bool:
        now = [time.monotonic(), receiver.counters()["rx_packets"]]
        if now[0] - begin[0] < 0.2:
            return False
        packets_per_ms = (now[1] - begin[1]) / (now[0] - begin[0]) / 1000
        begin[:] = now
        return packets_per_ms > FAST_PER_MS

    until(was_busy)


def take_turns(one: socket.socket, other: socket.socket) -> None:
    """A packet there and one back."""
    for sender, receiver in ((one, other), (other, one)):
        sender.send(b"x")
        assert receiver.recv(2) == b"x"


def test_workers_interrupt_others_only_while_packets_are_few(
    engines: tuple[Engine, Engine], stack: ExitStack
) -> None:
    ends = udp_pair(stack)
    take_turns(*ends)
    assert policies() == {os.SCHED_OTHER}
    with ExitStack() as heavy:
        be_busy(heavy, engines[1])
        until(lambda: policies() == {os.SCHED_BATCH})
        for engine in engines:  # whose new threads are ordinary ones
            engine.stop()
            engine.start()
        until(lambda: policies() == {os.SCHED_BATCH})
    until(lambda: policies() == {os.SCHED_OTHER})  # without another packet


def test_scheduling_that_somebody_else_has_chosen_is_kept(
    engines: tuple[Engine, Engine], stack: ExitStack
) -> None:
    ends = udp_pair(stack)
    for worker in workers():
        os.sched_setscheduler(worker, os.SCHED_BATCH, os.sched_param(0))
    with ExitStack() as heavy:
        be_busy(heavy, engines[1])
    for _ in range(5):
        time.sleep(2 * PACE_MS / 1000)  # every worker looks at what was, and there was little
        take_turns(*ends)
    assert policies() == {os.SCHED_BATCH}


def test_peer_that_moves_takes_its_packets_along(engines: tuple[Engine, Engine], stack: ExitStack) -> None:
    """Its address changes in one step: packets go to the one or the other, and none is lost in between."""
    sender, receiver = udp_pair(stack)
    peer_six = stack.enter_context(inside(TWO.namespace, lambda: open_udp(Family.IPV6, 9005)))
    del peer_six
    received = 0
    for number in range(100):
        outer = list(Family)[number % 2]
        for side, engine in zip(SIDES, engines, strict=True):
            engine.change([peer_of(other_of(side), Family.IPV4, outer=outer)], ())
        sender.send(struct.pack("=I", number))
        received += receiver.recv(9) == struct.pack("=I", number)
    assert received == 100


def test_loop_of_the_benches_carries_packets(stack: ExitStack) -> None:
    """The anchor has to work, or its figure means nothing."""
    stack.enter_context(loops(stack.enter_context(packets_program())))
    transfer(ONE, TWO, size=1 << 20, addresses=lambda side: format_address(side.loop_address))
