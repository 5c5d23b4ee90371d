# SPDX-License-Identifier: Apache-2.0
"""What ``loden lab`` refuses before it makes anything."""

import subprocess
import sys
from pathlib import Path

import pytest

from loden.cli.main import main
from loden.lab.state import names
from loden.lab.userns import is_privileged


@pytest.fixture(autouse=True)
def _own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LODEN_LAB_DIR", str(tmp_path))


@pytest.mark.skipif(
    not is_privileged(), reason="needs root: without it the command goes into a user namespace"
)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--name", "../x"), "not a usable name"),
        (("--hosts", "0"), "0 hosts: out of range"),
        (("--containers", "1000"), "1000 containers: out of range"),
        (("--network", "10.5"), "--network '10.5' is not an address range"),
        (("--network", "10.5.0.0/22", "--hosts", "20"), "too few for 20 hosts"),
        (("--underlay", "ipv6"), "--underlay ipv6 in lab lab: it carries no --family ipv4"),
        (("--family", "ipv6", "--network6", "fd00"), "--network6 'fd00' is not an address range"),
        (("--backend", "nope"), "unknown backend 'nope'"),
        (("--backend-config", "{"), "--backend-config '{'"),
        (("--backend-config", '{"VNI": "one"}'), "Backend.VNI"),
    ],
)
def test_bad_value_is_named_and_nothing_is_made(
    options: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lab", "run", *options]) == 1
    assert said in capsys.readouterr().err
    assert names() == ()


@pytest.mark.skipif(
    not is_privileged(), reason="needs root: without it the command goes into a user namespace"
)
@pytest.mark.parametrize(
    "command", [("status",), ("ping",), ("throughput",), ("exec", "h1", "--", "true")], ids=lambda it: it[0]
)
def test_lab_that_is_not_there_is_named(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", command[0], "--name", "none", *command[1:]]) == 1
    assert "use lab none: no such lab" in capsys.readouterr().err


# Root without capabilities, in a user namespace where no further one may be made.
_NOBODY = """
echo 0 > /proc/sys/user/max_user_namespaces &&
exec setpriv --bounding-set=-all --inh-caps=-all "$0" -m loden.cli.main lab run
"""


def test_neither_root_nor_user_namespaces_says_what_to_allow() -> None:
    possible = subprocess.run(
        ["unshare", "--user", "--map-root-user", "true"], capture_output=True, check=False
    )
    if possible.returncode != 0:
        pytest.skip(f"needs a user namespace to forbid them in ({possible.stderr.decode().strip()})")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", _NOBODY, sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "make a lab without root: unshare:" in done.stderr
    assert "sysctl -w user.max_user_namespaces=" in done.stderr
