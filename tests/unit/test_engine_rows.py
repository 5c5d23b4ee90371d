# SPDX-License-Identifier: Apache-2.0
"""Super-packets that were never cut, rows of datagrams and TCP, through the engine's socket for them."""

import random
from collections.abc import Iterator
from contextlib import ExitStack
from socket import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import packets
from tests.engine_ends import Ends, bound
from tests.packets import ACK, CWR, ECE, FIN, PSH, Ip, Ip4, Ip6, Raw, Tcp, Udp

ROW = Ip4(inner=Udp(payload=bytes(range(250)) * 4))


def dropped(rows: Ends, row: bytes, size: int, *, sender: socket | None = None) -> dict[str, int]:
    """The reasons that are counted for a row."""
    before = rows.engine.counters()
    rows.send(row, size, row=True, sender=sender)
    found = rows.settled(before)
    assert (found.pop("udp_packets"), found.pop("udp_receives")) == (1, 1)
    return found


@pytest.fixture(scope="module")
def rows() -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack)


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
def test_row_is_handed_on_as_it_came_one_hop_older(rows: Ends, found: tuple[Ip, int]) -> None:
    packet, size = found
    before = rows.engine.counters()
    rows.send(of_row(packet, size), size, row=True)
    written = rows.written()
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


def test_peer_is_credited_with_each_datagram(rows: Ends) -> None:
    before, counted = rows.engine.counters(), rows.engine.peer_counters()[0]
    rows.send(of_row(ROW, 64), 64, row=True)
    rows.written()
    rows.settled(before)
    now = rows.engine.peer_counters()[0]
    assert (now.rx_packets - counted.rx_packets, now.rx_bytes - counted.rx_bytes) == (16, 16 * 28 + 1000)


def test_datagrams_that_are_no_row_are_taken_each_by_itself(rows: Ends) -> None:
    """Every process of this host can send to the socket: what comes so is as good as at the other."""
    packet = msgspec.structs.replace(ROW, inner=Udp(payload=b"one")).bytes()
    before = rows.engine.counters()
    rows.send(packet, 0, row=True)
    assert rows.written()[packets.OFFLOAD.size :] == packets.forward(packet)
    assert rows.settled(before)["rx_packets"] == 1


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (msgspec.structs.replace(ROW, source=bytes((10, 5, 9, 1))), "spoofed"),
        (msgspec.structs.replace(ROW, ttl=1), "ttl"),
        (msgspec.structs.replace(ROW, mf=True), "offload"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_row_that_may_not_come_in_is_dropped_for_its_reason(rows: Ends, packet: Ip4, reason: str) -> None:
    assert dropped(rows, of_row(packet, 64), 64) == {reason: 1}


def test_row_of_another_protocol_is_dropped(rows: Ends) -> None:
    packet = msgspec.structs.replace(ROW, inner=Raw(protocol=132, payload=bytes(1000)))
    assert dropped(rows, packet.bytes(), 64) == {"offload": 1}


def test_row_whose_length_lies_is_dropped(rows: Ends) -> None:
    row = of_row(ROW, 64)
    assert dropped(rows, row + b"more", 64) == {"length": 1}
    assert dropped(rows, row[:-1], 64) == {"length": 1}
    assert dropped(rows, row[:20], 10) == {"length": 1}
    assert dropped(rows, row[:19], 10) == {"truncated": 1}


def test_packets_behind_each_other_are_no_row(rows: Ends) -> None:
    """What the kernel has merged out of several datagrams: each is a whole packet."""
    packet = msgspec.structs.replace(ROW, inner=Udp(payload=bytes(36))).bytes()
    assert dropped(rows, packet * 3, len(packet)) == {"length": 1}


def test_row_of_a_stranger_is_dropped_or_let_in_on_demand(rows: Ends) -> None:
    with bound() as stranger, ExitStack() as stack:
        assert dropped(rows, of_row(ROW, 64), 64, sender=stranger) == {"unknown_peer": 1}
        openly = Ends(stack, allow_unknown=True)
        openly.send(of_row(ROW, 64), 64, row=True, sender=stranger)
        assert len(openly.written()) == packets.OFFLOAD.size + len(ROW.bytes())


@pytest.fixture(scope="module")
def handed() -> Iterator[Ends]:
    """What comes to its socket for rows has come to another address."""
    with ExitStack() as stack:
        yield Ends(stack, rows="0.0.0.0")


@given(
    st.one_of(st.integers(1, 64), st.integers(500, 64_000)),
    st.integers(1, 900),
    st.sampled_from([0, 12, 40]),
    st.sampled_from([ACK, ACK | PSH, ACK | FIN, ACK | CWR | ECE]),
    st.booleans(),
)
def test_tcp_that_is_handed_over_is_written_as_it_came(
    handed: Ends, size: int, more: int, options: int, flags: int, is_ipv4: bool
) -> None:
    """The program has left the bytes of each segment in the place of the checksum."""
    payload = random.Random(size).randbytes(min(size + more, 65_000))
    tcp = Tcp(flags=flags, options=b"\1" * options, payload=payload)
    packet = Ip4(inner=tcp) if is_ipv4 else Ip6(inner=tcp)
    before = handed.engine.counters()
    handed.send(of_handed(packet, size), 0, row=True)
    older = packets.super_packet(packet, size, ecn=bool(flags & CWR))
    header = older[: packets.OFFLOAD.size]
    assert handed.written() == header + packets.forward(older[packets.OFFLOAD.size :])
    counted = handed.settled(before)
    assert counted["merged"] == counted["rx_packets"] == len(packets.segments(packet, size))


@pytest.mark.parametrize(
    "packet",
    [
        Ip4(inner=Tcp(payload=bytes(2000))),
        Ip4(inner=Tcp()),
        Ip4(inner=Udp(payload=bytes(2000)), mf=True),
        Ip4(inner=Raw(protocol=6, payload=bytes(19))),
        Ip4(inner=Raw(protocol=132, payload=bytes(2000))),
        Ip6(extensions=((60, b"\x3f" + bytes(510)),), inner=Tcp(payload=bytes(2000))),
    ],
)
def test_what_cannot_be_a_row_is_dropped(handed: Ends, packet: Ip) -> None:
    """A size of nothing, no payload, a fragment, no whole header, no such protocol, headers without end."""
    before = handed.engine.counters()
    handed.send(of_handed(packet, 0) if isinstance(packet.inner, Tcp) else packet.bytes(), 0, row=True)
    assert handed.settled(before) == {"udp_packets": 1, "udp_receives": 1, "offload": 1}


def test_tcp_behind_more_headers_says_no_size(handed: Ends) -> None:
    """What it has in the place of the checksum is a checksum."""
    packet = Ip6(extensions=((60, b"\0\x01\x04" + bytes(4)),), inner=Tcp(payload=bytes(2000)))
    before = handed.engine.counters()
    handed.send(packet.bytes(), 0, row=True)
    assert handed.settled(before) == {"udp_packets": 1, "udp_receives": 1, "offload": 1}


def test_tcp_that_comes_by_itself_is_no_row(rows: Ends) -> None:
    """Whoever sends to the socket's own address says nothing by that."""
    packet = Ip4(inner=Tcp(payload=bytes(60_000))).bytes()
    rows.send(packet, 0, row=True)
    assert rows.written() == packets.PLAIN + packets.forward(packet)


def of_handed(packet: Ip, size: int) -> bytes:
    """A TCP super-packet as the program hands it over."""
    whole = packet.bytes()
    place = packets.check(whole).network + 16
    return whole[:place] + size.to_bytes(2, "big") + whole[place + 2 :]


def rows_come_apart() -> None:
    """A row's datagrams come one by one: to be run with ``tests/kernel/old_kernel.c`` loaded."""
    with ExitStack() as stack:
        found = Ends(stack)
        packet = msgspec.structs.replace(ROW, inner=Udp(payload=bytes(range(250)) * 4 + b"end"))
        for _ in range(2):
            found.send(of_row(packet, 100), 100, row=True)
            written = [found.written()[packets.OFFLOAD.size :] for _ in range(11)]
            assert written == [packets.forward(one) for one in packets.segments(packet, 100)]
        counts = found.engine.counters()
        assert (counts["merged"], counts["tun_writes"]) == (0, 23), "it is tried once"
