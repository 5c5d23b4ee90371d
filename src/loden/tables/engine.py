# SPDX-License-Identifier: Apache-2.0
"""The packet engine (``native/engine``) as the rest of Loden sees it; nobody else imports the extension.

The extension is compiled when Loden is installed. Where that was not possible there is none, and
:func:`is_available` says what to do.
"""

import errno
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from loden.errors import KernelError, NotSupported

_HINT = "apt install gcc python3-dev, and install Loden again"


class Peer(NamedTuple):
    """Where packets for a prefix go, and the only place from where packets out of it are accepted.

    Args:
        prefix: the peer's subnet, packed; no bit is set behind its length.
        length: of the prefix, in bits.
        remote: the peer's outer address, packed, of any family.
        port: its UDP port; several peers behind one address differ in it.
        mtu: the most bytes of an inner packet to that peer; 0 where no limit is known.
    """

    prefix: bytes
    length: int
    remote: bytes
    port: int
    mtu: int = 0


class Traffic(NamedTuple):
    """What a peer was sent and has sent: inner packets, and their bytes.

    Args:
        prefix, length: as in :class:`Peer`.
        tx_packets, tx_bytes: sent to it.
        rx_packets, rx_bytes: accepted from it.
    """

    prefix: bytes
    length: int
    tx_packets: int
    tx_bytes: int
    rx_packets: int
    rx_bytes: int


class Failure(NamedTuple):
    """Why a worker stopped by itself.

    Args:
        errno: the positive error number; ``EBADFD`` where the TUN device was removed.
        what: failed.
    """

    errno: int
    what: str


def is_available() -> str:
    """Empty where there is an engine; else why there is none, and what to do about it."""
    try:
        from loden import _engine  # noqa: F401, PLC0415 - only hosts with the udp backend load it
    except ImportError as error:
        return f"the packet engine was not compiled when Loden was installed ({error}): {_HINT}"
    return ""


def drop_reasons() -> tuple[str, ...]:
    """Those keys of :meth:`Engine.counters` that count packets dropped, by the reason."""
    from loden import _engine  # noqa: PLC0415 - as above

    return _engine.DROP_REASONS


class Engine:
    """Worker threads, without the interpreter's lock, between a TUN device's queues and UDP sockets.

    Every datagram carries one bare IP packet. No method blocks for longer than it takes to do its work,
    however many packets move.

    Args:
        tun: descriptors of the queues of one device, opened with ``IFF_TUN | IFF_NO_PI | IFF_VNET_HDR``; they
            are duplicated and become non-blocking. Set what they offload before.
        udp: descriptors of bound UDP sockets, in which ``IP_MTU_DISCOVER`` is ``DO``; the same happens to
            them.
        source4: this host's tunnel address, where ICMP errors come from; without it there are none. The
            kernel accepts them only where the device's ``accept_local`` is 1.
        source6: the same of IPv6.
        allow_unknown: accept packets from everywhere, as flannel does.

    Raises:
        NotSupported: the extension was not compiled.
        KernelError: a descriptor is not as above.
    """

    def __init__(
        self,
        tun: Sequence[int],
        udp: Sequence[int],
        *,
        source4: bytes = b"",
        source6: bytes = b"",
        allow_unknown: bool = False,
    ) -> None:
        reason = is_available()
        if reason:
            raise NotSupported("start", "the packet engine", errno.ENOSYS, detail=reason, hint=_HINT)
        from loden import _engine  # noqa: PLC0415 - as above

        try:
            self._engine = _engine.Engine(
                tun, udp, source4=source4, source6=source6, allow_unknown=allow_unknown
            )
        except OSError as error:
            raise KernelError("make", "a packet engine", error.errno or 0) from error

    def start(self) -> None:
        """Start the workers; nothing if they run.

        Raises:
            KernelError: the system gives no thread.
        """
        try:
            self._engine.start()
        except OSError as error:
            raise KernelError("start", "the packet engine's threads", error.errno or 0) from error

    def stop(self) -> None:
        """Stop the workers and wait for them: milliseconds. They can start again."""
        self._engine.stop()

    def change(self, puts: Iterable[Peer], drops: Iterable[tuple[bytes, int]]) -> None:
        """Put and drop peers, all at once, while packets keep moving.

        Args:
            puts: each replaces the peer of its prefix, whose figures go on.
            drops: prefixes and their lengths; what does not stand is no error, and what is put too is put.

        Raises:
            ValueError: a value is out of its range; nothing has changed then.
        """
        self._engine.change(tuple(puts), tuple(drops))

    def peers(self) -> list[Peer]:
        """What stands, in order of family, prefix and length."""
        return [Peer(*one) for one in self._engine.peers()]

    def counters(self) -> dict[str, int]:
        """Figures since the engine was made; ``loden/_engine.pyi`` says what each counts."""
        return self._engine.counters()

    def peer_counters(self) -> list[Traffic]:
        """Of each peer, in the order of :meth:`peers`; they go on for as long as its prefix stands."""
        return [Traffic(*one) for one in self._engine.peer_counters()]

    def fileno(self) -> int:
        """An eventfd to read from when it is readable; it belongs to the engine.

        A worker has stopped by itself (:meth:`failure`), a packet was too big for its peer, or the underlay
        has refused one for its size.
        """
        return self._engine.fileno()

    def failure(self) -> Failure | None:
        """Why a worker stopped by itself; None while all is well, and again after :meth:`start`."""
        found = self._engine.failure()
        return None if found is None else Failure(*found)
