# SPDX-License-Identifier: Apache-2.0
"""The wire format of ``udp`` in plain Python (COMPAT §7.5), and what a receiver has to make of a frame.

Slow and obvious: the eBPF programs are held against it. A datagram's payload is a bare IP packet.
"""

import struct
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import msgspec

from loden.address import Family, parse_address

IP_PROTOCOL_UDP = 17
ETHERNET_BYTES = 14

UNSPEC, SHOT, REDIRECT = 0xFFFF_FFFF, 2, 7  # TC_ACT_*


def ones_sum(data: bytes) -> int:
    """The one's complement sum of 16-bit words (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ipv4(
    source: str,
    target: str,
    payload: bytes = b"",
    *,
    ttl: int = 64,
    protocol: int = 253,
    options: bytes = b"",
    **changed: int,
) -> bytes:
    """An IPv4 packet whose checksum is right, whatever fields are changed; ``check`` replaces it as well."""
    words = 5 + len(options) // 4
    fields = {
        "first": 0x40 | words,
        "tos": 0,
        "length": words * 4 + len(payload),
        "id": 0,
        "fragment": 0,
        "ttl": ttl,
        "protocol": protocol,
    } | changed
    given = fields.pop("check", None)
    head = struct.pack("!BBHHHBB", *fields.values()) + bytes(2)
    head += IPv4Address(source).packed + IPv4Address(target).packed + options
    check = 0xFFFF - ones_sum(head) if given is None else given
    return head[:10] + check.to_bytes(2, "big") + head[12:] + payload


def ipv6(
    source: str, target: str, payload: bytes = b"", *, ttl: int = 64, protocol: int = 253, **changed: int
) -> bytes:
    """An IPv6 packet."""
    fields = {"first": 6 << 28, "length": len(payload), "protocol": protocol, "ttl": ttl} | changed
    head = struct.pack("!IHBB", *fields.values())
    return head + IPv6Address(source).packed + IPv6Address(target).packed + payload


def udp(source: int, target: int, payload: bytes, **changed: int) -> bytes:
    """A UDP datagram without a checksum."""
    fields = {"source": source, "target": target, "length": 8 + len(payload), "check": 0} | changed
    return struct.pack("!4H", *fields.values()) + payload


def ethernet(payload: bytes, protocol: int | None = None) -> bytes:
    """A frame, of the protocol that the packet's first bits say."""
    if protocol is None:
        protocol = 0x86DD if payload[:1] and payload[0] >> 4 == 6 else 0x0800
    return bytes.fromhex("020000000001 020000000002") + protocol.to_bytes(2, "big") + payload


class Wire(msgspec.Struct, frozen=True):
    """What one family's test calls things.

    Args:
        family: of the packets inside and outside.
        own, own_container: the outer address of the host under test, and what is in its subnet.
        other, stranger, nobody: another address of the host; an outer address that no peer has; an inner one.
        peers: subnet → outer address and port.
        port: of the host under test.
    """

    family: Family
    own: str
    own_container: str
    other: str
    stranger: str
    nobody: str
    peers: Mapping[str, tuple[str, int]]
    port: int = 8285

    @property
    def inside(self) -> bytes:
        """The address of the host under test in the container network, packed: the first of its subnet."""
        return parse_address(self.own_container)[:-1] + b"\0"

    @property
    def headers(self) -> int:
        """Outer IP and UDP, bytes."""
        return 28 if self.family is Family.IPV4 else 48

    def packet(self, source: str, target: str, payload: bytes = b"", **changed: Any) -> bytes:
        return (ipv4 if self.family is Family.IPV4 else ipv6)(source, target, payload, **changed)

    def datagram(
        self,
        inner: bytes,
        *,
        source: str,
        port: int = 8285,
        target: str | None = None,
        target_port: int | None = None,
        check: int = 0,
        **changed: Any,
    ) -> bytes:
        """The frame that brings a packet here."""
        outer = udp(port, self.port if target_port is None else target_port, inner, check=check)
        changed.setdefault("protocol", IP_PROTOCOL_UDP)
        return ethernet(self.packet(source, target or self.own, outer, **changed))

    def encapsulated(self, inner: bytes, remote: str, port: int) -> bytes:
        """What leaves for a peer, from the outer IP header on; the inner packet is as it goes out."""
        if self.family is Family.IPV4:
            return ipv4(
                self.own, remote, udp(self.port, port, inner), protocol=IP_PROTOCOL_UDP, fragment=0x4000
            )
        return ipv6(self.own, remote, udp(self.port, port, inner), protocol=IP_PROTOCOL_UDP)

    def older(self, inner: bytes) -> bytes:
        """A packet one hop later, its checksum computed anew."""
        if self.family is Family.IPV6:
            return inner[:7] + bytes([inner[7] - 1]) + inner[8:]
        end = (inner[0] & 0xF) * 4
        head = inner[:8] + bytes([inner[8] - 1]) + inner[9:10] + bytes(2) + inner[12:end]
        return head[:10] + (0xFFFF - ones_sum(head)).to_bytes(2, "big") + head[12:] + inner[end:]

    def receive(self, frame: bytes, *, allow_unknown: bool = False) -> tuple[int, bytes, dict[str, int]]:
        """What has to become of a frame: the verdict, the frame afterwards, what is counted."""
        found = self._judge(frame[ETHERNET_BYTES:], frame[12:14], allow_unknown=allow_unknown)
        if isinstance(found, str):
            verdict = UNSPEC if found in ("", "from_engine") else SHOT
            return verdict, frame, {found: 1} if found else {}
        counted = {"rx_packets": 1, "rx_bytes": len(found)}
        return REDIRECT, frame[:ETHERNET_BYTES] + self.older(found), counted

    def _judge(self, outer: bytes, protocol: bytes, *, allow_unknown: bool) -> bytes | str:
        """The packet to take in; else the one counter that says why not, empty where it is not for us."""
        is_ipv4 = self.family is Family.IPV4
        if protocol != (b"\x08\x00" if is_ipv4 else b"\x86\xdd") or len(outer) < self.headers:
            return ""
        next_header, start = (outer[9], 12) if is_ipv4 else (outer[6], 8)
        size = self.family.size
        source, target = outer[start : start + size], outer[start + size : start + 2 * size]
        port, target_port = struct.unpack_from("!HH", outer, self.headers - 8)
        first = outer[0] if is_ipv4 else outer[0] & 0xF0
        is_for_us = (target, target_port) == (ip_address(self.own).packed, self.port)
        if first != (0x45 if is_ipv4 else 0x60) or next_header != IP_PROTOCOL_UDP or not is_for_us:
            return ""
        if is_ipv4 and int.from_bytes(outer[6:8], "big") & 0x3FFF:
            return "from_engine"
        inner = outer[self.headers :]
        has_checksum = outer[self.headers - 2 : self.headers] != bytes(2)
        return (
            self._fault(inner, has_checksum=has_checksum)
            or self._lie(inner, source, port, allow_unknown=allow_unknown)
            or inner
        )

    def _fault(self, inner: bytes, *, has_checksum: bool) -> str:
        """What is wrong with a packet in itself, or takes more than a look."""
        least = 20 if self.family is Family.IPV4 else 40
        if len(inner) < least:
            return "truncated"
        if inner[0] >> 4 != (4 if self.family is Family.IPV4 else 6):
            return "version"
        if self.family is Family.IPV6:
            length, words = 40 + int.from_bytes(inner[4:6], "big"), 10
        else:
            length, words = int.from_bytes(inner[2:4], "big"), inner[0] & 0xF
        if words * 4 < least or length > len(inner):
            return "length"
        # Where a socket's checksum has to be taken off, the program needs a few bytes behind the header.
        if words * 4 > least or length < len(inner) or (has_checksum and len(inner) < least + 8):
            return "from_engine"
        is_right = self.family is Family.IPV6 or ones_sum(inner[:20]) == 0xFFFF
        return "" if is_right else "checksum"

    def _lie(self, inner: bytes, source: bytes, port: int, *, allow_unknown: bool) -> str:
        """What is wrong with who sent it."""
        start = 12 if self.family is Family.IPV4 else 8
        claimed = ip_address(inner[start : start + self.family.size])
        sender = (str(ip_address(source)), port)
        matching = [net for net in map(ip_network, self.peers) if claimed in net]
        best = max(matching, key=lambda net: net.prefixlen, default=None)
        if not allow_unknown and (best is None or self.peers[str(best)] != sender):
            return "spoofed" if sender in self.peers.values() else "unknown_peer"
        ttl = inner[8] if self.family is Family.IPV4 else inner[7]
        return "ttl" if ttl <= 1 else ""


WIRES = (
    Wire(
        Family.IPV4,
        own="192.0.2.1",
        own_container="10.5.1.2",
        other="192.0.2.200",
        stranger="192.0.2.77",
        nobody="198.51.100.1",
        peers={
            "10.5.9.0/24": ("192.0.2.9", 8285),
            "10.5.8.0/24": ("192.0.2.8", 18285),
            "10.5.8.128/25": ("192.0.2.8", 28285),  # behind the same address, told apart by the port
        },
    ),
    Wire(
        Family.IPV6,
        own="2001:db8::1",
        own_container="fd00:5:0:1::2",
        other="2001:db8::200",
        stranger="2001:db8::77",
        nobody="2001:db8:77::1",
        peers={
            "fd00:5:0:9::/64": ("2001:db8::9", 8285),
            "fd00:5:0:8::/64": ("2001:db8::8", 18285),
            "fd00:5:0:8:8000::/65": ("2001:db8::8", 28285),
        },
    ),
)
