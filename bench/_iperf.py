# SPDX-License-Identifier: Apache-2.0
"""TCP as iperf3 sees it, which is what the anchors in docs/performance.md were measured with."""

import functools
import shutil
import subprocess
import time

import msgspec

from loden.address import format_address
from loden.errors import LabError
from loden.lab import namespaces
from loden.lab.throughput import Path

_PORT = 5201
#: What is left out of each measurement: congestion control finds its window.
_SETTLE_S = 0.5
_PATIENCE_S = 10.0


class _Sum(msgspec.Struct):
    bits_per_second: float


class _End(msgspec.Struct):
    sum_received: _Sum


class _Report(msgspec.Struct):
    end: _End | None = None
    error: str = ""


def is_available() -> bool:
    """Whether iperf3 is installed."""
    return shutil.which("iperf3") is not None


def tcp(path: Path, *, streams: int = 1, seconds: float) -> float:
    """What connections carry at the same time, in Gbit/s as the receiver sees it.

    Args:
        path: from where to where.
        streams: how many connections.
        seconds: to measure, behind half a second that does not count; blocks for as long.

    Raises:
        LabError: the path does not connect.
    """
    there, here = (format_address(end.address) for end in (path.target, path.source))
    serve = ("iperf3", "--server", "--one-off", "--bind", there, "--port", str(_PORT), "--forceflush")
    ask = (
        *("iperf3", "--client", there, "--bind", here, "--port", str(_PORT), "--parallel", str(streams)),
        *("--time", f"{seconds:g}", "--omit", f"{_SETTLE_S:g}", "--json", "--connect-timeout", "3000"),
    )
    with namespaces.inside(path.target.namespace, functools.partial(_popen, serve)) as server:
        try:
            _wait_until_listening(server)
            with namespaces.inside(path.source.namespace, functools.partial(_popen, ask)) as client:
                try:
                    said, _ = client.communicate(timeout=seconds + _PATIENCE_S)
                finally:
                    client.kill()
        except subprocess.TimeoutExpired as error:
            raise LabError(f"measure {path.source.name} to {path.target.name}: iperf3 hangs") from error
        finally:
            server.kill()
    report = msgspec.json.decode(said, type=_Report)
    if report.end is None or report.error:
        raise LabError(f"measure {path.source.name} to {path.target.name}: iperf3: {report.error}")
    return report.end.sum_received.bits_per_second / 1e9


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
