# SPDX-License-Identifier: Apache-2.0
"""What an agent costs that has nothing to do: processor time, over a span with a full look in it.

It keeps the firewall's rules besides.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

from bench._common import Arguments, Figure, figure, run, scratch
from bench._site import fill, site


def measure(arguments: Arguments) -> Iterator[Figure]:
    with scratch() as directory, site() as here:
        store = fill(Path(directory) / "store.db", arguments.leases)
        agent = here.start(store, "--ip-masq", "--iptables-forward-rules=true")
        agent.wait_idle()
        before, started = agent.cpu_s(), time.monotonic()
        time.sleep(arguments.seconds)
        used, span = agent.cpu_s() - before, time.monotonic() - started
        yield figure(f"{arguments.leases:,} leases, idle for {span:.0f} s", 100 * used / span, "%", "<= 0.2")
        yield figure("processor time in that span", 1000 * used, "ms")
        before, started = agent.cpu_s(), time.monotonic()
        time.sleep(arguments.seconds / 6)
        used, span = agent.cpu_s() - before, time.monotonic() - started
        yield figure("the same between two looks", 100 * used / span, "%", "<= 0.2")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--leases", type=int, default=5_000, help="how many [5000]")
    parser.add_argument("--seconds", type=float, default=65, help="how long [65]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
