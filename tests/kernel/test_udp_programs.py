# SPDX-License-Identifier: Apache-2.0
"""The program that takes datagrams in, packet by packet, beside a plain Python reference.

It runs on no device (``BPF_PROG_TEST_RUN``). The program at the TUN's egress wants packets without an
Ethernet header, which the kernel has no such test for: test_udp_path.py runs it on devices.
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loden.address import Prefix, parse_address
from loden.tables.bpf import Program, run_once
from loden.tables.entries import UdpPeer
from loden.tables.udp_bpf import FastPath, Settings
from tests.kernel.datagrams import REDIRECT, SHOT, UNSPEC, WIRES, Wire, ethernet, ones_sum
from tests.kernel.kernel import require_bpf

IPV4, IPV6 = WIRES
DETOUR_MARK = 0x4C4F444E  # native/bpf/detour.h
LOOPBACK = 1  # the verdict says that the packet is sent on; the test sends nothing


class Host:
    """The program of one host, and what the reference says of the same host."""

    def __init__(self, wire: Wire, *, allow_unknown: bool = False) -> None:
        require_bpf()
        self.wire = wire
        self.allow_unknown = allow_unknown
        settings = Settings(parse_address(wire.own), wire.port, LOOPBACK, wire.inside, allow_unknown)
        self.path = FastPath(settings)
        for subnet, (remote, port) in wire.peers.items():
            self.path.put(UdpPeer("", Prefix.parse(subnet), parse_address(remote), port, ""), LOOPBACK)

    def run(
        self, frame: bytes, context: bytes = b"", *, program: Program | None = None
    ) -> tuple[int, bytes, dict[str, int]]:
        """The verdict, the frame afterwards, and the counters that it moved."""
        before = self.path.counters()
        verdict, out = run_once(program or self.path.decapsulate, frame, context=context)
        after = self.path.counters()
        return (
            verdict,
            out,
            {name: after[name] - before[name] for name in after if after[name] != before[name]},
        )

    def check(self, frame: bytes) -> dict[str, int]:
        """Hold the program against the reference; the counters."""
        found = self.run(frame)
        assert found == self.wire.receive(frame, allow_unknown=self.allow_unknown)
        return found[2]


@pytest.fixture(scope="module", params=WIRES, ids=lambda wire: str(wire.family))
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    found = Host(request.param)
    yield found
    found.path.close()


@pytest.fixture(scope="module", params=WIRES, ids=lambda wire: str(wire.family))
def open_host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """One that takes in whatever comes."""
    found = Host(request.param, allow_unknown=True)
    yield found
    found.path.close()


@pytest.fixture(scope="module")
def host4() -> Iterator[Host]:
    found = Host(IPV4)
    yield found
    found.path.close()


def sender(wire: Wire, number: int = 0) -> tuple[str, str, int]:
    """A container of a peer, and where the peer sends from."""
    subnet, (remote, port) = list(wire.peers.items())[number]
    return str(ip_address(subnet.split("/")[0]) + 2), remote, port


def inner(wire: Wire, payload: bytes = b"data", *, number: int = 0, **changed: Any) -> bytes:
    return wire.packet(sender(wire, number)[0], wire.own_container, payload, **changed)


def arriving(wire: Wire, packet: bytes | None = None, *, number: int = 0, **changed: Any) -> bytes:
    """The frame in which a peer sends a packet."""
    _, remote, port = sender(wire, number)
    packet = inner(wire, number=number) if packet is None else packet
    return wire.datagram(packet, source=remote, port=port, **changed)


class TestSender:
    @pytest.mark.parametrize("number", range(3))
    def test_known_peer_is_taken_in(self, host: Host, number: int) -> None:
        packet = inner(host.wire, number=number)
        verdict, out, counted = host.run(arriving(host.wire, packet, number=number))
        assert verdict == REDIRECT
        assert out == ethernet(host.wire.older(packet))
        assert counted == {"rx_packets": 1, "rx_bytes": len(packet)}

    @pytest.mark.parametrize("size", [8, 9, 1400])
    def test_datagram_with_a_checksum_is_taken_in(self, host: Host, size: int) -> None:
        """As sockets send them: flannel's, and the engine's."""
        packet = inner(host.wire, (bytes(range(200)) * 8)[:size])
        assert host.check(arriving(host.wire, packet, check=1)) == {
            "rx_packets": 1,
            "rx_bytes": len(packet),
        }

    def test_unknown_sender_is_dropped(self, host: Host) -> None:
        assert host.check(host.wire.datagram(inner(host.wire), source=host.wire.stranger)) == {
            "unknown_peer": 1
        }

    def test_peer_that_sends_in_the_name_of_another_is_dropped(self, host: Host) -> None:
        assert host.check(arriving(host.wire, inner(host.wire, number=1), number=0)) == {"spoofed": 1}

    def test_peer_that_sends_in_the_name_of_nobody_is_dropped(self, host: Host) -> None:
        packet = host.wire.packet(host.wire.nobody, host.wire.own_container)
        assert host.check(arriving(host.wire, packet)) == {"spoofed": 1}

    def test_right_address_and_wrong_port_is_nobody(self, host: Host) -> None:
        _, remote, _ = sender(host.wire)
        frame = host.wire.datagram(inner(host.wire), source=remote, port=999)
        assert host.check(frame) == {"unknown_peer": 1}

    def test_right_port_of_the_other_peer_behind_the_address_is_a_lie(self, host: Host) -> None:
        """The longest prefix decides whose the source is."""
        assert host.check(arriving(host.wire, inner(host.wire, number=2), number=1)) == {"spoofed": 1}
        assert host.check(arriving(host.wire, inner(host.wire, number=1), number=2)) == {"spoofed": 1}

    def test_open_host_takes_in_whatever_comes(self, open_host: Host) -> None:
        wire = open_host.wire
        for packet in (inner(wire), wire.packet(wire.nobody, wire.own_container)):
            for frame in (arriving(wire, packet), wire.datagram(packet, source=wire.stranger, port=999)):
                assert open_host.check(frame) == {"rx_packets": 1, "rx_bytes": len(packet)}

    def test_open_host_still_drops_what_is_broken(self, open_host: Host) -> None:
        wire = open_host.wire
        assert open_host.check(arriving(wire, inner(wire, ttl=1))) == {"ttl": 1}
        assert open_host.check(arriving(wire, inner(wire)[:-1])) == {"length": 1}

    def test_peer_is_counted_for_itself(self, host: Host) -> None:
        subnet = Prefix.parse(list(host.wire.peers)[1])

        def traffic() -> tuple[int, int]:
            found = next(one.traffic for one in host.path.peers() if one.subnet == subnet)
            return found.rx_packets, found.rx_bytes

        packets, bytes_ = traffic()
        packet = inner(host.wire, number=1)
        host.check(arriving(host.wire, packet, number=1))
        host.check(arriving(host.wire, inner(host.wire, number=1, ttl=1), number=1))
        assert traffic() == (packets + 1, bytes_ + len(packet))


class TestNotForUs:
    """Such frames go on their way, untouched and uncounted."""

    def test_other_port(self, host: Host) -> None:
        assert host.check(arriving(host.wire, target_port=8284)) == {}

    def test_other_address_of_ours(self, host: Host) -> None:
        _, remote, _ = sender(host.wire)
        assert host.check(host.wire.datagram(inner(host.wire), source=remote, target=host.wire.other)) == {}

    @pytest.mark.parametrize(
        "protocol", [1, 6, 58, 132, 136], ids=["icmp", "tcp", "icmp6", "sctp", "udplite"]
    )
    def test_other_protocol_with_the_same_ports(self, host: Host, protocol: int) -> None:
        assert host.check(arriving(host.wire, protocol=protocol)) == {}

    @pytest.mark.parametrize(
        "protocol", [0, 43, 44, 60], ids=["hop-by-hop", "routing", "fragment", "destination"]
    )
    def test_extension_headers(self, protocol: int) -> None:
        with closing(Host(IPV6).path) as path:
            frame = arriving(IPV6, protocol=protocol)
            assert run_once(path.decapsulate, frame) == (UNSPEC, frame)

    def test_options_of_the_outer_header(self, host4: Host) -> None:
        assert host4.check(arriving(IPV4, options=b"\x01" * 4)) == {}

    @pytest.mark.parametrize("protocol", [0x0806, 0x8100, 0x88A8, 0x0000, 0xFFFF])
    def test_other_ethertype(self, host: Host, protocol: int) -> None:
        frame = arriving(host.wire)
        assert host.check(frame[:12] + protocol.to_bytes(2, "big") + frame[14:]) == {}

    def test_version_of_the_outer_header_that_lies(self, host: Host) -> None:
        frame = arriving(host.wire)
        first = frame[14] & 0x0F
        for version in set(range(16)) - {4 if host.wire is IPV4 else 6}:
            assert host.check(frame[:14] + bytes([version << 4 | first]) + frame[15:]) == {}

    def test_other_family(self, host: Host) -> None:
        other = IPV6 if host.wire is IPV4 else IPV4
        assert host.check(arriving(other)) == {}


class TestForTheEngine:
    @pytest.mark.parametrize(
        "fragment", [0x2000, 0x2001, 1, 0x1FFF], ids=["first", "middle", "offset", "last"]
    )
    def test_fragment_of_a_datagram(self, host4: Host, fragment: int) -> None:
        assert host4.check(arriving(IPV4, fragment=fragment)) == {"from_engine": 1}

    def test_dont_fragment_is_no_fragment(self, host4: Host) -> None:
        assert "rx_packets" in host4.check(arriving(IPV4, fragment=0x4000))

    def test_options_of_the_packet(self, host4: Host) -> None:
        packet = inner(IPV4, options=b"\x01" * 8)
        assert host4.check(arriving(IPV4, packet)) == {"from_engine": 1}

    @pytest.mark.parametrize("more", [1, 2, 100])
    def test_bytes_behind_the_packet(self, host: Host, more: int) -> None:
        assert host.check(arriving(host.wire, inner(host.wire) + bytes(more))) == {"from_engine": 1}

    def test_several_datagrams_merged_into_one(self, host: Host) -> None:
        """As UDP GRO hands them up: one outer header, packets behind each other."""
        packet = inner(host.wire, bytes(1000))
        context = sk_buff(gso_size=len(packet), gso_segs=2)
        verdict, out, counted = host.run(arriving(host.wire, packet * 2), context)
        assert (verdict, counted) == (UNSPEC, {"from_engine": 1})
        assert out == arriving(host.wire, packet * 2)

    @pytest.mark.parametrize(
        ("protocol", "counter"), [(socket.IPPROTO_TCP, "failed"), (socket.IPPROTO_UDP, "from_engine")]
    )
    def test_row_of_datagrams_that_was_never_cut(self, host: Host, protocol: int, counter: str) -> None:
        """As a virtual wire hands it on: one outer header, one inner one, and the size of the pieces.

        The kernel's test cannot say what kind of pieces they are, so TCP's headers do not come off here; that
        it is tried is what this shows.
        """
        packet = inner(host.wire, bytes(3000), protocol=protocol)
        _, _, counted = host.run(arriving(host.wire, packet), sk_buff(gso_size=1000, gso_segs=3))
        assert counted == {counter: 1}

    @pytest.mark.parametrize("size", [0, 7])
    def test_datagram_with_a_checksum_around_hardly_anything(self, host: Host, size: int) -> None:
        packet = inner(host.wire, bytes(size))
        assert host.check(arriving(host.wire, packet, check=1)) == {"from_engine": 1}


class TestSuperPacket:
    def test_kind_that_the_kernel_puts_no_headers_on_leaves_by_the_engine(self, host: Host) -> None:
        """As SCTP's, and what is in a tunnel already; it goes as it came.

        The kernel's test cannot say which kind it is, so it is none. It takes a packet's first bytes for an
        Ethernet header, so the source names the protocol there.
        """
        source = "8.0.1.2" if host.wire is IPV4 else "2001:db8:86dd::1"
        packet = host.wire.packet(source, sender(host.wire)[0], bytes(3000))
        found = host.run(packet, sk_buff(gso_size=1000, gso_segs=3), program=host.path.encapsulate)
        assert found == (UNSPEC, packet, {"to_engine": 1})


class TestDetour:
    def test_what_came_this_way_goes_on_into_the_tun(self, host: Host) -> None:
        frame = ethernet(inner(host.wire))
        found = host.run(frame, sk_buff(priority=DETOUR_MARK), program=host.path.detour)
        assert found == (REDIRECT, frame, {})

    @pytest.mark.parametrize("priority", [0, 6, DETOUR_MARK - 1])
    def test_strangers_are_dropped(self, host: Host, priority: int) -> None:
        verdict, _, counted = host.run(
            ethernet(inner(host.wire)), sk_buff(priority=priority), program=host.path.detour
        )
        assert (verdict, counted) == (SHOT, {"unknown_peer": 1})


class TestBroken:
    def test_cut_at_every_length(self, host: Host) -> None:
        """From the outer IP header alone up to the whole frame; shorter ones the kernel's test refuses."""
        frame = arriving(host.wire, inner(host.wire, bytes(range(20))))
        counted = [next(iter(host.check(frame[:end])), "") for end in range(least(host.wire), len(frame) + 1)]
        assert counted[-1] == "rx_packets"
        assert list(dict.fromkeys(counted)) == ["", "truncated", "length", "rx_packets"]

    @pytest.mark.parametrize("version", sorted(set(range(16)) - {4}))
    def test_version_that_lies_ipv4(self, host4: Host, version: int) -> None:
        packet = inner(IPV4, first=version << 4 | 5)
        assert host4.check(arriving(IPV4, packet)) == {"version": 1}

    def test_packet_of_the_other_family(self, host: Host) -> None:
        """IPv4 in IPv6 and the other way round is nothing that a peer sends."""
        other = inner(IPV6 if host.wire is IPV4 else IPV4, bytes(40))
        assert host.check(arriving(host.wire, other)) == {"version": 1}

    @pytest.mark.parametrize("words", range(5))
    def test_header_length_below_the_least(self, host4: Host, words: int) -> None:
        assert host4.check(arriving(IPV4, inner(IPV4, first=0x40 | words))) == {"length": 1}

    @pytest.mark.parametrize("length", [0, 19, 20, 23])
    def test_length_that_says_less(self, host: Host, length: int) -> None:
        length = length if host.wire is IPV4 else length // 8
        assert host.check(arriving(host.wire, inner(host.wire, length=length))) == {"from_engine": 1}

    @pytest.mark.parametrize("length", [25, 26, 1500, 65535])
    def test_length_that_says_more(self, host: Host, length: int) -> None:
        assert host.check(arriving(host.wire, inner(host.wire, length=length))) == {"length": 1}

    @pytest.mark.parametrize("bit", range(16))
    def test_checksum_that_is_wrong(self, host4: Host, bit: int) -> None:
        right = int.from_bytes(inner(IPV4)[10:12], "big")
        packet = inner(IPV4, check=right ^ 1 << bit)
        assert host4.check(arriving(IPV4, packet)) == {"checksum": 1}

    @pytest.mark.parametrize("ttl", [0, 1])
    def test_packet_that_has_lived_long_enough(self, host: Host, ttl: int) -> None:
        assert host.check(arriving(host.wire, inner(host.wire, ttl=ttl))) == {"ttl": 1}

    def test_sender_is_judged_before_age(self, host: Host) -> None:
        """A stranger learns nothing of what becomes of packets, and the counter tells who it was."""
        frame = arriving(host.wire, inner(host.wire, number=1, ttl=1), number=0)
        assert host.check(frame) == {"spoofed": 1}


class TestAge:
    def test_every_age(self, host: Host) -> None:
        for ttl in range(2, 256):
            packet = inner(host.wire, ttl=ttl)
            assert host.run(arriving(host.wire, packet))[1] == ethernet(host.wire.older(packet))

    def test_every_checksum(self, host4: Host) -> None:
        """The identification moves it through its range, the ends of which are where sums go wrong."""
        seen = set()
        for number in (*range(0, 0x10000, 251), *edges()):
            packet = inner(IPV4, id=number)
            seen.add(int.from_bytes(packet[10:12], "big"))
            assert host4.run(arriving(IPV4, packet))[1] == ethernet(IPV4.older(packet))
        assert {0x0000, 0xFEFF, 0xFF00, 0xFEFE, 0xFFFE} <= seen

    def test_checksum_of_all_ones_counts_as_right(self, host4: Host) -> None:
        """It is 0x0000 by another name (RFC 1624)."""
        number = next(it for it in range(0x10000) if inner(IPV4, id=it)[10:12] == b"\0\0")
        packet = inner(IPV4, id=number, check=0xFFFF)
        verdict, out, _ = host4.run(arriving(IPV4, packet))
        assert (verdict, ones_sum(out[14:34])) == (REDIRECT, 0xFFFF)


def edges() -> Iterator[int]:
    """Identifications that make the checksums around which a carry appears."""
    base = ones_sum(inner(IPV4, id=0, check=0)[:20])
    for check in (0x0000, 0x0001, 0x00FF, 0x0100, 0xFEFE, 0xFEFF, 0xFF00, 0xFFFE):
        yield (0xFFFF - check - base) % 0xFFFF


def sk_buff(*, gso_size: int = 0, gso_segs: int = 0, priority: int = 0) -> bytes:
    """``struct __sk_buff`` with what the kernel's test lets one choose."""
    found = bytearray(192)
    struct.pack_into("=I", found, 32, priority)
    struct.pack_into("=I", found, 164, gso_segs)
    struct.pack_into("=I", found, 176, gso_size)
    return bytes(found)


def frames(wire: Wire) -> st.SearchStrategy[bytes]:
    """Datagrams for us, many of them as they should be; and some with bits turned over, or cut off."""
    whole = st.builds(
        lambda number, ttl, payload, trailing, check: arriving(
            wire, inner(wire, payload, number=number, ttl=ttl) + trailing, number=number, check=check
        ),
        st.integers(0, 2),
        st.integers(0, 255),
        st.binary(max_size=100),
        st.one_of(st.just(b""), st.binary(max_size=3)),
        st.sampled_from([0, 1, 0xFFFF]),
    )
    anything = st.builds(lambda payload: arriving(wire, payload), st.binary(max_size=200))
    # Bits of the headers; the addresses of Ethernet are nobody's business.
    bits = st.lists(st.integers(12 * 8, (14 + 2 * wire.headers) * 8), max_size=3)
    return st.builds(
        partial(broken, wire),
        st.one_of(whole, whole, anything),
        bits,
        st.one_of(st.just(0), st.integers(0, 80)),
    )


def least(wire: Wire) -> int:
    """Bytes of Ethernet's and the outer IP header: less is no packet to the kernel."""
    return 14 + wire.headers - 8


def broken(wire: Wire, frame: bytes, bits: list[int], less: int) -> bytes:
    found = bytearray(frame)
    for bit in bits:
        if bit // 8 < len(found):
            found[bit // 8] ^= 1 << bit % 8
    return bytes(found[: max(len(found) - less, least(wire))])


@given(data=st.data())
@settings(
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_program_and_reference_agree_on_whatever_comes(host: Host, data: st.DataObject) -> None:
    host.check(data.draw(frames(host.wire)))
