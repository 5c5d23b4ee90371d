# SPDX-License-Identifier: Apache-2.0
"""The packet engine, compiled from ``native/engine``. ``loden.tables.engine`` is the one place that imports
it.

Addresses are packed, 4 or 16 bytes in network byte order. The functions whose names begin with ``_`` are the
engine's own decisions without its threads and descriptors, for comparison with another implementation.
"""

from collections.abc import Sequence
from typing import final

#: Why packets are dropped: each is a key of :meth:`Engine.counters`.
DROP_REASONS: tuple[str, ...]

_Peer = tuple[bytes, int, bytes, int, int]

@final
class Engine:
    """Worker threads, without the interpreter's lock, between a TUN device's queues and UDP sockets.

    Every datagram carries one bare IP packet. Make it in the network namespace of its descriptors: it opens
    sockets of its own, which only ask the kernel for path MTUs.
    """

    def __new__(
        cls,
        tun: Sequence[int],
        udp: Sequence[int],
        *,
        source4: bytes = b"",
        source6: bytes = b"",
        allow_unknown: bool = False,
    ) -> Engine:
        """Duplicate the descriptors; the caller's may be closed afterwards.

        Args:
            tun: queues of one device, opened with ``IFF_TUN | IFF_NO_PI | IFF_VNET_HDR``, with a virtio
                header of 10 bytes; 1 to 64. What they offload was set by the caller. They become
                non-blocking, and a transmitter reads each.
            udp: bound UDP sockets of any family, 1 to 64, in which ``IP_MTU_DISCOVER`` is set to ``DO``. They
                become non-blocking, get ``UDP_GRO``, and a receiver reads each; datagrams leave through one
                of the family of the peer's outer address.
            source4: this host's tunnel address, where ICMP errors come from; without it there are none. The
                kernel takes them from that address only where the device's ``accept_local`` is 1.
            source6: the same of IPv6.
            allow_unknown: accept packets from everywhere, as flannel does, instead of only from a known
                peer's outer address and port, and out of that peer's subnet.

        Raises:
            OSError: a descriptor is none, or no UDP socket (EPROTOTYPE).
            ValueError, TypeError: an argument is not as above.
        """

    def start(self) -> None:
        """Start the workers; nothing if they run. Does not block.

        Raises:
            OSError: the system gives no thread.
        """

    def stop(self) -> None:
        """Stop the workers and wait for them: milliseconds. They can start again."""

    def change(self, puts: Sequence[_Peer], drops: Sequence[tuple[bytes, int]]) -> None:
        """Put and drop peers, all at once; packets keep moving, and no worker is waited for.

        A put replaces the peer of the same prefix, whose figures go on. The same prefix among *puts* and
        *drops* is put. What is dropped and does not stand is no error.

        Args:
            puts: prefix, its length in bits, outer address, port, and the most bytes of an inner packet to
                that peer; 0 where no limit is known.
            drops: prefix and its length.

        Raises:
            ValueError, TypeError: an argument is not as above; nothing has changed then.
        """

    def peers(self) -> list[_Peer]:
        """What stands, in the form of *puts*, in order of family, prefix and length."""

    def counters(self) -> dict[str, int]:
        """Figures since the engine was made.

        ``tun_packets`` were read from the device, where a super-packet is one; ``udp_packets`` are
        datagrams received;
        ``tx_packets``, ``tx_bytes``, ``rx_packets`` and ``rx_bytes`` count inner packets sent and handed to
        the device; ``segments`` of those sent were cut from super-packets, ``merged`` of those handed on
        were part of one; ``fragments`` were made here; ``icmp`` errors were sent, ``icmp_limited`` were
        not, because they were more than 1000 in a second; ``udp_sends``, ``udp_receives`` and
        ``tun_writes`` count messages to and from the kernel. ``tables`` exist now, the one in use included.
        Everything else is a reason in :data:`DROP_REASONS`, and counts packets.
        """

    def peer_counters(self) -> list[tuple[bytes, int, int, int, int, int]]:
        """Prefix, length, packets and bytes sent, packets and bytes received of each peer, in that order."""

    def fileno(self) -> int:
        """An eventfd, to be read by the caller; it belongs to the engine.

        It is readable when a worker has stopped by itself (:meth:`failure`), when a packet was too big for
        its peer, or when the underlay has refused one for its size: the path's MTU is worth a look.
        """

    def failure(self) -> tuple[int, str] | None:
        """Why a worker stopped by itself: an error number, and what failed; None while all is well.

        The device was removed: ``EBADFD``.
        """

def _check(packet: bytes) -> tuple[int, int, int, bool, bool, bool, bool]:
    """What a packet is found to be.

    Its length, that of its network header, the protocol behind; whether it has options or extension headers,
    is a fragment, is one that is not the first, and may not be fragmented.

    Raises:
        ValueError: with the reason, one of :data:`DROP_REASONS`, for which it would be dropped.
    """

def _forward(packet: bytes) -> bytes:
    """The packet one hop further.

    Raises:
        ValueError: as :func:`_check`.
    """

def _checksum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words in network order, not complemented."""

def _segment(packet: bytes) -> list[bytes]:
    """The packets of wire size that a packet with its virtio header becomes.

    Raises:
        ValueError: as :func:`_check`.
    """

def _merge(packets: Sequence[bytes]) -> list[bytes]:
    """What is written to the device, each with its virtio header, when these packets come in one go.

    Raises:
        ValueError: as :func:`_check`, for the first that would be dropped.
    """

def _fragment(packet: bytes, mtu: int) -> list[bytes]:
    """The fragments of an IPv4 packet; none where the MTU has no room for any.

    Raises:
        ValueError: as :func:`_check`.
    """

def _icmp(packet: bytes, source: bytes, mtu: int) -> bytes:
    """The ICMP error that a packet deserves: no route where *mtu* is 0, too big elsewhere; empty for none.

    Raises:
        ValueError: as :func:`_check`, or the source is not of the packet's family.
    """

def _lookup(peers: Sequence[_Peer], addresses: Sequence[bytes]) -> list[_Peer | None]:
    """For each address the peer that has it in a table of these peers.

    Raises:
        ValueError, TypeError: as :meth:`Engine.change`.
    """
