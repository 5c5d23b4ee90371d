# SPDX-License-Identifier: Apache-2.0
"""From exec to subnet.env, and the memory of an agent at rest, with three peers."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from bench._common import Arguments, Figure, figure, median, percentile, run, scratch
from bench._site import fill, site

_PEERS = 3


def measure(arguments: Arguments) -> Iterator[Figure]:
    bare: list[float] = []
    loop: list[float] = []
    first: list[float] = []
    again: list[float] = []
    with scratch() as directory:
        for number in range(arguments.rounds + 1):
            url = fill(Path(directory) / f"{number}.db", _PEERS)
            bare.append(_python("pass"))
            loop.append(_python("import asyncio"))
            with site() as here:
                for starts in (first, again):
                    one = here.start(url)
                    starts.append(one.ready_s * 1000)
                    one.kill()
        for starts in (bare, loop, first, again):
            del starts[0]  # compiled what it imported
        anchor = ("python -c pass", median(bare))
        yield figure("python -c 'import asyncio', median", median(loop), "ms", anchor=anchor)
        yield figure("exec to subnet.env on a new host, median", median(first), "ms", "<= 250", anchor=anchor)
        yield figure(
            "exec to subnet.env on a new host, 90th percentile", percentile(first, 90), "ms", "<= 250"
        )
        yield figure("exec to subnet.env again, median", median(again), "ms", "<= 250", anchor=anchor)
        yield figure("exec to subnet.env again, 90th percentile", percentile(again, 90), "ms", "<= 250")
    with scratch() as directory, site() as here:
        one = here.start(fill(Path(directory) / "store.db", _PEERS))
        one.wait_idle()
        yield figure("processor time until it rests", 1000 * one.cpu_s(), "ms")
        yield figure("memory at rest, resident", one.memory_mb(), "MB", "<= 40")
        yield figure("memory at rest, its share (PSS)", one.memory_mb("Pss"), "MB", "<= 40")


def _python(code: str) -> float:
    """Milliseconds that the same interpreter takes for a line."""
    started = time.perf_counter()
    pid = os.posix_spawn(sys.executable, (sys.executable, "-c", code), os.environ)
    os.waitpid(pid, 0)
    return 1000 * (time.perf_counter() - started)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=10, help="how many starts [10]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
