# SPDX-License-Identifier: Apache-2.0
"""The eBPF programs of ``udp`` on devices: what goes into the TUN comes out of the wire, byte for byte.

::

    sent ──▶ TUN ──egress──▶ eth0 ═══ wire ──▶ seen        sent ──▶ wire ═══ eth0 ──ingress──▶ TUN ──▶ seen
              └──▶ its reader                                                 └──▶ the stack
"""

import os
import select
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress

import pytest

from loden.address import Family, Prefix, format_address, parse_address
from loden.lab.namespaces import inside
from loden.tables import tc
from loden.tables.devices import Devices
from loden.tables.entries import UdpPeer
from loden.tables.netlink import Netlink
from loden.tables.tun import open_queue
from loden.tables.udp_bpf import DECAPSULATE, DETOUR, ENCAPSULATE, FastPath, Settings
from loden.tables.udp_detour import detour_link
from loden.tables.udp_sockets import open_bound
from tests.kernel.datagrams import WIRES, Wire, ethernet, udp
from tests.kernel.kernel import command, ip, link_json, require_bpf, run, until

_ETH_P_ALL = 3
PATIENCE_S = 10.0
#: struct virtio_net_hdr { u8 flags, gso_type; u16 hdr_len, gso_size, csum_start, csum_offset; }
_VIRTIO = struct.Struct("=BBHHHH")
_NEEDS_CSUM, _TCPV4, _TCPV6, _UDP_L4 = 1, 1, 4, 5
_PACKET_OUTGOING = 4
_SOL_PACKET, _PACKET_AUXDATA, _PACKET_VNET_HDR = 263, 8, 15
_TP_STATUS_CSUMNOTREADY = 8
_FIN, _SYN, _RST, _PSH, _ACK = 1, 2, 4, 8, 16
_STAMPS = bytes((1, 1, 8, 10)) + bytes(8)
# native/bpf/detour.h: the mark, what its headers take, and how many packets that are lost close it.
_DETOUR, _DETOUR_BYTES, _MOST_MISSED = 0x4C4F444E, 22, 3
MTU = 65535


class PathOnDevices:
    """Both programs of one host, attached; the peers are beyond the wire."""

    def __init__(self, wire: Wire, *, allow_unknown: bool = False) -> None:
        self.wire = wire
        self.reader = open_queue("tun0")
        for device in ("tun0", "eth0", "wire"):
            ip(f"link set {device} up mtu {MTU}")
        self.requests = Netlink()
        self.eth0, self.tun = link_json("eth0")["ifindex"], link_json("tun0")["ifindex"]
        self.mac = bytes.fromhex(link_json("eth0")["address"].replace(":", ""))
        self.far_mac = bytes.fromhex(link_json("wire")["address"].replace(":", ""))
        self.link = detour_link("tun0", "eth0", parse_address(wire.own))
        assert run(Devices(self.requests).put([self.link])) == {}
        self.path = FastPath(
            Settings(
                parse_address(wire.own),
                wire.port,
                self.tun,
                wire.inside,
                allow_unknown,
                detour_port=self.link.port,
                detour_vni=self.link.vni,
            )
        )
        for subnet, (remote, port) in wire.peers.items():
            ip(f"neighbour replace {remote} lladdr {link_json('wire')['address']} dev eth0")
            self.put(subnet, remote, port)
        self.attach(self.tun, tc.Hook.EGRESS, ENCAPSULATE, self.path.encapsulate.fd)
        self.attach(self.eth0, tc.Hook.INGRESS, DECAPSULATE, self.path.decapsulate.fd)
        detour = link_json(self.link.name)["ifindex"]
        self.attach(detour, tc.Hook.INGRESS, DETOUR, self.path.detour.fd)
        self.far, self.near = listen("wire"), listen("tun0")
        self.into_tun = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)

    def close(self) -> None:
        for one in (self.far, self.near, self.into_tun):
            one.close()
        self.path.close()
        self.requests.close()
        os.close(self.reader)

    def attach(self, index: int, hook: tc.Hook, name: str, program_fd: int) -> None:
        assert run(tc.attach(self.requests, index, hook, name, program_fd)) is None

    def put(self, subnet: str, remote: str, port: int, *, mtu: int = 0, index: int | None = None) -> None:
        peer = UdpPeer("tun0", Prefix.parse(subnet), parse_address(remote), port, "eth0", mtu)
        self.path.put(peer, self.eth0 if index is None else index)

    def peer(self, number: int = 0) -> tuple[str, str, int]:
        """A container of a peer, and where the peer is reached."""
        subnet, (remote, port) = list(self.wire.peers.items())[number]
        prefix = Prefix.parse(subnet)
        return prefix_address(prefix, 2), remote, port

    def packet(self, payload: bytes = b"data", *, number: int = 0, **changed: int) -> bytes:
        """One from here to a peer's container."""
        return self.wire.packet(self.wire.own_container, self.peer(number)[0], payload, **changed)

    def send(self, packet: bytes, protocol: int = 0) -> dict[str, int]:
        """Out of the TUN device; the counters that it moved."""
        usual = 0x0800 if self.wire.family is Family.IPV4 else 0x86DD
        return self._send(self.into_tun, packet, protocol or usual)

    def send_super(self, packet: bytes, *, size: int = 1000, before: int = 0) -> dict[str, int]:
        """The same with a TCP packet that is to be cut into pieces with so many bytes of data.

        *before*: bytes of what stands between the IP header and TCP's.
        """
        counted = self.path.counters()
        self.inject(packet, size=size, before=before)
        after = self.path.counters()
        return {name: after[name] - counted[name] for name in after if after[name] != counted[name]}

    def inject(self, packet: bytes, *, size: int, before: int = 0, device: str = "tun0") -> None:
        """Send a super-packet of TCP, or of datagrams in a row, out of a device."""
        start, is_ipv4 = len(self.packet(b"")) + before, self.wire.family is Family.IPV4
        is_row = packet[9 if is_ipv4 else 6] == socket.IPPROTO_UDP
        kind, length, checksum = (_TCPV4 if is_ipv4 else _TCPV6, 20, 16) if not is_row else (_UDP_L4, 8, 6)
        header = _VIRTIO.pack(_NEEDS_CSUM, kind, start + length, size, start, checksum)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
            one.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
            one.sendto(header + packet, (device, 0x0800 if is_ipv4 else 0x86DD))

    def _send(self, one: socket.socket, data: bytes, protocol: int) -> dict[str, int]:
        before = self.path.counters()
        with suppress(OSError):  # a packet that a program drops is a refused one to who sends it like this
            one.sendto(data, ("tun0", protocol))
        after = self.path.counters()
        return {name: after[name] - before[name] for name in after if after[name] != before[name]}

    def on_wire(self) -> bytes:
        """The next frame with a datagram from here that arrives beyond the wire."""
        return next(frame for frame in frames(self.far) if self.is_datagram(frame))

    def is_datagram(self, frame: bytes) -> bool:
        outer = frame[14:]
        at = self.wire.headers - 8
        return frame[6:12] == self.mac and outer[at : at + 2] == self.wire.port.to_bytes(2, "big")

    def at_reader(self) -> bytes:
        """The next packet that the TUN's reader gets; the kernel's own are left out."""
        for _ in ready(self.reader):
            packet = os.read(self.reader, 1 << 17)[_VIRTIO.size :]
            if parse_address(self.wire.own_container) in packet[:40] or packet[:1] == b"\0":
                return packet
        raise AssertionError("nothing arrives at the TUN's reader")

    def tcp(
        self,
        payload: bytes,
        *,
        header: bytes | None = None,
        target: str = "",
        number: int = 0,
        **changed: int,
    ) -> bytes:
        """A TCP packet of a peer's container."""
        inner = (tcp_header() if header is None else header) + payload
        target = target or self.wire.own_container
        return self.wire.packet(self.peer(number)[0], target, inner, protocol=socket.IPPROTO_TCP, **changed)

    def row(self, payload: bytes, *, number: int = 0, **changed: int) -> bytes:
        """A packet of a peer's that holds datagrams in a row, as they are before they are cut."""
        target, inner = self.wire.own_container, udp(9, 9, payload)
        return self.wire.packet(self.peer(number)[0], target, inner, protocol=socket.IPPROTO_UDP, **changed)

    def arrive_whole(self, packet: bytes, *, size: int) -> dict[str, int]:
        """Come in from the wire as a super-packet with pieces of so many bytes.

        A peer's programs encapsulate it: no socket can make such a one.
        """
        _, remote, port = self.peer()
        reader = open_queue("tun1")
        with ExitStack() as stack:
            stack.callback(os.close, reader)
            stack.callback(ip, "link delete tun1")
            ip(f"link set tun1 up mtu {MTU}")
            ip(f"neighbour replace {self.wire.own} lladdr {link_json('eth0')['address']} dev wire")
            tun, wire = (link_json(name)["ifindex"] for name in ("tun1", "wire"))
            far = FastPath(Settings(parse_address(remote), port, tun, self.wire.inside))
            stack.callback(far.close)
            target = Prefix(parse_address(self.wire.own_container), self.wire.family.bits)
            subnet = Prefix.of(target.address, self.wire.family.bits - 8)
            far.put(UdpPeer("tun1", subnet, parse_address(self.wire.own), self.wire.port, "wire"), wire)
            self.attach(tun, tc.Hook.EGRESS, ENCAPSULATE, far.encapsulate.fd)
            with self.counted() as counts:
                self.inject(packet, size=size, device="tun1")
        return counts

    @contextmanager
    def bridged_container(self) -> Iterator[Iterator[bytes]]:
        """The frames that come to the own container, which is behind a bridge."""
        gateway = f"{self.wire.own_container[:-1]}1/{self.wire.family.bits - 8}"
        ip("link add br0 type bridge")
        try:
            ip("link add c0 master br0 type veth peer name c1")
            for name in ("br0", "c0", "c1"):
                ip(f"link set {name} up")
            ip(f"address add {gateway} dev br0 {'nodad' if self.wire.family is Family.IPV6 else ''}")
            # Not c1's own address: this host would send it on once more.
            ip(f"neighbour replace {self.wire.own_container} lladdr 02:00:00:00:00:99 dev br0")
            ip(f"route add {next(iter(self.wire.peers))} dev tun0")
            command("sysctl -q net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
            with listen("c1") as there:
                whom = parse_address(self.wire.own_container)
                yield (frame for frame in frames(there) if whom in frame[14:54])
        finally:
            ip("link delete br0")
            ip("link delete c0")

    @contextmanager
    def nothing_of_the_first_peer_passes_input(self) -> Iterator[None]:
        family = "ip" if self.wire.family is Family.IPV4 else "ip6"
        rule = f"type filter hook input priority 0; {family} saddr {self.peer()[1]} drop;"
        command(f"nft add table inet strict {{ chain input {{ {rule} }}; }}")
        try:
            yield
        finally:
            command("nft delete table inet strict")

    @contextmanager
    def counted(self) -> Iterator[dict[str, int]]:
        """The counters that move until something has."""
        counts: dict[str, int] = {}
        before = self.path.counters()
        yield counts
        deadline = time.monotonic() + PATIENCE_S
        while (after := self.path.counters()) == before:
            assert time.monotonic() < deadline, "nothing arrives"
        counts.update({name: after[name] - before[name] for name in after if after[name] != before[name]})

    def addressed(self, packet: bytes, *, check: int = 0, number: int = 0) -> bytes:
        """The frame that brings a peer's packet; the stack would drop one with another host's address."""
        _, remote, port = self.peer(number)
        return self.mac + self.wire.datagram(packet, source=remote, port=port, check=check)[6:]

    def arrive(self, frame: bytes) -> dict[str, int]:
        """Come in from the wire, a marker behind it; the counters that the frame alone moved."""
        before = self.path.counters()
        self.far.send(frame)
        _, remote, port = self.peer()
        marker = self.wire.packet(self.peer()[0], self.wire.own_container, b"marker")
        self.far.send(self.wire.datagram(marker, source=remote, port=port))
        self.came = []
        for packet in frames(self.near):
            if packet.endswith(b"marker"):
                break
            self.came.append(packet)
        after = self.path.counters()
        after["rx_packets"] -= 1
        after["rx_bytes"] -= len(marker)
        return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def ways(counted: dict[str, int]) -> dict[str, int]:
    """The counters about the detour."""
    return {name: count for name, count in counted.items() if name.endswith("detoured")}


def prefix_address(prefix: Prefix, host: int) -> str:
    """An address in a subnet."""
    packed = prefix.address[:-1] + bytes([prefix.address[-1] + host])
    return socket.inet_ntop(prefix.family, packed)


def listen(device: str) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK)
    found.bind((device, _ETH_P_ALL))
    return found


def frames(one: socket.socket) -> Iterator[bytes]:
    """What comes in on a device, as it comes."""
    for _ in ready(one.fileno()):
        frame, address = one.recvfrom(1 << 17)
        if address[2] != _PACKET_OUTGOING:
            yield frame
    raise AssertionError("nothing arrives")


def ready(descriptor: int) -> Iterator[None]:
    """Each time that there is something to read, for as long as one waits for what does not come."""
    end = time.monotonic() + PATIENCE_S
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    while (left := end - time.monotonic()) > 0:
        if poll.poll(left * 1000):
            yield


@pytest.fixture(params=WIRES, ids=lambda wire: str(wire.family))
def path(request: pytest.FixtureRequest, underlay: None) -> Iterator[PathOnDevices]:
    del underlay
    require_bpf()
    found = PathOnDevices(request.param)
    yield found
    found.close()


class TestOut:
    @pytest.mark.parametrize("number", range(3))
    def test_known_peer_gets_the_packet_behind_outer_headers(self, path: PathOnDevices, number: int) -> None:
        _, remote, port = path.peer(number)
        packet = path.packet(number=number)
        counted = path.send(packet)
        assert counted == {"tx_packets": 1, "tx_bytes": len(packet)}
        outer = path.wire.encapsulated(path.wire.older(packet), remote, port)
        # "Don't fragment" and both checksums are in the reference's bytes.
        assert path.on_wire() == path.far_mac + path.mac + ethernet(outer)[12:]
        subnet = Prefix.parse(list(path.wire.peers)[number])
        (traffic,) = [one.traffic for one in path.path.peers() if one.subnet == subnet]
        assert (traffic.tx_packets, traffic.tx_bytes) == (1, len(packet))

    def test_every_age(self, path: PathOnDevices) -> None:
        _, remote, port = path.peer()
        for ttl in range(2, 256):
            packet = path.packet(ttl=ttl)
            path.send(packet)
            assert path.on_wire()[14:] == path.wire.encapsulated(path.wire.older(packet), remote, port)

    @pytest.mark.parametrize("ttl", [0, 1])
    def test_packet_that_has_lived_long_enough_is_dropped(self, path: PathOnDevices, ttl: int) -> None:
        assert path.send(path.packet(ttl=ttl)) == {"ttl": 1}

    def test_packet_for_nobody_is_the_readers_as_it_was(self, path: PathOnDevices) -> None:
        packet = path.wire.packet(path.wire.own_container, path.wire.nobody)
        assert path.send(packet) == {"to_engine": 1}
        assert path.at_reader() == packet

    def test_packet_too_big_for_the_peer_is_the_readers(self, path: PathOnDevices) -> None:
        _, remote, port = path.peer()
        least = len(path.packet(b""))
        path.put(next(iter(path.wire.peers)), remote, port, mtu=least + 100)
        assert "tx_packets" in path.send(path.packet(bytes(100)))
        assert path.send(path.packet(bytes(101))) == {"to_engine": 1}
        assert path.at_reader() == path.packet(bytes(101))

    def test_packet_for_which_the_programs_know_no_way_is_the_readers(self, path: PathOnDevices) -> None:
        _, remote, port = path.peer()
        path.put(next(iter(path.wire.peers)), remote, port, index=0)
        assert path.send(path.packet()) == {"to_engine": 1}
        assert path.at_reader() == path.packet()

    @pytest.mark.parametrize("size", [1500, 9000, 15000, 15360, 16000, 16384, 20000, 65534 - 40])
    def test_none_is_lost_for_its_size(self, path: PathOnDevices, size: int) -> None:
        """The kernel makes room in front of packets up to a limit of its own."""
        _, remote, port = path.peer()
        packet = path.packet(bytes(size))
        counted = path.send(packet)
        if counted == {"to_engine": 1}:
            assert size > 9000  # no network card takes more
            assert path.at_reader() == packet
        else:
            assert path.on_wire()[14:] == path.wire.encapsulated(path.wire.older(packet), remote, port)

    def test_super_packet_goes_whole(self, path: PathOnDevices) -> None:
        _, remote, port = path.peer()
        packet = path.packet(tcp_header() + bytes(40000), protocol=6)
        assert path.send_super(packet) == {"tx_packets": 1, "tx_bytes": len(packet)}
        assert path.on_wire()[14:] == path.wire.encapsulated(path.wire.older(packet), remote, port)

    def test_super_packet_that_outer_headers_would_make_too_long_for_ip(self, path: PathOnDevices) -> None:
        most = 65535 - path.wire.headers - len(path.packet(tcp_header()))
        assert "tx_packets" in path.send_super(path.packet(tcp_header() + bytes(most), protocol=6))
        assert path.send_super(path.packet(tcp_header() + bytes(most + 1), protocol=6)) == {"to_engine": 1}

    @pytest.mark.parametrize(("mtu", "counter"), [(1400, "tx_packets"), (1399, "to_engine")])
    def test_pieces_of_a_super_packet_have_to_fit(self, path: PathOnDevices, mtu: int, counter: str) -> None:
        """TCP's header is taken for the longest there is."""
        _, remote, port = path.peer()
        path.put(next(iter(path.wire.peers)), remote, port, mtu=mtu)
        headers = len(path.packet(b"")) + 60
        packet = path.packet(tcp_header() + bytes(8000), protocol=6)
        assert counter in path.send_super(packet, size=1400 - headers)

    def test_forgotten_peer_is_nobody(self, path: PathOnDevices) -> None:
        path.path.drop(Prefix.parse(next(iter(path.wire.peers))))
        assert path.send(path.packet()) == {"to_engine": 1}

    def test_longest_prefix_decides(self, path: PathOnDevices) -> None:
        path.send(path.packet(number=2))
        path.send(path.packet(number=1))
        at = 14 + path.wire.headers - 6
        assert [int.from_bytes(path.on_wire()[at : at + 2], "big") for _ in range(2)] == [28285, 18285]

    def test_packet_cut_short_is_the_readers(self, path: PathOnDevices) -> None:
        """It never gets past the end of what there is."""
        whole = path.packet(b"")
        for length in range(1, len(whole)):
            assert path.send(whole[:length]) == {"to_engine": 1}
        assert "tx_packets" in path.send(whole)

    def test_packet_of_another_protocol_is_the_readers(self, path: PathOnDevices) -> None:
        assert path.send(bytes(28), 0x0806) == {"to_engine": 1}

    def test_neighbour_that_is_not_known_yet_is_asked_for(self, path: PathOnDevices) -> None:
        _, remote, _port = path.peer()
        ip(f"neighbour delete {remote} dev eth0")
        ip(f"address add {remote}/{24 if path.wire.family is Family.IPV4 else 64} dev wire nodad")
        # Whoever is beyond the wire answers, so that the packet follows.
        command("sysctl -q net.ipv4.conf.all.accept_local=1")
        packet = path.packet()
        path.send(packet)
        question = next(frame for frame in frames(path.far) if asks_for(frame, remote))
        assert question[6:12] == path.mac


def tcp_header(flags: int = 0x10, options: bytes = b"") -> bytes:
    """The checksum is the card's."""
    offset = (20 + len(options)) << 2
    return struct.pack("!HHIIBBHHH", 40000, 80, 1, 1, offset, flags, 1000, 0, 0) + options


def asks_for(frame: bytes, address: str) -> bool:
    """ARP, or a neighbour solicitation."""
    is_question = frame[12:14] == b"\x08\x06" or (frame[12:14] == b"\x86\xdd" and frame[54] == 135)
    return is_question and parse_address(address) in frame


def test_packet_with_options_is_the_readers(underlay: None) -> None:
    """The other end would leave it to its engine, where nobody knew of a checksum that is not finished."""
    del underlay
    require_bpf()
    with closing(PathOnDevices(WIRES[0])) as path:
        packet = path.wire.packet(path.wire.own_container, path.peer()[0], b"data", options=b"\x01" * 8)
        assert path.send(packet) == {"to_engine": 1}
        assert path.at_reader() == packet


def test_super_packet_with_extension_headers_is_the_readers(underlay: None) -> None:
    del underlay
    require_bpf()
    with closing(PathOnDevices(WIRES[1])) as path:
        behind = bytes((socket.IPPROTO_TCP, 0, 1, 4, 0, 0, 0, 0))  # destination options: padding
        tcp = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 5 << 4, 0x10, 100, 0, 0) + bytes(3000)
        packet = path.packet(behind + tcp, protocol=socket.IPPROTO_DSTOPTS)
        assert path.send_super(packet, before=len(behind)) == {"to_engine": 1}


class TestIn:
    def test_known_peers_packet_comes_out_of_the_tun(self, path: PathOnDevices) -> None:
        source, remote, port = path.peer()
        packet = path.wire.packet(source, path.wire.own_container, b"data")
        counted = path.arrive(path.wire.datagram(packet, source=remote, port=port))
        assert counted == {"rx_packets": 1, "rx_bytes": len(packet)}
        assert path.came == [path.wire.older(packet)]

    @pytest.mark.parametrize("kind", ["row", "tcp"])
    def test_super_packet_takes_the_detour(self, path: PathOnDevices, kind: str) -> None:
        """It stays one, and nothing but its age tells it from one that came the short way."""
        packet = getattr(path, kind)(bytes(range(250)) * 4)
        path.near.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        counted = path.arrive_whole(packet, size=100)
        assert counted == {"rx_packets": 1, "rx_bytes": len(packet), "detoured": 1}
        came = next(frames(path.near))
        assert came[_VIRTIO.size :] == path.wire.older(path.wire.older(packet))
        flags, offload, _, size, start, _ = _VIRTIO.unpack_from(came)
        tcp = _TCPV4 if path.wire.family is Family.IPV4 else _TCPV6
        assert (flags, offload, size) == (_NEEDS_CSUM, tcp if kind == "tcp" else _UDP_L4, 100)
        assert start == len(path.packet(b""))
        (traffic,) = [one.traffic for one in path.path.peers() if one.traffic.rx_packets]
        assert (traffic.rx_packets, traffic.rx_bytes) == (1, len(packet))

    @pytest.mark.parametrize(
        ("flags", "options", "data", "is_detoured"),
        [
            (_ACK, b"", b"d", True),
            (_ACK, _STAMPS, bytes(1000), True),
            (_ACK | _FIN, b"", b"", True),
            (_ACK | _SYN, _STAMPS, b"", True),
            (_RST, b"", b"", True),
            (_ACK, b"", b"", False),
            (_ACK | _PSH, _STAMPS, b"", False),
            (_ACK, b"\1" * 40, b"", False),
        ],
    )
    def test_tcp_takes_the_detour_save_bare_acknowledgements(
        self, path: PathOnDevices, flags: int, options: bytes, data: bytes, is_detoured: bool
    ) -> None:
        packet = path.tcp(data, header=tcp_header(flags, options))
        counted = path.arrive(path.addressed(packet))
        assert counted == {"rx_packets": 1, "rx_bytes": len(packet)} | (
            {"detoured": 1} if is_detoured else {}
        )
        assert path.came == [path.wire.older(packet)]

    def test_tcp_whose_header_lies_takes_some_way(self, path: PathOnDevices) -> None:
        """It is for the receiver to judge, cut short, or with a header shorter or longer than there is."""
        header = tcp_header()
        for inner in (
            *(header[:length] for length in range(20)),
            *(header[:12] + bytes([words << 4]) + header[13:] for words in range(16)),
        ):
            packet = path.tcp(b"", header=inner)
            path.arrive(path.addressed(packet))
            assert path.came == [path.wire.older(packet)]

    def test_tcp_with_an_outer_checksum_goes_the_short_way(self, path: PathOnDevices) -> None:
        packet = path.tcp(bytes(100))
        counted = path.arrive(path.addressed(packet, check=0x1234))
        assert counted == {"rx_packets": 1, "rx_bytes": len(packet)}
        assert path.came == [path.wire.older(packet)]

    def test_segments_that_a_card_has_cut_are_merged(self, path: PathOnDevices) -> None:
        """As they would be behind a tunnel of the kernel's; what is for the host itself comes as it is."""
        path.arrive(path.addressed(path.tcp(b"data")))
        command("ethtool -K wire tso off gso off")
        target = format_address(path.wire.inside)
        for whom, is_merged in (("", True), (target, False)):
            packet = path.tcp(bytes(range(250)) * 80, target=whom)
            path.arrive_whole(packet, size=1000)
            start, count, came = len(path.tcp(b"")), 0, b""
            for one in frames(path.near):
                count, came = count + 1, came + one[start:]
                if len(came) >= 20_000:
                    break
            assert came == bytes(range(250)) * 80
            assert (count < 20) is is_merged

    @pytest.mark.parametrize("kind", ["row", "tcp"])
    def test_super_packet_that_may_not_come_in_is_dropped(self, path: PathOnDevices, kind: str) -> None:
        """By the first program: the one behind the detour knows no peers."""
        make = getattr(path, kind)
        dropped = {"spoofed": make(bytes(3000), number=1), "ttl": make(bytes(3000), ttl=2)}
        if path.wire.family is Family.IPV4:
            dropped["checksum"] = make(bytes(3000), check=0x1234)
        for reason, packet in dropped.items():
            assert path.arrive_whole(packet, size=1000) == {reason: 1}
        path.path.drop(Prefix.parse(next(iter(path.wire.peers))))
        assert path.arrive_whole(make(bytes(3000)), size=1000) == {"unknown_peer": 1}

    @pytest.mark.parametrize("wire", WIRES, ids=lambda wire: str(wire.family))
    def test_strangers_super_packet_is_let_in_on_demand(self, underlay: None, wire: Wire) -> None:
        del underlay
        require_bpf()
        with closing(PathOnDevices(wire, allow_unknown=True)) as path:
            path.path.drop(Prefix.parse(next(iter(wire.peers))))
            for packet in (path.row(bytes(3000)), path.tcp(bytes(3000))):
                assert path.arrive_whole(packet, size=1000)["detoured"] == 1
                assert next(frames(path.near)) == wire.older(wire.older(packet))

    def test_bridge_hands_on_whole_what_came_by_the_detour(self, path: PathOnDevices) -> None:
        """And would cut it, did it not: so it is the detour that does it."""
        packet = path.tcp(bytes(10_000))
        with path.bridged_container() as came:
            path.arrive_whole(packet, size=1000)
            assert len(next(came)) == 14 + len(packet)
            ip("link set tun0.in down")
            path.arrive_whole(packet, size=1000)
            assert len(next(came)) == 14 + len(packet) - 9000

    def test_without_the_device_all_goes_as_it_can(self, path: PathOnDevices) -> None:
        """TCP goes on, whole; of datagrams in a row the socket of the port gets each by itself."""
        ip("link set tun0.in down")
        packet = path.tcp(bytes(3000))
        assert path.arrive_whole(packet, size=1000) == {"rx_packets": 1, "rx_bytes": len(packet)}
        assert next(frames(path.near)) == path.wire.older(path.wire.older(packet))
        row = path.row(bytes(range(250)) * 4)
        with closing(open_bound(parse_address(path.wire.own), path.wire.port)) as usual:
            assert path.arrive_whole(row, size=100) == {"from_engine": 1}
            for number in range(10):
                next(ready(usual.fileno()))
                datagram = usual.recv(1 << 17)
                assert len(datagram) == len(row) - 900
                assert datagram.endswith(row[-1000:][number * 100 : (number + 1) * 100])

    def test_firewall_that_lets_the_port_in_lets_all_in(self, path: PathOnDevices) -> None:
        rules = f"udp dport {path.wire.port} accept; icmpv6 type nd-neighbor-solicit accept"
        command(
            "nft add table inet strict { chain input { type filter hook input priority 0; policy drop;"
            f" {rules}; }}; }}"
        )
        try:
            for packet in (path.tcp(bytes(3000)), path.row(bytes(3000))):
                assert path.arrive_whole(packet, size=1000)["detoured"] == 1
                assert len(next(frames(path.near))) == len(packet)
        finally:
            command("nft delete table inet strict")

    def test_detour_that_lets_nothing_of_a_peer_out_is_left_until_it_does(self, path: PathOnDevices) -> None:
        """What is lost shows it, and in a while one packet more. Other peers' packets go on as they went."""
        data, others = (path.addressed(path.tcp(b"data", number=number), number=number) for number in (0, 1))
        for frame in (data, others):
            assert ways(path.arrive(frame)) == {"detoured": 1}
        with path.nothing_of_the_first_peer_passes_input():
            for _ in range(_MOST_MISSED):
                assert ways(path.arrive(data)) == {"detoured": 1}
                assert path.came == []
            run(until(lambda: ways(path.arrive(data)) == {"undetoured": 1}))
            for frame, way in ((data, "undetoured"), (others, "detoured")) * 5:
                assert ways(path.arrive(frame)) == {way: 1}
                assert len(path.came) == 1
        run(until(lambda: ways(path.arrive(data)) == {"detoured": 1}))
        for _ in range(5):
            assert len(path.came) == 1
            assert ways(path.arrive(data)) == {"detoured": 1}
        assert not any(one.passage.is_shut for one in path.path.peers())

    def test_new_peer_loses_one_packet_at_most(self, path: PathOnDevices) -> None:
        """Until one has come out of the detour nothing else goes there."""
        data = path.addressed(path.tcp(b"data"))
        with path.nothing_of_the_first_peer_passes_input():
            for number in range(5):
                assert ways(path.arrive(data)) == {"undetoured" if number else "detoured": 1}
                assert len(path.came) == (number > 0)
            assert not any(one.passage.is_shut for one in path.path.peers())  # for all that is known
            run(until(lambda: ways(path.arrive(data)) == {"detoured": 1}))
            assert path.came == []
            assert ways(path.arrive(data)) == {"undetoured": 1}
            subnet, (remote, port) = next(iter(path.wire.peers.items()))
            path.put(subnet, remote, port, mtu=1400)
            assert ways(path.arrive(data)) == {"undetoured": 1}, "a changed peer stays what it was"
            assert [one.passage.is_shut for one in path.path.peers()].count(True) == 1

    def test_peer_whose_detour_is_shut_loses_nothing_else(self, path: PathOnDevices) -> None:
        """What does not need it is not counted, and opens nothing; nor do strangers' frames at its port."""
        command("tc filter delete dev tun0.in ingress")
        data, spare = (path.addressed(path.tcp(payload)) for payload in (b"data", b""))
        run(until(lambda: ways(path.arrive(data)) == {"undetoured": 1}))
        for frame in (spare, path.addressed(path.tcp(b"data"), check=0x1234)):
            assert ways(path.arrive(frame)) == {}
            assert len(path.came) == 1
        detour = link_json(path.link.name)["ifindex"]
        path.attach(detour, tc.Hook.INGRESS, DETOUR, path.path.detour.fd)
        header = bytes((8, 0, 0, 0)) + path.link.vni.to_bytes(3, "big") + bytes(1)
        forged = header + ethernet(path.tcp(b"data"))
        frame = path.wire.datagram(forged, source=path.peer()[1], target_port=path.link.port)
        before = [one.passage for one in path.path.peers()]
        assert path.arrive(path.mac + frame[6:]) == {"unknown_peer": 1}
        assert [one.passage for one in path.path.peers()] == before

    def test_burst_shuts_nothing(self, path: PathOnDevices) -> None:
        """More goes in at once than may be missed, and says nothing about when to try."""
        path.arrive(path.addressed(path.tcp(b"data")))
        tried = [(one.passage.wait_s, one.passage.next_ns) for one in path.path.peers()]
        command("ethtool -K wire tso off gso off")
        counted = path.arrive_whole(path.tcp(bytes(40_000)), size=1000)
        assert counted["detoured"] == 40
        assert "undetoured" not in counted
        assert [(one.passage.wait_s, one.passage.next_ns) for one in path.path.peers()] == tried

    def test_frames_to_the_detour_have_a_source_that_nobody_can_guess(self, path: PathOnDevices) -> None:
        """GRO would merge others with them, in front of the program that tells them apart."""
        with listen(path.link.name) as behind:
            path.arrive(path.addressed(path.tcp(b"data")))
            source = next(frames(behind))[6:12]
        assert source == path.path.settings.detour_source
        assert source[0] & 3 == 2  # local, and one device's
        other = Settings(parse_address(path.wire.own), path.wire.port, path.tun, path.wire.inside)
        assert other.detour_source != source

    def test_tcp_for_the_host_itself_goes_the_short_way(self, path: PathOnDevices) -> None:
        for host in range(3):
            inside = format_address(path.wire.inside[:-1] + bytes([host]))
            counted = path.arrive_whole(path.tcp(bytes(3000), target=inside), size=1000)
            assert list(counted) == ["rx_packets", "rx_bytes"] + ["detoured"] * (host == 2)

    def test_what_the_detour_would_make_too_long_for_ip(self, path: PathOnDevices) -> None:
        """What a peer sends has room for its own outer headers, and not always for those of the detour."""
        most = 65535 - path.wire.headers - _DETOUR_BYTES - len(path.tcp(b""))
        for more, ways in ((0, 1), (1, 0), (8, 0)):  # with more the wire itself would cut it
            packet = path.tcp(bytes(most + more))
            assert path.arrive_whole(packet, size=1000).get("detoured", 0) == ways
            assert next(frames(path.near)) == path.wire.older(path.wire.older(packet))

    @pytest.mark.parametrize("is_own_host", [False, True])
    def test_strangers_at_the_detours_port_are_dropped(self, path: PathOnDevices, is_own_host: bool) -> None:
        """They know all that can be known: VNI, the device's address, and the programs' mark."""
        target = bytes.fromhex(link_json("tun0.in")["address"].replace(":", ""))
        header = bytes((8, 0, 0, 0)) + path.link.vni.to_bytes(3, "big") + bytes(1)
        inner = path.wire.packet(path.peer()[0], path.wire.own_container, b"data")
        forged = header + target + ethernet(inner)[6:]
        with path.counted() as counts:
            if is_own_host:
                with socket.socket(path.wire.family, socket.SOCK_DGRAM) as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 6)  # the most that users may
                    one.sendto(forged, (path.wire.own, path.link.port))
            else:
                with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, _DETOUR)
                    one.bind(("wire", 0))
                    remote = path.peer()[1]
                    frame = path.wire.datagram(forged, source=remote, target_port=path.link.port)
                    one.send(path.mac + frame[6:])
        assert counts == {"unknown_peer": 1}

    def test_vlan_is_somebody_elses(self, path: PathOnDevices) -> None:
        source, remote, port = path.peer()
        frame = path.wire.datagram(
            path.wire.packet(source, path.wire.own_container), source=remote, port=port
        )
        assert path.arrive(frame[:12] + b"\x81\x00\x00\x07" + frame[12:]) == {}
        assert path.came == []

    def test_frame_cut_short_is_left_to_the_stack(self, path: PathOnDevices) -> None:
        """Also shorter than an outer header, which the kernel's test of programs refuses."""
        frame = path.wire.datagram(b"", source=path.peer()[1])
        for length in range(15, len(frame)):
            assert path.arrive(frame[:length]) == {}
        assert path.arrive(frame) == {"truncated": 1}

    def test_checksum_that_a_socket_left_to_the_card_is_done_with(self, path: PathOnDevices) -> None:
        """A sender at the other end of a virtual wire leaves the outer checksum open (``CHECKSUM_PARTIAL``).

        It must not be filled in later, when the outer header is gone: that would hit something else.
        """
        source, remote, port = path.peer()
        length = 24 if path.wire.family is Family.IPV4 else 64
        ip("netns add peer")
        try:
            ip("link set wire netns peer")
            command("ip netns exec peer ip link set wire up")
            nodad = "" if path.wire.family is Family.IPV4 else "nodad"
            command(f"ip netns exec peer ip address add {remote}/{length} dev wire {nodad}")
            mac = link_json("eth0")["address"]
            command(f"ip netns exec peer ip neighbour replace {path.wire.own} lladdr {mac} dev wire")
            one = inside("peer", lambda: socket.socket(path.wire.family, socket.SOCK_DGRAM))
            path.near.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)
            with one:
                one.bind((remote, port))
                for payload in (b"8 bytes.", b"9 bytes..", b"data" * 100):
                    packet = path.wire.packet(source, path.wire.own_container, payload)
                    one.sendto(packet, (path.wire.own, path.wire.port))
                    assert next_with_status(path.near) == (path.wire.older(packet), False)
        finally:
            ip("netns delete peer")


def next_with_status(one: socket.socket) -> tuple[bytes, bool]:
    """The next packet, and whether a checksum in it is still to be filled in."""
    assert any(True for _ in ready(one.fileno())), "nothing arrives"
    packet, ((_level, _kind, data), *_), _flags, _address = one.recvmsg(1 << 16, 1024)
    return packet, bool(int.from_bytes(data[:4], sys.byteorder) & _TP_STATUS_CSUMNOTREADY)
