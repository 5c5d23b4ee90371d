# SPDX-License-Identifier: Apache-2.0
"""``loden lab`` as a person types it: the real agent, as root and without."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.kernel

_LODEN = (sys.executable, "-m", "loden.cli.main", "lab")
_NAME = f"c{os.getpid()}"


def _lab(*arguments: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *_LODEN, *arguments], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(autouse=True)
def _clean_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LODEN_LAB_DIR", str(tmp_path / "labs"))
    yield
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    _lab("down", "--all")
    assert _NAME not in left


@pytest.mark.parametrize(
    ("backend", "topology", "config"),
    [
        ("vxlan", "switched", "{}"),
        ("vxlan", "routed", "{}"),
        ("vxlan", "mixed", '{"DirectRouting": true}'),
        ("host-gw", "switched", "{}"),
    ],
)
def test_run_reaches_every_pair(backend: str, topology: str, config: str) -> None:
    options = ("--backend", backend, "--topology", topology, "--backend-config", config)
    done = _lab("run", "--name", _NAME, *options, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["backend"] == backend
    assert [host["name"] for host in report["hosts"]] == ["h1", "h2", "h3"]
    assert len({host["subnet"] for host in report["hosts"]}) == 3
    assert len(report["pairs"]) == 6
    assert all(pair["ok"] and pair["rtt_ms"] > 0 for pair in report["pairs"])
    assert report["reachable"] is True
    assert "throughput" not in report


@pytest.mark.skipif(shutil.which("etcd") is None, reason="etcd is not installed: apt-get install etcd-server")
@pytest.mark.parametrize("options", [("--topology", "routed"), ("--family", "ipv6")], ids=" ".join)
def test_run_on_etcd_reaches_every_pair_and_leaves_no_process(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    done = _lab("run", "--name", _NAME, "--store", "etcd", "--hosts", "2", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reachable"] is True
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in running


def test_lab_without_etcd_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    found = shutil.which("ip")
    assert found is not None
    (tmp_path / "bin" / "ip").symlink_to(found)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = _lab("run", "--name", _NAME, "--store", "etcd", "--hosts", "1")
    monkeypatch.undo()
    assert done.returncode == 1
    assert "apt-get install etcd-server" in done.stderr
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout == ""


def test_host_gw_behind_a_router_says_why_not() -> None:
    done = _lab("run", "--name", _NAME, "--backend", "host-gw", "--topology", "routed", "--hosts", "2")
    assert done.returncode == 1
    assert "0 of 2 pairs reached" in done.stdout
    assert "h1-c1 → h2-c1:" in done.stdout
    assert "198.18.1.1 is behind the router 198.18.0.254" in done.stdout


def test_run_with_throughput_prints_it() -> None:
    done = _lab("run", "--name", _NAME, "--hosts", "2", "--throughput", "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["throughput"]
    assert set(measured) == {"underlay_gbps", "overlay_gbps", "ratio", "container_gbps"}
    assert all(value > 0 for value in measured.values())


def test_fifty_hosts_form_a_full_mesh() -> None:
    done = _lab("run", "--name", _NAME, "--hosts", "50", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["pairs"]) == 50 * 49


def test_lab_is_used_by_one_command_after_another() -> None:
    _use_and_remove((), "ipv4")


def test_lab_is_used_without_root(tmp_path: Path) -> None:
    """As ``nobody``, who is root only inside a user namespace."""
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    (tmp_path / "labs").mkdir()
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    try:
        os.chown(tmp_path / "labs", 65534, 65534)
    except OSError as error:
        pytest.skip(f"needs another user to become: {error.strerror}")
    possible = subprocess.run(
        [*nobody, "unshare", "--user", "--map-root-user", sys.executable, "-c", "import loden.cli.main"],
        capture_output=True,
        text=True,
        check=False,
    )
    if possible.returncode != 0:
        pytest.skip(f"needs user namespaces, and a package that others may read: {possible.stderr.strip()}")
    _use_and_remove(nobody, "dual")
    assert not (tmp_path / "labs/keeper.json").exists()
    assert not _uses(str(tmp_path))


def _use_and_remove(prefix: Sequence[str], family: str) -> None:
    name = ("--name", _NAME)
    assert _lab("up", *name, "--hosts", "2", "--family", family, prefix=prefix).returncode == 0
    again = _lab("up", *name, prefix=prefix)
    assert again.returncode == 1
    assert "it exists" in again.stderr
    status = _lab("status", *name, "--json", prefix=prefix)
    assert status.returncode == 0, status.stderr
    assert [host["public_ip"] for host in json.loads(status.stdout)["hosts"]] == ["198.18.0.1", "198.18.0.2"]
    inside = _lab("exec", *name, "h2", "--", "ip", "-brief", "addr", "show", "eth0", prefix=prefix)
    assert "198.18.0.2/24" in inside.stdout
    assert _lab("exec", *name, "h1-c1", "--", "sh", "-c", "exit 7", prefix=prefix).returncode == 7
    ping = _lab("ping", *name, prefix=prefix)
    assert ping.returncode == 0
    count = 4 if family == "dual" else 2
    assert f"{count} of {count} pairs reached" in ping.stdout
    assert _lab("down", *name, prefix=prefix).returncode == 0
    assert _lab("down", *name, prefix=prefix).returncode == 0
    assert _lab("status", *name, prefix=prefix).returncode == 1


def _uses(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_text(errors="replace")
        except OSError:
            continue
        if text in command:
            found.append(command)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_run_that_is_interrupted_removes_all(number: signal.Signals, tmp_path: Path) -> None:
    run = subprocess.Popen(
        [*_LODEN, "run", "--name", _NAME, "--throughput"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert run.stderr is not None
    while b"start agents" not in run.stderr.readline():
        pass
    run.send_signal(number)
    run.communicate(timeout=60)
    assert run.returncode == 128 + number
    assert list((tmp_path / "labs").iterdir()) == []
    assert not _uses(str(tmp_path))


def test_agents_log_and_lease_are_kept_while_the_lab_is_up(tmp_path: Path) -> None:
    assert _lab("up", "--name", _NAME, "--hosts", "1").returncode == 0
    home = tmp_path / "labs" / _NAME
    assert (home / "store.db").exists()
    assert "FLANNEL_SUBNET=" in (home / "h1/subnet.env").read_text()
    assert _lab("down", "--all").returncode == 0
    assert not home.exists()
