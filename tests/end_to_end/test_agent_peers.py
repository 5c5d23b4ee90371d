# SPDX-License-Identifier: Apache-2.0
"""Peers come, change and go, devices and links vanish: the entries follow."""

import time
from collections.abc import Callable

import msgspec

from loden.address import Family, Prefix, parse_address
from loden.lab.topology import Topology
from loden.lease import Lease, Leg
from loden.stores.base import Record, Store
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import Host, Hosts, wait_until

#: The hosts' own subnets are below 10.5.50.0; what tests write is above.
VXLAN = '{"Network": "10.5.0.0/16", "SubnetMax": "10.5.50.0"}'
HOST_GW = '{"Network": "10.5.0.0/16", "SubnetMax": "10.5.50.0", "Backend": {"Type": "host-gw"}}'
DIRECT = '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": true}}'
PEER = Prefix.parse("10.5.77.0/24")


def write_peer(
    hosts: Hosts, *, subnet: Prefix = PEER, address: str = "192.0.2.1", mac: str = "02:00:00:00:00:01",
    backend_type: str = "vxlan",
) -> Record:  # fmt: skip
    """A peer's lease as another agent writes it, new or over what it wrote before."""
    data = f'{{"VNI":1,"VtepMAC":"{mac}"}}'.encode()
    legs = {Family.IPV4: Leg(subnet, parse_address(address), data)}
    lease = Lease.make(legs, backend_type)

    async def write(store: Store) -> Record:
        was = (await store.snapshot()).records.get(lease.key)
        if was is None:
            return await store.create(lease, holder=None)
        return await store.replace(msgspec.structs.replace(was, lease=lease))

    return hosts.with_store(write)


def wait_state(host: Host, routes: list[str], neighbours: list[str], fdb: list[str]) -> None:
    wait_until(f"{routes} {neighbours} {fdb}", lambda: host.state() == (routes, neighbours, fdb))


def test_changed_lease_is_followed_and_old_entries_go(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    (agent,) = hosts.up(VXLAN, containers=False)
    route, neighbour = "10.5.77.0/24 via 10.5.77.0 dev flannel.1", "10.5.77.0 lladdr"
    write_peer(hosts)
    wait_state(host, [route], [f"{neighbour} 02:00:00:00:00:01"], ["02:00:00:00:00:01 dst 192.0.2.1"])
    write_peer(hosts, address="192.0.2.2")  # W10
    wait_state(host, [route], [f"{neighbour} 02:00:00:00:00:01"], ["02:00:00:00:00:01 dst 192.0.2.2"])
    write_peer(hosts, address="192.0.2.2", mac="02:00:00:00:00:02")  # W13
    wait_state(host, [route], [f"{neighbour} 02:00:00:00:00:02"], ["02:00:00:00:00:02 dst 192.0.2.2"])
    write_peer(hosts, address="192.0.2.2", backend_type="host-gw")  # W12
    wait_state(host, [], [], [])
    record = write_peer(hosts)
    wait_state(host, [route], [f"{neighbour} 02:00:00:00:00:01"], ["02:00:00:00:00:01 dst 192.0.2.1"])

    async def move(store: Store) -> None:
        await store.delete(record)

    hosts.with_store(move)
    write_peer(hosts, subnet=Prefix.parse("10.5.78.0/24"))
    wait_state(
        host,
        ["10.5.78.0/24 via 10.5.78.0 dev flannel.1"],
        ["10.5.78.0 lladdr 02:00:00:00:00:01"],
        ["02:00:00:00:00:01 dst 192.0.2.1"],
    )
    assert not agent.lines("ERROR")


def test_changes_while_it_was_dead_are_followed(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    (agent,) = hosts.up(VXLAN, containers=False)
    gone = write_peer(hosts, subnet=Prefix.parse("10.5.78.0/24"), mac="02:00:00:00:00:09")
    write_peer(hosts)
    wait_until("both", lambda: len(host.routes()) == 2)
    agent.kill()

    async def release(store: Store) -> None:
        await store.delete(gone)

    hosts.with_store(release)
    write_peer(hosts, address="192.0.2.2", mac="02:00:00:00:00:02")
    host.start().wait_ready()
    wait_state(
        host,
        ["10.5.77.0/24 via 10.5.77.0 dev flannel.1"],
        ["10.5.77.0 lladdr 02:00:00:00:00:02"],
        ["02:00:00:00:00:02 dst 192.0.2.2"],
    )


def test_malformed_keys_hurt_nobody_else(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    agents = hosts.up(VXLAN)
    write_peer(hosts)
    wait_until("the peer", lambda: len(hosts[0].routes()) == 2)
    before = [host.state() for host in hosts]
    hosts.write_raw(("no-subnet-at-all", "{}"))
    hosts.write_raw(("10.5.200.0-24", "not JSON"))
    hosts.write_raw(("10.5.201.0-24", '{"PublicIP": "nowhere"}'))
    for agent in agents:
        for key in ("no-subnet-at-all", "10.5.200.0-24", "10.5.201.0-24"):
            agent.wait_line("WARNING", "lease unreadable", key)
    hosts.write_raw(("10.5.202.0-24", '{"PublicIP": "192.0.2.9", "BackendType": "vxlan"}'))
    agents[0].wait_line("WARNING", "peer refused lease=10.5.202.0-24", "BackendData")
    hosts.write_raw(("10.5.77.0-24", "a peer that was well before"))
    agents[0].wait_line("WARNING", "lease unreadable key=10.5.77.0-24", "stays")
    write_peer(hosts, subnet=Prefix.parse("10.5.79.0/24"), mac="02:00:00:00:00:03")
    wait_until("a good one behind them", lambda: len(hosts[0].routes()) == 3)
    assert set(before[0][0]) <= set(hosts[0].routes())
    hosts.require_all_reached()
    agents[0].kill()
    hosts[0].start().wait_ready()
    wait_until("the same after a restart", lambda: len(hosts[0].routes()) == 2)  # what was known is not
    hosts.require_all_reached()


def test_peer_whose_route_would_cut_the_host_off_is_refused(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    agents = hosts.up(VXLAN)
    near = Prefix.of(parse_address(hosts[1].address), 31)
    for number, subnet in enumerate(("128.0.0.0/2", "198.18.0.128/25", str(near), "127.0.0.0/16")):
        mac = f"02:00:00:00:01:{number:02x}"
        write_peer(hosts, subnet=Prefix.parse(subnet), address=hosts[1].address, mac=mac)
    agents[0].wait_lines(4, "WARNING", "peer refused")
    write_peer(hosts)
    wait_until(
        "a good one behind them", lambda: "10.5.77.0/24 via 10.5.77.0 dev flannel.1" in hosts[0].routes()
    )
    assert len(hosts[0].routes()) == 2
    hosts.require_all_reached()


def comes_back(hosts: Hosts, host: Host, what: str, harm: Callable[[], object]) -> None:
    """After some harm everything is there again; how long that takes is printed."""
    harm()
    start = time.monotonic()
    wait_until(what, lambda: host.state() == expected(hosts, host))
    print(f"{what}: as before after {time.monotonic() - start:.3f} s")
    hosts.require_all_reached()


def expected(hosts: Hosts, host: Host) -> tuple[list[str], list[str], list[str]]:
    """What is to carry packets to the other hosts."""
    peers = [peer for peer in hosts if peer is not host]
    if "flannel.1" not in host.ip("-o link"):
        return sorted(f"{peer.subnet} via {peer.address} dev eth0" for peer in peers), [], []
    bases = {peer: peer.subnet.partition("/")[0] for peer in peers}
    macs = {peer: peer.ip("-o link show flannel.1").partition("ether ")[2].split()[0] for peer in peers}
    return (
        sorted(f"{peer.subnet} via {base} dev flannel.1" for peer, base in bases.items()),
        sorted(f"{base} lladdr {macs[peer]}" for peer, base in bases.items()),
        sorted(f"{macs[peer]} dst {peer.address}" for peer in peers),
    )


def test_device_that_vanishes_or_is_spoilt_comes_back_with_all_peers(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=3)
    agents = hosts.up(VXLAN)
    one = hosts[0]
    base = one.subnet.partition("/")[0]
    device = one.ip("-d link show flannel.1").partition(" mtu ")[2]
    comes_back(hosts, one, "device deleted", lambda: one.ip("link delete flannel.1"))
    comes_back(hosts, one, "device down", lambda: one.ip("link set flannel.1 down"))
    comes_back(hosts, one, "address deleted", lambda: one.ip(f"addr del {base}/32 dev flannel.1"))
    assert f"inet {base}/32" in one.ip("addr show flannel.1")
    comes_back(hosts, one, "neighbours flushed", lambda: one.ip("neigh flush dev flannel.1 nud permanent"))
    comes_back(hosts, one, "route deleted", lambda: one.ip(f"route del {hosts[1].subnet}"))
    comes_back(hosts, one, "nexthops and routes flushed", lambda: one.ip("nexthop flush"))
    assert one.ip("-d link show flannel.1").partition(" mtu ")[2] == device
    assert agents[0].process.poll() is None


def test_underlay_that_goes_down_comes_back_with_all_peers(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=3)
    hosts.up(HOST_GW)
    one = hosts[0]

    def flap() -> None:
        one.ip("link set eth0 down")
        wait_until("no routes", lambda: not one.routes())
        one.ip("link set eth0 up")

    comes_back(hosts, one, "underlay down and up", flap)


def test_vxlan_underlay_that_goes_down_comes_back(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    hosts.up(VXLAN)
    one = hosts[0]

    def flap() -> None:
        one.ip("link set eth0 down")
        one.ip("link set eth0 up")

    comes_back(hosts, one, "underlay down and up", flap)


def test_host_gw_behind_a_router_is_refused_once(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=2, shape=Topology.ROUTED)
    agents = hosts.up(HOST_GW, containers=False)
    one, two = hosts
    said = agents[0].wait_line("WARNING", "peer refused", f"the peer {two.address} is behind the router")
    assert "use vxlan" in said
    one.ip("route add 203.0.113.0/24 dev eth0")  # something that makes it ask again
    one.ip("route del 203.0.113.0/24 dev eth0")
    one.ip("link set lo down")
    write_peer(hosts, address=two.address, backend_type="host-gw")
    agents[0].wait_lines(2, "WARNING", "peer refused")
    assert len(agents[0].lines("peer refused", two.subnet.partition("/")[0])) == 1
    assert one.routes() == []


def test_direct_routing_for_near_and_vxlan_for_far_peers(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=4, shape=Topology.MIXED)
    hosts.up(DIRECT)
    one, near, far, _ = hosts
    routes = {route.split()[0]: route for route in one.routes()}
    assert routes[near.subnet] == f"{near.subnet} via {near.address} dev eth0"
    assert "dev flannel.1" in routes[far.subnet]
    assert len(one.neighbours()) == len(one.fdb()) == 2
    # The far peer moves to the near segment of the switch and keeps its address.
    for host, other in ((one, far), (far, one)):
        host.ip(f"route add {other.address}/32 dev eth0")
    hosts.plug(far, into=one)
    wait_until("a direct route", lambda: f"{far.subnet} via {far.address} dev eth0" in one.routes())
    wait_until("no entries behind it", lambda: len(one.neighbours()) == len(one.fdb()) == 1)
    hosts.require_all_reached(one, far)
    hosts.plug(far, into=far)
    for host, other in ((one, far), (far, one)):
        host.ip(f"route del {other.address}/32 dev eth0")
    wait_until("vxlan again", lambda: len(one.neighbours()) == len(one.fdb()) == 2)
    wait_until("the same routes as before", lambda: set(one.routes()) == set(routes.values()))
    hosts.require_all_reached()
