# SPDX-License-Identifier: Apache-2.0
"""What the end-to-end tests share."""

import itertools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from loden.lab import namespaces
from tests.end_to_end.hosts import Hosts

_numbers = itertools.count(1)

MakeHosts = Callable[..., Hosts]


@pytest.fixture
def make_hosts(tmp_path: Path) -> Iterator[MakeHosts]:
    """Makes hosts as :class:`Hosts` does; they go with the test, and nothing may stay of them."""
    links = _links()
    made: list[Hosts] = []
    with ExitStack() as stack:

        def make(**options: Any) -> Hosts:
            number = next(_numbers)
            directory = tmp_path / str(number)
            directory.mkdir()
            hosts = stack.enter_context(Hosts(directory, name=f"t{number}", **options))
            made.append(hosts)
            return hosts

        yield make
    assert not [name for hosts in made for name in hosts.plan.namespaces if namespaces.exists(name)]
    assert _links() == links


def _links() -> str:
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True).stdout
