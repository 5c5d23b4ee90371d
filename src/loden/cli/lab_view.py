# SPDX-License-Identifier: Apache-2.0
"""What ``loden lab`` shows: progress on stderr while it works, tables on stdout at the end."""

import statistics
import sys
from types import TracebackType
from typing import Self

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from loden.lab.lab import Lab
from loden.lab.report import HostReport, Pair, Report, Status
from loden.lab.throughput import Throughput

_MOST_ROWS = 12  # beyond that a table tells less than a sentence
_MOST_REASONS = 10


class Watch:
    """The :class:`loden.lab.lab.Progress` that draws; off a terminal it writes a line for each stage."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._drawn = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._drawn.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drawn.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._drawn.add_task(stage, total=total)
            if self._drawn.disable:
                self._console.print(f"{stage} …", highlight=False)
        self._drawn.update(self._tasks[stage], completed=done)


def show_report(lab: Lab, report: Report, *, as_json: bool) -> None:
    """What was reached; for people also why the rest was not."""
    if as_json:
        _print_json(report)
        return
    out = Console()
    if len(report.hosts) <= _MOST_ROWS:
        out.print(_hosts(report.hosts))
    for family, pairs in _by_family(report.pairs).items():
        containers = tuple(dict.fromkeys(pair.source for pair in pairs))
        if len(containers) <= _MOST_ROWS:
            out.print(_matrix(containers, pairs, family))
    out.print(_summary(report), highlight=False, soft_wrap=True)
    _print_unreached(out, lab, [pair for pair in report.pairs if not pair.ok])
    if report.throughput is not None:
        out.print(_throughput(report.throughput))


def show_throughput(measured: Throughput, *, as_json: bool) -> None:
    """What the paths of a lab carry."""
    if as_json:
        _print_json(measured)
    else:
        Console().print(_throughput(measured))


def show_status(status: Status, *, as_json: bool) -> None:
    """A lab's hosts and agents."""
    if as_json:
        _print_json(status)
        return
    table = Table("host", "public address", "subnet", "agent", title=f"lab {status.name}, {status.backend}")
    for host in status.hosts:
        agent = "[red]ended[/]" if host.agent_pid is None else f"pid {host.agent_pid}"
        table.add_row(*_host_cells(host), agent)
    Console().print(table)


def _print_json(value: msgspec.Struct) -> None:
    print(msgspec.json.encode(value).decode())


def _hosts(hosts: tuple[HostReport, ...]) -> Table:
    table = Table("host", "public address", "subnet")
    for host in hosts:
        table.add_row(*_host_cells(host))
    return table


def _host_cells(host: HostReport) -> tuple[str, str, str]:
    return host.name, _lines(host.public_ip, host.public_ipv6), _lines(host.subnet, host.ipv6_subnet)


def _lines(*texts: str | msgspec.UnsetType) -> str:
    """Those that there are, one below the other."""
    return "\n".join(text for text in texts if text is not msgspec.UNSET)


def _by_family(pairs: tuple[Pair, ...]) -> dict[str, list[Pair]]:
    """The pairs by the family's name, which is empty where there is IPv4 alone."""
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(_lines(pair.family), []).append(pair)
    return found


def _matrix(containers: tuple[str, ...], pairs: list[Pair], family: str) -> Table:
    """Who reached whom, and how long the answer took."""
    cells = {(pair.source, pair.target): pair for pair in pairs}
    table = Table(f"{family}, ms from ↓ to →" if family else "ms from ↓ to →", *containers)
    for source in containers:
        table.add_row(source, *(_cell(cells.get((source, target))) for target in containers))
    return table


def _cell(pair: Pair | None) -> str:
    if pair is None:
        return ""
    return "[red]none[/]" if pair.rtt_ms is None else f"[green]{pair.rtt_ms:.2f}[/]"


def _summary(report: Report) -> str:
    times = [pair.rtt_ms for pair in report.pairs if pair.rtt_ms is not None]
    said = f"{len(times)} of {len(report.pairs)} pairs reached over {report.backend}"
    if times:
        said += (
            f", {min(times):.2f} / {statistics.median(times):.2f} / {max(times):.2f} ms (least, median, most)"
        )
    return f"[{'green' if report.reachable else 'red'}]{said}[/]"


def _print_unreached(out: Console, lab: Lab, pairs: list[Pair]) -> None:
    for pair in pairs[:_MOST_REASONS]:
        reasons = lab.reasons(pair) or ("no answer, and the sender's agent logged nothing about it",)
        out.print(
            f"{pair.source} → {pair.target}{_in(pair.family)}:",
            *reasons,
            sep="\n  ",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if len(pairs) > _MOST_REASONS:
        out.print(f"and {len(pairs) - _MOST_REASONS} more; --json lists them all", highlight=False)


def _throughput(measured: Throughput) -> Table:
    table = Table(f"TCP, host 1 to host 2{_in(measured.family)}", "Gbit/s")
    table.add_row("bare underlay", f"{measured.underlay_gbps:.2f}")
    table.add_row("through the fabric", f"{measured.overlay_gbps:.2f}")
    table.add_row("  of the underlay", f"{measured.ratio:.1%}")
    table.add_row("container to container", f"{measured.container_gbps:.2f}")
    return table


def _in(family: str | msgspec.UnsetType) -> str:
    return "" if family is msgspec.UNSET else f", {family}"
