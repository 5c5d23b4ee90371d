# SPDX-License-Identifier: Apache-2.0
"""Packed addresses and prefixes beside the objects of ``ipaddress``: memory and time of each."""

import argparse
import ipaddress
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from bench._common import Arguments, Figure, figure, median, run
from loden.address import Family, Prefix, format_address, parse_address

_ROUNDS = 5

T = TypeVar("T")


def measure(arguments: Arguments) -> Iterator[Figure]:
    texts = [
        format_address((0x0A000000 + 256 * number).to_bytes(4, "big")) for number in range(arguments.count)
    ]
    subnets = [f"{text}/24" for text in texts]
    yield from _compare("address", texts, parse_address, ipaddress.IPv4Address)
    yield from _compare("prefix", subnets, Prefix.parse, ipaddress.IPv4Network)
    packed = [Prefix.parse(text) for text in subnets]
    assert all(one.family is Family.IPV4 for one in packed)


def _compare(
    what: str, texts: Sequence[str], ours: Callable[[str], object], theirs: Callable[[str], object]
) -> Iterator[Figure]:
    """Each figure is per object, ours beside theirs."""

    def line(done: str, unit: str, of: Callable[[Callable[[str], object]], float]) -> Figure:
        return figure(f"{what}, {done}", of(ours), unit, anchor=("ipaddress", of(theirs)))

    yield line("memory", "bytes", lambda parse: _memory(parse, texts))
    yield line("parse", "ns", lambda parse: _time(texts, lambda items: map(parse, items)))
    yield line("hash", "ns", lambda parse: _time(_made(parse, texts), lambda items: map(hash, items)))
    yield line("look up in a dictionary", "ns", lambda parse: _look_up(parse, texts))
    yield line("sort", "ns", lambda parse: _time(_made(parse, texts)[::-1], _sort))


def _made(parse: Callable[[str], T], texts: Sequence[str]) -> list[T]:
    return [parse(text) for text in texts]


def _memory(parse: Callable[[str], object], texts: Sequence[str]) -> float:
    """Bytes that one object takes, with all that it holds alone."""
    slots: list[object] = [None] * len(texts)
    tracemalloc.start()
    for number, text in enumerate(texts):
        slots[number] = parse(text)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return size / len(texts)


def _look_up(parse: Callable[[str], object], texts: Sequence[str]) -> float:
    table = dict.fromkeys(_made(parse, texts))
    # Equal and not the same, as what the kernel lists and what is wanted are.
    return _time(_made(parse, texts), lambda items: map(table.__contains__, items))


def _sort(items: Iterable[object]) -> Iterable[object]:
    return sorted(items, key=lambda item: item)  # type: ignore[arg-type, return-value]  # all kinds compare


def _time(items: Sequence[T], work: Callable[[Sequence[T]], Iterable[object]]) -> float:
    """Nanoseconds an item, the median of some rounds."""
    took = []
    for _ in range(_ROUNDS):
        started = time.perf_counter_ns()
        deque(work(items), maxlen=0)
        took.append((time.perf_counter_ns() - started) / len(items))
    return median(took)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=50_000, help="how many objects [50000]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
