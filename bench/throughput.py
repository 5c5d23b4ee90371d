# SPDX-License-Identifier: Apache-2.0
"""TCP through the fabric as Loden sets it up, beside the same devices and routes set up by hand.

Two set-ups that are alike to the last entry differ by some percent, however long they are measured: where the
kernel put what belongs to them stays with them. So there are many of each, made anew in changing order, and
beside Loden against by hand stands by hand against by hand: the error of the bench itself. Processor time for
a gigabyte is steadier than the rate on a machine that others use.
"""

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from bench._common import Arguments, Figure, figure, median, run
from bench._paths import fabric, underlay
from loden.lab import throughput
from loden.lab.agents import Launch, loden_run
from loden.lab.lab import running
from loden.lab.topology import Spec

_HOSTS = 2
_ROUND_S = 0.1
_LODEN, _HAND, _AGAIN = "loden", "hand", "again"


class _Sample(msgspec.Struct, frozen=True):
    """What a path carried, and this process's time for it: it sends, receives, and does most in between."""

    gbps: float
    cpu_s_per_gb: float


class _Pairing(msgspec.Struct, frozen=True):
    """What labs that were made at the same time carried: medians of their samples."""

    labs: dict[str, _Sample]
    underlay: _Sample

    def ratio(self, one: str, other: str) -> float:
        return self.labs[one].gbps / self.labs[other].gbps

    def cpu_ratio(self, one: str, other: str) -> float:
        return self.labs[one].cpu_s_per_gb / self.labs[other].cpu_s_per_gb


def measure(arguments: Arguments) -> Iterator[Figure]:
    for backend in ("vxlan", "host-gw"):
        orders = itertools.cycle(itertools.permutations((_LODEN, _HAND, _AGAIN)))
        found = [_pair(backend, next(orders), arguments.rounds) for _ in range(arguments.labs)]
        yield from _compare(backend, found)


def _compare(backend: str, found: Sequence[_Pairing]) -> Iterator[Figure]:
    by_hand = median([one.labs[_HAND].gbps for one in found])
    ours = median([one.labs[_LODEN].gbps for one in found])
    bare = median([one.underlay.gbps for one in found])
    yield figure(f"{backend}, bare underlay", bare, "Gbit/s")
    yield figure(f"{backend}, through the fabric", ours, "Gbit/s", anchor=("by hand", by_hand))
    ratios = [one.ratio(_LODEN, _HAND) for one in found]
    errors = [one.ratio(_AGAIN, _HAND) for one in found]
    yield figure(
        f"{backend}, fabric, to the same by hand",
        median(ratios),
        "times",
        ">= 0.98",
        anchor=("by hand to by hand", median(errors)),
    )
    yield figure(f"{backend}, lowest of {len(found)}", min(ratios), "times", anchor=("by hand", min(errors)))
    yield figure(f"{backend}, highest of {len(found)}", max(ratios), "times", anchor=("by hand", max(errors)))
    yield figure(
        f"{backend}, processor time a byte, to by hand",
        median([one.cpu_ratio(_LODEN, _HAND) for one in found]),
        "times",
        "<= 1.02",
        anchor=("by hand to by hand", median([one.cpu_ratio(_AGAIN, _HAND) for one in found])),
    )
    yield figure(f"{backend}, fabric, to the bare underlay", ours / bare, "times")


def _pair(backend: str, order: Sequence[str], rounds: int) -> _Pairing:
    """Make the labs in an order, and let them take turns."""
    launches = {_LODEN: loden_run, _HAND: _by_hand(backend), _AGAIN: _by_hand(backend)}
    with ExitStack() as stack:
        labs = {
            name: stack.enter_context(
                running(Spec(name=f"bench-{name}", hosts=_HOSTS, backend=backend), launch=launches[name])
            )
            for name in order
        }
        paths = {name: fabric(lab) for name, lab in labs.items()}
        samples: dict[str, list[_Sample]] = {name: [] for name in paths}
        bare: list[_Sample] = []
        turns = itertools.cycle(itertools.permutations(paths))
        for _ in range(rounds):
            for name in next(turns):
                samples[name].append(_carry(paths[name]))
            bare.append(_carry(underlay(labs[_HAND])))
    return _Pairing({name: _middle(found) for name, found in samples.items()}, _middle(bare))


def _carry(path: throughput.Path) -> _Sample:
    """Three connections in a row; the lab's own measurement takes any three paths."""
    before = time.process_time()
    found = throughput.measure(underlay=path, overlay=path, container=path, rounds=1, round_s=_ROUND_S)
    rates = (found.underlay_gbps, found.overlay_gbps, found.container_gbps)
    gigabytes = sum(rates) * _ROUND_S / 8
    return _Sample(median(rates), (time.process_time() - before) / gigabytes)


def _middle(samples: Sequence[_Sample]) -> _Sample:
    return _Sample(median([one.gbps for one in samples]), median([one.cpu_s_per_gb for one in samples]))


def _by_hand(backend: str) -> Launch:
    def command(_: str, subnet_file: Path) -> tuple[str, ...]:
        return (sys.executable, "-m", "bench._by_hand", backend, str(_HOSTS), str(subnet_file))

    return command


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labs", type=int, default=6, help="how many of each, a multiple of 6 is fair [6]")
    parser.add_argument("--rounds", type=int, default=6, help="how many with each, of 1.2 s [6]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
