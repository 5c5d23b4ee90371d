# SPDX-License-Identifier: Apache-2.0
"""Somebody damages the rules under traffic: the agent puts them back, and connections live on.

A container of the first host talks to one of the second, and to a third host that is outside and knows no way
back to containers. FORWARD drops by policy, so without our rules nothing passes.

The host has rules of somebody else's besides, as with Docker: the kernel follows connections only while any
rule asks for it, and translates addresses only while there is any nat chain. A host with nothing of the kind
but our rules would, once they are gone, get the answers to containers itself and reset the connections.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack

import pytest

from loden.address import Family, format_address
from loden.firewall.programs import Kind
from loden.lab.probe import End
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import Host, wait_until
from tests.end_to_end.talk import Ends, Talk, connection
from tests.end_to_end.test_agent_edges import run

NETWORKS = {
    Kind.NFT: '{"Network": "10.5.0.0/16", "EnableNFTables": true}',
    Kind.IPTABLES_NFT: '{"Network": "10.5.0.0/16"}',
    Kind.IPTABLES_LEGACY: '{"Network": "10.5.0.0/16"}',
}
#: Of others, which decide for a tool.
FOREIGN = "-t nat -A POSTROUTING -d 192.0.2.99 -j ACCEPT"

SITE = """table ip site {
    chain nat { type nat hook postrouting priority 90; }
    chain way { type filter hook forward priority 10; ct state established accept; }
}"""

#: What somebody else does, in a shell, by tool. Legacy tables cannot be deleted: all in them is.
DAMAGE = {
    "rules flushed": {
        Kind.NFT: "nft flush table ip flannel-ipv4",
        Kind.IPTABLES_NFT: "iptables-nft -t nat -F FLANNEL-POSTRTG; iptables-nft -F FLANNEL-FWD",
        Kind.IPTABLES_LEGACY: "iptables-legacy -t nat -F FLANNEL-POSTRTG; iptables-legacy -F FLANNEL-FWD",
    },
    "rules reordered": {
        Kind.NFT: "nft insert rule ip flannel-ipv4 postrtg ip saddr 10.5.0.0/16 return",
        Kind.IPTABLES_NFT: "iptables-nft -t nat -D FLANNEL-POSTRTG 1;"
        " iptables-nft -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000"
        ' -m comment --comment "flanneld masq" -j RETURN',
        Kind.IPTABLES_LEGACY: "iptables-legacy -t nat -D FLANNEL-POSTRTG 1;"
        " iptables-legacy -t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000"
        ' -m comment --comment "flanneld masq" -j RETURN',
    },
    "chains deleted": {
        Kind.NFT: "nft delete chain ip flannel-ipv4 postrtg; nft delete chain ip flannel-ipv4 forward",
        Kind.IPTABLES_NFT: "iptables-nft -F FORWARD; iptables-nft -F FLANNEL-FWD;"
        " iptables-nft -X FLANNEL-FWD",
        Kind.IPTABLES_LEGACY: "iptables-legacy -F FORWARD; iptables-legacy -F FLANNEL-FWD;"
        " iptables-legacy -X FLANNEL-FWD",
    },
    "tables deleted": {
        Kind.NFT: "nft delete table ip flannel-ipv4",
        Kind.IPTABLES_NFT: "nft delete table ip nat; nft delete table ip filter",
        Kind.IPTABLES_LEGACY: "iptables-legacy -t nat -F; iptables-legacy -t nat -X; iptables-legacy -F;"
        " iptables-legacy -X",
    },
}
LISTING = {
    Kind.NFT: "nft list table ip flannel-ipv4",
    Kind.IPTABLES_NFT: "iptables-nft-save | grep FLANNEL",
    Kind.IPTABLES_LEGACY: "iptables-legacy-save | grep FLANNEL",
}


def _up(
    make_hosts: MakeHosts, kind: Kind, backend: Mapping[str, str] | None = None
) -> tuple[Host, Host, Host]:
    """Two hosts with agents and containers, and a third one without."""
    one, other, outside = hosts = make_hosts(count=3)
    more = {"Backend": backend} if backend else {}
    hosts.put_network(json.dumps(json.loads(NETWORKS[kind]) | more))
    if kind is not Kind.NFT:
        run(one, kind, *FOREIGN.split())
    run(one, "nft", SITE)
    # Where nft is in use, Docker may use iptables yet.
    run(one, kind if kind is not Kind.NFT else Kind.IPTABLES_NFT, "-P", "FORWARD", "DROP")
    for host in (one, other):
        host.start("--iface", "eth0", "--ip-masq", "--iptables-resync=1").wait_ready()
        host.add_containers()
    one.agents[0].wait_line(f"firewall tool={kind} ")
    hosts.require_all_reached(one, other)
    return one, other, outside


def _shell(host: Host, script: str) -> str:
    return run(host, "sh", "-ec", script)


@pytest.mark.parametrize("kind", list(Kind))
def test_rules_come_back_under_traffic_and_connections_live_on(make_hosts: MakeHosts, kind: Kind) -> None:
    one, other, outside = _up(make_hosts, kind)
    source = one.container()
    far_host = End("outside", outside.namespace, outside.plan.addresses[Family.IPV4])
    ways: dict[str, Callable[[], Ends]] = {
        "to a container": lambda: connection(source, other.container(), format_address(source.address)),
        "to the outside": lambda: connection(source, far_host, one.address),
    }
    wait_until("the rules", lambda: _shell(one, LISTING[kind]))
    rules = _shell(one, LISTING[kind])
    with ExitStack() as stack:
        talks = [stack.enter_context(Talk(name, *stack.enter_context(way()))) for name, way in ways.items()]
        for name, scripts in DAMAGE.items():
            for talk in talks:
                talk.require_alive("the last repair")
            _shell(one, scripts[kind])
            wait_until(
                name, lambda: sorted(_shell(one, LISTING[kind]).split("\n")) == sorted(rules.split("\n"))
            )
            for talk in talks:
                talk.require_alive(name)
        one.agents[0].wait_line("firewall drift", f"tool={kind}")
        for name, way in ways.items():  # a new connection is masqueraded as before
            with way() as ends, Talk(f"anew {name}", *ends) as talk:
                talk.require_alive("all repairs")


@pytest.mark.parametrize("acceleration", ["ebpf", "engine"])
@pytest.mark.parametrize("kind", list(Kind))
def test_udp_meets_the_same_rules(make_hosts: MakeHosts, kind: Kind, acceleration: str) -> None:
    """However its packets are carried, they pass FORWARD, and the outside sees the host."""
    one, other, outside = _up(make_hosts, kind, {"Type": "udp", "Acceleration": acceleration})
    one.agents[0].wait_line(f"udp acceleration={acceleration} ")
    source = one.container()
    far_host = End("outside", outside.namespace, outside.plan.addresses[Family.IPV4])
    ways: dict[str, Callable[[], Ends]] = {
        "to a container": lambda: connection(source, other.container(), format_address(source.address)),
        "to the outside": lambda: connection(source, far_host, one.address),
    }
    for name, way in ways.items():
        with way() as ends, Talk(name, *ends) as talk:
            talk.require_alive("its start")
