# SPDX-License-Identifier: Apache-2.0
"""Who reaches whom: echo requests (RFC 792, RFC 4443) from each container to each other one.

No ``ping`` processes: one raw socket is opened inside each container's namespace, and one loop serves all.
Who does not answer is asked again in the next round, so that the whole takes as long as the slowest answer,
or *tries* rounds where somebody stays silent. Times are the kernel's (``SO_TIMESTAMPNS``): a loop that is
busy with other answers does not count as the network's delay.
"""

import contextlib
import functools
import selectors
import socket
import struct
import time
from collections.abc import Callable, Sequence

import msgspec

from loden.address import Family, format_address
from loden.lab import namespaces

_SO_TIMESTAMPNS = 35  # <asm-generic/socket.h>
_HEADER = struct.Struct("!BBHHH")  # type, code, checksum, identifier, sequence number
_TIMESPEC = struct.Struct("@ll")
TRIES = 4
_BURST = 64  # requests between two looks for answers


class _Echo(msgspec.Struct, frozen=True):
    """What differs between the families.

    Args:
        protocol: ICMP's number.
        request, reply: message types.
        filter_option: level and name of the socket option that drops the message types whose bit is set.
        filter_bits: how many there are.
        has_header: whether a raw socket also delivers the IP header.
    """

    protocol: int
    request: int
    reply: int
    filter_option: tuple[int, int]
    filter_bits: int
    has_header: bool


_SOL_RAW, _ICMP_FILTER, _ICMPV6_FILTER = 255, 1, 1  # <linux/socket.h>, <linux/icmp.h>, <linux/icmpv6.h>
_ECHOES = {
    Family.IPV4: _Echo(socket.IPPROTO_ICMP, 8, 0, (_SOL_RAW, _ICMP_FILTER), 32, has_header=True),
    Family.IPV6: _Echo(
        socket.IPPROTO_ICMPV6, 128, 129, (socket.IPPROTO_ICMPV6, _ICMPV6_FILTER), 256, has_header=False
    ),
}


class End(msgspec.Struct, frozen=True):
    """One end of a pair: a node's name, its namespace and its address (packed)."""

    name: str
    namespace: str
    address: bytes


class Answer(msgspec.Struct, frozen=True):
    """What came of one pair.

    Args:
        source, target: the ends' names.
        rtt_ms: until the answer, in milliseconds; None where none came.
        refusal: what the kernel said when it refused to send.
    """

    source: str
    target: str
    rtt_ms: float | None = None
    refusal: str = ""


def all_pairs(
    ends: Sequence[End],
    *,
    tries: int = TRIES,
    patience_s: float = 1.0,
    on_answer: Callable[[], None] = lambda: None,
) -> tuple[Answer, ...]:
    """Ask from every end to every other; blocks.

    Args:
        ends: one to 65,536, all of one family.
        tries: how often a pair is asked before it counts as unreached.
        patience_s: how long a round waits for the last answer, in seconds.
        on_answer: called for each pair that was reached.

    Returns:
        one answer for each ordered pair, in the order of *ends*.

    Raises:
        LabError: a namespace cannot be entered.
    """
    with contextlib.ExitStack() as stack:
        family = Family.of(ends[0].address)
        open_socket = functools.partial(_socket, family)
        sockets = [stack.enter_context(namespaces.inside(end.namespace, open_socket)) for end in ends]
        probe = _Probe(ends, sockets, _ECHOES[family], on_answer)
        stack.callback(probe.close)
        for _ in range(tries):
            probe.ask_unanswered()
            probe.wait(patience_s)
            if probe.is_done:
                break
        return probe.answers()


def _socket(family: Family) -> socket.socket:
    echo = _ECHOES[family]
    found = socket.socket(family, socket.SOCK_RAW | socket.SOCK_NONBLOCK, echo.protocol)
    all_but_replies = (1 << echo.filter_bits) - 1 ^ 1 << echo.reply
    words = (all_but_replies >> shift & 0xFFFFFFFF for shift in range(0, echo.filter_bits, 32))
    found.setsockopt(*echo.filter_option, b"".join(struct.pack("=I", word) for word in words))
    found.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    return found


class _Probe:
    """One run. A pair is the numbers of source and target; a request's sequence number is its target's."""

    def __init__(
        self,
        ends: Sequence[End],
        sockets: Sequence[socket.socket],
        echo: _Echo,
        on_answer: Callable[[], None],
    ) -> None:
        self._echo = echo
        self._ends = ends
        self._sockets = sockets
        self._texts = [format_address(end.address) for end in ends]
        self._on_answer = on_answer
        self._sent_ns: dict[tuple[int, int], int] = {}
        self._rtt_ms: dict[tuple[int, int], float] = {}
        self._refused: dict[tuple[int, int], str] = {}
        # Neighbours in the list have different sources: no queue takes a whole row at once.
        count = range(len(ends))
        self._pairs = [
            (source, (source + step) % len(ends)) for step in range(1, len(ends)) for source in count
        ]
        self._selector = selectors.DefaultSelector()
        for number, found in enumerate(sockets):
            self._selector.register(found, selectors.EVENT_READ, number)

    def close(self) -> None:
        self._selector.close()

    @property
    def is_done(self) -> bool:
        return len(self._rtt_ms) == len(self._pairs)

    def ask_unanswered(self) -> None:
        """Send one request for each pair without an answer, looking for answers in between."""
        open_pairs = [pair for pair in self._pairs if pair not in self._rtt_ms]
        for number, pair in enumerate(open_pairs):
            self._ask(pair)
            if number % _BURST == _BURST - 1:
                self._take(0.0)

    def wait(self, patience_s: float) -> None:
        """Take answers until none is missing or the time is up."""
        deadline = time.monotonic() + patience_s
        while not self.is_done and (left := deadline - time.monotonic()) > 0:
            self._take(left)

    def answers(self) -> tuple[Answer, ...]:
        return tuple(
            Answer(
                self._ends[source].name,
                self._ends[target].name,
                self._rtt_ms.get((source, target)),
                self._refused.get((source, target), ""),
            )
            for source, target in sorted(self._pairs)
        )

    def _ask(self, pair: tuple[int, int]) -> None:
        source, target = pair
        self._sent_ns[pair] = time.time_ns()
        try:
            request = echo_request(self._echo.request, source, target)
            self._sockets[source].sendto(request, (self._texts[target], 0))
            self._refused.pop(pair, None)
        except OSError as error:
            self._refused[pair] = error.strerror or str(error)

    def _take(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            self._drain(key.data)

    def _drain(self, source: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                packet, extras, _, sender = self._sockets[source].recvmsg(256, 64)
                self._note(source, packet, sender[0], next((data for *_, data in extras), b""))

    def _note(self, source: int, packet: bytes, sender: str, stamp: bytes) -> None:
        start = (packet[0] & 0x0F) * 4 if self._echo.has_header else 0
        if len(packet) < start + _HEADER.size:
            return
        kind, _, _, identifier, target = _HEADER.unpack_from(packet, start)
        pair = (source, target)
        if kind != self._echo.reply or identifier != source or sender != self._texts[target]:
            return
        if pair not in self._sent_ns or pair in self._rtt_ms:
            return
        seconds, nanoseconds = _TIMESPEC.unpack(stamp)
        self._rtt_ms[pair] = (seconds * 1_000_000_000 + nanoseconds - self._sent_ns[pair]) / 1e6
        self._on_answer()


def echo_request(kind: int, identifier: int, sequence: int, data: bytes = b"loden lab") -> bytes:
    """An ICMP echo request of either family: one layout, two types.

    The checksum is IPv4's (RFC 1071); the kernel puts that of IPv6, which covers addresses too, over it.
    """
    bare = _HEADER.pack(kind, 0, 0, identifier, sequence) + data
    return _HEADER.pack(kind, 0, checksum(bare), identifier, sequence) + data


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of data in network byte order."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
