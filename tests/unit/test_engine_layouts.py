# SPDX-License-Identifier: Apache-2.0
"""What the engine expects of packets for their layout changes how they are read, and nothing else.

Rows of packets that are what the last ones led to expect, and that are not: longer or shorter headers, other
sizes, rubbish in between. Everything is compared byte for byte with ``tests/packets.py``.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests import packets
from tests.engine_ends import NARROW4, NARROW6, Ends, bound
from tests.packets import ACK, PLAIN, PSH, Dropped, Ip, Ip4, Ip6, Raw, Tcp, Udp

TIMESTAMPS = b"\1\1\x08\x0a" + bytes(8)
SACK = b"\1\1\x05\x0a" + bytes(8)
DESTINATION = ((60, b"\0\x01\x04" + bytes(4)),)
#: Payload bytes of a segment; layouts begin at 1,024.
SIZES = (900, 1023, 1024, 1200, 1408, 1420, 8948)
FILLING = random.Random(1).randbytes(1 << 16)
USUAL = Tcp(options=TIMESTAMPS)


@pytest.fixture(scope="module")
def ends() -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(stack)


transports: st.SearchStrategy[Tcp | Udp] = st.one_of(
    st.builds(
        Tcp,
        sequence=st.integers(0, 2**32 - 1),
        flags=st.sampled_from([ACK, ACK | PSH, 0xFF]),
        options=st.sampled_from([b"", TIMESTAMPS, TIMESTAMPS, TIMESTAMPS + SACK]),
    ),
    st.builds(Udp),
)


@st.composite
def supers(draw: st.DrawFn) -> tuple[Ip, int]:
    """A super-packet that the device is given, and the bytes of its segments; 0: a packet of any length."""
    size = draw(st.sampled_from([*SIZES, 1420, 1420, 0]))
    inner: Tcp | Udp | Raw = draw(transports)
    payload = FILLING[: draw(st.one_of(st.integers(1, 9000), st.integers(30_000, 65_000)))]
    inner = msgspec.structs.replace(inner, payload=payload)
    if size == 0 and draw(st.booleans()):
        inner = Raw(protocol=253, payload=payload)
    if draw(st.booleans()):
        return Ip4(df=draw(st.booleans()), options=draw(st.sampled_from([b"", b"\1" * 4])), inner=inner), size
    return Ip6(extensions=draw(st.sampled_from([(), DESTINATION])), inner=inner), size


def as_read(packet: Ip, size: int) -> bytes:
    """A packet as the kernel gives it to a device's reader."""
    return packets.super_packet(packet, size) if size else PLAIN + packet.bytes()


def as_sent(packet: Ip, size: int) -> list[bytes]:
    whole = packets.segments(packet, size) if size else [packet.bytes()]
    return [packets.forward(one) for one in whole]


def filled(packet: Ip, length: int) -> Ip:
    inner = msgspec.structs.replace(packet.inner, payload=FILLING[:length])
    return msgspec.structs.replace(packet, inner=inner)


#: It leads the engine to expect more of the kind.
LEAD = (filled(Ip4(inner=USUAL), 60_000), 1420)


@given(st.lists(supers(), min_size=1, max_size=5))
@example([LEAD])
@example([(Ip6(inner=Raw(protocol=60, payload=bytes([60, 255]) + FILLING[:60_000])), 0)])
@settings(max_examples=150)
def test_what_is_read_is_sent_in_the_order_of_its_bytes(ends: Ends, found: list[tuple[Ip, int]]) -> None:
    for packet, size in (LEAD, *found, LEAD):
        ends.device.send(as_read(packet, size))
        for expected in as_sent(packet, size):
            assert ends.sent() == expected


def test_small_packets_end_the_expectation_and_a_large_one_brings_it_back(ends: Ends) -> None:
    small = [(filled(Ip4(inner=Udp()), length), 0) for length in range(1, 13)]
    for packet, size in (LEAD, *small, LEAD, LEAD):
        ends.device.send(as_read(packet, size))
        assert [ends.sent() for _ in as_sent(packet, size)] == as_sent(packet, size)


@pytest.mark.parametrize("size", SIZES)
def test_packet_that_nobody_gets_is_quoted_whole(size: int) -> None:
    """An ICMP error quotes what follows in the packet, not what lies behind it in memory."""
    home = bytes.fromhex("fd000005000000010000000000000001")
    lead = filled(Ip6(inner=USUAL), 60_000)
    lost = msgspec.structs.replace(lead, target=bytes.fromhex("fd0000050000ffff0000000000000002"))
    with ExitStack() as stack:
        ends = Ends(stack, source6=home)
        for _ in range(2):
            ends.device.send(as_read(lead, size))
            assert [ends.sent() for _ in as_sent(lead, size)] == as_sent(lead, size)
            read = as_read(lost, size)
            ends.device.send(read)
            error = ends.written()[len(PLAIN) :]
            assert error[40] == 1, "ICMPv6: destination unreachable"
            assert len(error) == 1280
            assert error[48:] == read[len(PLAIN) :][: 1280 - 48]


def test_packets_of_one_batch_do_not_touch_each_other(ends: Ends) -> None:
    """Several are read before the first is sent, each laid out behind the one before."""
    found = [(filled(Ip4(ident=number, inner=USUAL), 5_000), 1420) for number in range(3)]
    ends.engine.stop()
    for packet, size in found:
        ends.device.send(as_read(packet, size))
    ends.engine.start()
    for packet, size in found:
        assert [ends.sent() for _ in as_sent(packet, size)] == as_sent(packet, size)


def test_segments_that_must_be_fragmented_are_those_of_the_packet() -> None:
    lead = filled(Ip4(df=False, inner=USUAL), 20_000)
    narrow = msgspec.structs.replace(lead, target=NARROW4)
    with ExitStack() as stack:
        ends = Ends(stack, narrow=1300)
        for _ in range(2):
            ends.device.send(as_read(lead, 1420))
            assert [ends.sent() for _ in as_sent(lead, 1420)] == as_sent(lead, 1420)
            ends.device.send(as_read(narrow, 1420))
            expected = [
                piece for one in as_sent(narrow, 1420) for piece in packets.fragments(ip4_of(one), 1300)
            ]
            assert [ends.sent() for _ in expected] == expected


def ip4_of(packet: bytes) -> Ip4:
    found = packets.parse(packet)
    assert isinstance(found, Ip4)
    return found


def test_super_packet_that_is_too_big_is_quoted_whole() -> None:
    """And not the gap behind its first segment, which is short enough for the quote to reach it."""
    lead = filled(Ip6(inner=USUAL), 60_000)
    narrow = msgspec.structs.replace(lead, target=NARROW6)
    with ExitStack() as stack:
        ends = Ends(stack, narrow=1100, source6=lead.source[:-1] + b"\1")
        ends.device.send(as_read(lead, 1050))
        assert [ends.sent() for _ in as_sent(lead, 1050)] == as_sent(lead, 1050)
        read = as_read(narrow, 1050)
        ends.device.send(read)
        error = ends.written()[len(PLAIN) :]
        assert error[40] == 2, "ICMPv6: packet too big"
        assert error[48:] == read[len(PLAIN) :][: 1280 - 48]


@pytest.mark.parametrize("size", [1424, 60_000, 65_000, 65_483, 65_484, 65_535])
def test_segments_larger_than_what_there_is_of_them(ends: Ends, size: int) -> None:
    packet = filled(Ip4(inner=USUAL), 1423)
    for one, each in ((LEAD[0], 1420), (packet, size), (packet, size), LEAD):
        ends.device.send(as_read(one, each))
        assert [ends.sent() for _ in as_sent(one, each)] == as_sent(one, each)


# Receiving

FOREIGN = b"\xee\1"  #: ends a source that is not the peer's
#: What can be wrong with a packet in the midst of a row, and what comes of it.
SPOILS = ("", "", "", "", "", "sum", "spoofed", "ttl", "options", "no header", "noise")


def spoiled(packet: Ip, spoil: str) -> bytes:
    """A packet of the same length with something wrong."""
    length = len(packet.bytes())
    if spoil == "sum":
        return packet.bytes()[:-1] + b"!"
    if spoil == "spoofed":
        return msgspec.structs.replace(packet, source=packet.source[:-2] + FOREIGN).bytes()
    if spoil == "ttl":
        return msgspec.structs.replace(packet, **{"ttl" if isinstance(packet, Ip4) else "hops": 1}).bytes()
    if spoil == "options":
        assert isinstance(packet.inner, Tcp | Udp)
        less = filled(packet, len(packet.inner.payload) - 8)
        if isinstance(less, Ip4):
            return msgspec.structs.replace(less, options=b"\1" * 8).bytes()
        return msgspec.structs.replace(less, extensions=DESTINATION).bytes()
    if spoil == "no header":
        head = len(packet.bytes()) - len(packet.inner.bytes(b""))
        return msgspec.structs.replace(packet, inner=Raw(protocol=6, payload=bytes(length - head))).bytes()
    return FILLING[:length] if spoil == "noise" else packet.bytes()


@st.composite
def messages(draw: st.DrawFn) -> tuple[list[bytes], int]:
    """Packets of one message: all of one length but the last; and that length."""
    size = draw(st.sampled_from([*SIZES, 1420, 1420, 1420]))
    inner = draw(transports)
    head: Ip = Ip4(inner=inner) if draw(st.booleans()) else Ip6(inner=inner)
    whole = filled(head, draw(st.integers(1, max(1, min(60 * size, 60_000)))))
    found = [packets.parse(one) for one in packets.segments(whole, size)]
    spoils = draw(st.lists(st.sampled_from(SPOILS), min_size=len(found) - 1, max_size=len(found) - 1))
    row = [spoiled(one, spoil) for one, spoil in zip(found[:-1], spoils, strict=True)] + [found[-1].bytes()]
    return row, len(found[0].bytes())


def as_written(row: Iterable[bytes]) -> list[bytes]:
    """What goes on of the packets that came."""
    found = []
    for packet in row:
        try:
            older = packets.forward(packet)
        except Dropped:
            continue
        if source_of(older)[-2:] != FOREIGN:
            found.append(older)
    return found


def source_of(packet: bytes) -> bytes:
    return packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]


def by_flow(found: Iterable[bytes]) -> dict[bytes, list[bytes]]:
    """In order within each flow; without identifications, which a merge may number anew."""
    flows: dict[bytes, list[bytes]] = defaultdict(list)
    for packet in found:
        is_ipv4 = packet[0] >> 4 == 4
        protocol = packet[9:10] if is_ipv4 else packet[6:7]
        flows[source_of(packet) + protocol].append(
            packet[:4] + packet[6:10] + packet[12:] if is_ipv4 else packet
        )
    return dict(flows)


def row_of(count: int, inner: Tcp | Udp, size: int = 1420) -> tuple[list[bytes], int]:
    row = packets.segments(filled(Ip4(inner=inner), count * size), size)
    return row, len(row[0])


def with_spoil(row: tuple[list[bytes], int], place: int, spoil: str) -> tuple[list[bytes], int]:
    found, size = row
    found[place] = spoiled(packets.parse(found[place]), spoil)
    return found, size


@given(st.lists(messages(), min_size=1, max_size=4))
@example([row_of(40, USUAL)])
@example([row_of(40, Tcp(options=TIMESTAMPS + SACK), 1408), row_of(40, Tcp())])
@example([with_spoil(row_of(40, USUAL), 20, "options")])
@example([with_spoil(row_of(40, USUAL), 39, "noise")])
@settings(max_examples=150)
def test_what_comes_is_written_byte_for_byte(ends: Ends, found: list[tuple[list[bytes], int]]) -> None:
    for row, size in (row_of(44, USUAL), *found, row_of(44, USUAL), ([LAST], len(LAST))):
        before = ends.engine.counters()
        ends.send(b"".join(row), size if len(row) > 1 else 0)
        expected = as_written(row)
        written: list[bytes] = []
        while len(written) < len(expected):
            written += packets.cut_again(ends.written())
        assert by_flow(written) == by_flow(expected)
        counts = ends.settled(before)
        assert counts["udp_packets"] == len(row)
        assert counts.get("rx_packets", 0) == len(expected)


LAST = Ip4(inner=Udp(payload=b"last")).bytes()


def test_expected_row_is_written_as_one_packet_of_the_same_bytes(ends: Ends) -> None:
    """And so is one that ends in the midst of a message: the next begins with headers that lie apart."""
    for flags in (ACK, ACK | PSH):
        row, size = row_of(44, USUAL)
        middle = packets.parse(row[20])
        inner = msgspec.structs.replace(middle.inner, flags=flags)
        row[20] = msgspec.structs.replace(middle, inner=inner).bytes()
        written: list[bytes] = []
        for _ in range(3):
            ends.send(b"".join(row), size)
            written = [ends.written()]
            while sum(len(packets.cut_again(one)) for one in written) < len(row):
                written.append(ends.written())
        assert len(written) == (1 if flags == ACK else 2)
        assert by_flow([two for one in written for two in packets.cut_again(one)]) == by_flow(as_written(row))


def merged_come_apart() -> None:
    """Merged datagrams are written one by one: to be run with ``tests/kernel/old_kernel.c`` loaded."""
    with ExitStack() as stack:
        ends = Ends(stack)
        for number in range(4):
            row, size = row_of(44, Udp(source=1000 + number), 1200)
            ends.send(b"".join(row), size)
            written = [ends.written() for _ in row]
            assert by_flow(one[len(PLAIN) :] for one in written) == by_flow(as_written(row))
        assert ends.engine.counters()["merged"] == 0


@pytest.mark.parametrize("length", [0, 1, 19, 51, 52, 53, 1471, 1472, 1473, 1524, 1525, 30_000])
def test_messages_of_any_length_end_where_they_end(ends: Ends, length: int) -> None:
    """An empty one too, from the peer and from a stranger, while a row is expected."""
    with bound() as stranger:
        for sender in (stranger, None):
            before = ends.engine.counters()
            ends.send(b"".join(row_of(44, USUAL)[0]), 1472)
            assert len(packets.cut_again(ends.written())) == 44
            ends.settled(before)  # it is written before it is counted
            before = ends.engine.counters()
            ends.send(FILLING[:length], 0, sender=sender)
            counted = ends.settled(before)
            assert counted.pop("udp_packets") == 1
            assert counted.pop("udp_receives") == 1
            assert sum(counted.values()) == 1, "one drop"
            assert ("unknown_peer" in counted) == (sender is stranger)
