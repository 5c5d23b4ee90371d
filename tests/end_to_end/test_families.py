# SPDX-License-Identifier: Apache-2.0
"""Dual stack and IPv6 alone, in labs with the real agent."""

import asyncio
import errno
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from loden.address import Family, Prefix, format_address, parse_address
from loden.backends.vxlan import vtep_mac
from loden.lab import namespaces
from loden.lab.lab import Lab, down, running
from loden.lab.state import names
from loden.lab.topology import Host, Spec, Stack, Topology, family_name
from loden.lease import Lease, Leg
from loden.stores import open_store
from loden.stores.base import Holder, Record, Snapshot
from loden.tables.entries import format_mac

_NAME = f"f{os.getpid()}"
_IPV4, _IPV6 = Family.IPV4, Family.IPV6
_DEVICES = {_IPV4: "flannel.1", _IPV6: "flannel-v6.1"}


@pytest.fixture(autouse=True)
def _clean_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LODEN_LAB_DIR", str(tmp_path))
    yield
    for name in names():
        down(name)


def _spec(family: Stack = Stack.DUAL, backend: str = "vxlan", hosts: int = 2) -> Spec:
    return Spec(name=_NAME, hosts=hosts, family=family, backend=backend)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _ip(host: Host, *command: str) -> str:
    return _output("ip", "-n", host.namespace, *command)


def _fdb(host: Host, family: Family) -> str:
    return _output("bridge", "-n", host.namespace, "fdb", "show", "dev", _DEVICES[family])


def _route(host: Host, subnet: Prefix) -> str:
    return _ip(host, f"-{str(subnet.family)[-1]}", "route", "show", str(subnet))


def _until(is_so: Callable[[], bool]) -> None:
    """The agent tells nobody when it has followed a peer: look until it has."""
    deadline = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# The lab


@pytest.mark.parametrize("family", [Stack.DUAL, Stack.IPV6])
@pytest.mark.parametrize("backend", ["vxlan", "host-gw", "udp"])
def test_every_pair_is_reached_in_every_family(family: Stack, backend: str) -> None:
    with running(_spec(family, backend, hosts=3)) as lab:
        report = lab.check()
    asked = [(pair.source, pair.target, pair.family) for pair in report.pairs]
    assert asked == [
        (f"h{source}-c1", f"h{target}-c1", family_name(one))
        for one in family.families
        for source in (1, 2, 3)
        for target in (1, 2, 3)
        if source != target
    ]
    assert report.reachable


@pytest.mark.parametrize("family", [Stack.DUAL, Stack.IPV6])
@pytest.mark.parametrize("backend", ["vxlan", "udp"])
def test_hosts_behind_routers_reach_each_other(family: Stack, backend: str) -> None:
    with running(msgspec.structs.replace(_spec(family, backend, hosts=3), topology=Topology.ROUTED)) as lab:
        assert lab.check().reachable


def test_host_gw_behind_a_router_says_why_not_in_every_family() -> None:
    with running(msgspec.structs.replace(_spec(backend="host-gw"), topology=Topology.ROUTED)) as lab:
        report = lab.check(tries=1)
        assert {pair.family for pair in report.pairs if not pair.ok} == {"ipv4", "ipv6"}
        assert all("is behind the router" in " ".join(lab.reasons(pair)) for pair in report.pairs)


def test_fifty_hosts_form_a_full_mesh_in_both_families() -> None:
    with running(_spec(hosts=50)) as lab:
        report = lab.check()
    assert len(report.pairs) == 2 * 50 * 49
    assert report.reachable


_SECOND = {"public_ipv6", "ipv6_subnet"}


@pytest.mark.parametrize(
    ("options", "asked", "host_keys"),
    [
        (("--family", "ipv4", "--underlay", "ipv4"), {None}, set()),
        (("--family", "ipv6", "--underlay", "ipv6"), {"ipv6"}, set()),
        (("--family", "dual", "--underlay", "ipv6"), {"ipv4", "ipv6"}, _SECOND),
    ],
)
def test_json_has_a_pair_per_family(
    options: tuple[str, ...], asked: set[str | None], host_keys: set[str]
) -> None:
    command = (sys.executable, "-m", "loden.cli.main", "lab", "run", "--name", _NAME, "--json")
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"backend", "hosts", "pairs", "reachable"}
    assert all(set(host) == {"name", "public_ip", "subnet"} | host_keys for host in report["hosts"])
    assert len(report["pairs"]) == 3 * 2 * len(asked)
    assert {pair.get("family") for pair in report["pairs"]} == asked


def test_throughput_is_measured_in_the_family_of_the_underlay() -> None:
    with running(_spec()) as lab:
        for underlay, family in ((None, "ipv4"), ("ipv4", "ipv4"), ("ipv6", "ipv6")):
            measured = lab.throughput(underlay=underlay, round_s=0.05)
            assert measured.family == family
            assert min(measured.underlay_gbps, measured.overlay_gbps, measured.container_gbps) > 0


# What the agent leaves on a host


@pytest.mark.parametrize(
    ("backend", "family", "mtu"),
    [
        ("vxlan", Stack.DUAL, 1430),
        ("vxlan", Stack.IPV6, 1430),
        ("vxlan", Stack.IPV4, 1450),
        ("host-gw", Stack.DUAL, 1500),
        ("host-gw", Stack.IPV6, 1500),
        ("udp", Stack.DUAL, 1452),
        ("udp", Stack.IPV6, 1452),
        ("udp", Stack.IPV4, 1472),
        ("alloc", Stack.DUAL, 1500),
        ("alloc", Stack.IPV6, 1500),
    ],
)
def test_subnet_env_has_the_lines_of_each_family(backend: str, family: Stack, mtu: int) -> None:
    with running(_spec(family, backend, hosts=1)) as lab:
        text = lab.state.subnet_file("h1").read_text()
        subnets = lab.found["h1"].subnets
    lines = {
        _IPV4: ("FLANNEL_NETWORK=10.5.0.0/16", "FLANNEL_SUBNET"),
        _IPV6: ("FLANNEL_IPV6_NETWORK=fd00:5::/48", "FLANNEL_IPV6_SUBNET"),
    }
    wanted = []
    for one in family.families:
        network, key = lines[one]
        wanted += [network, f"{key}={format_address(subnets[one].gateway)}/{subnets[one].length}"]
    assert text.splitlines() == [*wanted, f"FLANNEL_MTU={mtu}", "FLANNEL_IPMASQ=false"]


def _snapshot(lab: Lab) -> Snapshot:
    async def read() -> Snapshot:
        store = open_store(lab.state.store_url)
        try:
            return await store.snapshot()
        finally:
            await store.close()

    return asyncio.run(read())


def test_hosts_of_ipv6_alone_get_leases_of_their_own() -> None:
    """W6: all of them have the IPv4 address 0.0.0.0."""
    with running(_spec(Stack.IPV6, hosts=3)) as lab:
        found = {
            record.lease.ipv6.public: record.key
            for record in _snapshot(lab).records.values()
            if record.lease.ipv6
        }
        own = {host.addresses[_IPV6]: lab.found[host.name].subnets[_IPV6] for host in lab.plan.hosts}
    assert len(set(own.values())) == 3
    assert found == {public: f"0.0.0.0-0&{str(subnet).replace('/', '-')}" for public, subnet in own.items()}


def test_alloc_gives_dual_leases_and_programs_nothing() -> None:
    with running(_spec(backend="alloc")) as lab:
        keys = sorted(_snapshot(lab).records)
        own = [lab.found[host.name].subnets for host in lab.plan.hosts]
        h1 = lab.plan.hosts[0]
        assert [_route(h1, subnet) for subnet in own[1].values()] == ["", ""]
        assert "flannel" not in _ip(h1, "-brief", "link")
    assert keys == sorted("&".join(str(it).replace("/", "-") for it in one.values()) for one in own)


@pytest.mark.parametrize("family", [Stack.DUAL, Stack.IPV6])
def test_vxlan_device_of_ipv6_is_flannels(family: Stack) -> None:
    """COMPAT §7.3: name, MAC, address, lower device, port, MTU less what IPv6 costs (W16), no accept_ra."""
    with running(_spec(family)) as lab:
        h1, h2 = lab.plan.hosts
        own, peer = (lab.found[host.name].subnets[_IPV6] for host in (h1, h2))
        (device,) = json.loads(_ip(h1, "-details", "-json", "link", "show", "flannel-v6.1"))
        (addresses,) = json.loads(_ip(h1, "-json", "-6", "addr", "show", "dev", "flannel-v6.1"))
        there = {
            leg.public: vtep_mac(leg)
            for record in _snapshot(lab).records.values()
            if (leg := record.lease.ipv6) is not None
        }
        mac = format_mac(there[h2.addresses[_IPV6]])
        accept_ra = _ip(h1, "netns", "exec", h1.namespace, "cat", _ACCEPT_RA).strip()
        neighbour = _ip(h1, "-6", "neigh", "show", "dev", "flannel-v6.1", "nud", "permanent")
        forwarding = _fdb(h1, _IPV6)
        route = _route(h1, peer)
        assert ("flannel.1" in _ip(h1, "-brief", "link")) == (family is Stack.DUAL)
    assert device["address"] == format_mac(there[h1.addresses[_IPV6]])
    vxlan = device["linkinfo"]["info_data"]
    assert (device["mtu"], vxlan["link"], device["qdisc"]) == (1430, "eth0", "noqueue")
    assert (vxlan["id"], vxlan["port"], vxlan["local6"]) == (1, 8472, format_address(h1.addresses[_IPV6]))
    assert vxlan["learning"] is False
    scoped = [(it["local"], it["prefixlen"]) for it in addresses["addr_info"] if it["scope"] == "global"]
    assert scoped == [(format_address(own.address), 128)]
    assert accept_ra == "0"
    base = format_address(peer.address)
    assert f"{base} lladdr {mac}" in neighbour
    assert f"{mac} dst {format_address(h2.addresses[_IPV6])} self permanent" in forwarding
    assert f"via {base} dev flannel-v6.1" in route
    assert "onlink" in route


_ACCEPT_RA = "/proc/sys/net/ipv6/conf/flannel-v6.1/accept_ra"


def test_host_gw_routes_go_to_the_peer_itself() -> None:
    with running(_spec(backend="host-gw")) as lab:
        h1, h2 = lab.plan.hosts
        for family, subnet in lab.found["h2"].subnets.items():
            assert f"via {format_address(h2.addresses[family])} dev eth0" in _route(h1, subnet)


def test_direct_routing_takes_the_near_way_in_both_families() -> None:
    """h1 and h2 share a segment, h3 is behind the router."""
    near_and_far = msgspec.structs.replace(
        _spec(hosts=3), topology=Topology.MIXED, backend_config='{"DirectRouting": true}'
    )
    with running(near_and_far) as lab:
        assert lab.check().reachable
        h1, h2, h3 = lab.plan.hosts
        for family, device in _DEVICES.items():
            near, far = (lab.found[host.name].subnets[family] for host in (h2, h3))
            assert f"via {format_address(h2.addresses[family])} dev eth0" in _route(h1, near)
            assert f"via {format_address(far.address)} dev {device}" in _route(h1, far)
            remotes = [line.split()[2] for line in _fdb(h1, family).splitlines() if " dst " in line]
            assert remotes == [format_address(h3.addresses[family])]


# MTU

_MTU_DISCOVER = {_IPV4: (socket.IPPROTO_IP, 10), _IPV6: (socket.IPPROTO_IPV6, 23)}  # <linux/in.h>, in6.h
_PMTUDISC_DO = 2
_HEADERS = {_IPV4: 20 + 8, _IPV6: 40 + 8}


def _udp(family: Family) -> socket.socket:
    found = socket.socket(family, socket.SOCK_DGRAM)
    found.setsockopt(*_MTU_DISCOVER[family], _PMTUDISC_DO)
    found.settimeout(5)
    return found


def _fragments(host: Host) -> int:
    """How many fragments the host has made, of packets of either family."""
    made = 0
    for name in ("snmp", "snmp6"):
        text = _output("ip", "netns", "exec", host.namespace, "cat", f"/proc/net/{name}")
        rows = [line.split() for line in text.splitlines()]
        made += sum(int(row[1]) for row in rows if row[0] == "Ip6FragCreates")
        keys, values = (row for row in rows if row[0] == "Ip:") if name == "snmp" else ([], [])
        made += sum(int(value) for key, value in zip(keys, values, strict=True) if key == "FragCreates")
    return made


@pytest.mark.parametrize(
    ("family", "backend", "mtu"),
    [
        (Stack.IPV4, "vxlan", 1450),
        (Stack.DUAL, "vxlan", 1430),
        (Stack.IPV6, "vxlan", 1430),
        (Stack.DUAL, "host-gw", 1500),
        (Stack.IPV4, "udp", 1472),
        (Stack.DUAL, "udp", 1452),
        (Stack.IPV6, "udp", 1452),
    ],
)
def test_full_packets_pass_whole_and_one_byte_more_is_refused(family: Stack, backend: str, mtu: int) -> None:
    """W16: over IPv6, VXLAN costs 70 bytes; with 50 the host would have to cut every full packet in two."""
    with running(_spec(family, backend)) as lab:
        h1, h2 = lab.plan.hosts
        for one in family.families:
            source, target = lab.containers(h1, one)[0], lab.containers(h2, one)[0]
            open_socket = functools.partial(_udp, one)
            with (
                namespaces.inside(source.namespace, open_socket) as sender,
                namespaces.inside(target.namespace, open_socket) as receiver,
            ):
                receiver.bind((format_address(target.address), 0))
                full = bytes(mtu - _HEADERS[one])
                sender.sendto(full, receiver.getsockname())
                assert receiver.recv(mtu) == full
                with pytest.raises(OSError, match="Message too long") as refused:
                    sender.sendto(full + b"\0", receiver.getsockname())
                assert refused.value.errno == errno.EMSGSIZE
        assert [_fragments(host) for host in (h1, h2)] == [0, 0]


def _subnet_env(lab: Lab) -> str:
    return lab.state.subnet_file("h1").read_text()


def _said(lab: Lab, *parts: str) -> list[str]:
    return [line for line in lab.state.log_lines("h1") if all(part in line for part in parts)]


def _device_mtu(host: Host, name: str) -> int:
    (device,) = json.loads(_ip(host, "-json", "link", "show", name))
    return int(device["mtu"])


@pytest.mark.parametrize(
    ("backend", "mtu", "reason", "inner"),
    [
        (
            "vxlan",
            1300,
            ("1230 bytes are left", "set Backend.MTU to 1350 or more, or raise the interface's"),
            1250,
        ),
        ("vxlan", 1200, ("no usable IPv6 address: its MTU is 1200, and IPv6 needs 1280",), 1150),
        ("host-gw", 1200, ("no usable IPv6 address: its MTU is 1200, and IPv6 needs 1280",), 1200),
    ],
)
def test_mtu_that_is_too_low_for_ipv6_does_not_hold_ipv4_back(
    backend: str, mtu: int, reason: tuple[str, ...], inner: int
) -> None:
    with running(_spec(backend=backend)) as lab:
        h1 = lab.plan.hosts[0]
        before, leases = _subnet_env(lab), _snapshot(lab).records.keys()
        _ip(h1, "link", "set", "eth0", "mtu", str(mtu))
        _until(lambda: f"FLANNEL_MTU={inner}\n" in _subnet_env(lab))
        _until(lambda: bool(_said(lab, "following the host for IPv6 fails", *reason)))
        assert "FLANNEL_SUBNET=" in _subnet_env(lab)
        assert "IPV6" not in _subnet_env(lab)  # no container could have such an address
        if backend == "vxlan":
            assert _device_mtu(h1, "flannel.1") == inner
            assert _device_mtu(h1, "flannel-v6.1") == 1430  # what stands stays
        assert {pair.family for pair in lab.check(tries=1).pairs if pair.ok} >= {"ipv4"}
        _ip(h1, "link", "set", "eth0", "mtu", "1500")
        if mtu < 1280:  # the kernel took the address away
            address = format_address(h1.addresses[_IPV6])
            _ip(h1, "address", "add", f"{address}/64", "dev", "eth0", "nodad")
        _until(lambda: _subnet_env(lab) == before)
        _until(lambda: bool(_said(lab, "following the host for IPv6 works again")))
        assert len(_said(lab, "following the host for IPv6 fails", *reason)) == 1
        assert _snapshot(lab).records.keys() == leases
        assert lab.check().reachable


def test_family_that_loses_its_address_does_not_hold_the_other_back() -> None:
    """The other one's address changes meanwhile, and is followed."""
    with running(_spec()) as lab:
        h1, h2 = lab.plan.hosts
        _ip(h1, "address", "delete", f"{format_address(h1.addresses[_IPV6])}/64", "dev", "eth0")
        _until(lambda: bool(_said(lab, "following the host for IPv6 fails", "no usable IPv6 address")))
        _ip(h1, "address", "delete", f"{format_address(h1.addresses[_IPV4])}/24", "dev", "eth0")
        _ip(h1, "address", "add", "198.18.0.77/24", "dev", "eth0")
        _until(lambda: " dst 198.18.0.77 " in _fdb(h2, _IPV4))
        assert {pair.family for pair in lab.check(tries=1).pairs if pair.ok} >= {"ipv4"}
        assert "FLANNEL_IPV6_SUBNET=" in _subnet_env(lab)  # the address may be back any moment
        _ip(h1, "address", "add", "2001:db8::77/64", "dev", "eth0", "nodad")
        _until(lambda: " dst 2001:db8::77 " in _fdb(h2, _IPV6))
        assert lab.check().reachable


@pytest.mark.parametrize("family", [_IPV4, _IPV6], ids=str)
def test_udp_peer_whose_address_of_one_family_changes_is_followed(family: Family) -> None:
    """W4, with real agents at both ends: neither knows of the change but by the lease."""
    moved = {_IPV4: "198.18.0.77", _IPV6: "2001:db8::77"}[family]
    length = {_IPV4: 24, _IPV6: 64}[family]
    with running(_spec(backend="udp")) as lab:
        h2 = lab.plan.hosts[1]
        leases = _snapshot(lab).records.keys()
        _ip(h2, "address", "delete", f"{format_address(h2.addresses[family])}/{length}", "dev", "eth0")
        _ip(h2, "address", "add", f"{moved}/{length}", "dev", "eth0", "nodad")

        def is_published() -> bool:
            legs = [record.lease.leg(family) for record in _snapshot(lab).records.values()]
            return parse_address(moved) in {leg.public for leg in legs if leg is not None}

        _until(is_published)
        assert lab.check().reachable
        assert _snapshot(lab).records.keys() == leases


# What becomes of a peer's lease


class _Ghost:
    """A peer that is a lease and nothing else, for the real agents to follow.

    It has the first subnets, which are never handed out.
    """

    def __init__(self, lab: Lab, families: tuple[Family, ...]) -> None:
        self._lab = lab
        legs = {family: self.leg(family) for family in families}
        lease = Lease.make(legs, lab.plan.spec.backend)
        self._record = self._write(lambda store: store.create(lease, holder=Holder("ghost")))

    def leg(self, family: Family, *, public: int = 200, mac: int = 200) -> Leg:
        """What it says in one family."""
        subnet, address = {
            _IPV4: ("10.5.0.0/24", f"198.18.0.{public}"),
            _IPV6: ("fd00:5::/64", f"2001:db8::{public}"),
        }[family]
        data = json.dumps({"VNI": 1, "VtepMAC": f"02:00:00:00:0{str(family)[-1]}:{mac:02x}"}).encode()
        with_data = self._lab.plan.spec.backend == "vxlan"
        return Leg(Prefix.parse(subnet), parse_address(address), data if with_data else None)

    def change(self, family: Family, leg: Leg) -> None:
        """Write its lease with another leg in one family."""
        lease = self._record.lease
        legs = {own.subnet.family: own for own in lease.legs} | {family: leg}
        changed = msgspec.structs.replace(self._record, lease=Lease.make(legs, lease.backend_type))
        self._record = self._write(lambda store: store.replace(changed))

    def _write(self, write: Callable[..., object]) -> Record:
        async def act() -> Record:
            store = open_store(self._lab.state.store_url)
            try:
                record: Record = await write(store)  # type: ignore[misc]
                return record
            finally:
                await store.close()

        return asyncio.run(act())


def _followed(host: Host, leg: Leg) -> bool:
    """Whether the host's kernel has what a VXLAN peer's leg asks for."""
    family, device = leg.subnet.family, _DEVICES[leg.subnet.family]
    mac, base = format_mac(vtep_mac(leg)), format_address(leg.subnet.address)
    forwarding = f"{mac} dst {format_address(leg.public or b'')} self permanent"
    neighbours = _ip(host, f"-{str(family)[-1]}", "neigh", "show", base, "dev", device)
    return (
        forwarding in _fdb(host, family)
        and f"{base} lladdr {mac} PERMANENT" in neighbours
        and f"via {base} dev {device}" in _route(host, leg.subnet)
    )


@pytest.mark.parametrize("family", [_IPV4, _IPV6], ids=str)
@pytest.mark.parametrize("change", [{"public": 201}, {"mac": 201}], ids=["public address", "MAC"])
def test_change_of_one_family_alone_is_followed(family: Family, change: dict[str, int]) -> None:
    """W4."""
    other = _IPV6 if family is _IPV4 else _IPV4
    with running(_spec(hosts=1)) as lab:
        (h1,) = lab.plan.hosts
        ghost = _Ghost(lab, (_IPV4, _IPV6))
        before, after, untouched = ghost.leg(family), ghost.leg(family, **change), ghost.leg(other)
        _until(lambda: _followed(h1, before) and _followed(h1, untouched))
        ghost.change(family, after)
        _until(lambda: _followed(h1, after))
        assert not _followed(h1, before)
        assert _fdb(h1, family).count(" dst ") == 1
        assert _followed(h1, untouched)


def test_public_address_of_one_family_alone_moves_its_host_gw_route() -> None:
    """W4, where the address itself is the router."""
    with running(_spec(backend="host-gw", hosts=1)) as lab:
        (h1,) = lab.plan.hosts
        ghost = _Ghost(lab, (_IPV4, _IPV6))
        for family, other in ((_IPV4, _IPV6), (_IPV6, _IPV4)):
            moved = ghost.leg(family, public=201)
            _until(lambda: bool(_route(h1, ghost.leg(family).subnet)))  # noqa: B023 - used at once
            stays = _route(h1, ghost.leg(other).subnet)
            ghost.change(family, moved)
            router = f"via {format_address(moved.public or b'')} dev eth0"
            _until(lambda: router in _route(h1, moved.subnet))  # noqa: B023 - used at once
            assert _route(h1, ghost.leg(other).subnet) == stays


@pytest.mark.parametrize(
    ("own", "peers"),
    [
        (Stack.IPV4, (_IPV4, _IPV6)),
        (Stack.IPV6, (_IPV4, _IPV6)),
        (Stack.DUAL, (_IPV4,)),
        (Stack.DUAL, (_IPV6,)),
    ],
)
def test_peer_with_other_families_is_served_in_those_both_have(own: Stack, peers: tuple[Family, ...]) -> None:
    """W5."""
    with running(_spec(own, hosts=2)) as lab:
        h1, _ = lab.plan.hosts
        ghost = _Ghost(lab, peers)
        shared = [ghost.leg(family) for family in peers if family in own.families]
        _until(lambda: all(_followed(h1, leg) for leg in shared))
        assert lab.check().reachable
        assert all(host.agent_pid for host in lab.status().hosts)


@pytest.mark.parametrize("family", [_IPV4, _IPV6], ids=str)
def test_family_whose_data_are_malformed_leaves_the_other_alone(family: Family) -> None:
    other = _IPV6 if family is _IPV4 else _IPV4
    with running(_spec(hosts=1)) as lab:
        (h1,) = lab.plan.hosts
        ghost = _Ghost(lab, (_IPV4, _IPV6))
        _until(lambda: _followed(h1, ghost.leg(_IPV4)) and _followed(h1, ghost.leg(_IPV6)))
        ghost.change(family, msgspec.structs.replace(ghost.leg(family), data=b'{"VNI":1}'))
        _until(lambda: not _followed(h1, ghost.leg(family)))
        assert _followed(h1, ghost.leg(other))
