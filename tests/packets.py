# SPDX-License-Identifier: Apache-2.0
"""IP packets in plain Python: made, taken apart, and what the engine has to do with them, written down again.

The reference that ``native/engine`` is compared with. It shares no line with it and is made to be read:
fields instead of offsets, no table, no trick.
"""

import itertools
import struct
from collections.abc import Iterator, Sequence

import msgspec

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
OFFLOAD = struct.Struct("=BBHHHH")  # flags, type, header, size, checksum's start, its offset: virtio_net_hdr
NEEDS_CHECKSUM = 1
OFFLOAD_NONE, OFFLOAD_TCP4, OFFLOAD_TCP6, OFFLOAD_UDP, OFFLOAD_ECN = 0, 1, 4, 5, 0x80
PLAIN = OFFLOAD.pack(0, 0, 0, 0, 0, 0)

_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION = 0, 43, 44, 51, 60
_EXTENSIONS = (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AUTHENTICATION, _DESTINATION, 135, 139, 140)


class Dropped(Exception):
    """A packet that must not go on; with the engine's name of the reason."""


def ones_sum(data: bytes) -> int:
    """RFC 1071: the sum of 16-bit words, carries added again."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes) -> int:
    """What goes into a header."""
    return 0xFFFF - ones_sum(data)


class Tcp(msgspec.Struct, frozen=True, kw_only=True):
    """A TCP segment."""

    source: int = 40000
    target: int = 80
    sequence: int = 1000
    acknowledged: int = 77
    flags: int = ACK
    window: int = 500
    urgent: int = 0
    options: bytes = b""
    payload: bytes = b""

    def header(self, check: int = 0) -> bytes:
        words = (5 + len(self.options) // 4) << 4
        return (
            struct.pack(
                "!HHIIBBHHH",
                self.source,
                self.target,
                self.sequence % 2**32,
                self.acknowledged,
                words,
                self.flags,
                self.window,
                check,
                self.urgent,
            )
            + self.options
        )

    def bytes(self, pseudo: bytes) -> bytes:
        whole = self.header() + self.payload
        return self.header(checksum(pseudo + whole)) + self.payload


class Udp(msgspec.Struct, frozen=True, kw_only=True):
    """A UDP datagram; *has_checksum* False leaves it out, as IPv4 allows."""

    source: int = 40000
    target: int = 53
    payload: bytes = b""
    has_checksum: bool = True

    def header(self, check: int = 0) -> bytes:
        return struct.pack("!HHHH", self.source, self.target, 8 + len(self.payload), check)

    def bytes(self, pseudo: bytes) -> bytes:
        check = (checksum(pseudo + self.header() + self.payload) or 0xFFFF) if self.has_checksum else 0
        return self.header(check) + self.payload


class Raw(msgspec.Struct, frozen=True, kw_only=True):
    """Anything else behind an IP header."""

    protocol: int
    payload: bytes = b""

    def bytes(self, _: bytes) -> bytes:
        return self.payload


Inner = Tcp | Udp | Raw


def protocol_of(inner: Inner) -> int:
    if isinstance(inner, Raw):
        return inner.protocol
    return TCP if isinstance(inner, Tcp) else UDP


class Ip4(msgspec.Struct, frozen=True, kw_only=True):
    """An IPv4 packet; *offset* in units of 8 bytes."""

    source: bytes = bytes((10, 5, 1, 2))
    target: bytes = bytes((10, 5, 2, 2))
    service: int = 0
    ident: int = 1
    df: bool = True
    mf: bool = False
    offset: int = 0
    ttl: int = 64
    options: bytes = b""
    inner: Inner = Raw(protocol=253)

    def pseudo(self, length: int) -> bytes:
        return self.source + self.target + struct.pack("!BBH", 0, protocol_of(self.inner), length)

    def header(self, length: int) -> bytes:
        words = 5 + len(self.options) // 4
        flags = self.df << 14 | self.mf << 13 | self.offset

        def with_checksum(check: int) -> bytes:
            fixed = struct.pack(
                "!BBHHHBBH",
                0x40 | words,
                self.service,
                words * 4 + length,
                self.ident % 2**16,
                flags,
                self.ttl,
                protocol_of(self.inner),
                check,
            )
            return fixed + self.source + self.target + self.options

        return with_checksum(checksum(with_checksum(0)))

    def bytes(self) -> bytes:
        size = len(self.inner.bytes(b""))
        inner = self.inner.bytes(self.pseudo(size))
        return self.header(size) + inner


class Ip6(msgspec.Struct, frozen=True, kw_only=True):
    """An IPv6 packet; *extensions* are pairs of a header's number and its bytes from the second on."""

    source: bytes = bytes.fromhex("fd000005000000010000000000000002")
    target: bytes = bytes.fromhex("fd000005000000020000000000000002")
    service: int = 0
    flow: int = 0
    hops: int = 64
    extensions: tuple[tuple[int, bytes], ...] = ()
    inner: Inner = Raw(protocol=253)

    def pseudo(self, length: int) -> bytes:
        return self.source + self.target + struct.pack("!IHBB", length, 0, 0, protocol_of(self.inner))

    def bytes(self) -> bytes:
        size = len(self.inner.bytes(b""))
        numbers = [number for number, _ in self.extensions] + [protocol_of(self.inner)]
        chain = b"".join(
            bytes([following]) + rest
            for (_, rest), following in zip(self.extensions, numbers[1:], strict=True)
        )
        first = 6 << 28 | self.service << 20 | self.flow
        fixed = struct.pack("!IHBB", first, len(chain) + size, numbers[0], self.hops)
        return fixed + self.source + self.target + chain + self.inner.bytes(self.pseudo(size))


Ip = Ip4 | Ip6


class Found(msgspec.Struct, frozen=True):
    """What a packet is, as the engine's ``_check`` says it."""

    length: int
    network: int
    protocol: int
    has_options: bool
    is_fragment: bool
    is_later: bool
    dont_fragment: bool


def check(packet: bytes) -> Found:
    """Take a packet apart, or say why it must be dropped."""
    if not packet:
        raise Dropped("truncated")
    version = packet[0] >> 4
    if version == 4:
        return _check4(packet)
    if version == 6:
        return _check6(packet)
    raise Dropped("version")


def _check4(packet: bytes) -> Found:
    if len(packet) < 20:
        raise Dropped("truncated")
    header = packet[0] % 16 * 4
    length, _, flags, ttl, protocol = struct.unpack_from("!HHHBB", packet, 2)
    if header < 20:
        raise Dropped("header")
    if header > len(packet):
        raise Dropped("truncated")
    if not header <= length <= len(packet):
        raise Dropped("length")
    if ones_sum(packet[:header]) != 0xFFFF:
        raise Dropped("checksum")
    list(options_of(packet[20:header]))
    if ttl == 0:
        raise Dropped("ttl")
    offset = flags % 2**13
    return Found(
        length,
        header,
        protocol,
        has_options=header > 20,
        is_fragment=bool(flags & 0x2000) or offset > 0,
        is_later=offset > 0,
        dont_fragment=bool(flags & 0x4000),
    )


def options_of(options: bytes) -> Iterator[bytes]:
    """The options of an IPv4 header, one by one, up to the end of the list."""
    while options and options[0] != 0:
        if options[0] == 1:
            size = 1
        elif len(options) < 2 or not 2 <= options[1] <= len(options):
            raise Dropped("options")
        else:
            size = options[1]
        yield options[:size]
        options = options[size:]


def _check6(packet: bytes) -> Found:
    if len(packet) < 40:
        raise Dropped("truncated")
    payload, protocol, hops = struct.unpack_from("!HBB", packet, 4)
    if 40 + payload > len(packet):
        raise Dropped("length")
    if hops == 0:
        raise Dropped("ttl")
    rest = packet[40 : 40 + payload]
    is_fragment = is_later = False
    while protocol in _EXTENSIONS and not is_later:
        if len(rest) < 8:
            raise Dropped("options")
        if protocol == _FRAGMENT:
            size, is_fragment = 8, True
            is_later = int.from_bytes(rest[2:4], "big") >> 3 > 0
        else:
            size = (rest[1] + 2) * 4 if protocol == _AUTHENTICATION else (rest[1] + 1) * 8
        if size > len(rest):
            raise Dropped("options")
        protocol, rest = rest[0], rest[size:]
    network = 40 + payload - len(rest)
    return Found(
        40 + payload,
        network,
        protocol,
        has_options=network > 40,
        is_fragment=is_fragment,
        is_later=is_later,
        dont_fragment=True,
    )


def forward(packet: bytes) -> bytes:
    """One hop further, the header's checksum summed anew."""
    found = check(packet)
    changed = bytearray(packet[: found.length])
    place = 8 if packet[0] >> 4 == 4 else 7
    if changed[place] == 1:
        raise Dropped("ttl")
    changed[place] -= 1
    if place == 8:
        changed[10:12] = bytes(2)
        changed[10:12] = checksum(bytes(changed[: found.network])).to_bytes(2, "big")
    return bytes(changed)


def super_packet(packet: Ip, size: int, *, ecn: bool = False) -> bytes:
    """A packet as the kernel hands it to a device that cuts: with a virtio header, its sum not finished."""
    whole = bytearray(packet.bytes())
    found = check(bytes(whole))
    inner = packet.inner
    assert isinstance(inner, Tcp | Udp)
    place = 16 if isinstance(inner, Tcp) else 6
    partial = ones_sum(packet.pseudo(found.length - found.network))
    whole[found.network + place : found.network + place + 2] = partial.to_bytes(2, "big")
    if isinstance(inner, Udp):
        kind = OFFLOAD_UDP
    else:
        kind = OFFLOAD_TCP4 if isinstance(packet, Ip4) else OFFLOAD_TCP6
    header = found.network + len(inner.header())
    return OFFLOAD.pack(
        NEEDS_CHECKSUM, kind | (OFFLOAD_ECN if ecn else 0), header, size, found.network, place
    ) + bytes(whole)


def segments(packet: Ip, size: int) -> list[bytes]:
    """What a super-packet becomes on the wire, as the kernel's own segmentation would have it."""
    inner = packet.inner
    assert isinstance(inner, Tcp | Udp)
    parts = [inner.payload[at : at + size] for at in range(0, len(inner.payload), size)]
    found = []
    for number, part in enumerate(parts):
        if isinstance(inner, Tcp):
            flags = inner.flags
            if number < len(parts) - 1:
                flags &= ~(FIN | PSH)
            if number > 0:
                flags &= ~CWR
            changed: Inner = msgspec.structs.replace(
                inner, payload=part, sequence=inner.sequence + number * size, flags=flags
            )
        else:
            changed = msgspec.structs.replace(inner, payload=part)
        if isinstance(packet, Ip4):
            found.append(msgspec.structs.replace(packet, inner=changed, ident=packet.ident + number).bytes())
        else:
            found.append(msgspec.structs.replace(packet, inner=changed).bytes())
    return found


def can_follow(group: Sequence[Ip], packet: Ip) -> bool:
    """Whether a packet can be put behind others of one flow into one super-packet."""
    first, last = group[0], group[-1]
    if len(group) == 64 or not _are_plain(packet) or type(packet) is not type(first):
        return False
    a, b, z = first.inner, packet.inner, last.inner
    if isinstance(a, Raw) or isinstance(b, Raw) or isinstance(z, Raw) or type(a) is not type(b):
        return False
    if len(z.payload) < len(a.payload) or len(b.payload) > len(a.payload):
        return False
    if isinstance(a, Tcp) and isinstance(b, Tcp) and isinstance(z, Tcp):
        if z.flags & PSH or b.sequence % 2**32 != (z.sequence + len(z.payload)) % 2**32:
            return False
        if msgspec.structs.replace(
            b, sequence=0, payload=b"", flags=b.flags & ~PSH
        ) != msgspec.structs.replace(a, sequence=0, payload=b"", flags=a.flags & ~PSH):
            return False
    if isinstance(packet, Ip4) and isinstance(last, Ip4) and isinstance(first, Ip4):
        step = (packet.ident - last.ident) % 2**16
        steps = {(two.ident - one.ident) % 2**16 for one, two in _pairs(group)} | {step}
        if len(steps) > 1 or not (step == 1 or (step == 0 and packet.df)):
            return False
    total = len(first.bytes()) + sum(len(_payload(one)) for one in group[1:]) + len(_payload(packet))
    return total <= 65535 and _but_inner(packet) == _but_inner(first)


def _pairs(group: Sequence[Ip]) -> Iterator[tuple[Ip4, Ip4]]:
    for one, two in itertools.pairwise(group):
        assert isinstance(one, Ip4)
        assert isinstance(two, Ip4)
        yield one, two


def _payload(packet: Ip) -> bytes:
    assert isinstance(packet.inner, Tcp | Udp)
    return packet.inner.payload


def _but_inner(packet: Ip) -> Ip:
    inner = packet.inner
    assert isinstance(inner, Tcp | Udp)
    ports = Udp(source=inner.source, target=inner.target)
    if isinstance(packet, Ip4):
        return msgspec.structs.replace(packet, ident=0, inner=ports)
    return msgspec.structs.replace(packet, inner=ports)


def _are_plain(packet: Ip) -> bool:
    inner = packet.inner
    if isinstance(inner, Raw) or not inner.payload:
        return False
    if isinstance(packet, Ip4):
        if packet.options or packet.mf or packet.offset:
            return False
    elif packet.extensions:
        return False
    if isinstance(inner, Tcp):
        return inner.flags in (ACK, ACK | PSH, ACK | ECE, ACK | PSH | ECE)
    return inner.has_checksum


def merge(packets: Sequence[Ip]) -> list[list[Ip]]:
    """Neighbours of one flow, together; the groups in the order of their first packets."""
    groups: list[list[Ip]] = []
    open_groups: dict[object, list[Ip]] = {}
    for packet in packets:
        pair = (packet.source, packet.target, protocol_of(packet.inner))
        if not _are_plain(packet):
            for key in [key for key in open_groups if isinstance(key, tuple) and key[0] == pair]:
                del open_groups[key]
            groups.append([packet])
            continue
        assert isinstance(packet.inner, Tcp | Udp)
        flow = (pair, packet.inner.source, packet.inner.target)
        group = open_groups.get(flow)
        if group is not None and can_follow(group, packet):
            group.append(packet)
        else:
            open_groups[flow] = [packet]
            groups.append(open_groups[flow])
    return groups


def cut_again(written: bytes) -> list[bytes]:
    """What a kernel makes of a packet that was written to a device, virtio header and all."""
    flags, kind, header, size, start, offset = OFFLOAD.unpack_from(written)
    packet = written[OFFLOAD.size :]
    if kind == OFFLOAD_NONE:
        assert flags == 0
        return [packet]
    assert flags == NEEDS_CHECKSUM
    parsed = parse(packet)
    inner = parsed.inner
    assert isinstance(inner, Tcp | Udp)
    found = check(packet)
    assert (start, header) == (found.network, found.network + len(inner.header()))
    assert offset == (16 if isinstance(inner, Tcp) else 6)
    partial = int.from_bytes(packet[start + offset : start + offset + 2], "big")
    assert partial == ones_sum(parsed.pseudo(found.length - found.network))
    return segments(parsed, size)


def parse(packet: bytes) -> Ip:
    """The fields of a packet without IP options and extension headers."""
    found = check(packet)
    assert not found.has_options
    behind = packet[found.network : found.length]
    inner = _parse_inner(found.protocol, behind)
    if found.is_fragment:
        inner = Raw(protocol=found.protocol, payload=behind)
    if packet[0] >> 4 == 6:
        first, _, _, hops = struct.unpack_from("!IHBB", packet)
        return Ip6(
            source=packet[8:24],
            target=packet[24:40],
            service=first >> 20 & 0xFF,
            flow=first & 0xFFFFF,
            hops=hops,
            inner=inner,
        )
    service, _, ident, flags, ttl = struct.unpack_from("!xBHHHB", packet)
    return Ip4(
        source=packet[12:16],
        target=packet[16:20],
        service=service,
        ident=ident,
        df=bool(flags & 0x4000),
        mf=bool(flags & 0x2000),
        offset=flags % 2**13,
        ttl=ttl,
        inner=inner,
    )


def _parse_inner(protocol: int, data: bytes) -> Inner:
    if protocol == TCP:
        source, target, sequence, acknowledged, words, flags, window, _, urgent = struct.unpack_from(
            "!HHIIBBHHH", data
        )
        size = (words >> 4) * 4
        return Tcp(
            source=source,
            target=target,
            sequence=sequence,
            acknowledged=acknowledged,
            flags=flags,
            window=window,
            urgent=urgent,
            options=data[20:size],
            payload=data[size:],
        )
    if protocol == UDP:
        source, target, length, check_field = struct.unpack_from("!HHHH", data)
        return Udp(source=source, target=target, payload=data[8:length], has_checksum=check_field != 0)
    return Raw(protocol=protocol, payload=data)


def fragments(packet: Ip4, mtu: int) -> list[bytes]:
    """RFC 791: as large as fits, in units of 8 bytes; options with the copied bit in all of them."""
    size = len(packet.inner.bytes(b""))
    rest = packet.inner.bytes(packet.pseudo(size))
    copied = b"".join(one for one in options_of(packet.options) if one[0] & 0x80)
    copied += bytes(-len(copied) % 4)
    found, offset, options = [], packet.offset, packet.options
    while rest:
        room = mtu - 20 - len(options)
        part = rest if len(rest) <= room else rest[: room // 8 * 8]
        rest = rest[len(part) :]
        found.append(
            msgspec.structs.replace(
                packet,
                offset=offset,
                mf=bool(rest) or packet.mf,
                options=options,
                inner=Raw(protocol=protocol_of(packet.inner), payload=part),
            ).bytes()
        )
        offset += len(part) // 8
        options = copied
    return found


def icmp_error(packet: bytes, source: bytes, mtu: int) -> bytes:
    """No route where *mtu* is 0, too big elsewhere: COMPAT's udp backend, RFC 1191, RFC 4443."""
    found = check(packet)
    if packet[0] >> 4 == 4:
        quoted = packet[: min(found.network + 8, found.length)]
        head = struct.pack("!BBHHH", 3, 4 if mtu else 0, 0, 0, min(mtu, 65535))
        body = head[:2] + checksum(head + quoted).to_bytes(2, "big") + head[4:] + quoted
        return Ip4(
            source=source,
            target=packet[12:16],
            ident=0,
            df=False,
            ttl=8,
            inner=Raw(protocol=ICMP, payload=body),
        ).bytes()
    quoted = packet[: min(1280 - 48, found.length)]
    head = struct.pack("!BBHI", 2 if mtu else 1, 0, 0, mtu)
    answer = Ip6(source=source, target=packet[8:24], hops=8, inner=Raw(protocol=ICMPV6))
    body = head + quoted
    check_field = checksum(answer.pseudo(len(body)) + body)
    body = head[:2] + check_field.to_bytes(2, "big") + head[4:] + quoted
    return msgspec.structs.replace(answer, inner=Raw(protocol=ICMPV6, payload=body)).bytes()
