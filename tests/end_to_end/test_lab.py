# SPDX-License-Identifier: Apache-2.0
"""The lab itself, on the real kernel, with a stand-in for the agent."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loden.address import Family
from loden.errors import LabError
from loden.lab import namespaces, probe, processes
from loden.lab.agents import Launch
from loden.lab.lab import Lab, down, running, up
from loden.lab.state import State, names
from loden.lab.topology import Spec, Topology, plan

pytestmark = pytest.mark.kernel

_AGENT = Path(__file__).with_name("plain_routes.py")
_NAME = f"t{os.getpid()}"


def _launch(hosts: int, *fault: str) -> Launch:
    return lambda _, subnet_file: (sys.executable, str(_AGENT), str(subnet_file), str(hosts), *fault)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def _clean_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test did: nothing of its lab is left, and the machine's own network is as it was."""
    monkeypatch.setenv("LODEN_LAB_DIR", str(tmp_path))
    looks = [("ip", "-o", kind, "show") for kind in ("link", "addr", "route", "rule")]
    before = [_output(*look) for look in looks]
    yield
    left = [name for name in _output("ip", "netns", "list").splitlines() if name.startswith(_NAME)]
    for name in names():
        down(name)
    assert left == []
    assert [_output(*look) for look in looks] == before
    assert not [one for one in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in _read(one)]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_every_container_reaches_every_other() -> None:
    with running(Spec(name=_NAME, containers=2), launch=_launch(3)) as lab:
        report = lab.check()
    assert report.reachable
    assert len(report.pairs) == 6 * 5
    assert all(pair.rtt_ms is not None and pair.rtt_ms > 0 for pair in report.pairs)
    assert [host.subnet for host in report.hosts] == ["10.5.1.0/24", "10.5.2.0/24", "10.5.3.0/24"]


def test_unreached_pair_is_reported_with_the_agents_reason() -> None:
    with running(Spec(name=_NAME), launch=_launch(3, "strays")) as lab:
        report = lab.check(with_throughput=True, tries=1)
        unreached = [pair for pair in report.pairs if not pair.ok]
        assert not report.reachable
        assert report.throughput is None
        assert {pair.target for pair in unreached if pair.source == "h1-c1"} == {"h3-c1"}
        lost = next(pair for pair in unreached if pair.source == "h1-c1")
        assert lost.rtt_ms is None
        assert lab.reasons(lost) == ("WARNING route 10.5.3.0/24: not on-link",)


@pytest.mark.parametrize("topology", [Topology.ROUTED, Topology.MIXED])
def test_hosts_reach_each_other_over_the_router(topology: Topology) -> None:
    with running(Spec(name=_NAME, topology=topology), launch=_launch(0)) as lab:
        ends = [probe.End(host.name, host.namespace, host.addresses[Family.IPV4]) for host in lab.plan.hosts]
        assert all(answer.rtt_ms is not None for answer in probe.all_pairs(ends))


def test_fifty_hosts_form_a_full_mesh() -> None:
    with running(Spec(name=_NAME, hosts=50), launch=_launch(50)) as lab:
        report = lab.check()
    assert len(report.pairs) == 50 * 49
    assert report.reachable


def test_throughput_is_measured_on_three_paths() -> None:
    with running(Spec(name=_NAME, hosts=2), launch=_launch(2)) as lab:
        found = lab.throughput(round_s=0.05)
    assert min(found.underlay_gbps, found.overlay_gbps, found.container_gbps) > 0
    assert found.ratio == pytest.approx(found.overlay_gbps / found.underlay_gbps, rel=0.2)


def test_throughput_of_one_host_is_refused() -> None:
    with (
        running(Spec(name=_NAME, hosts=1), launch=_launch(1)) as lab,
        pytest.raises(LabError, match="it has one host"),
    ):
        lab.throughput()


def test_labs_live_side_by_side() -> None:
    second = f"{_NAME}b"
    with running(Spec(name=_NAME, hosts=2), launch=_launch(2)) as lab:
        with running(Spec(name=second, hosts=2), launch=_launch(2)) as other:
            assert names() == (_NAME, second)
            assert other.check().reachable
        assert lab.check().reachable


def test_lab_that_is_up_can_be_opened_asked_and_removed_by_others() -> None:
    up(Spec(name=_NAME, hosts=2), launch=_launch(2))
    with pytest.raises(LabError, match="it exists"):
        up(Spec(name=_NAME), launch=_launch(3))
    lab = Lab.open(_NAME)
    assert lab.check().reachable
    assert all(host.agent_pid for host in lab.status().hosts)
    assert down(_NAME)
    assert not down(_NAME)


def test_agent_that_ended_is_seen_in_the_status() -> None:
    with running(Spec(name=_NAME, hosts=2), launch=_launch(2)) as lab:
        agent = lab.state.agent("h1")
        assert agent is not None
        processes.end([agent])
        assert [host.agent_pid is None for host in lab.status().hosts] == [True, False]


@pytest.mark.parametrize(
    ("fault", "said"),
    [("ends", "it ended; its log:\n  ERROR no backend for today"), ("hangs", "waiting for better weather")],
)
def test_agent_that_does_not_become_ready_ends_the_lab(fault: str, said: str) -> None:
    with pytest.raises(LabError, match="wait for agent of h") as caught:
        up(Spec(name=_NAME), launch=_launch(3, fault), ready_s=0.3)
    assert said in str(caught.value)
    assert names() == ()


def test_agent_that_cannot_be_started_ends_the_lab() -> None:
    with pytest.raises(LabError, match=r"start agent of h1 .*No such file"):
        up(Spec(name=_NAME), launch=lambda _url, _path: ("/nonexistent/agent",))
    assert names() == ()


def test_foreign_namespace_of_the_name_is_left_alone() -> None:
    foreign = f"{_NAME}-h2"
    _output("ip", "netns", "add", foreign)
    try:
        with pytest.raises(LabError, match=f"namespace {foreign} exists and belongs to no lab"):
            up(Spec(name=_NAME), launch=_launch(3))
        assert names() == ()
        assert namespaces.exists(foreign)
    finally:
        _output("ip", "netns", "del", foreign)


_MOMENTS = [
    ("make hosts", 0),
    ("make hosts", 2),
    ("start agents", 0),
    ("start agents", 1),
    ("start containers", 1),
    ("start containers", 3),
]


@pytest.mark.parametrize(("stage", "done"), _MOMENTS)
def test_down_cleans_after_a_kill_at(stage: str, done: int) -> None:
    at = (stage, done)

    def kill(stage: str, done: int, total: int) -> None:
        if (stage, done) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        up(Spec(name=_NAME), launch=_launch(3), progress=kill)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert down(_NAME)
    assert not any(namespaces.exists(name) for name in plan(Spec(name=_NAME)).namespaces)
    with running(Spec(name=_NAME), launch=_launch(3)) as lab:
        assert lab.check().reachable


def test_down_cleans_after_a_kill_before_the_plan_was_written() -> None:
    State(_NAME).path.mkdir()
    assert down(_NAME)
    assert names() == ()


def test_down_ends_everything_inside_and_agents_whose_namespace_lost_its_name() -> None:
    lab = up(Spec(name=_NAME, hosts=2), launch=_launch(2))
    stray = subprocess.Popen(
        ["ip", "netns", "exec", f"{_NAME}-h1-c1", "sh", "-c", "echo; exec sleep infinity"],
        stdout=subprocess.PIPE,
    )
    assert stray.stdout is not None
    with stray.stdout as said:
        said.readline()
    agent = lab.state.agent("h2")
    _output("ip", "netns", "del", f"{_NAME}-h2")
    assert down(_NAME)
    assert agent is not None
    assert not agent.is_alive
    assert processes.Process.of(stray.pid) is None
    stray.wait()


def test_namespace_that_is_gone_is_named() -> None:
    with running(Spec(name=_NAME, hosts=2), launch=_launch(2)) as lab:
        _output("ip", "netns", "del", f"{_NAME}-h2-c1")
        with pytest.raises(LabError, match=f"enter namespace {_NAME}-h2-c1"):
            lab.check()


def test_what_happens_inside_a_namespace_leaves_this_process_where_it_was() -> None:
    here = processes.identity_of(Path("/proc/self/ns/net"))
    with running(Spec(name=_NAME, hosts=1), launch=_launch(1)) as lab:
        there = namespaces.inside(
            lab.plan.hosts[0].namespace, lambda: processes.identity_of(Path("/proc/thread-self/ns/net"))
        )
        assert there == namespaces.identity(lab.plan.hosts[0].namespace)
    assert processes.identity_of(Path("/proc/self/ns/net")) == here
    assert there != here
