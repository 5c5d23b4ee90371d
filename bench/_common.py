# SPDX-License-Identifier: Apache-2.0
"""What all benches share: a world of their own, and how a figure is printed.

A bench judges nothing: it prints figures, what was promised, and an anchor, something known that the same
run measured, because on a shared machine only ratios within one run mean anything. Its exit status says
whether it could measure.
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from loden.errors import LodenError

ROOT = Path(__file__).resolve().parent.parent

Arguments = argparse.Namespace


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One figure.

    Args:
        what: was measured.
        value: in *unit*; None where it could not be measured, and *what* says why.
        promise: what the project promises, in the same unit; empty where it promises nothing.
        anchor: what *anchor_value*, in the same unit, is of; empty where there is none.
        ratio: of the value to the anchor's.
    """

    what: str
    value: float | None
    unit: str
    promise: str = ""
    anchor: str = ""
    anchor_value: float | None = None
    ratio: float | None = None


def figure(
    what: str, value: float | None, unit: str, promise: str = "", *, anchor: tuple[str, float] | None = None
) -> Figure:
    """A figure, with its ratio to an anchor (its name and value)."""
    name, beside = anchor or ("", None)
    ratio = None if value is None or not beside else round(value / beside, 3)
    return Figure(
        what=what,
        value=None if value is None else round(value, 4),
        unit=unit,
        promise=promise,
        anchor=name,
        anchor_value=None if beside is None else round(beside, 4),
        ratio=ratio,
    )


def run(
    measure: Callable[[Arguments], Iterable[Figure]],
    *,
    about: str | None,
    options: Callable[[argparse.ArgumentParser], None] = lambda _: None,
) -> None:
    """A bench's whole main program; ends the process.

    Args:
        measure: yields figures as it gets them. It runs in a world of its own (``scripts/world``), where all
            it makes in the network, and its processes, end with it.
        about: for ``--help``.
        options: adds the bench's own.
    """
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "run it with python -m"
    parser = argparse.ArgumentParser(prog=f"python -m {spec.name}", description=(about or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options(parser)
    arguments = parser.parse_args()
    _enter_world(spec.name)
    # Either unwinds, and so removes files too; Ctrl-C also where a shell had it ignored.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _show(spec.name.removeprefix("bench."), measure(arguments), as_json=arguments.json)
    except KeyboardInterrupt:
        sys.exit(130)
    except (LodenError, OSError) as error:
        sys.exit(f"{spec.name}: {error}")


def _enter_world(module: str) -> None:
    if "LODEN_TEST_WORLD" in os.environ:
        return
    os.chdir(ROOT)
    world = str(ROOT / "scripts" / "world")
    # This checkout's code, whatever else is installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    os.execve(world, [world, sys.executable, "-m", module, *sys.argv[1:]], environment)


def _show(name: str, figures: Iterable[Figure], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(msgspec.json.encode({"bench": name, "figures": list(figures)}).decode() + "\n")
        return
    print(f"{name:<58} {'figure':>13} {'promise':>10}  beside", flush=True)
    for one in figures:
        beside = "" if one.anchor_value is None else f"{one.anchor} {_text(one.anchor_value)} {one.unit}"
        if one.ratio is not None:
            beside += f": {one.ratio:g} times that"
        value = "" if one.value is None else f"{_text(one.value)} {one.unit}"
        print(f"{one.what:<58} {value:>13} {one.promise:>10}  {beside}".rstrip(), flush=True)


def _text(value: float) -> str:
    if value == int(value):
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


median = statistics.median


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A directory on a disk, for the length of a block: stores sync, and memory would flatter them."""
    return tempfile.TemporaryDirectory(prefix="loden-bench-", dir="/var/tmp")
