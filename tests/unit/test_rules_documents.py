# SPDX-License-Identifier: Apache-2.0
"""Documents name what exists: paths, make targets, commands and their options."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from loden.cli.main import COMMANDS, loden
from loden.options import FLAGS, NOT_YET

DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/**/*.md") for path in Path().glob(pattern) if path.name != "LICENSE"
)
TOP = {path.name for path in Path().iterdir()}

_CODE = re.compile(r"```\w*\n(.*?)```|`([^`\n]+)`", re.DOTALL)


def code(path: Path) -> Iterator[str]:
    """What a document sets as code, line by line."""
    for block, inline in _CODE.findall(path.read_text()):
        yield from (block or inline).splitlines()


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_paths_exist(path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False).stdout.split()
    known = {str(parent) for file in tracked for parent in (Path(file), *Path(file).parents)} | {".venv"}
    words = {word.strip("/.,:()") for line in code(path) for word in line.split()}
    named = {
        word for word in words if re.fullmatch(r"[\w.-]+(/[\w.-]+)+", word) and word.split("/")[0] in TOP
    }
    missing = {word for word in named if word not in known and not Path(word).exists()}
    assert {word for word in missing if not word.startswith(".venv/")} == set()


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_make_targets_exist(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", Path("Makefile").read_text(), re.MULTILINE))
    named = {match for line in code(path) for match in re.findall(r"(?:^|\s)make ([a-z][\w-]*)", line)}
    assert named - targets == set()


def options_of(command: click.Command) -> set[str]:
    found = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return found | {"--help", "-h"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_commands_and_their_options_exist(path: Path) -> None:
    context = click.Context(loden)
    for line in code(path):
        match = re.search(r"(?:^|[\s/])loden ((?:[a-z-]+ ?)*)(.*)", line)
        if match is None or not match[1].split() or match[1].split()[0] not in COMMANDS:
            continue
        command: click.Command | None = loden
        for word in match[1].split():
            if not isinstance(command, click.Group):
                break
            command = command.get_command(context, word)
            assert command is not None, f"{path}: no such command in {line!r}"
        ours = match[2].split(" -- ")[0]
        assert command is not None
        for option in re.findall(r"(?:^|\s)(--[a-z][\w-]*)", ours):
            assert option in options_of(command), f"{path}: no such option in {line!r}"


def test_flags_of_flannel_are_all_there_or_all_refused() -> None:
    assert not {flag.name for flag in FLAGS} & NOT_YET
