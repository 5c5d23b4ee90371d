# SPDX-License-Identifier: Apache-2.0
"""The packet engine beside the bare underlay, and beside a loop that moves one packet with each system call.

Two namespaces, a wire, real TUN devices, no agent. The paths take turns: a busy machine slows all alike.
"""

import argparse
import contextlib
import functools
import pathlib
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from bench import _frames
from bench._common import Arguments, Figure, figure, median, run
from bench._tunnel import SIDES, Side, engines, loops, packets_program, wire
from loden.address import Family, format_address
from loden.errors import LabError
from loden.lab import namespaces
from loden.lab.probe import End
from loden.lab.throughput import Path
from loden.tables.engine import Engine, Peer

ROUND_S = 1.0
DATAGRAM_BYTES = 64

_PATIENCE_S = 10.0
ROW = 64
_PEERS = 10_000
_OFFERS = (0.9, 1.1, 1.3, 1.6, 2.0)
_UDP_GRO = 104  # <linux/udp.h>
_AHEAD_S = 0.3  # so long the source runs before and after the sink counts
_BUFFER_BYTES = 4 << 20
_LONG_S = "3600"

K = TypeVar("K")
T = TypeVar("T")


def tcp(program: pathlib.Path, path: Path, *, streams: int = 1, seconds: float = ROUND_S) -> float:
    """What connections carry at the same time, in Gbit/s of payload as the receivers see it.

    Args:
        program: ``bench/packets.c``, compiled.
        path: from where to where.
        streams: how many connections.
        seconds: to measure; blocks for so long.

    Raises:
        LabError: the path does not connect.
    """
    with contextlib.ExitStack() as stack:
        pulls = []
        for _ in range(streams):
            sender, receiver = _connect(path, stack)
            pulls.append(_start(program, stack, "pull", receiver, f"{seconds:g}"))
            _start(program, stack, "push", sender, f"{seconds + _AHEAD_S:g}")
        return sum(_figure_of(one) for one in pulls) * 8 / 1e9


def datagrams(program: pathlib.Path, path: Path, *, seconds: float = ROUND_S) -> float:
    """How many small datagrams a second reach the receiver while a UDP socket sends as fast as it can.

    Args:
        program, path, seconds: as in :func:`tcp`.
    """
    with contextlib.ExitStack() as stack:
        sender, receiver = _datagram_sockets(path, stack)
        source = _Source("flood", sender, (str(DATAGRAM_BYTES), "1"))
        return _arriving(program, source, receiver, 0, seconds=seconds)


def most_datagrams(
    program: pathlib.Path,
    path: Path,
    *,
    size: int = DATAGRAM_BYTES,
    row: int = 1,
    seconds: float = ROUND_S,
) -> float:
    """About the most datagrams a second that reach the receiver, whatever is offered: RFC 2285 section 3.6.3.

    Offered too much, a path spends its time on what it drops. So it is offered parts and multiples of what
    arrives of a flood, and what did best is measured again: the best of several would flatter. Source and
    sink share the processors with what is measured, and cost as little as they can: the sink takes several
    datagrams at once where the kernel has merged them (``UDP_GRO``).

    Args:
        program, path, seconds: as in :func:`tcp`, of each offer; the path is of IPv4.
        size: bytes of payload in each.
        row: how many the source hands to its kernel at once, 64 at most. One by one they come from a packet
            socket: a UDP socket would cost more than the engine.
    """
    with contextlib.ExitStack() as stack:
        sender, receiver = _datagram_sockets(path, stack)
        receiver.setsockopt(socket.IPPROTO_UDP, _UDP_GRO, 1)
        source = _Source("flood", sender, (str(size), str(row)))
        if row == 1:
            receiver.settimeout(_PATIENCE_S)
            sender.send(b"?")  # so that the neighbour is known
            receiver.recv(1)
            receiver.setblocking(True)
            device, frame = _frames.frame(path, receiver.getsockname()[1], size)
            emitter = stack.enter_context(_frames.open_socket(path.source.namespace, device))
            source = _Source("emit", emitter, (frame.hex(),))
        arriving = functools.partial(_arriving, program, source, receiver, seconds=seconds)
        flood = arriving(0)
        found = {0.0: flood} | {part * flood: arriving(part * flood) for part in _OFFERS}
        return arriving(max(found, key=found.__getitem__))


class _Source(NamedTuple):
    """A way to send: what ``packets`` calls it, on which socket, and with which words more."""

    what: str
    on: socket.socket
    more: tuple[str, ...]


def _arriving(
    program: pathlib.Path, source: _Source, receiver: socket.socket, offered: float, *, seconds: float
) -> float:
    """Datagrams a second at the receiver while a source offers so many; 0: as many as it can."""
    with contextlib.ExitStack() as stack:
        lasting = f"{seconds + 2 * _AHEAD_S:g}"
        _start(program, stack, source.what, source.on, lasting, f"{offered:.0f}", *source.more)
        return _figure_of(_start(program, stack, "sink", receiver, f"{seconds:g}"))


class Latency(NamedTuple):
    """How long answers took, in microseconds, and how many questions had none."""

    p50_us: float
    p99_us: float
    answered: int
    lost: int


def latency(
    program: pathlib.Path, path: Path, *, size: int = DATAGRAM_BYTES, seconds: float = ROUND_S
) -> Latency:
    """A datagram there and back, one after the other.

    Args:
        program, path, seconds: as in :func:`tcp`.
        size: bytes of payload in each.
    """
    with contextlib.ExitStack() as stack:
        sender, receiver = _datagram_sockets(path, stack)
        _start(program, stack, "answer", receiver)
        asked = _start(program, stack, "ask", sender, f"{seconds:g}", str(size))
        p50, p99, answered, lost = _said_by(asked).split()
        return Latency(float(p50), float(p99), int(answered), int(lost))


class Carried(NamedTuple):
    """A connection that carries what it can."""

    sender: socket.socket
    receiver: socket.socket
    source: subprocess.Popen[str]

    def lost_segments(self) -> int:
        """Stop sending, and say how many segments never came to the other end, whatever was sent again.

        As both ends have counted them (``struct tcp_info``): those with data that were sent, and that came,
        twice or not. It is exact between containers; elsewhere a super-packet that comes counts as one.
        """
        self.source.kill()
        self.source.wait()
        deadline = time.monotonic() + _PATIENCE_S
        while any(_told(self.sender, place) for place in (_UNACKED, _NOTSENT)):
            if time.monotonic() > deadline:
                raise LabError("wait for the last acknowledgement: it does not come")
            time.sleep(0.01)
        time.sleep(0.1)  # what was sent twice may be on its way still
        return _told(self.sender, _DATA_SEGS_OUT) - _told(self.receiver, _DATA_SEGS_IN)


#: Places in ``struct tcp_info``: ``tcpi_unacked``, ``_notsent_bytes``, ``_data_segs_in``, ``_data_segs_out``.
_UNACKED, _NOTSENT, _DATA_SEGS_IN, _DATA_SEGS_OUT = 24, 144, 152, 156


def _told(connection: socket.socket, place: int) -> int:
    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
    return int(struct.unpack_from("=I", told, place)[0])


@contextlib.contextmanager
def carrying(program: pathlib.Path, path: Path) -> Iterator[Carried]:
    """A connection that carries what it can, for the length of a block."""
    with contextlib.ExitStack() as stack:
        sender, receiver = _connect(path, stack)
        _start(program, stack, "pull", receiver, _LONG_S)
        yield Carried(sender, receiver, _start(program, stack, "push", sender, _LONG_S))


def _datagram_sockets(path: Path, stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    """Both ends' sockets, of which the first is connected to the second."""
    open_socket = functools.partial(socket.socket, Family.of(path.target.address), socket.SOCK_DGRAM)
    receiver = stack.enter_context(namespaces.inside(path.target.namespace, open_socket))
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    receiver.bind((format_address(path.target.address), 0))
    sender = stack.enter_context(namespaces.inside(path.source.namespace, open_socket))
    sender.bind((format_address(path.source.address), 0))
    sender.connect(receiver.getsockname())
    return sender, receiver


def _connect(path: Path, stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    open_socket = functools.partial(socket.socket, Family.of(path.target.address), socket.SOCK_STREAM)
    try:
        with namespaces.inside(path.target.namespace, open_socket) as listener:
            listener.bind((format_address(path.target.address), 0))
            listener.listen(1)
            sender = stack.enter_context(namespaces.inside(path.source.namespace, open_socket))
            sender.settimeout(_PATIENCE_S)
            sender.bind((format_address(path.source.address), 0))
            sender.connect(listener.getsockname())
            receiver = stack.enter_context(listener.accept()[0])
    except OSError as error:
        raise LabError(f"connect {path.source.name} to {path.target.name}: {error}") from error
    for one in (sender, receiver):
        one.settimeout(None)
        one.setblocking(True)
    return sender, receiver


def _start(
    program: pathlib.Path,
    stack: contextlib.ExitStack,
    what: str,
    on: socket.socket,
    *more: str,
) -> subprocess.Popen[str]:
    words = (str(program), what, str(on.fileno()), *more)
    started = subprocess.Popen(words, pass_fds=(on.fileno(),), stdout=subprocess.PIPE, text=True)
    stack.callback(started.wait)
    stack.callback(started.kill)
    return started


def _figure_of(process: subprocess.Popen[str]) -> float:
    return float(_said_by(process))


def _said_by(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate()
    if process.returncode != 0:
        raise LabError(f"measure: packets ended with {process.returncode}")
    return said


def path_of(
    address: Callable[[Side], bytes], name: str, *, is_back: bool = False, sides: Sequence[Side] = SIDES
) -> Path:
    """From one side's address to the other's.

    Args:
        address: of a side, packed.
        name: of the path, for errors.
        is_back: from the second side to the first.
        sides: which ones.
    """
    ends = [End(f"{name} {side.number}", side.namespace, address(side)) for side in sides]
    return Path(*(reversed(ends) if is_back else ends))


def in_turns(paths: Mapping[K, Callable[[], T]], rounds: int) -> dict[K, list[T]]:
    """Measure several things, one after the other, again and again; every second time in reverse order."""
    found: dict[K, list[T]] = {name: [] for name in paths}
    for number in range(rounds):
        for name in reversed(list(paths)) if number % 2 else paths:
            found[name].append(paths[name]())
    return found


def ratio(found: Mapping[str, list[float]], name: str, to: str) -> float:
    """The median of the ratios of one round: rounds differ more than paths do."""
    return median(one / other for one, other in zip(found[name], found[to], strict=True))


def measure(arguments: Arguments) -> Iterator[Figure]:
    """All figures of the engine."""
    with packets_program() as program, wire(), engines() as pair, loops(program):
        for family in Family:
            yield from _tcp_figures(program, family, arguments.rounds)
        yield from _datagram_figures(program, arguments.rounds)
        yield from _table_figures(program, pair, arguments.rounds)


def _tcp_figures(program: pathlib.Path, family: Family, rounds: int) -> Iterator[Figure]:
    paths = {
        "bare": path_of(lambda side: side.wire(family), "wire"),
        "engine": path_of(lambda side: side.subnet(family).address, "engine"),
    }
    for streams in (1, 4):
        found = in_turns(
            {name: functools.partial(tcp, program, path, streams=streams) for name, path in paths.items()},
            rounds,
        )
        what = f"TCP over {family}, {streams} stream{'s' if streams > 1 else ''}"
        beside = ("bare underlay", median(found["bare"]))
        yield figure(f"{what}, engine", median(found["engine"]), "Gbit/s", anchor=beside)
        yield figure(f"{what}, engine to underlay", ratio(found, "engine", "bare"), "times", ">= 0.45")


def _datagram_figures(program: pathlib.Path, rounds: int) -> Iterator[Figure]:
    paths = {
        "bare": path_of(Side.wire, "wire"),
        "engine": path_of(lambda side: side.subnet().address, "engine"),
        "loop": path_of(lambda side: side.loop_address, "loop"),
    }
    for row, how in ((1, "one by one"), (ROW, f"in rows of {ROW}")):
        found = in_turns(
            {name: functools.partial(most_datagrams, program, path, row=row) for name, path in paths.items()},
            rounds,
        )
        what = f"{DATAGRAM_BYTES}-byte datagrams, {how}, at most"
        beside = ("a packet each system call", median(found["loop"]))
        yield figure(f"{what}, bare underlay", median(found["bare"]), "/s")
        yield figure(f"{what}, engine", median(found["engine"]), "/s", anchor=beside)
        yield figure(f"{what}, engine to such a loop", ratio(found, "engine", "loop"), "times", ">= 4")


def _table_figures(program: pathlib.Path, pair: Sequence[Engine], rounds: int) -> Iterator[Figure]:
    tunnel = path_of(lambda side: side.subnet().address, "engine")
    many = peers(_PEERS)

    def with_peers(measured: Callable[[], float], *, are_many: bool) -> float:
        for engine in pair:
            engine.change(many if are_many else (), () if are_many else [one[:2] for one in many])
        return measured()

    for what, measured in (
        ("TCP, 1 stream", functools.partial(tcp, program, tunnel)),
        (f"{DATAGRAM_BYTES}-byte datagrams", functools.partial(datagrams, program, tunnel)),
    ):
        found = in_turns(
            {
                name: functools.partial(with_peers, measured, are_many=name == "many")
                for name in ("few", "many")
            },
            rounds,
        )
        yield figure(
            f"{what}, with {_PEERS:,} peers, to without", ratio(found, "many", "few"), "times", "> 0.97"
        )
    yield figure(f"put {_PEERS:,} peers, packets moving or not", _change_ms(pair[0], many), "ms")


def peers(count: int) -> list[Peer]:
    """So many that do not exist."""
    return [
        Peer(
            bytes((10, 64 + (number >> 8), number & 255, 0)),
            24,
            (0xC6120000 + number).to_bytes(4, "big"),
            8285,
        )
        for number in range(count)
    ]


def _change_ms(engine: Engine, many: Sequence[Peer]) -> float:
    took = []
    for _ in range(9):
        engine.change((), [one[:2] for one in many])
        started = time.perf_counter()
        engine.change(many, ())
        took.append(time.perf_counter() - started)
    return 1000 * median(took)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="how many, of about 26 s [5]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
