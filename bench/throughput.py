# SPDX-License-Identifier: Apache-2.0
"""TCP through the fabric as Loden sets it up, beside the same devices and routes set up by hand.

Two labs stand side by side and take turns, so that a busy machine slows both alike.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench._common import Arguments, Figure, figure, median, run
from loden.address import Family
from loden.lab import throughput
from loden.lab.agents import Launch, loden_run
from loden.lab.lab import Lab, running
from loden.lab.probe import End
from loden.lab.topology import Spec

_HOSTS = 2


def measure(arguments: Arguments) -> Iterator[Figure]:
    for backend in ("vxlan", "host-gw"):
        yield from _compare(backend, arguments.rounds)


def _compare(backend: str, rounds: int) -> Iterator[Figure]:
    with ExitStack() as stack:
        labs = {
            name: stack.enter_context(
                running(Spec(name=f"bench-{name}", hosts=_HOSTS, backend=backend), launch=launch)
            )
            for name, launch in (("loden", loden_run), ("hand", _by_hand(backend)))
        }
        loden, hand = _fabric(labs["loden"]), _fabric(labs["hand"])
        seen = [
            _round(loden, hand, _underlay(labs["loden"]), hand_first=bool(number % 2))
            for number in range(rounds)
        ]
    ours, theirs, bare = (median(rates) for rates in zip(*seen, strict=True))
    yield figure(f"{backend}, bare underlay", bare, "Gbit/s")
    yield figure(f"{backend}, through the fabric", ours, "Gbit/s", anchor=("by hand", theirs))
    # Each goes against its neighbour in time: rounds differ more than the set-ups do.
    ratios = [loden / hand for loden, hand, _ in seen]
    yield figure(f"{backend}, fabric, to the same by hand", median(ratios), "times", ">= 0.98")
    yield figure(f"{backend}, fabric, to the bare underlay", ours / bare, "times")


def _round(
    loden: throughput.Path, hand: throughput.Path, underlay: throughput.Path, *, hand_first: bool
) -> tuple[float, float, float]:
    """Gbit/s of the three, one right after the other; the lab's own measurement takes any three paths."""
    first, second = (hand, loden) if hand_first else (loden, hand)
    found = throughput.measure(underlay=first, overlay=second, container=underlay, rounds=1)
    one, two, bare = found.underlay_gbps, found.overlay_gbps, found.container_gbps
    return (two, one, bare) if hand_first else (one, two, bare)


def _by_hand(backend: str) -> Launch:
    def command(_: str, subnet_file: Path) -> tuple[str, ...]:
        return (sys.executable, "-m", "bench._by_hand", backend, str(_HOSTS), str(subnet_file))

    return command


def _fabric(lab: Lab) -> throughput.Path:
    """Between the first two hosts' gateway addresses: the fabric's cost alone."""
    return throughput.Path(
        *(
            End(f"{host.name}'s gateway", host.namespace, lab.found[host.name].subnets[Family.IPV4].gateway)
            for host in lab.plan.hosts
        )
    )


def _underlay(lab: Lab) -> throughput.Path:
    return throughput.Path(
        *(End(host.name, host.namespace, host.addresses[Family.IPV4]) for host in lab.plan.hosts)
    )


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=15, help="how many, of about 2 s [15]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
