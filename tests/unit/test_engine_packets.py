# SPDX-License-Identifier: Apache-2.0
"""What the engine does with packets, against the plain reference in ``tests/packets.py``."""

import random
import struct
from collections.abc import Callable, Sequence

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from loden import _engine
from loden.tables.engine import drop_reasons, is_available
from tests import packets
from tests.packets import ACK, CWR, ECE, FIN, PSH, SYN, TCP, UDP, Dropped, Ip, Ip4, Ip6, Raw, Tcp, Udp

SOURCE4, SOURCE6 = bytes((10, 5, 1, 0)), bytes.fromhex("fd000005000000010000000000000000")
MOST = 65535

octets = st.integers(0, 255)
payloads = st.binary(max_size=300)
#: Options of IPv4 that add up, padded: record route, router alert (copied), nothing, the end.
options4 = st.lists(
    st.sampled_from([b"\x07\x07\x04\0\0\0\0", b"\x94\x04\0\0", b"\x01", b"\x82\x0b" + bytes(9)]), max_size=3
).map(lambda found: b"".join(found) + bytes(-len(b"".join(found)) % 4))
hop_by_hop = st.integers(0, 3).map(lambda n: (0, bytes([n]) + bytes(6 + 8 * n)))
routing = st.integers(0, 2).map(lambda n: (43, bytes([n]) + bytes(6 + 8 * n)))
destination = st.integers(0, 3).map(lambda n: (60, bytes([n]) + bytes(6 + 8 * n)))
authentication = st.integers(1, 4).map(lambda n: (51, bytes([2 * n]) + bytes(8 * n + 6)))
extensions = st.lists(st.one_of(hop_by_hop, routing, destination, authentication), max_size=3).map(tuple)
tcp_options = st.integers(0, 10).flatmap(lambda words: st.binary(min_size=4 * words, max_size=4 * words))
tcps = st.builds(
    Tcp,
    source=st.integers(0, MOST),
    sequence=st.integers(0, 2**32 - 1),
    flags=octets,
    options=tcp_options,
    payload=payloads,
)
udps = st.builds(Udp, source=st.integers(0, MOST), payload=payloads, has_checksum=st.booleans())
raws = st.builds(Raw, protocol=st.sampled_from([1, 47, 58, 132, 253]), payload=payloads)
inners = st.one_of(tcps, udps, raws)
ip4s = st.builds(
    Ip4,
    service=octets,
    ident=st.integers(0, MOST),
    df=st.booleans(),
    mf=st.booleans(),
    offset=st.sampled_from([0, 0, 0, 185]),
    ttl=octets,
    options=options4,
    inner=inners,
)
ip6s = st.builds(
    Ip6, service=octets, flow=st.integers(0, 2**20 - 1), hops=octets, extensions=extensions, inner=inners
)
ips: st.SearchStrategy[Ip] = st.one_of(ip4s, ip6s)


def outcome(function: Callable[[], object]) -> object:
    """What a function returns, or the reason why it drops."""
    try:
        return function()
    except (Dropped, ValueError) as reason:
        return str(reason)


def checked(packet: bytes) -> object:
    return outcome(lambda: packets.Found(*_engine._check(packet)))


def test_engine_is_there() -> None:
    assert is_available() == ""


@given(st.binary(max_size=3000))
@example(b"\xff" * 31)
@example(bytes(65535))
def test_checksum_is_that_of_rfc_1071(data: bytes) -> None:
    assert _engine._checksum(data) == packets.ones_sum(data)


@given(ips, st.binary(max_size=9))
def test_packet_is_taken_apart_and_trimmed(packet: Ip, behind: bytes) -> None:
    whole = packet.bytes() + behind
    assert checked(whole) == outcome(lambda: packets.check(whole))


@given(ips, st.data())
def test_packet_with_wrong_bytes_is_dropped_for_the_same_reason(packet: Ip, data: st.DataObject) -> None:
    whole = bytearray(packet.bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, min(len(whole), 60) - 1))] = data.draw(octets)
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))]) if data.draw(st.booleans()) else bytes(whole)
    if cut and cut[0] >> 4 == 4 and data.draw(st.booleans()):
        cut = with_right_checksum(cut)  # so that what is behind the checksum is looked at
    assert checked(cut) == outcome(lambda: packets.check(cut))


def with_right_checksum(packet: bytes) -> bytes:
    header = packet[0] % 16 * 4
    if len(packet) < max(header, 20):
        return packet
    empty = packet[:10] + bytes(2) + packet[12:]
    return packet[:10] + packets.checksum(empty[:header]).to_bytes(2, "big") + packet[12:]


@given(st.binary(max_size=100))
def test_noise_is_judged_alike(noise: bytes) -> None:
    assert checked(noise) == outcome(lambda: packets.check(noise))


def broken(packet: bytes, at: int, value: bytes) -> bytes:
    return packet[:at] + value + packet[at + len(value) :]


GOOD4 = Ip4(inner=Udp(payload=b"hello")).bytes()
GOOD6 = Ip6(inner=Udp(payload=b"hello")).bytes()
NO_OPTIONS = Ip4(options=b"\x07\x09\x04\0", inner=Raw(protocol=253)).bytes()


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"", "truncated"),
        (GOOD4[:19], "truncated"),
        (GOOD6[:39], "truncated"),
        (b"\x4f" + GOOD4[1:], "truncated"),
        (b"\x55" + GOOD4[1:], "version"),
        (b"\x44" + GOOD4[1:], "header"),
        (GOOD4[:-1], "length"),
        (GOOD6[:-1], "length"),
        (with_right_checksum(broken(GOOD4, 2, b"\0\x13")), "length"),
        (broken(GOOD4, 10, b"\0\0"), "checksum"),
        (NO_OPTIONS, "options"),
        (Ip6(extensions=((0, bytes([1]) + bytes(6)),)).bytes(), "options"),
        (Ip6(extensions=((0, bytes([0]) + bytes(2)),)).bytes(), "options"),
        (Ip4(ttl=0).bytes(), "ttl"),
        (Ip6(hops=0).bytes(), "ttl"),
    ],
)
def test_bad_packet_is_dropped_for_its_reason(packet: bytes, reason: str) -> None:
    assert checked(packet) == reason
    assert reason in drop_reasons()
    assert outcome(lambda: packets.check(packet)) == reason


@given(ips)
def test_packet_goes_one_hop_further(packet: Ip) -> None:
    whole = packet.bytes()
    assert outcome(lambda: _engine._forward(whole)) == outcome(lambda: packets.forward(whole))


def test_checksum_of_header_follows_ttl_for_every_checksum() -> None:
    for ident in range(0, MOST + 1, 7):
        whole = Ip4(ident=ident, ttl=ident % 254 + 2).bytes()
        assert _engine._forward(whole) == packets.forward(whole)


# Segmentation


def long_payload(length: int) -> bytes:
    return random.Random(length).randbytes(length)


transports: st.SearchStrategy[Tcp | Udp] = st.one_of(
    st.builds(
        Tcp,
        sequence=st.integers(0, 2**32 - 1),
        flags=octets,
        options=tcp_options,
        payload=st.integers(1, 60000).map(long_payload),
    ),
    st.builds(Udp, payload=st.integers(1, 60000).map(long_payload)),
)
supers: st.SearchStrategy[Ip] = st.one_of(
    st.builds(
        Ip4,
        service=octets,
        ident=st.integers(0, MOST),
        df=st.booleans(),
        options=options4,
        inner=transports,
    ),
    st.builds(Ip6, flow=st.integers(0, 2**20 - 1), extensions=extensions, inner=transports),
)


@given(supers, st.sampled_from([1, 7, 536, 1219, 1220, 1448, 8948, 65000]), st.booleans())
@settings(max_examples=60)
def test_super_packet_is_cut_as_the_kernel_would(packet: Ip, size: int, ecn: bool) -> None:
    inner = packet.inner
    assert isinstance(inner, Tcp | Udp)
    if size < 100:
        inner = msgspec.structs.replace(inner, payload=inner.payload[:900])
        packet = msgspec.structs.replace(packet, inner=inner)
    given_packet = packets.super_packet(packet, size, ecn=ecn and isinstance(inner, Tcp))
    assert _engine._segment(given_packet) == packets.segments(packet, size)


@given(supers)
@settings(max_examples=20)
def test_super_packet_is_cut_the_same_without_a_sum_from_the_kernel(packet: Ip) -> None:
    whole = packets.super_packet(packet, 1000)
    assert _engine._segment(b"\0" + whole[1:]) == packets.segments(packet, 1000)


def test_destination_behind_a_routing_header_is_in_the_sum() -> None:
    """The kernel's own sum is what the segments' go on from, not one over the addresses in the header."""
    packet = Ip6(extensions=((43, bytes([0]) + bytes(6)),), inner=Tcp(payload=long_payload(3000)))
    final = msgspec.structs.replace(packet, target=bytes(15) + b"\x09")
    shown = bytearray(packets.super_packet(final, 1000))
    shown[10 + 24 : 10 + 40] = packet.target
    wanted = [one[:24] + packet.target + one[40:] for one in packets.segments(final, 1000)]
    assert _engine._segment(bytes(shown)) == wanted


@given(
    st.one_of(st.builds(Tcp, options=tcp_options, payload=payloads), st.builds(Udp, payload=payloads)),
    st.booleans(),
)
def test_checksum_that_was_left_to_the_device_is_finished(inner: Tcp | Udp, is_ipv4: bool) -> None:
    packet: Ip = Ip4(inner=inner) if is_ipv4 else Ip6(inner=inner)
    whole = packets.super_packet(packet, 0)
    alone = whole[:1] + b"\0" + whole[2:]
    assert _engine._segment(alone) == [packet.bytes()]


def test_sum_of_zero_is_sent_as_ones_in_udp() -> None:
    for number in range(MOST + 1):
        packet = Ip4(inner=Udp(payload=struct.pack("!H", number)))
        if packet.bytes()[26:28] == b"\xff\xff":
            break
    whole = packets.super_packet(packet, 0)
    assert _engine._segment(whole[:1] + b"\0" + whole[2:]) == [packet.bytes()]
    assert _engine._segment(packets.super_packet(packet, 2)) == [packet.bytes()]


SUPER = packets.super_packet(Ip4(inner=Tcp(payload=bytes(3000))), 1000)
SUPER6 = packets.super_packet(Ip6(inner=Tcp(payload=bytes(3000))), 1000)


@pytest.mark.parametrize(
    "packet",
    [
        broken(SUPER, 1, b"\x02"),  # no such kind
        broken(SUPER, 1, b"\x03"),  # UFO, which is never asked for
        broken(SUPER, 1, b"\x04"),  # says IPv6
        broken(SUPER, 1, b"\x05"),  # says UDP
        broken(SUPER6, 1, b"\x01"),  # says IPv4
        broken(SUPER, 4, bytes(2)),  # segments of nothing
        broken(SUPER, 10 + 32, b"\x40"),  # a TCP header of 16 bytes
        packets.OFFLOAD.pack(1, 1, 0, 9, 20, 16) + Ip4(inner=Tcp()).bytes(),  # no payload
        packets.OFFLOAD.pack(1, 1, 0, 9, 20, 16) + Ip4(inner=Raw(protocol=TCP, payload=bytes(19))).bytes(),
        packets.OFFLOAD.pack(1, 5, 0, 9, 20, 6) + Ip4(inner=Raw(protocol=UDP, payload=bytes(7))).bytes(),
        packets.OFFLOAD.pack(1, 1, 0, 9, 20, 16) + Ip4(mf=True, inner=Tcp(payload=b"x")).bytes(),
        packets.OFFLOAD.pack(1, 4, 0, 9, 552, 16)
        + Ip6(extensions=((60, b"\x3f" + bytes(510)),), inner=Tcp(payload=b"x")).bytes(),  # 532 of headers
        packets.OFFLOAD.pack(1, 0, 0, 0, 19, 6) + Ip4(inner=Udp(payload=b"x")).bytes(),  # sum in the header
        packets.OFFLOAD.pack(1, 0, 0, 0, 20, 8) + Ip4(inner=Udp()).bytes(),  # checksum behind the end
        packets.OFFLOAD.pack(1, 0, 0, 0, 65535, 65535) + Ip4(inner=Udp()).bytes(),
    ],
)
def test_virtio_header_that_does_not_fit_is_refused(packet: bytes) -> None:
    assert outcome(lambda: _engine._segment(packet)) == "offload"


def test_packet_shorter_than_its_virtio_header_is_truncated() -> None:
    assert outcome(lambda: _engine._segment(SUPER[:9])) == "truncated"
    assert outcome(lambda: _engine._segment(SUPER[:10])) == "truncated"


# Merging


def stream(
    count: int, size: int, *, last: int | None = None, flags: int = ACK, last_flags: int = ACK | PSH
) -> list[Ip4]:
    """Segments of one connection, the last one shorter."""
    found = []
    for number in range(count):
        is_last = number == count - 1
        length = size if not is_last or last is None else last
        inner = Tcp(
            sequence=2**32 - 3000 + number * size,
            flags=last_flags if is_last else flags,
            options=b"\1\1\x08\x0a" + bytes(8),
            payload=random.Random(number).randbytes(length),
        )
        found.append(Ip4(ident=65534 + number, inner=inner))
    return found


def merged(given_packets: Sequence[Ip]) -> list[bytes]:
    return _engine._merge([one.bytes() for one in given_packets])


def cut_again(written: Sequence[bytes]) -> list[bytes]:
    return [one for whole in written for one in packets.cut_again(whole)]


def without_ident(packet: bytes) -> bytes:
    """Where a packet may not be fragmented, its identification means nothing (RFC 6864 section 4.1)."""
    found = packets.check(packet)
    if packet[0] >> 4 == 6 or not found.dont_fragment or found.is_fragment:
        return packet
    return with_right_checksum(broken(packet, 4, bytes(2)))


def require_same_as_reference(given_packets: Sequence[Ip]) -> list[bytes]:
    """The engine merges just what the reference merges, and no byte is lost or changed on the way."""
    written = merged(given_packets)
    wanted = packets.merge(given_packets)
    again = sorted(tuple(packets.cut_again(whole)) for whole in written)
    assert [len(group) for group in again] == [
        len(group) for group in sorted(tuple(one.bytes() for one in group) for group in renumbered(wanted))
    ]
    assert sorted(without_ident(one) for group in again for one in group) == sorted(
        without_ident(one.bytes()) for one in given_packets
    )
    for flow in {flow_of(one) for one in given_packets}:
        mine = [without_ident(one) for one in cut_again(written) if flow_of(as_ip(one)) == flow]
        assert mine == [without_ident(one.bytes()) for one in given_packets if flow_of(one) == flow]
    return written


def renumbered(groups: Sequence[Sequence[Ip]]) -> list[list[Ip]]:
    """Groups as they come out of a cut: the identifications numbered on."""
    return [
        [
            msgspec.structs.replace(one, ident=group[0].ident + number)
            if isinstance(one, Ip4) and isinstance(group[0], Ip4)
            else one
            for number, one in enumerate(group)
        ]
        for group in groups
    ]


def as_ip(packet: bytes) -> Ip:
    """Of packets with options, only what :func:`flow_of` needs."""
    found = packets.check(packet)
    if not found.has_options:
        return packets.parse(packet)
    if packet[0] >> 4 == 4:
        return Ip4(source=packet[12:16], target=packet[16:20], inner=Raw(protocol=found.protocol))
    return Ip6(source=packet[8:24], target=packet[24:40], inner=Raw(protocol=found.protocol))


def flow_of(packet: Ip) -> object:
    is_fragment = isinstance(packet, Ip4) and (packet.mf or packet.offset > 0)
    ports = (0, 0)
    if not isinstance(packet.inner, Raw) and not is_fragment:
        ports = packet.inner.source, packet.inner.target
    return packet.source, packet.target, packets.protocol_of(packet.inner), *ports


@pytest.mark.parametrize("last", [None, 1, 999, 1000])
def test_segments_of_a_stream_become_one_packet(last: int | None) -> None:
    given_packets = stream(20, 1000, last=last)
    (written,) = require_same_as_reference(given_packets)
    assert packets.OFFLOAD.unpack_from(written)[1] == packets.OFFLOAD_TCP4
    assert cut_again([written]) == [one.bytes() for one in given_packets]


def test_datagrams_of_a_flow_become_one_packet() -> None:
    for made in (
        [Ip4(ident=n, df=False, inner=Udp(payload=bytes([n]) * 64)) for n in range(30)],
        [Ip6(inner=Udp(payload=bytes([n]) * 65)) for n in range(30)],
    ):
        written = merged(made)
        assert len(written) == 1
        assert packets.OFFLOAD.unpack_from(written[0])[1] == packets.OFFLOAD_UDP
        assert cut_again(written) == [one.bytes() for one in made]


def test_no_more_than_fits_becomes_one_packet() -> None:
    assert [len(group) for group in packets.merge(stream(100, 100))] == [64, 36]
    require_same_as_reference(stream(100, 100))
    require_same_as_reference(stream(50, 1448))
    require_same_as_reference(stream(9, 8948))


_TCP_FIELDS = {*Tcp.__struct_fields__} - {"source", "target"}  # addresses, not ports


def changed(packet: Ip4, **fields: object) -> Ip4:
    """A packet with other fields, of its TCP header where that has them."""
    inner = packet.inner
    assert isinstance(inner, Tcp)
    of_tcp = {name: value for name, value in fields.items() if name in _TCP_FIELDS}
    of_ip = {name: value for name, value in fields.items() if name not in of_tcp}
    return msgspec.structs.replace(packet, inner=msgspec.structs.replace(inner, **of_tcp), **of_ip)


@pytest.mark.parametrize(
    "fields",
    [
        {"service": 1},
        {"ttl": 63},
        {"df": False},
        {"ident": 7},
        {"acknowledged": 78},
        {"window": 501},
        {"urgent": 1},
        {"options": b"\1\1\x08\x0a" + bytes(7) + b"\1"},
        {"options": b""},
        {"flags": ACK | ECE},
        {"flags": ACK | CWR},
        {"flags": ACK | FIN},
        {"flags": ACK | SYN},
        {"flags": ACK | PSH},
        {"flags": PSH},
        {"flags": ACK | 0x20},
        {"sequence": 5},
        {"payload": b""},
        {"payload": b"x" * 99},
        {"payload": b"x" * 101},
        {"source": bytes((10, 5, 1, 9))},
        {"target": bytes((10, 5, 2, 9))},
        {"mf": True},
        {"offset": 1},
    ],
    ids=str,
)
def test_segment_that_differs_is_not_merged(fields: dict[str, object]) -> None:
    before, odd, after = stream(3, 100)
    written = require_same_as_reference([before, changed(odd, **fields), after])
    assert len(written) > 1
    require_same_as_reference([changed(before, **fields), odd, after])


def test_segment_with_options_of_ip_is_not_merged() -> None:
    options = bytes.fromhex("94040000")
    given_packets = [msgspec.structs.replace(one, options=options) for one in stream(3, 100)]
    assert [one[10:] for one in merged(given_packets)] == [one.bytes() for one in given_packets]
    made = [
        Ip6(extensions=((0, bytes([0]) + bytes(6)),), inner=Udp(payload=bytes([n]) * 50)) for n in range(3)
    ]
    assert [one[10:] for one in merged(made)] == [one.bytes() for one in made]


@pytest.mark.parametrize("place", [20 + 16, 40, 60, 85])
def test_segment_with_wrong_checksum_goes_on_alone_and_unchanged(place: int) -> None:
    whole = [one.bytes() for one in stream(4, 100)]
    whole[2] = broken(whole[2], place, bytes([whole[2][place] ^ 0x10]))
    written = _engine._merge(whole)
    assert whole[2] in [one[10:] for one in written]
    assert cut_again([one for one in written if one[10:] != whole[2]]) == whole[:2] + whole[3:]


def test_datagram_whose_length_lies_is_not_merged() -> None:
    whole = [Ip4(ident=n, inner=Udp(payload=bytes(64))).bytes() for n in range(3)]
    whole[1] = broken(whole[1], 24, struct.pack("!H", 71))
    assert whole[1] in [one[10:] for one in _engine._merge(whole)]


def test_reserved_bit_of_ipv4_is_not_merged() -> None:
    whole = [with_right_checksum(broken(one.bytes(), 6, b"\xc0")) for one in stream(3, 100)]
    assert [one[10:] for one in _engine._merge(whole)] == whole


def test_datagrams_without_checksum_or_with_one_ident_are_merged_where_it_can_be_undone() -> None:
    for has_checksum, df, wanted in ((False, True, 4), (True, True, 1), (True, False, 4)):
        made = [
            Ip4(ident=0, df=df, inner=Udp(payload=bytes([n]) * 64, has_checksum=has_checksum))
            for n in range(4)
        ]
        assert len(require_same_as_reference(made)) == wanted


def test_identifications_that_stand_and_then_go_on_are_two_packets() -> None:
    made = [Ip4(ident=ident, inner=Udp(payload=bytes([n]) * 64)) for n, ident in enumerate((5, 5, 6, 7, 7))]
    assert [len(group) for group in packets.merge(made)] == [2, 2, 1]
    assert len(require_same_as_reference(made)) == 3


def test_more_flows_than_places_lose_nothing() -> None:
    made = [
        Ip6(inner=Udp(source=1000 + number % 20, payload=struct.pack("!I", number))) for number in range(200)
    ]
    again = cut_again(merged(made))
    for port in range(1000, 1020):
        mine = [one for one in again if int.from_bytes(one[40:42], "big") == port]
        assert mine == [
            one.bytes() for one in made if isinstance(one.inner, Udp) and one.inner.source == port
        ]


@st.composite
def traffic(draw: st.DrawFn) -> list[Ip]:
    """What several connections send, as it comes out of a network: late, lost, twice, and other things."""
    made: list[tuple[float, Ip]] = []
    for port in range(draw(st.integers(1, 5))):
        size = draw(st.sampled_from([1, 100, 333, 1220]))
        is_tcp, is_ipv4, df = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
        sequence = draw(st.integers(0, 2**32 - 1))
        for number in range(draw(st.integers(1, 25))):
            length = draw(st.sampled_from([size] * 8 + [size // 2 + 1, 0]))
            payload = random.Random(number).randbytes(length)
            inner: Tcp | Udp = Udp(source=port, payload=payload)
            if is_tcp:
                flags = draw(st.sampled_from([ACK] * 8 + [ACK | PSH, ACK | FIN]))
                inner = Tcp(source=port, sequence=sequence, flags=flags, payload=payload)
                sequence += length
            packet = Ip4(ident=number, df=df, inner=inner) if is_ipv4 else Ip6(inner=inner)
            is_late = draw(st.sampled_from([0] * 8 + [3]))
            made.append((number + port / 10 + is_late, packet))
    if draw(st.booleans()):
        made.append((5.0, Ip4(mf=True, inner=Raw(protocol=UDP, payload=b"x" * 64))))
        made.append((6.0, Ip4(inner=Raw(protocol=1, payload=b"ping"))))
    lost = draw(st.sets(st.integers(0, len(made) - 1), max_size=3))
    made = [one for number, one in enumerate(made) if number not in lost]
    return [packet for _, packet in sorted(made, key=lambda one: one[0])]


@given(traffic())
@settings(max_examples=150)
def test_streams_come_out_as_they_went_in_under_loss_and_reordering(given_packets: list[Ip]) -> None:
    require_same_as_reference(given_packets)


@given(supers, st.sampled_from([536, 1220, 8948]))
@settings(max_examples=40)
def test_what_was_cut_is_merged_again_byte_for_byte(packet: Ip, size: int) -> None:
    cut = _engine._segment(packets.super_packet(packet, size))
    assert cut_with_options_aside(_engine._merge(cut)) == cut


def cut_with_options_aside(written: Sequence[bytes]) -> list[bytes]:
    return [
        one
        for whole in written
        for one in ([whole[10:]] if whole[:10] == packets.PLAIN else packets.cut_again(whole))
    ]


# Fragments


@given(
    st.builds(
        Ip4,
        ident=st.integers(0, MOST),
        df=st.just(False),
        mf=st.booleans(),
        offset=st.sampled_from([0, 185]),
        options=options4,
        inner=st.one_of(
            st.builds(Udp, payload=st.integers(0, 9000).map(long_payload)),
            st.builds(Raw, protocol=st.just(1), payload=st.integers(0, 9000).map(long_payload)),
        ),
    ),
    st.integers(68, 9000),
)
@settings(max_examples=150)
def test_fragments_are_those_of_rfc_791(packet: Ip4, mtu: int) -> None:
    found = _engine._fragment(packet.bytes(), mtu)
    assert found == packets.fragments(packet, mtu)
    assert all(len(one) <= mtu for one in found)
    assert (
        b"".join(one[packets.check(one).network :] for one in found)
        == packet.bytes()[20 + len(packet.options) :]
    )


@pytest.mark.parametrize("mtu", [0, 1, 20, 27])
def test_no_fragment_fits_a_tiny_mtu(mtu: int) -> None:
    assert _engine._fragment(Ip4(df=False, inner=Udp(payload=bytes(100))).bytes(), mtu) == []


# Errors


def echo(kind: int) -> Raw:
    return Raw(protocol=1, payload=bytes([kind]) + bytes(20))


def echo6(kind: int) -> Raw:
    return Raw(protocol=58, payload=bytes([kind]) + bytes(20))


@given(ips.filter(lambda one: not isinstance(one.inner, Raw)), st.sampled_from([0, 576, 1400, 70000]))
@settings(max_examples=150)
def test_error_is_that_of_the_reference(packet: Ip, mtu: int) -> None:
    whole = packet.bytes()
    source = SOURCE4 if isinstance(packet, Ip4) else SOURCE6
    found = outcome(lambda: packets.check(whole))
    if isinstance(found, packets.Found) and not found.is_later:
        assert _engine._icmp(whole, source, mtu) == packets.icmp_error(whole, source, mtu)
    elif isinstance(found, packets.Found):
        assert _engine._icmp(whole, source, mtu) == b""


@pytest.mark.parametrize(
    ("packet", "no_route", "too_big"),
    [
        (Ip4(inner=Udp(payload=bytes(100))), True, True),
        (Ip4(inner=Raw(protocol=253)), True, True),  # nothing but a header to quote
        (Ip4(inner=Tcp(), offset=1), False, False),
        (Ip4(inner=echo(8)), False, True),  # flannel answers no ICMP; whoever looks for the MTU asks with it
        (Ip4(inner=echo(3)), False, False),
        (Ip4(inner=echo(4)), False, False),
        (Ip4(inner=echo(5)), False, False),
        (Ip4(inner=echo(11)), False, False),
        (Ip4(inner=echo(12)), False, False),
        (Ip4(inner=Raw(protocol=1)), False, False),
        (Ip4(source=bytes(4), inner=Udp()), False, False),
        (Ip4(source=bytes((127, 0, 0, 1)), inner=Udp()), False, False),
        (Ip4(source=bytes((224, 0, 0, 1)), inner=Udp()), False, False),
        (Ip4(source=bytes([255] * 4), inner=Udp()), False, False),
        (Ip4(target=bytes((239, 0, 0, 1)), inner=Udp()), False, False),
        (Ip4(target=bytes([255] * 4), inner=Udp()), False, False),
        (Ip6(inner=Udp(payload=bytes(2000))), True, True),
        (Ip6(inner=echo6(128)), True, True),
        (Ip6(inner=echo6(1)), False, False),
        (Ip6(inner=echo6(127)), False, False),
        (Ip6(inner=echo6(137)), False, False),
        (Ip6(inner=Raw(protocol=58)), False, False),
        (Ip6(source=bytes(16), inner=Udp()), False, False),
        (Ip6(source=b"\xff" + bytes(15), inner=Udp()), False, False),
        (Ip6(target=b"\xff" + bytes(15), inner=Udp()), False, True),
    ],
    ids=str,
)
def test_error_is_sent_where_one_is_deserved(packet: Ip, no_route: bool, too_big: bool) -> None:
    source = SOURCE4 if isinstance(packet, Ip4) else SOURCE6
    whole = packet.bytes()
    for mtu, is_wanted in ((0, no_route), (1300, too_big)):
        wanted = packets.icmp_error(whole, source, mtu) if is_wanted else b""
        assert _engine._icmp(whole, source, mtu) == wanted
