# SPDX-License-Identifier: Apache-2.0
"""TCP as iperf3 sees it, which is what the anchors in docs/performance.md were measured with."""

import contextlib
import functools
import shutil
import subprocess
import time

import msgspec

from loden.address import format_address
from loden.errors import LabError
from loden.lab import namespaces
from loden.lab.probe import End
from loden.lab.throughput import Path

_FIRST_PORT = 5201
#: What is left out of each measurement: congestion control finds its window.
_SETTLE_S = 0.5
_PATIENCE_S = 10.0


class _Sum(msgspec.Struct):
    bits_per_second: float


class _End(msgspec.Struct):
    sum_received: _Sum | None = None


class _Report(msgspec.Struct):
    end: _End | None = None
    error: str = ""


def is_available() -> bool:
    """Whether iperf3 is installed."""
    return shutil.which("iperf3") is not None


def tcp(path: Path, *, streams: int = 1, seconds: int, congestion: str = "") -> float:
    """What connections carry at the same time, in Gbit/s as the receivers see it.

    Each has processes of its own: iperf3 before 3.16 has one thread for all its streams, and with four of
    them that thread would be what is measured.

    Args:
        path: from where to where.
        streams: how many connections.
        seconds: to measure, behind half a second that does not count; blocks for as long. iperf3 takes no
            fractions, and 0 for ever.
        congestion: the senders' congestion control; empty for the host's.

    Raises:
        LabError: the path does not connect.
    """
    what = f"measure {path.source.name} to {path.target.name}"
    there, here = (format_address(end.address) for end in (path.target, path.source))
    with contextlib.ExitStack() as stack:
        ports = [str(_FIRST_PORT + number) for number in range(streams)]
        servers = [
            _start(
                ("--server", "--one-off", "--bind", there, "--port", port, "--forceflush"), path.target, stack
            )
            for port in ports
        ]
        for server in servers:
            _wait_until_listening(server)
        congested = ("--congestion", congestion) if congestion else ()
        clients = [
            _start(
                (
                    *("--client", there, "--bind", here, "--port", port, "--connect-timeout", "3000"),
                    *("--time", str(seconds), "--omit", f"{_SETTLE_S:g}", "--json"),
                    *congested,
                ),
                path.source,
                stack,
            )
            for port in ports
        ]
        try:
            said = [client.communicate(timeout=seconds + _PATIENCE_S)[0] for client in clients]
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{what}: iperf3 hangs") from error
    return sum(_gbps(one, what) for one in said)


def _gbps(said: str, what: str) -> float:
    report = msgspec.json.decode(said, type=_Report)
    if report.error or report.end is None or report.end.sum_received is None:
        raise LabError(f"{what}: iperf3: {report.error}")
    return report.end.sum_received.bits_per_second / 1e9


def _start(words: tuple[str, ...], end: End, stack: contextlib.ExitStack) -> subprocess.Popen[str]:
    started = namespaces.inside(end.namespace, functools.partial(_popen, ("iperf3", *words)))
    stack.enter_context(started)
    stack.callback(started.kill)
    return started


def _popen(words: tuple[str, ...]) -> subprocess.Popen[str]:
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _wait_until_listening(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    deadline = time.monotonic() + _PATIENCE_S
    said = ""
    while "listening" not in said:
        line = server.stdout.readline()
        if not line or time.monotonic() > deadline:
            raise LabError(f"start iperf3: {said.strip() or 'it said nothing'}")
        said += line
