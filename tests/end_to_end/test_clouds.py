# SPDX-License-Identifier: Apache-2.0
"""Real agents in the clouds of the lab: packets go by the doubled route table or not at all."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlencode

import msgspec
import pytest

from loden.clouds.alibaba import Alibaba, Instance
from loden.lab import namespaces, probe
from loden.lab.agents import Agents, loden_run
from loden.lab.clouds.alibaba import KEY_ID, REGION, VPC
from loden.lab.clouds.aws import OWN_KEY_ID
from loden.lab.clouds.catalogue import API, CLOUDS
from loden.lab.clouds.google import PROJECT, ZONE
from loden.lab.clouds.journal import Call, read_calls
from loden.lab.lab import Lab, down, running, up
from loden.lab.state import names
from loden.lab.topology import Host, Spec, plan
from loden.secret import Secret
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import wait_until

pytestmark = pytest.mark.kernel

_NAME = f"c{os.getpid()}"
_OPTIONS = '{"CheckInterval": 1, "GracePeriod": 1}'
_TTL_S = 6
_LONG_S = 40.0


@pytest.fixture(autouse=True)
def _clean_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a test did: nothing of its lab is left."""
    monkeypatch.setenv("LODEN_LAB_DIR", str(tmp_path))
    yield
    left = [line for line in _output("ip", "netns", "list").splitlines() if line.startswith(_NAME)]
    for name in names():
        down(name)
    assert left == []
    assert not [one for one in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in _read(one)]


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _launch(store_url: str, subnet_file: Path) -> tuple[str, ...]:
    """The real agent, with leases that end soon after it, and as talkative as it can be."""
    return (*loden_run(f"{store_url}?ttl={_TTL_S}", subnet_file), "--v=10")


class Owner:
    """The owner of a lab's cloud, who does things without asking the agents."""

    ADD = REMOVE = LIST = ""
    #: Whether an agent can switch the check off again.
    is_repaired = True

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def remove_route(self, host: Host) -> None:
        raise NotImplementedError

    def switch_check(self, host: Host, *, on: bool) -> None:
        raise NotImplementedError

    def subnet(self, host: Host) -> str:
        return str(next(iter(self.lab.found[host.name].subnets.values())))

    def ask(self, method: str, path: str, headers: Mapping[str, str], body: str = "") -> str:
        """A call from the router's own namespace."""

        def ask() -> str:
            connection = http.client.HTTPConnection(API, timeout=10)
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            text = answer.read().decode()
            assert answer.status == 200, text
            connection.close()
            return text

        return namespaces.inside(self.lab.plan.switch, ask)


class AwsOwner(Owner):
    ADD, REMOVE, LIST = "CreateRoute", "DeleteRoute", "DescribeRouteTables"

    def call(self, action: str, **parameters: str) -> str:
        headers = {
            "Content-Type": "application/x-www-form-urlencoded; charset=utf-8",
            "Host": "ec2.us-west-2.amazonaws.com",
            "Authorization": f"AWS4-HMAC-SHA256 Credential={OWN_KEY_ID}/20200101/us-west-2/ec2/aws4_request, "
            "SignedHeaders=host, Signature=0",
        }
        form = urlencode({"Action": action, "Version": "2016-11-15", **parameters})
        return self.ask("POST", "/", headers, form)

    def _route(self, host: Host) -> tuple[str, str]:
        """The table and the interface of a host's route."""
        text = self.call("DescribeRouteTables")
        for table in text.split("<routeTableId>")[1:]:
            found = re.search(
                rf"<destinationCidrBlock>{re.escape(self.subnet(host))}</destinationCidrBlock>.*?"
                r"<networkInterfaceId>([^<]+)<",
                table,
                re.DOTALL,
            )
            if found:
                return table.partition("<")[0], found[1]
        raise AssertionError(text)

    def remove_route(self, host: Host) -> None:
        table = self._route(host)[0]
        self.call("DeleteRoute", RouteTableId=table, DestinationCidrBlock=self.subnet(host))

    def switch_check(self, host: Host, *, on: bool) -> None:
        self.call(
            "ModifyNetworkInterfaceAttribute",
            **{"NetworkInterfaceId": self._route(host)[1], "SourceDestCheck.Value": str(on).lower()},
        )


class GoogleOwner(Owner):
    ADD, REMOVE, LIST = "routes.insert", "routes.delete", "routes.list"
    is_repaired = False
    _headers: Mapping[str, str] = {"Authorization": "Bearer lab-access-token"}

    def remove_route(self, host: Host) -> None:
        name = "flannel-" + self.subnet(host).replace(".", "-").replace("/", "-")
        self.ask("DELETE", f"/compute/v1/projects/{PROJECT}/global/routes/{name}", self._headers)

    def switch_check(self, host: Host, *, on: bool) -> None:
        path = f"/compute/v1/projects/{PROJECT}/zones/{ZONE}/instances/{host.name}"
        body = msgspec.json.encode({"canIpForward": not on}).decode()
        self.ask("PUT", path, {**self._headers, "Content-Type": "application/json"}, body)


class AlibabaOwner(Owner):
    ADD, REMOVE, LIST = "CreateRouteEntry", "DeleteRouteEntry", "DescribeRouteEntryList"

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self._cloud = Alibaba(address=b"", key_id=Secret(KEY_ID), key_secret=Secret("lab-secret-of-the-role"))
        self._cloud._instance = Instance("i-owner", "eni-owner", True, REGION, VPC, "vsw-owner")

    def remove_route(self, host: Host) -> None:
        def remove() -> None:
            found = self._cloud.list_routes().routes
            self._cloud.remove(next(one for one in found if str(one.dst) == self.subnet(host)))

        namespaces.inside(self.lab.plan.switch, remove)

    def switch_check(self, host: Host, *, on: bool) -> None:
        interface = f"eni-lab{int(host.name[1:]):04}"
        namespaces.inside(
            self.lab.plan.switch,
            lambda: self._cloud._ask(
                "switch check",
                ("ecs", "2014-05-26"),
                "ModifyNetworkInterfaceAttribute",
                {"NetworkInterfaceId": interface, "SourceDestCheck": str(on).lower()},
            ),
        )


OWNERS: Mapping[str, type[Owner]] = {"aws-vpc": AwsOwner, "gce": GoogleOwner, "ali-vpc": AlibabaOwner}


@pytest.mark.parametrize("backend", list(CLOUDS))
def test_three_hosts_live_in_a_cloud(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One lab for the whole story, as each takes seconds to make."""
    for product in ("VPC", "ECS"):
        monkeypatch.setenv(f"{product}_ENDPOINT", f"http://{API}")
    spec = Spec(name=_NAME, backend=backend, backend_config=_OPTIONS)
    with running(spec, launch=_launch, ready_s=_LONG_S) as lab:
        owner = OWNERS[backend](lab)
        first, second, third = lab.plan.hosts
        _require_reached(lab)
        _no_route_is_the_kernels(lab)
        _killed_agent_comes_back_without_a_write(lab, owner, first)
        _removed_route_returns(lab, owner, second)
        _check_is_repaired_or_told(lab, owner, second)
        _dead_hosts_route_goes(lab, owner, third)
        _without_agents_nothing_is_repaired(lab, owner, (first, second))
        _no_secret_was_written(lab)


def _no_secret_was_written(lab: Lab) -> None:
    """Neither what the metadata service handed out, nor what was made of it."""
    files = [path for path in lab.state.path.rglob("*") if path.is_file()]
    assert lab.state.log("h1") in files
    for path in files:
        text = path.read_bytes()
        for secret in (b"lab-secret-of-the-role", b"lab-access-token", b"Authorization"):
            assert secret not in text, path


def _require_reached(lab: Lab, *some: Host) -> None:
    wait_until("all containers reach each other", lambda: not _unreached(lab, *some), most_s=_LONG_S)


def _unreached(lab: Lab, *some: Host) -> list[tuple[str, str]]:
    hosts = some or lab.plan.hosts
    ends = [end for host in hosts for end in lab.containers(host, lab.plan.families[0])]
    answers = probe.all_pairs(ends, tries=2, patience_s=0.3)
    return [(one.source, one.target) for one in answers if one.rtt_ms is None]


def _no_route_is_the_kernels(lab: Lab) -> None:
    for host in lab.plan.hosts:
        text = namespaces.inside(host.namespace, lambda: _output("ip", "route", "show"))
        assert "proto 76" not in text
        assert not [line for line in text.splitlines() if line.startswith("10.5.") and "cni0" not in line]


def _calls(lab: Lab, host: Host, since: int) -> list[Call]:
    address = ".".join(map(str, next(iter(host.addresses.values()))))
    return [call for call in read_calls(lab.state.cloud_calls)[since:] if call.client == address]


def _end(lab: Lab, host: Host) -> None:
    agent = lab.state.agent(host.name)
    assert agent is not None
    os.kill(agent.pid, signal.SIGKILL)
    wait_until(f"the agent of {host.name} ends", lambda: not agent.is_alive)


def _killed_agent_comes_back_without_a_write(lab: Lab, owner: Owner, host: Host) -> None:
    _end(lab, host)
    since = len(read_calls(lab.state.cloud_calls))
    with Agents(lab.state, _launch, backend=lab.plan.spec.backend) as agents:
        agents.start(host)
        agents.wait_ready(timeout_s=_LONG_S, on_ready=lambda _: None)
        calls = _calls(lab, host, since)
    # Ready means that the first look is over; a second one may have begun.
    first_look = calls[: [call.action for call in calls].index(owner.LIST) + 2]
    assert [call for call in calls if call.is_write] == []
    assert len(first_look) <= 4
    _require_reached(lab)


def _removed_route_returns(lab: Lab, owner: Owner, host: Host) -> None:
    since = len(read_calls(lab.state.cloud_calls))
    owner.remove_route(host)

    def is_added() -> bool:
        return any(call.action == owner.ADD and call.outcome == "ok" for call in _calls(lab, host, since))

    wait_until("the route is added again", is_added, most_s=_LONG_S)
    assert any("drift count=" in line for line in lab.state.log_lines(host.name))
    _require_reached(lab)


def _check_is_repaired_or_told(lab: Lab, owner: Owner, host: Host) -> None:
    owner.switch_check(host, on=True)
    if owner.is_repaired:
        _wait_log(lab, host, "cloud setting source/destination check=off", "putting them back")
    else:
        _wait_log(lab, host, "canIpForward is not true", "gcloud compute instances update-from-file")
        assert _unreached(lab)
        owner.switch_check(host, on=False)  # as the command does
        _wait_log(lab, host, "mended", "canIpForward")
    _require_reached(lab)


def _wait_log(lab: Lab, host: Host, *parts: str) -> None:
    def is_there() -> bool:
        return any(all(part in line for part in parts) for line in lab.state.log_lines(host.name))

    wait_until(f"{host.name} logs {parts}", is_there, most_s=_LONG_S)


def _dead_hosts_route_goes(lab: Lab, owner: Owner, dead: Host) -> None:
    since = len(read_calls(lab.state.cloud_calls))
    subnet = owner.subnet(dead)
    _end(lab, dead)
    others = [host for host in lab.plan.hosts if host != dead]

    def removals() -> list[Call]:
        return [call for host in others for call in _calls(lab, host, since) if call.action == owner.REMOVE]

    wait_until("another host removes the route", removals, most_s=_TTL_S + _LONG_S)
    wait_until("it is said", lambda: [host for host in others if _has_said(lab, host, subnet)])
    assert len(removals()) == 1
    wait_until("the router has it", lambda: ("h1-c1", f"{dead.name}-c1") in _unreached(lab))
    assert not _unreached(lab, *others)


def _has_said(lab: Lab, host: Host, subnet: str) -> bool:
    return any(f"cloud route removed {subnet}" in line for line in lab.state.log_lines(host.name))


def _without_agents_nothing_is_repaired(lab: Lab, owner: Owner, hosts: tuple[Host, Host]) -> None:
    """What the agents did before is what carried the packets."""
    first, second = hosts
    for host in hosts:
        _end(lab, host)
    assert not _unreached(lab, *hosts)
    owner.switch_check(second, on=True)
    wait_until("the check stops packets of others", lambda: _unreached(lab, *hosts))
    owner.switch_check(second, on=False)
    _require_reached(lab, *hosts)
    owner.remove_route(first)
    wait_until("there is no way without the route", lambda: _unreached(lab, *hosts))


def test_plan_prints_what_would_be_done_and_writes_nothing() -> None:
    with running(Spec(name=_NAME, backend="gce", hosts=2), ready_s=_LONG_S) as lab:
        owner = GoogleOwner(lab)
        first, second = lab.plan.hosts
        for host in lab.plan.hosts:
            _end(lab, host)
        owner.remove_route(first)
        since = len(read_calls(lab.state.cloud_calls))
        environment = Agents(lab.state, backend="gce")._environment

        def plan_on(host: Host) -> subprocess.CompletedProcess[str]:
            command = [
                *(sys.executable, "-m", "loden.cli.main", "cloud", "plan", "--store", lab.state.store_url),
                *("--subnet-file", str(lab.state.subnet_file(host.name)), "--iface", "eth0"),
            ]
            return namespaces.inside(
                host.namespace,
                lambda: subprocess.run(command, capture_output=True, text=True, check=False, env=environment),
            )

        done = plan_on(first)
        assert done.returncode == 0, done.stderr
        assert f"add {owner.subnet(first)} via this host in lab-network" in done.stdout
        owner.switch_check(second, on=True)
        done = plan_on(second)
        assert done.returncode == 0, done.stderr
        assert "change cloud setting canIpForward=true: it is false" in done.stdout
        assert owner.subnet(second) not in done.stdout
        made = [call for host in lab.plan.hosts for call in _calls(lab, host, since)]
        assert made
        assert not [call for call in made if call.is_write]


def test_killed_lab_leaves_no_cloud_behind() -> None:
    """``down`` cleans also where ``up`` was killed while the cloud ran and the agents started."""
    child = os.fork()
    if child == 0:
        up(Spec(name=_NAME, backend="gce"), progress=_die_among_agents)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert down(_NAME)
    assert not any(namespaces.exists(name) for name in plan(Spec(name=_NAME, backend="gce")).namespaces)


def _die_among_agents(stage: str, done: int, total: int) -> None:
    if (stage, done) == ("start agents", 1):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("backend", list(CLOUDS))
def test_agent_outside_of_its_cloud_says_so_and_goes_on(make_hosts: MakeHosts, backend: str) -> None:
    hosts = make_hosts(count=1)
    hosts.put_network(f'{{"Network": "10.5.0.0/16", "Backend": {{"Type": "{backend}"}}}}')
    agent = hosts[0].start()
    agent.wait_line(
        "reading the routes of", "fails, trying again: read", "metadata at http://", "unreachable"
    )
    assert len(hosts.leases()) == 1
    wait_until("it says what it waits for", lambda: "STATUS=waiting for the cloud's route" in agent.told)
    assert "READY=1" not in agent.told
    assert agent.stop() == 0


def test_agent_ends_at_once_though_its_cloud_hangs(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=1)
    hosts.put_network('{"Network": "10.5.0.0/16", "Backend": {"Type": "aws-vpc"}}')
    hosts[0].ip("address add 169.254.169.254/32 dev lo")
    with hosts[0].inside(lambda: socket.create_server(("169.254.169.254", 80))) as silent:
        agent = hosts[0].start()
        silent.settimeout(_LONG_S)
        with silent.accept()[0]:  # the question is there, and will have no answer
            assert agent.stop() == 0


def test_plan_is_refused_where_there_is_nothing_to_plan(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=1)

    def plan_of(network: str) -> str:
        hosts.put_network(network)
        command = [sys.executable, "-m", "loden.cli.main", "cloud", "plan", "--store", hosts.store_url]
        done = hosts[0].inside(
            lambda: subprocess.run([*command, "--iface", "eth0"], capture_output=True, text=True, check=False)
        )
        assert done.returncode == 1
        return done.stderr

    assert "vxlan has no routes in a cloud" in plan_of('{"Network": "10.5.0.0/16"}')
    said = plan_of('{"Network": "10.5.0.0/16", "Backend": {"Type": "gce"}}')
    assert "this host has no lease" in said
    assert "loden run" in said
