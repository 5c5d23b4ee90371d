# SPDX-License-Identifier: Apache-2.0
"""Hears routers say that a datagram of ours does not fit (RFC 1191, RFC 8201).

The kernel notes it beside the route to that address, where a look-up finds it
(:func:`loden.tables.host.find_hops`); but it tells nobody. So a raw socket for each family hears the same
messages: it says that there is something to look up, and takes nothing from them.

::

    ICMP:    IP header, u8 type 3, u8 code 4, be16 sum, be16 0, be16 mtu; then the header of what did not fit
    ICMPv6:  u8 type 2, u8 code 0, be16 sum, be32 mtu; then the same
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

from loden.address import Family

log = logging.getLogger(__name__)

_SOL_RAW, _ICMP_FILTER, _ICMP6_FILTER = 255, 1, 1
_DEST_UNREACHABLE, _FRAGMENTATION_NEEDED, _PACKET_TOO_BIG = 3, 4, 2
_ICMP_BYTES = 8
#: However many messages come, the ways to the peers are not asked for more often.
_SPACING_S = 0.5
_MOST_BYTES, _MOST_MESSAGES = 512, 256


class PathMtuWatch:
    """Listens for the ports of some tunnels.

    Args:
        changed: called when a datagram from there did not fit.
    """

    def __init__(self, changed: Callable[[], None]) -> None:
        self._changed = changed
        self._ports: dict[Family, int] = {}
        self._sockets: dict[Family, socket.socket] = {}
        self._pause: asyncio.TimerHandle | None = None

    def use(self, family: Family, port: int) -> None:
        """Listen for what was sent from this port in this family, in place of what was said before."""
        self._ports[family] = port
        if family not in self._sockets:
            try:
                self._sockets[family] = _open(family)
            except OSError as error:
                log.warning(
                    "cannot listen to ICMP over %s: %s: a narrow path is noticed late; CAP_NET_RAW is needed",
                    family, error.strerror or error,
                )  # fmt: skip
        self._listen()

    def close(self) -> None:
        """Stop; idempotent."""
        if self._pause is not None:
            self._pause.cancel()
        for one in self._sockets.values():
            with suppress(RuntimeError):
                asyncio.get_running_loop().remove_reader(one)
            one.close()
        self._sockets.clear()

    def _listen(self) -> None:
        for family, one in self._sockets.items():
            asyncio.get_running_loop().add_reader(one, self._receive, family)

    def _receive(self, family: Family) -> None:
        came: list[bytes] = []
        with suppress(OSError):
            while len(came) < _MOST_MESSAGES:
                came.append(self._sockets[family].recv(_MOST_BYTES))
        if any(is_too_big(family, packet, self._ports[family]) for packet in came):
            loop = asyncio.get_running_loop()
            for one in self._sockets.values():
                loop.remove_reader(one)
            self._pause = loop.call_later(_SPACING_S, self._listen)
            self._changed()


def is_too_big(family: Family, packet: bytes, port: int) -> bool:
    """Whether a message says that a UDP datagram from a port of ours was too big.

    Args:
        family: of the message.
        packet: as a raw socket gives it: ICMP behind its IP header, ICMPv6 without.
        port: ours.
    """
    start = (packet[0] & 0xF) * 4 if family is Family.IPV4 and packet else 0
    kinds = (_DEST_UNREACHABLE, _FRAGMENTATION_NEEDED) if family is Family.IPV4 else (_PACKET_TOO_BIG, 0)
    if len(packet) < start + _ICMP_BYTES or (packet[start], packet[start + 1]) != kinds:
        return False
    inner = packet[start + _ICMP_BYTES :]
    header = 40 if family is Family.IPV6 else (inner[0] & 0xF) * 4 if inner else 0
    if len(inner) < max(header, 20) + 2:
        return False
    protocol = inner[6] if family is Family.IPV6 else inner[9]
    return protocol == socket.IPPROTO_UDP and int.from_bytes(inner[header : header + 2], "big") == port


def _open(family: Family) -> socket.socket:
    """A raw socket that lets nothing through but the one type; both filters name what is kept out."""
    is_ipv4 = family is Family.IPV4
    protocol = socket.IPPROTO_ICMP if is_ipv4 else socket.IPPROTO_ICMPV6
    opened = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    if is_ipv4:
        opened.setsockopt(_SOL_RAW, _ICMP_FILTER, _all_but(_DEST_UNREACHABLE)[:4])
    else:
        opened.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, _all_but(_PACKET_TOO_BIG))
    return opened


def _all_but(kind: int) -> bytes:
    """A bit for each type, set where it is kept out."""
    return struct.pack("=8I", ~(1 << kind) & 0xFFFFFFFF, *[0xFFFFFFFF] * 7)
