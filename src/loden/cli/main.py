# SPDX-License-Identifier: Apache-2.0
"""The command ``loden``: finds the subcommand, and turns whatever ends it into words and an exit status."""

import importlib
import os
import sys
from collections.abc import Sequence

import click

from loden import __version__
from loden.errors import LodenError

#: Subcommand → the module that has it as ``command``; imported when it is asked for.
COMMANDS = {
    "run": "loden.cli.run",
    "config": "loden.cli.config",
    "lease": "loden.cli.lease",
    "firewall": "loden.cli.firewall",
    "cloud": "loden.cli.cloud",
    "lab": "loden.cli.lab",
}

_INTERRUPTED = 130  # what a shell reports for SIGINT


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name]).command
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loden", message="%(prog)s %(version)s")
def loden() -> None:
    """Give each host a container subnet, and reach every container from every host."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for what went wrong, 2 for what was asked wrongly.

    Args:
        arguments: of the command line; the process's own by default.
    """
    try:
        status = loden.main(arguments, prog_name="loden", standalone_mode=False)
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except LodenError as error:
        click.echo(f"loden: {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        return 1
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except OSError as error:
        # The interpreter's own flush at exit must not fail on it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # a reader that has gone needs no word
            click.echo(f"loden: write the answer: {error.strerror or error}", err=True)
        return 1
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
