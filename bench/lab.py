# SPDX-License-Identifier: Apache-2.0
"""``loden lab run``: how long it takes for three hosts, and for many, with the memory that those need."""

import argparse
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bench._common import Arguments, Figure, figure, run
from loden.errors import LabError
from loden.lab.report import Report

_SAMPLE_S = 0.1


def measure(arguments: Arguments) -> Iterator[Figure]:
    for backend in ("vxlan", "host-gw"):
        seconds, report = _lab(3, "--backend", backend, "--throughput")
        yield figure(f"3 hosts, {backend}, with throughput", seconds, "s", "<= 15")
        assert report.throughput is not None
    with _Memory() as memory:
        seconds, report = _lab(arguments.hosts)
    what = f"{arguments.hosts} hosts"
    yield figure(f"{what}, full mesh, made, asked and removed", seconds, "s")
    pairs = arguments.hosts * (arguments.hosts - 1)
    yield figure(f"{what}, pairs reached", sum(pair.ok for pair in report.pairs), "", str(pairs))
    answers = sorted(pair.rtt_ms for pair in report.pairs if pair.rtt_ms is not None)
    yield figure(f"{what}, median answer", answers[len(answers) // 2], "ms")
    yield figure(f"{what}, the machine's memory at the peak", memory.most_mb, "MB", "<= 24000")


def _lab(hosts: int, *more: str) -> tuple[float, Report]:
    """Seconds, and the report."""
    started = time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "loden.cli.main", "lab", "run", "--name", "bench", "--json"),
            *("--hosts", str(hosts), *more),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    try:
        return seconds, msgspec.json.decode(done.stdout, type=Report)
    except msgspec.DecodeError as error:
        raise LabError(f"run a lab of {hosts} hosts: {done.stderr.strip() or error}") from error


class _Memory:
    """By how much the machine's available memory goes down in a block; others on the machine count too."""

    def __init__(self) -> None:
        self._before = self._least = _available_mb()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory")

    @property
    def most_mb(self) -> float:
        return self._before - self._least

    def __enter__(self) -> "_Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self._least = min(self._least, _available_mb())


def _available_mb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) / 1024


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", type=int, default=50, help="of the large lab [50]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
