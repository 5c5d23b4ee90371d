# SPDX-License-Identifier: Apache-2.0
"""Real agents whose leases are in a real etcd, in a namespace of its own, in good and in bad times."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from loden.lab import etcd, namespaces, processes
from loden.lab.topology import StoreKind, store_address
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import VXLAN, Agent, Host, Hosts, Pinger, wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("etcd") is None or shutil.which("etcdctl") is None,
    reason="etcd is not installed: apt-get install etcd-server etcd-client",
)

T = TypeVar("T")
PREFIX = "/coreos.com/network"


class Site:
    """Hosts and their etcd, which a test stops, cuts off and writes to as it likes."""

    def __init__(self, hosts: Hosts, directory: Path) -> None:
        self.hosts = hosts
        self._directory = directory
        self._process = etcd.start(hosts.plan.switch, store_address(hosts.plan), directory)

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        processes.end([self._process], grace_s=0)

    def start_again(self) -> None:
        self._process = etcd.start(self.hosts.plan.switch, store_address(self.hosts.plan), self._directory)

    def ctl(self, *words: str, text: str | None = None) -> str:
        """What ``etcdctl`` says."""
        address = etcd.url(self.hosts.plan).removeprefix("etcd://").partition("/")[0]
        done = self._inside(
            lambda: subprocess.run(
                ["etcdctl", "--endpoints", address, *words],
                input=text,
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, "ETCDCTL_API": "3"},
            )
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def put(self, key: str, value: str) -> None:
        """As a flannel node would, or somebody who errs."""
        self.ctl("put", f"{PREFIX}/{key}", text=value)

    def subnets(self) -> list[str]:
        found = self.ctl("get", f"{PREFIX}/subnets/", "--prefix", "--keys-only").split()
        return [key.rpartition("/")[2] for key in found]

    def _inside(self, act: Callable[[], T]) -> T:
        return namespaces.inside(self.hosts.plan.switch, act)

    def cut_off(self, host: Host) -> None:
        """Drop what goes from a host to etcd; the rest of its packets go on."""
        address = etcd.url(self.hosts.plan).removeprefix("etcd://").partition(":")[0]
        host.ip(f"route add blackhole {address}/32")

    def let_back(self, host: Host) -> None:
        address = etcd.url(self.hosts.plan).removeprefix("etcd://").partition(":")[0]
        host.ip(f"route del blackhole {address}/32")


@pytest.fixture
def make_site(make_hosts: MakeHosts, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(*, ttl_s: int | None = None, count: int = 2, **options: object) -> Site:
        hosts = make_hosts(count=count, ttl_s=ttl_s, store=StoreKind.ETCD, **options)
        made.append(Site(hosts, tmp_path / "etcd"))
        return made[-1]

    yield make
    for site in made:
        site.kill()


def up(site: Site, network: str = VXLAN, *flags: str) -> list[Agent]:
    site.put("config", network)
    agents = [host.start("--iface", "eth0", *flags) for host in site.hosts]
    for agent in agents:
        agent.wait_ready()
    for host in site.hosts:
        host.add_containers()
    site.hosts.require_all_reached()
    return agents


def test_hosts_find_each_other_through_etcd_and_keep_their_subnets(make_site: Callable[..., Site]) -> None:
    site = make_site(count=3)
    agents = up(site)
    before = {host.name: host.subnet for host in site.hosts}
    assert sorted(site.subnets()) == sorted(subnet.replace("/", "-") for subnet in before.values())
    leases = site.ctl("lease", "list")
    for agent in agents:
        agent.kill()
    for host in site.hosts:
        host.start().wait_ready()
    assert {host.name: host.subnet for host in site.hosts} == before
    assert len(site.ctl("lease", "list").split()) == len(leases.split()), "old etcd leases are revoked (W23)"
    site.hosts.require_all_reached()


def test_etcd_away_under_traffic_loses_no_packet(make_site: Callable[..., Site]) -> None:
    """It is killed for longer than half of what leases last; all are renewed after."""
    site = make_site(ttl_s=8)
    agents = up(site)
    one, two = site.hosts
    before = {host.name: host.subnet for host in site.hosts}
    with Pinger(one.container(), two.container()) as ping:
        site.kill()
        for agent in agents:
            agent.wait_line("ERROR", "keeping the lease fails")
            agent.wait_line("ERROR", "watching the leases fails")
        site.start_again()
        for agent in agents:
            agent.wait_line("keeping the lease works again")
            agent.wait_line("watching the leases works again")
            agent.wait_line("lease renewed")
    assert ping.sent > 100
    assert ping.lost == 0
    assert {host.name: host.subnet for host in site.hosts} == before
    assert not [line for agent in agents for line in agent.lines("lease let go")]
    site.hosts.require_all_reached()


def test_etcd_stopped_for_longer_than_the_leases_last(make_site: Callable[..., Site]) -> None:
    """Nobody can say who owns what any more, so nobody sends; and everything comes back by itself."""
    site = make_site(ttl_s=3)
    agents = up(site)
    before = {host.name: host.subnet for host in site.hosts}
    site.signal(signal.SIGSTOP)
    for agent, host in zip(agents, site.hosts, strict=True):
        agent.wait_line("ERROR", "lease let go", "could not be renewed")
        wait_until("nothing is sent", lambda host=host: host.state() == ([], [], []))  # type: ignore[misc]
    site.signal(signal.SIGCONT)
    wait_until("all are back", lambda: all(host.routes() for host in site.hosts), most_s=30)
    assert {host.name: host.subnet for host in site.hosts} == before
    site.hosts.require_all_reached()


def test_host_cut_off_from_etcd_lets_go_and_returns(make_site: Callable[..., Site]) -> None:
    """Its packets still go everywhere else: that is when two hosts could both answer for one subnet."""
    site = make_site(ttl_s=3)
    one, two = site.hosts
    agent, other = up(site)
    lost = one.subnet
    site.cut_off(one)
    agent.wait_line("ERROR", f"lease let go subnet={lost}")
    wait_until("it sends nothing", lambda: one.state() == ([], [], []))
    wait_until("its lease has ended", lambda: lost.replace("/", "-") not in site.subnets(), most_s=20)
    wait_until("its peer has heard", lambda: not two.routes())
    value = (
        '{"PublicIP":"198.18.0.99","PublicIPv6":null,"BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:63"}}'
    )
    site.put(f"subnets/{lost.replace('/', '-')}", value)
    wait_until("the new owner is a peer", lambda: any(lost in route for route in two.routes()))
    site.let_back(one)
    agent.wait_line("ERROR", f"subnet changed old={lost}")
    found = site.ctl("get", f"{PREFIX}/subnets/{lost.replace('/', '-')}", "--print-value-only")
    assert found.strip() == value, "a newer owner is never written over (W22)"
    one.ip("link delete cni0")  # whose subnet is somebody else's now
    wait_until("the route to the new owner", lambda: any(lost in route for route in one.routes()))
    assert one.subnet != lost
    assert not other.lines("lease lost")


def test_keys_of_all_kinds_harm_no_peer_and_are_named_once(make_site: Callable[..., Site]) -> None:
    """W1, W5, and everything else that others may write under our prefix."""
    site = make_site()
    one, _ = site.hosts
    # The hosts' own subnets stay clear of those that are written below.
    agent, _ = up(site, '{"Network": "10.5.0.0/16", "SubnetMax": "10.5.199.0"}')
    before = one.state()
    bad = {
        "subnets/10.5.200.0-24": "{",
        "subnets/10.5.201.0-33": "{}",
        "subnets/hello": "world",
        "subnets-x/10.5.202.0-24": "{}",
        "subnets/10.5.203.0-24": '{"PublicIP":"198.18.0.2","BackendType":"host-gw"}',
        "subnets/10.5.204.0-24": '{"PublicIP":"198.18.0.2","BackendType":"vxlan","BackendData":{"VNI":1}}',
        "subnets/10.5.205.0-24": '{"PublicIP":"198.18.0.2"}',
        "subnets/0.0.0.0-0&fd00:1::-64": '{"PublicIPv6":"fd00::9","BackendType":"vxlan"}',
    }
    dual = (
        '{"PublicIP":"198.18.0.77","PublicIPv6":"fd00::9","BackendType":"vxlan",'
        '"BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:77"},'
        '"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:00:78"}}'
    )
    for _ in range(2):
        for key, value in bad.items():
            site.put(key, value)
            assert agent.told  # read now: ten messages are all that wait
    site.put("loden/holders/x", "{")
    site.put("other", "x")
    site.put("subnets/10.5.206.0-24&fd00:2::-64", dual)
    wait_until("the IPv4 half of a dual-stack peer", lambda: len(one.routes()) == 2)
    for key in bad:
        name = key.removeprefix("subnets/")
        assert len(agent.lines("WARNING", name)) == 1, agent.log
    assert len(agent.lines("WARNING", "this network has no IPv6")) == 2
    wait_until("they are counted", lambda: "6 peers, 9 refused" in agent.told)
    assert all(set(was) <= set(now) for was, now in zip(before, one.state(), strict=True))
    for key in (*bad, "subnets/10.5.206.0-24&fd00:2::-64"):
        site.ctl("del", f"{PREFIX}/{key}")
    wait_until("as before", lambda: one.state() == before)
    site.hosts.require_all_reached()


def test_network_is_followed_while_the_agent_runs(make_site: Callable[..., Site]) -> None:
    site = make_site()
    one, _ = site.hosts
    agent, _ = up(site, '{"Network": "10.5.0.0/16", "SubnetMax": "10.5.99.0"}')
    was = one.subnet
    site.put("config", '{"Network": "10.5.0.0/16", "SubnetMin": "10.5.250.0", "Backend": {"Type": "vxlan"}}')
    agent.wait_line("new leases are from 10.5.250.0/24 to 10.5.255.0/24")
    assert one.subnet == was
    site.put("config", '{"Networks": ["10.6.0.0/16"]}')
    agent.wait_line("ERROR", "network configuration unusable", "Network: missing")
    site.put("config", '{"Network": "10.6.0.0/16", "Backend": {"Type": "host-gw"}}')
    agent.wait_line("ERROR", "Network stays 10.5.0.0/16, not 10.6.0.0/16", "start the agents again")
    agent.wait_line("ERROR", "Backend stays vxlan")
    site.put("config", '{"Network": "10.5.0.0/16", "SubnetMin": "10.5.250.0", "Backend": {"Type": "vxlan"}}')
    site.ctl("del", f"{PREFIX}/subnets/{was.replace('/', '-')}")
    agent.wait_line("ERROR", "subnet changed")
    wait_until("subnet.env", lambda: one.subnet.startswith("10.5.25"))


def test_release_on_exit_frees_the_subnet_and_a_restart_keeps_it(make_site: Callable[..., Site]) -> None:
    site = make_site()
    one, two = site.hosts
    agent, other = up(site, VXLAN, "--release-on-exit")
    was = one.subnet
    assert agent.stop() == 0
    assert "lease released" in agent.log
    assert site.subnets() == [two.subnet.replace("/", "-")]
    assert one.state() == ([], [], [])
    wait_until("its peer forgets it", lambda: not two.routes())
    one.start().wait_ready()
    assert one.subnet == was, "subnet.env remembers it"
    assert other.stop() == 0
    two.start().wait_ready().stop()
    assert two.subnet.replace("/", "-") in site.subnets(), "off by default"


def test_two_hosts_with_one_address_are_told_apart_and_both_say_so(make_site: Callable[..., Site]) -> None:
    """W33: flannel's nodes steal each other's lease, and find out after hours."""
    site = make_site()
    one, two = site.hosts
    site.put("config", VXLAN)
    agent = one.start("--iface", "eth0", "--public-ip", "198.18.0.50").wait_ready()
    was = site.ctl("get", f"{PREFIX}/subnets/", "--prefix", "--print-value-only")
    other = two.start("--iface", "eth0", "--public-ip", "198.18.0.50")
    agent.wait_line("ERROR", "lease contended", "'h2'")
    other.wait_line("ERROR", "host 'h1' lives", "198.18.0.50", "--public-ip")
    assert site.ctl("get", f"{PREFIX}/subnets/", "--prefix", "--print-value-only") == was
    agent.kill()
    other.wait_ready()  # silence hands the lease over
    assert two.subnet.replace("/", "-") in site.subnets()


def test_commands_work_on_etcd(make_site: Callable[..., Site]) -> None:
    site = make_site(count=1)
    (host,) = site.hosts

    def loden(*words: str, text: str = "", status: int = 0) -> str:
        endpoint = "http://" + etcd.url(site.hosts.plan).removeprefix("etcd://").partition("/")[0]
        done = host.inside(
            lambda: subprocess.run(
                [sys.executable, "-m", "loden.cli.main", *words, "--etcd-endpoints", endpoint],
                input=text,
                capture_output=True,
                text=True,
                check=False,
            )
        )
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    assert "there is none" in loden("config", "get", status=1)
    assert "SubnetLen" in loden(
        "config", "put", "-", text='{"Network":"10.5.0.0/16","SubnetLen":31}', status=1
    )
    assert site.ctl("get", f"{PREFIX}/config") == "", "what is wrong is not written"
    loden("config", "put", "-", text=VXLAN)
    assert json.loads(loden("config", "get")) == json.loads(VXLAN)
    assert "reserved 10.5.9.0/24" in loden("lease", "reserve", "10.5.9.0/24", "--public-ip", "198.18.0.1")
    host.start().wait_ready()
    assert host.subnet == "10.5.9.0/24"
    (found,) = json.loads(loden("lease", "list", "--json"))["leases"]
    assert found["reservation"] is True
    assert found["holder"]["name"] == "h1"
    loden("lease", "release", "10.5.9.0/24")
    wait_until("it is taken again", lambda: "9.0-24" in " ".join(site.subnets()))
    (found,) = json.loads(loden("lease", "list", "--json"))["leases"]
    assert 86_000 < found["expires_in_s"] <= 86_400
