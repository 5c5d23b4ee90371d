# SPDX-License-Identifier: Apache-2.0
"""The host's edges, kept by the real agent: forwarding, firewall rules, the blackhole route."""

import fcntl
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import Host, wait_until

VXLAN = '{"Network": "10.5.0.0/16"}'
NFT = '{"Network": "10.5.0.0/16", "EnableNFTables": true}'
DUAL = '{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}'
FORWARD = "net/ipv4/ip_forward"


def sysctl(host: Host, path: str, value: str | None = None) -> str:
    """A setting of the host's namespace; written first where a value is given."""

    def act() -> str:
        if value is not None:
            with open(f"/proc/sys/{path}", "w", encoding="ascii") as file:
                file.write(value)
        with open(f"/proc/sys/{path}", encoding="ascii") as file:
            return file.read().strip()

    return host.inside(act)


def run(host: Host, *words: str) -> str:
    done = host.inside(lambda: subprocess.run(words, capture_output=True, text=True, check=False))
    return done.stdout


def test_forwarding_is_switched_on_and_kept_on(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    sysctl(host, FORWARD, "0")
    sysctl(host, "net/ipv4/conf/default/rp_filter", "1")
    agent = host.start().wait_ready()
    wait_until("forwarding", lambda: sysctl(host, FORWARD) == "1")
    wait_until("a loose filter", lambda: sysctl(host, "net/ipv4/conf/flannel.1/rp_filter") == "2")
    sysctl(host, FORWARD, "0")
    wait_until("forwarding again", lambda: sysctl(host, FORWARD) == "1")
    agent.wait_line("drift", FORWARD)


def test_forwarding_is_only_reported_where_it_is_not_ours_to_set(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    sysctl(host, FORWARD, "0")
    agent = host.start("--iface", "eth0", "--manage-sysctls=false").wait_ready()
    agent.wait_line(f"{FORWARD} is 0: run sysctl -w {FORWARD}=1")
    assert sysctl(host, FORWARD) == "0"


def test_read_only_settings_are_said_and_hold_nothing_up(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    sysctl(host, FORWARD, "0")
    read_only = 'mount -o bind,ro /proc/sys /proc/sys && exec "$@"'
    agent = host.start(under=("unshare", "--mount", "sh", "-c", read_only, "sh")).wait_ready()
    agent.wait_line("refused", FORWARD, "Read-only file system", "--manage-sysctls=false")
    assert len(agent.lines("refused", FORWARD)) == 1


@pytest.mark.parametrize(
    ("network", "listing"),
    [(VXLAN, ("iptables-save", "-t", "nat")), (NFT, ("nft", "list", "table", "ip", "flannel-ipv4"))],
    ids=["iptables", "nftables"],
)
def test_rules_are_kept_and_health_waits_for_them(
    make_hosts: MakeHosts, network: str, listing: tuple[str, ...]
) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(network)
    host.start(
        *("--iface", "eth0", "--ip-masq", "--iptables-resync=1", "--ip-masq-exclude", "192.0.2.0/24"),
        *("--healthz-ip", "127.0.0.1", "--healthz-port", "8081"),
    ).wait_ready()
    host.inside(lambda: subprocess.run(["ip", "link", "set", "lo", "up"], check=True))
    wait_until("ready", lambda: host.get("/readyz", 8081) == 200)
    assert "FLANNEL_IPMASQ=true\n" in host.subnet_file.read_text()
    rules = run(host, *listing)
    assert "192.0.2.0/24" in rules
    flush = ("nft", "flush", "ruleset") if network == NFT else ("iptables", "-t", "nat", "-F")
    run(host, *flush)
    wait_until("the rules", lambda: run(host, *listing).splitlines()[1:-1] == rules.splitlines()[1:-1])


@pytest.mark.parametrize(
    ("version", "complaint"),
    [
        ("", "find a firewall tool: no firewall tool is installed"),
        ("nftables v1.0.0", "nft: version 1.0.0 is too old, 1.0.1 is the first that works"),
    ],
    ids=["missing", "too old"],
)
def test_firewall_tool_is_waited_for_and_packets_are_not_held_up(
    make_hosts: MakeHosts, tmp_path: Path, version: str, complaint: str
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    nft = folder / "nft"
    if version:
        nft.write_text(f"#!/bin/sh\necho '{version}'\n")
        nft.chmod(0o755)
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    agent = host.start(
        *("--iface", "eth0", "--healthz-ip", "127.0.0.1", "--healthz-port", "8081"),
        under=("env", f"PATH={folder}"),
    ).wait_ready()
    agent.wait_line("keeping the firewall's rules fails", complaint, "install nftables 1.0.1 or newer")
    assert host.get("/readyz", 8081) == 503
    nft.unlink(missing_ok=True)
    nft.symlink_to(shutil.which("nft") or "nft")
    agent.wait_line("keeping the firewall's rules works again")
    wait_until("ready", lambda: host.get("/readyz", 8081) == 200)
    assert "10.5.0.0/16" in run(host, "nft", "list", "table", "ip", "flannel-ipv4")


def test_held_xtables_lock_is_said_and_holds_nothing_else_up(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    run(host, "iptables-legacy", "-A", "INPUT", "-j", "ACCEPT")
    with open("/run/xtables.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        agent = host.start().wait_ready()
        agent.wait_line("keeping the firewall's rules fails", "xtables.lock", "fuser /run/xtables.lock")
    agent.wait_line("keeping the firewall's rules works again")
    assert len(agent.lines("keeping the firewall's rules fails")) == 1
    assert "FLANNEL-FWD" in run(host, "iptables-legacy-save")


def test_blackhole_takes_what_no_container_has(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    host.start("--iface", "eth0", "--ip-blackhole-route").wait_ready()
    wait_until("blackhole", lambda: f"blackhole {host.subnet}" in host.ip("route show proto 76"))


def test_ipv6_forwarding_keeps_router_advertisements(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    sysctl(host, "net/ipv6/conf/eth0/accept_ra", "1")
    host.ip("address add 2001:db8::5/64 dev eth0 nodad")
    hosts.put_network(DUAL)
    host.start().wait_ready()
    wait_until("forwarding", lambda: sysctl(host, "net/ipv6/conf/all/forwarding") == "1")
    assert sysctl(host, "net/ipv6/conf/eth0/accept_ra") == "2"
    assert sysctl(host, "net/ipv6/conf/flannel-v6.1/accept_ra") == "0"
