# SPDX-License-Identifier: Apache-2.0
"""An agent's life: start, readiness, signals, crashes; and that packets flow through all of it."""

import os
import random
import signal
import subprocess
import time

import pytest

from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import HOST_GW, VXLAN, Pinger, wait_until


def test_second_agent_is_refused_and_named_and_the_next_after_a_crash_starts(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    first = host.start().wait_ready()
    seconds = [host.start() for _ in range(3)]
    for second in seconds:
        assert second.process.wait(30) == 1
        assert f"another agent (pid {first.pid}) works in this network namespace already" in second.log
        assert "hint: stop it first" in second.log
        assert "Traceback" not in second.log
    before = host.subnet
    first.kill()
    host.start().wait_ready()
    assert host.subnet == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_and_leaves_everything(make_hosts: MakeHosts, number: int) -> None:
    hosts = make_hosts()
    agents = hosts.up()
    before = [host.state() for host in hosts]
    for agent in agents:
        assert agent.stop(number) == 0
        assert "Traceback" not in agent.log
    assert [host.state() for host in hosts] == before
    hosts.require_all_reached()
    assert len(hosts.leases()) == 2


def test_signal_while_waiting_ends_it(make_hosts: MakeHosts) -> None:
    (host,) = make_hosts(count=1)
    agent = host.start()
    agent.wait_line("no network configuration yet")
    assert agent.stop() == 0


def test_second_signal_kills(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1, ttl_s=1.0)
    hosts.put_network(VXLAN)
    agent = host.start().wait_ready()
    with hosts.locked_store():  # its renewal waits for the lock, and the first signal for the renewal
        time.sleep(1.0)  # it is due
        agent.process.send_signal(signal.SIGTERM)
        wait_until("the first signal is taken", lambda: not _catches(agent.pid, signal.SIGTERM))
        assert agent.stop(signal.SIGTERM) == -signal.SIGTERM
    host.start().wait_ready()


def _catches(pid: int, number: int) -> bool:
    with open(f"/proc/{pid}/status", encoding="ascii") as status:
        caught = next(line.split()[1] for line in status if line.startswith("SigCgt"))
    return bool(int(caught, 16) & 1 << (number - 1))


def test_health_and_service_manager_follow_the_subnet_file(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    agent = host.start("--iface", "eth0", "--healthz-port", "8081")
    agent.wait_line("no network configuration yet")
    assert (host.get("/healthz", 8081), host.get("/readyz", 8081)) == (200, 503)
    assert "STATUS=waiting: the store holds no network configuration yet" in agent.told
    assert "READY" not in agent.told
    hosts.put_network(VXLAN)
    agent.wait_ready()
    wait_until("the firewall's rules stand", lambda: host.get("/readyz", 8081) == 200)
    wait_until("the peers are counted", lambda: f"STATUS={host.subnet}, 0 peers, 0 refused" in agent.told)


def test_busy_health_port_is_said(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    with host.listening(8081):
        agent = host.start("--healthz-port", "8081")
        assert agent.process.wait(10) == 1
    assert "listen 0.0.0.0 port 8081: " in agent.log
    assert "--healthz-port" in agent.log
    assert "Traceback" not in agent.log


@pytest.mark.parametrize(
    "under",
    [
        ("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"),
        ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"),
    ],
    ids=["root without CAP_NET_ADMIN", "another user"],
)
def test_missing_rights_are_said_and_no_lease_is_taken(make_hosts: MakeHosts, under: tuple[str, ...]) -> None:
    if subprocess.run([*under, "true"], check=False).returncode:
        pytest.skip("needs a second user, which a user namespace made without root has not")
    hosts = make_hosts()
    host, other = hosts
    hosts.put_network(HOST_GW)
    other.start().wait_ready()
    agent = host.start(under=under)
    assert agent.process.wait(10) == 1
    assert "Operation not permitted [EPERM]" in agent.log
    assert "hint: run as root, or give the process CAP_NET_ADMIN" in agent.log
    assert "Traceback" not in agent.log
    assert list(hosts.leases()) == [other.subnet]


_WITH_A_BUG = """
import sys
from loden.cli.main import main
from loden.peers import Peers
Peers.take = lambda *_: 1 / 0
sys.exit(main())
"""


def test_bug_leaves_a_traceback_and_status_1(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    agent = host.start(program=("-c", _WITH_A_BUG))
    assert agent.process.wait(10) == 1
    assert "Traceback" in agent.log
    assert "ZeroDivisionError" in agent.log
    host.start().wait_ready()


@pytest.mark.parametrize("network", [VXLAN, HOST_GW], ids=["vxlan", "host-gw"])
def test_nothing_is_lost_across_crash_and_restart(make_hosts: MakeHosts, network: str) -> None:
    hosts = make_hosts()
    first, second = hosts.up(network)
    before = [host.state() for host in hosts]
    one, two = hosts
    with (
        Pinger(one.container(), two.container()) as there,
        Pinger(two.container(), one.container()) as back,
    ):
        first.kill()
        first = one.start().wait_ready()
        first.kill()
        second.kill()
        for agent in [host.start() for host in hosts]:
            agent.wait_ready()
        sent = there.sent
        wait_until("some pings after the last start", lambda: there.sent > sent + 300)
    print(f"sent {there.sent} and {back.sent}, lost {there.lost} and {back.lost}")
    assert (there.lost, back.lost) == (0, 0)
    assert [host.state() for host in hosts] == before


WIDE = '{"Network": "10.0.0.0/8", "SubnetLen": 24, "SubnetMax": "10.99.0.0"}'
CROWD = 1000


def test_nothing_is_lost_across_crash_and_restart_among_many(make_hosts: MakeHosts) -> None:
    """Whatever the start does to the device must not take all peers away until it has written them again."""
    hosts = make_hosts()
    one, two = hosts
    agent, _ = hosts.up(WIDE)
    crowd = [(f"10.{100 + number // 200}.{number % 200}.0-24", number) for number in range(CROWD)]
    hosts.write_raw(
        *(
            (
                key,
                '{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan",'
                f'"BackendData":{{"VNI":1,"VtepMAC":"02:00:00:01:{number >> 8:02x}:{number & 255:02x}"}}}}',
            )
            for key, number in crowd
        )
    )
    wait_until("everybody's route", lambda: all(len(host.routes()) == CROWD + 1 for host in hosts))
    with one.deletions() as deleted, Pinger(one.container(), two.container()) as there:
        agent.kill()
        agent = one.start().wait_ready()
        agent.wait_line("lease subnet=")
        sent = there.sent
        wait_until("some pings after it", lambda: there.sent > sent + 1000)
    print(f"sent {there.sent}, lost {there.lost}")
    assert there.lost == 0
    assert deleted == []
    wait_until("everybody's route", lambda: len(one.routes()) == CROWD + 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("network", [VXLAN, HOST_GW], ids=["vxlan", "host-gw"])
def test_killed_at_any_moment_the_next_start_is_right(make_hosts: MakeHosts, network: str, seed: int) -> None:
    rng = random.Random(seed)
    hosts = make_hosts()
    one, two = hosts
    hosts.put_network(network)
    two.start().wait_ready()
    for _ in range(8):
        agent = one.start()
        time.sleep(rng.uniform(0.05, 0.35))  # somewhere between exec and the end of the start
        agent.kill()
    one.start().wait_ready()
    assert len(hosts.leases()) == 2
    for host in hosts:
        host.add_containers()
    hosts.require_all_reached()
    assert len(two.routes()) == 1
    assert not [name for name in os.listdir(one.subnet_file.parent) if name != one.subnet_file.name]
