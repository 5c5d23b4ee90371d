# SPDX-License-Identifier: Apache-2.0
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from loden.address import Family, Prefix
from loden.errors import FileError
from loden.lease import Lease, Leg
from loden.network import parse_network
from loden.subnet_file import Previous, read_previous, render, write_atomic

DUAL = parse_network(b'{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}')
LEASE = Lease(Leg(Prefix.parse("10.5.72.0/24")), Leg(Prefix.parse("fd00:0:0:7::/64")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "flannel" / "subnet.env"


def test_text_is_flannels_line_by_line() -> None:
    assert render(DUAL, LEASE, mtu=1450, ip_masq=True) == (
        "FLANNEL_NETWORK=10.5.0.0/16\n"
        "FLANNEL_SUBNET=10.5.72.1/24\n"
        "FLANNEL_IPV6_NETWORK=fd00::/48\n"
        "FLANNEL_IPV6_SUBNET=fd00:0:0:7::1/64\n"
        "FLANNEL_MTU=1450\n"
        "FLANNEL_IPMASQ=true\n"
    )


def test_text_has_the_enabled_families_alone() -> None:
    ipv4 = parse_network(b'{"Network":"10.5.0.0/16","IPv6Network":"fd00::/48"}')
    assert render(ipv4, LEASE, mtu=1450).splitlines() == [
        "FLANNEL_NETWORK=10.5.0.0/16",
        "FLANNEL_SUBNET=10.5.72.1/24",
        "FLANNEL_MTU=1450",
        "FLANNEL_IPMASQ=false",
    ]


@pytest.mark.parametrize(("mtu", "has_ipv6"), [(1280, True), (1279, False)])
def test_text_leaves_out_a_family_that_cannot_live_with_the_mtu(mtu: int, has_ipv6: bool) -> None:
    text = render(DUAL, LEASE, mtu=mtu)
    assert "FLANNEL_SUBNET=10.5.72.1/24\n" in text
    assert ("FLANNEL_IPV6_NETWORK=" in text, "FLANNEL_IPV6_SUBNET=" in text) == (has_ipv6, has_ipv6)


def test_write_then_read_gives_what_was_written(path: Path) -> None:
    write_atomic(str(path), render(DUAL, LEASE, mtu=1450))
    assert read_previous(str(path)) == Previous(
        networks={Family.IPV4: Prefix.parse("10.5.0.0/16"), Family.IPV6: Prefix.parse("fd00::/48")},
        subnets={Family.IPV4: Prefix.parse("10.5.72.0/24"), Family.IPV6: Prefix.parse("fd00:0:0:7::/64")},
    )


def test_modes_do_not_depend_on_the_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_atomic(str(path), "A=1\n")
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o7777 == 0o644
    assert path.parent.stat().st_mode & 0o7777 == 0o755


def test_what_a_killed_writer_left_is_overwritten(path: Path) -> None:
    path.parent.mkdir()
    (path.parent / ".subnet.env.tmp").write_text("half of a much longer te")
    write_atomic(str(path), "A=1\n")
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"]
    assert path.read_text() == "A=1\n"


def test_of_many_writers_each_writes_whole(path: Path) -> None:
    texts = [f"{letter * 5000}\n" for letter in "abcd"]
    writers = [threading.Thread(target=write_atomic, args=(str(path), text)) for text in texts * 5]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() in texts
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"]


def test_write_that_cannot_end_leaves_the_old_file(path: Path) -> None:
    """A limit on file sizes stands in for the full disk, which needs a file system (tests/kernel)."""
    write_atomic(str(path), "A=1\n")
    script = "import sys; from loden.subnet_file import write_atomic; write_atomic(sys.argv[1], 'B' * 5000)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert f"FileError: write {path}: File too large" in done.stderr
    assert path.read_text() == "A=1\n"
    assert [entry.name for entry in path.parent.iterdir()] == ["subnet.env"]


def test_place_that_cannot_be_written_is_named_with_the_flag(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "subnet.env"
    with pytest.raises(FileError, match="Not a directory") as caught:
        write_atomic(str(path), "A=1\n")
    assert caught.value.path == str(path)
    assert "--subnet-file" in caught.value.hint


def test_no_file_means_nothing_is_known(tmp_path: Path) -> None:
    assert read_previous(str(tmp_path / "none")) == Previous({}, {})
    assert read_previous(str(tmp_path)) == Previous({}, {})


@pytest.mark.parametrize(
    ("line", "subnet"),
    [
        ("FLANNEL_SUBNET=10.5.72.1/24", "10.5.72.0/24"),
        ("  export FLANNEL_SUBNET = '10.5.72.1/24' ", "10.5.72.0/24"),
        ('FLANNEL_SUBNET="10.5.72.1/24" # ours', "10.5.72.0/24"),
        ("FLANNEL_SUBNET=10.5.72.1/24 # ours", "10.5.72.0/24"),
        ("FLANNEL_SUBNET=nonsense,10.5.72.1/24", "10.5.72.0/24"),
        ("FLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_SUBNET=10.5.73.1/24", "10.5.73.0/24"),
        ("FLANNEL_SUBNET=10.5.72.1/24,10.5.73.1/24", None),
        ("#FLANNEL_SUBNET=10.5.72.1/24", None),
        ("FLANNEL_SUBNET=fd00::1/64", None),
        ("FLANNEL_SUBNET=10.5.72.1", None),
        ("FLANNEL_SUBNET=", None),
        ("FLANNEL_SUBNET", None),
        ("\x00\xff=\xff", None),
    ],
)
def test_lines_are_read_as_dotenv(tmp_path: Path, line: str, subnet: str | None) -> None:
    path = tmp_path / "subnet.env"
    path.write_bytes(f"{line}\nFLANNEL_IPV6_SUBNET=fd00::1/64\n".encode("latin-1"))
    expected = {Family.IPV6: Prefix.parse("fd00::/64")}
    if subnet:
        expected[Family.IPV4] = Prefix.parse(subnet)
    assert read_previous(str(path)).subnets == expected
