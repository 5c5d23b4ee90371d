# SPDX-License-Identifier: Apache-2.0
"""Rows of datagrams that were never cut, through the engine's socket for them.

A pair of sockets stands in for the TUN device, so that what is written to it is seen byte by byte. Rows come
over the loopback interface, which cuts none.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.tables.engine import Engine, Peer
from tests import packets
from tests.packets import Ip, Ip4, Ip6, Raw, Tcp, Udp

UDP_SEGMENT = 103  # <linux/udp.h>
PATIENCE_S = 10.0
HOME = b"\x7f\0\0\1"
ROW = Ip4(inner=Udp(payload=bytes(range(250)) * 4))


class Rows:
    """An engine with a socket for rows, the end of its device that is ours, and a peer that sends rows."""

    def __init__(self, stack: ExitStack, *, allow_unknown: bool = False) -> None:
        self.device, tun = (
            stack.enter_context(one) for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        self.device.settimeout(PATIENCE_S)
        self.sender, plain, rows = (stack.enter_context(_bound()) for _ in range(3))
        self.place = rows.getsockname()
        self.engine = Engine([tun.fileno()], [plain.fileno()], [rows.fileno()], allow_unknown=allow_unknown)
        port = self.sender.getsockname()[1]
        subnets = ((Ip4().source[:3] + b"\0", 24), (Ip6().source[:8] + bytes(8), 64))
        self.engine.change([Peer(address, length, HOME, port) for address, length in subnets], ())
        stack.callback(self.engine.stop)
        self.engine.start()

    def send(self, row: bytes, size: int, *, sender: socket.socket | None = None) -> None:
        """Send what a tunnel leaves of a row: a message with so many bytes of payload in each datagram."""
        sender = sender or self.sender
        sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        sender.sendto(row, self.place)

    def settled(self, before: dict[str, int]) -> dict[str, int]:
        """What has been counted since, when one message more has come: that is counted last."""
        deadline = time.monotonic() + PATIENCE_S
        while (now := self.engine.counters())["udp_receives"] == before["udp_receives"]:
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.001)
        return {name: now[name] - before[name] for name in now if now[name] != before[name]}

    def dropped(self, row: bytes, size: int, *, sender: socket.socket | None = None) -> dict[str, int]:
        """The reasons that are counted for a row."""
        before = self.engine.counters()
        self.send(row, size, sender=sender)
        found = self.settled(before)
        assert (found.pop("udp_packets"), found.pop("udp_receives")) == (1, 1)
        return found


def _bound() -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind(("127.0.0.1", 0))
    return opened


@pytest.fixture(scope="module")
def rows() -> Iterator[Rows]:
    with ExitStack() as stack:
        yield Rows(stack)


def of_row(packet: Ip, size: int) -> bytes:
    """A row as it lies in its datagram: the super-packet without the device's header."""
    return packets.super_packet(packet, size)[packets.OFFLOAD.size :]


@st.composite
def row(draw: st.DrawFn) -> tuple[Ip, int]:
    """A row of 2 to 64 datagrams, the last of which may be shorter, and the bytes of each."""
    size = draw(st.sampled_from([1, 8, 63, 64, 333, 1200]))
    count = draw(st.integers(2, min(64, 60_000 // size)))
    payload = draw(st.randoms(use_true_random=False)).randbytes(size * count - draw(st.integers(0, size - 1)))
    inner = Udp(source=draw(st.integers(1, 65535)), payload=payload)
    if draw(st.booleans()):
        ident, df, service = draw(st.integers(0, 65535)), draw(st.booleans()), draw(st.integers(0, 255))
        options = draw(st.sampled_from([b"", b"\x01" * 4]))
        ttl = draw(st.integers(2, 255))
        return Ip4(ident=ident, df=df, service=service, options=options, ttl=ttl, inner=inner), size
    extensions = draw(st.sampled_from([(), ((60, b"\0\x01\x04" + bytes(4)),)]))
    return Ip6(flow=draw(st.integers(0, 2**20 - 1)), extensions=extensions, inner=inner), size


@given(row())
def test_row_is_handed_on_as_it_came_one_hop_older(rows: Rows, found: tuple[Ip, int]) -> None:
    packet, size = found
    before = rows.engine.counters()
    rows.send(of_row(packet, size), size)
    written = rows.device.recv(1 << 17)
    older = packets.super_packet(packet, size)
    expected = older[: packets.OFFLOAD.size] + packets.forward(older[packets.OFFLOAD.size :])
    assert written == expected
    count = -(-len(packet.inner.payload) // size)
    assert rows.settled(before) == {
        "udp_packets": 1,
        "udp_receives": 1,
        "tun_writes": 1,
        "merged": count,
        "rx_packets": count,
        "rx_bytes": sum(map(len, packets.segments(packet, size))),
    }


def test_peer_is_credited_with_each_datagram(rows: Rows) -> None:
    before, counted = rows.engine.counters(), rows.engine.peer_counters()[0]
    rows.send(of_row(ROW, 64), 64)
    rows.device.recv(1 << 17)
    rows.settled(before)
    now = rows.engine.peer_counters()[0]
    assert (now.rx_packets - counted.rx_packets, now.rx_bytes - counted.rx_bytes) == (16, 16 * 28 + 1000)


def test_datagrams_that_are_no_row_are_taken_each_by_itself(rows: Rows) -> None:
    """Every process of this host can send to the socket: what comes so is as good as at the other."""
    packet = msgspec.structs.replace(ROW, inner=Udp(payload=b"one")).bytes()
    before = rows.engine.counters()
    rows.sender.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)
    rows.sender.sendto(packet, rows.place)
    assert rows.device.recv(1 << 17)[packets.OFFLOAD.size :] == packets.forward(packet)
    assert rows.settled(before)["rx_packets"] == 1


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (msgspec.structs.replace(ROW, source=bytes((10, 5, 9, 1))), "spoofed"),
        (msgspec.structs.replace(ROW, ttl=1), "ttl"),
        (msgspec.structs.replace(ROW, mf=True), "offload"),
        (msgspec.structs.replace(ROW, inner=Tcp(payload=bytes(1000))), "offload"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_row_that_may_not_come_in_is_dropped_for_its_reason(rows: Rows, packet: Ip4, reason: str) -> None:
    assert rows.dropped(of_row(packet, 64), 64) == {reason: 1}


def test_row_of_another_protocol_is_dropped(rows: Rows) -> None:
    packet = msgspec.structs.replace(ROW, inner=Raw(protocol=132, payload=bytes(1000)))
    assert rows.dropped(packet.bytes(), 64) == {"offload": 1}


def test_row_whose_length_lies_is_dropped(rows: Rows) -> None:
    row = of_row(ROW, 64)
    assert rows.dropped(row + b"more", 64) == {"length": 1}
    assert rows.dropped(row[:-1], 64) == {"length": 1}
    assert rows.dropped(row[:20], 10) == {"length": 1}
    assert rows.dropped(row[:19], 10) == {"truncated": 1}


def test_packets_behind_each_other_are_no_row(rows: Rows) -> None:
    """What the kernel has merged out of several datagrams: each is a whole packet."""
    packet = msgspec.structs.replace(ROW, inner=Udp(payload=bytes(36))).bytes()
    assert rows.dropped(packet * 3, len(packet)) == {"length": 1}


def test_row_of_a_stranger_is_dropped_or_let_in_on_demand(rows: Rows) -> None:
    with _bound() as stranger, ExitStack() as stack:
        assert rows.dropped(of_row(ROW, 64), 64, sender=stranger) == {"unknown_peer": 1}
        openly = Rows(stack, allow_unknown=True)
        openly.send(of_row(ROW, 64), 64, sender=stranger)
        assert len(openly.device.recv(1 << 17)) == packets.OFFLOAD.size + len(ROW.bytes())


def rows_come_apart() -> None:
    """A row's datagrams come one by one: to be run with ``tests/kernel/old_kernel.c`` loaded."""
    with ExitStack() as stack:
        found = Rows(stack)
        packet = msgspec.structs.replace(ROW, inner=Udp(payload=bytes(range(250)) * 4 + b"end"))
        for _ in range(2):
            found.send(of_row(packet, 100), 100)
            written = [found.device.recv(1 << 17)[packets.OFFLOAD.size :] for _ in range(11)]
            assert written == [packets.forward(one) for one in packets.segments(packet, 100)]
        counts = found.engine.counters()
        assert (counts["merged"], counts["tun_writes"]) == (0, 23), "it is tried once"
