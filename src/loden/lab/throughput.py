# SPDX-License-Identifier: Apache-2.0
"""What one TCP connection carries: bare, through the fabric, and from container to container.

The three paths take turns, several rounds, so that a busy machine slows all of them alike.
"""

import contextlib
import functools
import socket
import statistics
import threading
import time
from collections.abc import Callable

import msgspec

from loden.address import Family, format_address
from loden.errors import LabError
from loden.lab import namespaces
from loden.lab.probe import End

ROUNDS = 3
ROUND_S = 0.7
_BUFFER_BYTES = 1 << 20
_PATIENCE_S = 5.0


class Throughput(msgspec.Struct, frozen=True):
    """Medians over all rounds, in Gbit/s of TCP payload.

    Args:
        underlay_gbps: between two hosts' own addresses.
        overlay_gbps: between their gateway addresses: the same two kernels, and the fabric.
        ratio: overlay to underlay: the fabric's cost alone.
        container_gbps: between two containers: the fabric, bridges and wires.
        family: of all three, where the lab is not of IPv4 alone.
    """

    underlay_gbps: float
    overlay_gbps: float
    ratio: float
    container_gbps: float
    family: str | msgspec.UnsetType = msgspec.UNSET


class Path(msgspec.Struct, frozen=True):
    """From where to where a connection goes."""

    source: End
    target: End


def measure(
    *,
    underlay: Path,
    overlay: Path,
    container: Path,
    rounds: int = ROUNDS,
    round_s: float = ROUND_S,
    on_round: Callable[[], None] = lambda: None,
) -> Throughput:
    """Measure the three paths in turns; blocks for about three times *rounds* times *round_s* seconds.

    Raises:
        LabError: a path does not connect, or what goes in does not come out.
    """
    paths = (underlay, overlay, container)
    rates: dict[Path, list[float]] = {path: [] for path in paths}
    for _ in range(rounds):
        for path in paths:
            rates[path].append(_carry(path, round_s))
            on_round()
    bare, fabric, far = (statistics.median(rates[path]) for path in paths)
    return Throughput(round(bare, 2), round(fabric, 2), round(fabric / bare, 3), round(far, 2))


def _carry(path: Path, seconds: float) -> float:
    """One round over one path, in Gbit/s as the receiver sees it."""
    try:
        with contextlib.ExitStack() as stack:
            sender, receiver = _connect(path, stack)
            return _pump(sender, receiver, seconds)
    except OSError as error:
        raise LabError(
            f"measure {path.source.name} to {path.target.name}: {error.strerror or error}",
            hint="`loden lab ping` says who reaches whom",
        ) from error


def _connect(path: Path, stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    open_socket = functools.partial(_tcp, Family.of(path.target.address))
    listener = stack.enter_context(namespaces.inside(path.target.namespace, open_socket))
    listener.bind((format_address(path.target.address), 0))
    listener.listen(1)
    sender = stack.enter_context(namespaces.inside(path.source.namespace, open_socket))
    sender.bind((format_address(path.source.address), 0))
    sender.connect(listener.getsockname())
    receiver = stack.enter_context(listener.accept()[0])
    receiver.settimeout(_PATIENCE_S)
    return sender, receiver


def _tcp(family: Family) -> socket.socket:
    found = socket.socket(family, socket.SOCK_STREAM)
    found.settimeout(_PATIENCE_S)
    return found


def _pump(sender: socket.socket, receiver: socket.socket, seconds: float) -> float:
    """Send in a thread, receive here; both are in the kernel, without the interpreter's lock."""
    stop = threading.Event()

    def send() -> None:
        # A receiver that gave up has said why; the sender's error would only repeat it.
        with contextlib.suppress(OSError):
            while not stop.is_set():
                sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)

    data, buffer = bytes(_BUFFER_BYTES), bytearray(_BUFFER_BYTES)
    thread = threading.Thread(target=send, name="throughput")
    thread.start()
    try:
        start = time.perf_counter()
        received = 0
        while (elapsed := time.perf_counter() - start) < seconds:
            received += receiver.recv_into(buffer)
        return received * 8 / elapsed / 1e9
    finally:
        stop.set()
        receiver.close()
        thread.join()
