# SPDX-License-Identifier: Apache-2.0
"""``loden run``: the agent of one host. Its flags are flannel's (:mod:`loden.options`)."""

import logging
import os
from collections.abc import Mapping, Sequence

import click

from loden import __version__
from loden.interface import require_sound
from loden.options import FLAGS, Flag, build, read_command_line, read_environment

_log = logging.getLogger(__name__)


class GoFlags(click.Command):
    """Takes flags with one dash or two, as flanneld does."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(read_command_line(args)))


def _print_version(context: click.Context, _: click.Parameter, is_given: bool) -> None:
    if is_given:
        click.echo(f"loden {__version__}", err=True)  # flanneld prints it there
        context.exit()


def make_option(flag: Flag) -> click.Option:
    """The command line's form of a flag; its value arrives as a tuple of texts under :func:`identifier`."""
    remarks = " May be repeated." if flag.is_repeatable else ""
    remarks += f" [default: {flag.default}]" if flag.default else ""
    return click.Option(
        [identifier(flag), f"--{flag.name}"],
        multiple=True,  # as in Go, a flag may come again: the last one counts, or all of a repeatable one
        metavar=flag.metavar,
        help=flag.help + remarks,
    )


def identifier(flag: Flag) -> str:
    """The flag's name as Python's."""
    return flag.name.replace("-", "_")


def read_given(flags: Sequence[Flag], given: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The values of flags by name, from what click hands over.

    Raises:
        ConfigError: one is not allowed.
    """
    found = {flag.name: tuple(given[identifier(flag)]) for flag in flags}
    for flag in flags:
        for text in found[flag.name]:
            flag.require_valid(text)
    return found


def _run(*, cleanup: bool, **given: tuple[str, ...]) -> int:
    environment, ignored = read_environment(os.environ)
    options = build(read_given(FLAGS, given), environment)
    logging.basicConfig(
        level=logging.DEBUG if options.verbosity > 0 else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for sentence in ignored:
        _log.warning("%s", sentence)

    if cleanup:
        from loden.cleanup import clean_up

        clean_up()
        return 0
    require_sound(options.selection)

    from loden.agent import run

    return run(options)


command = GoFlags(
    "run",
    callback=_run,
    help="Run the agent: get this host its subnet, and reach the other hosts' containers.\n\n"
    "Each flag can also be set by the environment: LODEN_IFACE, or flannel's FLANNELD_IFACE, for --iface.",
    params=[
        *(make_option(flag) for flag in FLAGS),
        click.Option(
            ["--cleanup"],
            is_flag=True,
            help="Remove what agents left in this host's kernel and firewall, and exit. The lease stays.",
        ),
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_version,
            help="Print the version and exit.",
        ),
    ],
)
