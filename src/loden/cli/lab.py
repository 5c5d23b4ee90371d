# SPDX-License-Identifier: Apache-2.0
"""``loden lab``: many hosts on one machine, in network namespaces, each with the real agent."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from loden.lab.lab import Lab
    from loden.lab.topology import Spec

T = TypeVar("T")
Decorator = Callable[[Callable[..., T]], Callable[..., T]]


@click.group()
def command() -> None:
    """Many hosts on this machine, each with the real agent.

    Every host and every container is a network namespace, named after the lab: NAME-h1, NAME-h1-c1. The
    machine's own interfaces, routes and rules are never touched.
    """


_name = click.option("--name", default="lab", show_default=True, help="The lab's name.")
_underlay = click.option(
    "--underlay",
    type=click.Choice(["ipv4", "ipv6"]),
    help="The hosts' addresses that carry what is measured; each family has its own.  [default: the first]",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


def _spec_options(function: Callable[..., T]) -> Callable[..., T]:
    """What describes a lab; the decorated function takes the values as keyword arguments."""
    options: tuple[Decorator[T], ...] = (
        _name,
        click.option("--hosts", default=3, show_default=True, help="How many hosts."),
        click.option("--containers", default=1, show_default=True, help="How many containers on each."),
        click.option("--backend", default="vxlan", show_default=True, metavar="TYPE", help="The backend."),
        click.option(
            "--backend-config",
            default="{}",
            metavar="JSON",
            help='The backend\'s options, such as {"DirectRouting": true}.',
        ),
        click.option(
            "--network",
            default="10.5.0.0/16",
            show_default=True,
            metavar="CIDR",
            help="All IPv4 container addresses.",
        ),
        click.option(
            "--network6",
            default="fd00:5::/48",
            show_default=True,
            metavar="CIDR",
            help="All IPv6 container addresses.",
        ),
        click.option(
            "--family",
            type=click.Choice(["ipv4", "dual", "ipv6"]),
            default="ipv4",
            show_default=True,
            help="The address families of containers, and of the hosts under them.",
        ),
        _underlay,
        click.option(
            "--topology",
            type=click.Choice(["switched", "routed", "mixed"]),
            default="switched",
            show_default=True,
            help="All hosts in one segment, each in its own behind a router, or two in each.",
        ),
        click.option(
            "--store",
            type=click.Choice(["sqlite", "etcd"]),
            default="sqlite",
            show_default=True,
            help="Where the agents have their leases; an etcd of the lab's own is started, and ends with it.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@command.command()
@_spec_options
@click.option("--throughput", "with_throughput", is_flag=True, help="Measure it, beside the bare underlay.")
@_json
def run(*, with_throughput: bool, as_json: bool, **spec: str | int | None) -> int:
    """Make a lab, check that every container reaches every other, remove it.

    The exit status is 0 only if every pair was reached.
    """
    _as_root()
    from loden.cli import lab_view
    from loden.lab.lab import running

    with _orderly_end(), lab_view.Watch() as progress, running(_spec(spec), progress=progress) as lab:
        report = lab.check(with_throughput=with_throughput, progress=progress)
        lab_view.show_report(lab, report, as_json=as_json)
    return 0 if report.reachable else 1


@command.command()
@_spec_options
@_json
def up(*, as_json: bool, **spec: str | int | None) -> None:
    """Make a lab and leave it running."""
    _as_root()
    from loden.cli import lab_view
    from loden.lab import lab

    with _orderly_end(), lab_view.Watch() as progress:
        made = lab.up(_spec(spec), progress=progress)
    lab_view.show_status(made.status(), as_json=as_json)


@command.command()
@_name
@_json
def status(*, name: str, as_json: bool) -> int:
    """Show a lab's hosts. The exit status is 0 only if every agent runs."""
    found = _open(name).status()
    from loden.cli import lab_view

    lab_view.show_status(found, as_json=as_json)
    return 1 if any(host.agent_pid is None for host in found.hosts) else 0


@command.command("exec", context_settings={"ignore_unknown_options": True})
@_name
@click.argument("host")
@click.argument("argv", metavar="-- COMMAND", nargs=-1, required=True, type=click.UNPROCESSED)
def execute(*, name: str, host: str, argv: tuple[str, ...]) -> NoReturn:
    """Run a command in a host (h1) or a container (h1-c1)."""
    namespace = _open(name).plan.namespace_of(host)
    os.execvp("ip", ("ip", "netns", "exec", namespace, *argv))


@command.command()
@_name
@_json
def ping(*, name: str, as_json: bool) -> int:
    """Check that every container reaches every other; the exit status is 0 only if so."""
    lab = _open(name)
    from loden.cli import lab_view

    with lab_view.Watch() as progress:
        report = lab.check(progress=progress)
        lab_view.show_report(lab, report, as_json=as_json)
    return 0 if report.reachable else 1


@command.command()
@_name
@_underlay
@_json
def throughput(*, name: str, underlay: str | None, as_json: bool) -> None:
    """Measure TCP between the first two hosts: bare, through the fabric, between containers."""
    lab = _open(name)
    from loden.cli import lab_view

    with lab_view.Watch() as progress:
        measured = lab.throughput(underlay=underlay, progress=progress)
        lab_view.show_throughput(measured, as_json=as_json)


@command.command()
@_name
@click.option("--all", "every", is_flag=True, help="Every lab there is.")
def down(*, name: str, every: bool) -> None:
    """Remove all of a lab, also of one that was killed. There being none is no error."""
    _as_root()
    from loden.lab import lab, state

    for one in state.names() if every else (name,):
        there_was = lab.down(one)
        click.echo(f"lab {one}: {'removed' if there_was else 'there is none'}", err=True)


def _spec(values: dict[str, str | int | None]) -> "Spec":
    """The command line's values, typed: click has converted them, msgspec knows what each must be."""
    import msgspec

    from loden.lab.topology import Spec

    return msgspec.convert(values, Spec)


def _open(name: str) -> "Lab":
    _as_root()
    from loden.lab.lab import Lab

    return Lab.open(name)


def _as_root() -> None:
    """Go on as root; who is not does all of it inside a user namespace, and ends with its status."""
    from loden.lab import userns

    if not userns.is_privileged():
        sys.exit(userns.run_again((sys.executable, *sys.orig_argv[1:])))


@contextlib.contextmanager
def _orderly_end() -> Iterator[None]:
    """Turn the first signal that would end this process into an exception, and ignore those after it:
    what was made must be removed, however impatient the sender."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(number: int, _: object) -> NoReturn:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        sys.exit(128 + number)

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
