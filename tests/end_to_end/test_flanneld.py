# SPDX-License-Identifier: Apache-2.0
"""One cluster with flannel's own agents, as they are: black boxes that share an etcd and the wires with ours.

No package of Debian's has flanneld, so the set-up cannot bring it; whoever has it in PATH runs these
tests too. They passed with flannel v0.28.10.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loden.address import Family
from loden.lab import etcd, namespaces, probe
from loden.lab.agents import Agents, Launch, loden_run
from loden.lab.lab import Lab, running
from loden.lab.topology import Host, Spec, StoreKind
from tests.end_to_end.hosts import wait_until
from tests.end_to_end.test_udp import require_all_kinds

_MISSING = [name for name in ("flanneld", "etcd") if shutil.which(name) is None]
if _MISSING:
    pytest.skip(f"not installed: {' '.join(_MISSING)}", allow_module_level=True)

pytestmark = pytest.mark.kernel

_READY_S = 30.0
_BACKENDS = [
    ("udp", '{"Acceleration": "ebpf"}'),
    ("udp", '{"Acceleration": "engine"}'),
    ("vxlan", "{}"),
    ("vxlan", '{"DirectRouting": true}'),
    ("host-gw", "{}"),
]


@pytest.fixture
def make_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Spec]:
    monkeypatch.setenv("LODEN_LAB_DIR", str(tmp_path))

    def make(backend: str, config: str) -> Spec:
        name = f"f{os.getpid()}"
        return Spec(name=name, hosts=3, backend=backend, backend_config=config, store=StoreKind.ETCD)

    return make


def flanneld(store_url: str, subnet_file: Path) -> tuple[str, ...]:
    """The command line of flannel's agent."""
    endpoint = store_url.removeprefix("etcd://").partition("/")[0]
    return (
        *(shutil.which("flanneld") or "", f"-etcd-endpoints=http://{endpoint}", "-iface=eth0"),
        *(f"-subnet-file={subnet_file}", "-iptables-forward-rules=false"),
    )


def containers(lab: Lab) -> list[probe.End]:
    return [lab.containers(host, Family.IPV4)[0] for host in lab.plan.hosts]


@pytest.mark.parametrize("theirs", [("h1",), ("h2", "h3")], ids="+".join)
@pytest.mark.parametrize(("backend", "config"), _BACKENDS)
def test_their_hosts_and_ours_reach_each_other(
    make_spec: Callable[[str, str], Spec], backend: str, config: str, theirs: tuple[str, ...]
) -> None:
    def launch(store_url: str, subnet_file: Path) -> tuple[str, ...]:
        return (flanneld if subnet_file.parent.name in theirs else loden_run)(store_url, subnet_file)

    with running(make_spec(backend, config), launch=launch, ready_s=_READY_S) as lab:
        assert lab.check().reachable
        require_all_kinds(containers(lab))


@pytest.mark.parametrize(("backend", "config"), _BACKENDS)
def test_host_by_host_a_cluster_becomes_ours_and_theirs_again(
    make_spec: Callable[[str, str], Spec], backend: str, config: str
) -> None:
    """With the subnets that its containers have. The way back begins with ``loden run --cleanup``."""
    with running(make_spec(backend, config), launch=flanneld, ready_s=_READY_S) as lab:
        require_all_kinds(containers(lab))
        subnets = {name: found.subnets for name, found in lab.found.items()}
        for launch in (loden_run, flanneld):
            for host in lab.plan.hosts:
                end_agent(lab, host)
                if launch is flanneld:
                    namespaces.inside(host.namespace, clean_up)
                start_agent(lab, host, launch)
                again = Lab.open(lab.plan.spec.name)
                assert {name: found.subnets for name, found in again.found.items()} == subnets
                wait_until("all are reached", lambda: lab.check().reachable)
                require_all_kinds(containers(lab))


def end_agent(lab: Lab, host: Host) -> None:
    agent = lab.state.agent(host.name)
    assert agent is not None
    os.kill(agent.pid, signal.SIGTERM)
    wait_until(f"the agent of {host.name} ends", lambda: not agent.is_alive)


def clean_up() -> None:
    subprocess.run([sys.executable, "-m", "loden.cli.main", "run", "--cleanup"], check=True)


def start_agent(lab: Lab, host: Host, launch: Launch) -> None:
    url = etcd.url(lab.plan)
    with Agents(lab.state, lambda _, subnet_file: launch(url, subnet_file)) as agents:
        agents.start(host)
        agents.wait_ready(timeout_s=_READY_S, on_ready=lambda _: None)
