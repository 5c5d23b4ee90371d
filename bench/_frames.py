# SPDX-License-Identifier: Apache-2.0
"""Datagrams as frames, for a source that costs less than a UDP socket does."""

import json
import socket
import struct
import subprocess
from typing import Any

from loden.address import Family, format_address
from loden.errors import LabError
from loden.lab import namespaces
from loden.lab.throughput import Path

_ETHERTYPE = b"\x08\0"  # IPv4
_DF, _TTL = 0x4000, 64
_SOURCE_PORT = 9


def frame(path: Path, port: int, size: int) -> tuple[str, bytes]:
    """The device of a path's source that leads to its target, and what to send there.

    Args:
        path: of IPv4; its addresses answer, or no neighbour is known.
        port: of the datagram's target.
        size: bytes of its payload, all zero.

    Raises:
        LabError: the way is not known.
    """
    target = format_address(path.target.address)
    route = _ask(path.source.namespace, "route", "get", target)
    device, nexthop = route["dev"], route.get("gateway", target)
    packet = _packet(path.source.address, path.target.address, port, size)
    link = _ask(path.source.namespace, "link", "show", "dev", device)
    if link["link_type"] != "ether":
        return device, packet
    neighbour = _ask(path.source.namespace, "neigh", "show", "to", nexthop, "dev", device)
    macs = (neighbour["lladdr"], link["address"])
    return device, b"".join(bytes.fromhex(mac.replace(":", "")) for mac in macs) + _ETHERTYPE + packet


def open_socket(namespace: str, device: str) -> socket.socket:
    """A packet socket that sends on a device, and hears nothing."""
    opened = namespaces.inside(namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0))
    opened.bind((device, 0))
    return opened


def _packet(source: bytes, target: bytes, port: int, size: int) -> bytes:
    assert Family.of(source) is Family.IPV4
    udp = struct.pack("!4H", _SOURCE_PORT, port, 8 + size, 0)
    pseudo = source + target + struct.pack("!2H", socket.IPPROTO_UDP, 8 + size)
    udp = udp[:6] + (_checksum(pseudo + udp) or 0xFFFF).to_bytes(2, "big")
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28 + size, 0, _DF, _TTL, socket.IPPROTO_UDP, 0) + source + target
    return head[:10] + _checksum(head).to_bytes(2, "big") + head[12:] + udp + bytes(size)


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def _ask(namespace: str, *words: str) -> dict[str, Any]:
    """The one thing that ``ip -json`` says."""
    command = ("ip", "-netns", namespace, "-json", *words)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout or "[]") if not done.returncode else []
    if not found:
        raise LabError(f"run {' '.join(command)}: {done.stderr.strip() or 'nothing found'}")
    (one,) = found
    assert isinstance(one, dict)
    return one
