# SPDX-License-Identifier: Apache-2.0
"""An engine between sockets of ours: what it sends and writes is seen byte by byte.

A pair of sockets stands in for the TUN device. Datagrams go over the loopback interface, which cuts none and
merges none: a message arrives as it was sent.
"""

import socket
import time
from contextlib import ExitStack

from loden.tables.engine import Engine, Peer
from tests.packets import Ip4, Ip6

PATIENCE_S = 10.0
_UDP_SEGMENT = 103  # <linux/udp.h>
_HOME = b"\x7f\0\0\1"
_MOST = 1 << 17  # bytes in one read


#: Containers behind a path with a small MTU.
NARROW4, NARROW6 = bytes((10, 5, 3, 2)), bytes.fromhex("fd000005000000030000000000000002")


class Ends:
    """An engine, the end of its device that is ours, and its one peer: the subnets of ``Ip4`` and ``Ip6``.

    Args:
        stack: ends it.
        narrow: the MTU of one more subnet of the peer, those of :data:`NARROW4` and :data:`NARROW6`.
        source6, allow_unknown: as in :class:`Engine`.
    """

    def __init__(
        self,
        stack: ExitStack,
        *,
        narrow: int = 0,
        source6: bytes = b"",
        allow_unknown: bool = False,
    ) -> None:
        self.device, tun = (
            stack.enter_context(one) for one in socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        )
        self.device.settimeout(PATIENCE_S)
        self.peer, plain = (stack.enter_context(bound()) for _ in range(2))
        self.peer.settimeout(PATIENCE_S)
        self.port = plain.getsockname()
        self.engine = Engine(
            [tun.fileno()],
            [plain.fileno()],
            source6=source6,
            allow_unknown=allow_unknown,
        )
        port = self.peer.getsockname()[1]
        subnets = [
            (address[:-1] + b"\0", bits)
            for one, bits in ((Ip4(), 24), (Ip6(), 120))
            for address in (one.source, one.target)
        ]
        peers = [Peer(address, bits, _HOME, port) for address, bits in subnets]
        peers += [Peer(address, len(address) * 8, _HOME, port, narrow) for address in (NARROW4, NARROW6)]
        self.engine.change(peers, ())
        stack.callback(self.engine.stop)
        self.engine.start()

    def send(self, message: bytes, size: int, *, sender: socket.socket | None = None) -> None:
        """Send a message as datagrams of so many bytes, none of which is cut off on the way.

        Args:
            message: of the peer.
            size: of each datagram but the last; 0 for one.
            sender: somebody else.
        """
        sender = sender or self.peer
        sender.setsockopt(socket.IPPROTO_UDP, _UDP_SEGMENT, size)
        sender.sendto(message, self.port)

    def written(self) -> bytes:
        """The next packet that the engine writes to the device, behind its virtio header."""
        return self.device.recv(_MOST)

    def sent(self) -> bytes:
        """The next datagram that the engine sends to the peer."""
        return self.peer.recv(_MOST)

    def settled(self, before: dict[str, int]) -> dict[str, int]:
        """What has been counted since, when one message more has come: that is counted last."""
        deadline = time.monotonic() + PATIENCE_S
        while (now := self.engine.counters())["udp_receives"] == before["udp_receives"]:
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.001)
        return {name: now[name] - before[name] for name in now if now[name] != before[name]}


def bound() -> socket.socket:
    """A UDP socket with a port of its own."""
    opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind(("127.0.0.1", 0))
    return opened
