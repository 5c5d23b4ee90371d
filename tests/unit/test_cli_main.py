# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import click
import pytest

from loden import __version__
from loden.cli import main as cli
from loden.errors import LodenError


def loden(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "loden.cli.main", *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )


def failing(error: BaseException) -> click.Command:
    def fail() -> None:
        raise error

    return click.Command("fail", callback=fail)


def run_failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    monkeypatch.setattr(cli.loden, "get_command", lambda *_: failing(error))
    return cli.main(["fail"])


def test_error_is_two_lines_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_failing(monkeypatch, LodenError("open x: it is not there", hint="make it")) == 1
    assert capsys.readouterr() == ("", "loden: open x: it is not there\nhint: make it\n")


def test_interrupt_is_what_a_shell_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_failing(monkeypatch, KeyboardInterrupt()) == 130


def test_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_failing(monkeypatch, ZeroDivisionError())


def test_version_is_printed() -> None:
    assert loden("--version").stdout == f"loden {__version__}\n"


def test_help_names_every_command() -> None:
    done = loden("--help")
    assert done.returncode == 0
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)


def test_unknown_command_is_a_wrong_question() -> None:
    assert loden("rnu").returncode == 2


def test_reader_that_goes_away_is_no_error_message() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "loden.cli.main", "config", "check", "-"],
            input=b'{"Network": "10.5.0.0/16"}',
            stdout=gone,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert done.stderr == b""
    assert done.returncode == 1
