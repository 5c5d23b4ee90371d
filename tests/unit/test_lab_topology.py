# SPDX-License-Identifier: Apache-2.0
import msgspec
import pytest

from loden.address import Family, Prefix, format_address
from loden.errors import LabError
from loden.lab.network import network_text, require_room
from loden.lab.topology import Plan, Spec, Stack, Topology, measured_family, plan
from loden.lab.wiring import (
    HostSubnets,
    bridge_wiring,
    container_wirings,
    first_settings,
    read_subnet_env,
    switch_wiring,
    underlay_wiring,
)
from loden.network import parse_network

_IPV4, _IPV6 = Family.IPV4, Family.IPV6


def _addresses(planned: Plan, family: Family = _IPV4) -> list[str]:
    return [format_address(host.addresses[family]) for host in planned.hosts]


def test_plan_names_namespaces_after_lab_host_and_container() -> None:
    planned = plan(Spec(name="x", hosts=2, containers=2))
    assert planned.namespaces == ("x-net", "x-h1", "x-h1-c1", "x-h1-c2", "x-h2", "x-h2-c1", "x-h2-c2")


def test_switched_hosts_share_one_segment_without_a_router() -> None:
    planned = plan(Spec(hosts=3))
    assert _addresses(planned) == ["198.18.0.1", "198.18.0.2", "198.18.0.3"]
    assert [segment.routers for segment in planned.segments] == [{}]


@pytest.mark.parametrize(
    ("family", "hosts", "routers"),
    [
        (
            _IPV4,
            ["198.18.0.1", "198.18.1.1", "198.18.2.1"],
            ["198.18.0.254", "198.18.1.254", "198.18.2.254"],
        ),
        (
            _IPV6,
            ["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:2::1"],
            ["2001:db8::fe", "2001:db8:0:1::fe", "2001:db8:0:2::fe"],
        ),
    ],
)
def test_routed_hosts_have_a_segment_and_a_router_each(
    family: Family, hosts: list[str], routers: list[str]
) -> None:
    planned = plan(Spec(hosts=3, topology=Topology.ROUTED, family=Stack.DUAL))
    assert _addresses(planned, family) == hosts
    assert [format_address(segment.routers[family]) for segment in planned.segments] == routers
    assert switch_wiring(planned).forwards == (_IPV4, _IPV6)


def test_mixed_hosts_are_two_to_a_segment() -> None:
    assert _addresses(plan(Spec(hosts=3, topology=Topology.MIXED))) == [
        "198.18.0.1",
        "198.18.0.2",
        "198.18.1.1",
    ]


@pytest.mark.parametrize("topology", list(Topology))
def test_most_hosts_have_addresses_of_their_own(topology: Topology) -> None:
    planned = plan(Spec(hosts=250, topology=topology, family=Stack.DUAL))
    addresses = {address for host in planned.hosts for address in host.addresses.values()}
    assert len(addresses) == 2 * 250
    assert len({host.mac for host in planned.hosts}) == 250
    assert not addresses & {router for segment in planned.segments for router in segment.routers.values()}


def test_plan_survives_json() -> None:
    planned = plan(Spec(hosts=2, containers=2, topology=Topology.MIXED, family=Stack.DUAL))
    assert msgspec.json.decode(msgspec.json.encode(planned), type=Plan) == planned


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Spec(name=""), "not a usable name"),
        (Spec(name="../x"), "not a usable name"),
        (Spec(name="a b"), "not a usable name"),
        (Spec(name="-a"), "not a usable name"),
        (Spec(name="x" * 65), "not a usable name"),
        (Spec(hosts=0), "0 hosts: out of range"),
        (Spec(hosts=251), "251 hosts: out of range"),
        (Spec(containers=0), "0 containers: out of range"),
        (Spec(containers=101), "101 containers: out of range"),
    ],
)
def test_plan_refuses(spec: Spec, said: str) -> None:
    with pytest.raises(LabError, match=said):
        plan(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Spec(network="10.5.0.0"), "--network"),
        (Spec(network="198.0.0.0/8"), "overlaps"),
        (Spec(network="fd00::/48"), "is not an IPv4 range"),
        (Spec(network6="10.5.0.0/16", family=Stack.IPV6), "--network6 10.5.0.0/16 is not an IPv6 range"),
        (Spec(network6="2001:db8:1::/48", family=Stack.DUAL), "overlaps"),
        (Spec(backend_config="{"), "--backend-config"),
        (Spec(backend_config="[]"), "--backend-config"),
        (Spec(backend_config='{"type": "udp"}'), "names a Type"),
    ],
)
def test_network_text_refuses(spec: Spec, said: str) -> None:
    with pytest.raises(LabError, match=said):
        network_text(spec)


def test_network_text_is_the_agents_configuration() -> None:
    text = network_text(Spec(backend="host-gw", backend_config='{"Option": 1}'))
    assert msgspec.json.decode(text) == {
        "Network": "10.5.0.0/16",
        "Backend": {"Type": "host-gw", "Option": 1},
    }


def test_network_text_has_the_keys_of_its_families() -> None:
    dual = parse_network(network_text(Spec(family=Stack.DUAL)))
    assert [str(part.network) for part in dual.ranges] == ["10.5.0.0/16", "fd00:5::/48"]
    alone = parse_network(network_text(Spec(family=Stack.IPV6, network="not looked at")))
    assert [str(part.network) for part in alone.ranges] == ["fd00:5::/48"]


def test_every_family_has_an_underlay_of_its_own_and_the_first_is_measured() -> None:
    assert measured_family(Spec()) is _IPV4
    assert measured_family(Spec(family=Stack.IPV6)) is _IPV6
    assert measured_family(Spec(family=Stack.DUAL)) is _IPV4
    assert measured_family(Spec(family=Stack.DUAL, underlay="ipv6")) is _IPV6


@pytest.mark.parametrize(("family", "underlay"), [(Stack.IPV4, "ipv6"), (Stack.IPV6, "ipv4")])
def test_one_family_over_the_other_is_refused(family: Stack, underlay: str) -> None:
    with pytest.raises(LabError, match=f"--underlay {underlay} .* carries no --family {family}"):
        plan(Spec(family=family, underlay=underlay))


def test_switch_wiring_is_the_segments_and_a_wire_to_each_host() -> None:
    planned = plan(Spec(name="x", hosts=2, topology=Topology.ROUTED))
    assert switch_wiring(planned).commands == (
        "link set lo up",
        "link add s0 mtu 1500 type bridge",
        "link add s1 mtu 1500 type bridge",
        "link add h1 mtu 1500 type veth peer name eth0 mtu 1500 netns x-h1 address 02:00:00:00:00:01",
        "link add h2 mtu 1500 type veth peer name eth0 mtu 1500 netns x-h2 address 02:00:00:00:00:02",
        "link set h1 master s0 up",
        "link set h2 master s1 up",
        "addr add 198.18.0.254/24 dev s0",
        "addr add 198.18.1.254/24 dev s1",
        "link set s0 up",
        "link set s1 up",
    )


def test_underlay_wiring_knows_the_hosts_of_the_segment() -> None:
    planned = plan(Spec(hosts=3, topology=Topology.MIXED))
    assert underlay_wiring(planned, planned.hosts[0]).commands == (
        "link set lo up",
        "addr add 198.18.0.1/24 dev eth0",
        "link set eth0 up",
        "neigh add 198.18.0.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent",
        "route add default via 198.18.0.254",
    )


def test_underlay_wiring_has_each_family() -> None:
    planned = plan(Spec(hosts=3, topology=Topology.MIXED, family=Stack.DUAL))
    assert underlay_wiring(planned, planned.hosts[0]).commands == (
        "link set lo up",
        "addr add 198.18.0.1/24 dev eth0",
        "addr add 2001:db8::1/64 dev eth0",
        "link set eth0 up",
        "neigh add 198.18.0.2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent",
        "neigh add 2001:db8::2 lladdr 02:00:00:00:00:02 dev eth0 nud permanent",
        "route add default via 198.18.0.254",
        "route add default via 2001:db8::fe",
    )


def test_settings_are_those_of_the_families_there_are() -> None:
    for families, folders in (((_IPV4,), {"ipv4"}), ((_IPV4, _IPV6), {"ipv4", "ipv6"})):
        assert {name.partition("/")[0] for name in first_settings(families)} == folders
    host = plan(Spec(hosts=1, family=Stack.IPV6))
    assert underlay_wiring(host, host.hosts[0]).settings == {"ipv6/conf/all/forwarding": "1"}


_DUAL = HostSubnets({_IPV4: Prefix.parse("10.5.72.0/24"), _IPV6: Prefix.parse("fd00:5:0:7::/64")}, 1430)


def test_containers_sit_behind_the_hosts_bridge() -> None:
    host = plan(Spec(name="x", hosts=1, family=Stack.DUAL)).hosts[0]
    assert bridge_wiring(host, _DUAL).commands == (
        "link set lo up",
        "link add cni0 mtu 1430 type bridge",
        "link add c1 mtu 1430 type veth peer name eth0 mtu 1430 netns x-h1-c1",
        "link set c1 master cni0 up",
        "addr add 10.5.72.1/24 dev cni0",
        "addr add fd00:5:0:7::1/64 dev cni0",
        "link set cni0 up",
    )
    assert container_wirings(host, _DUAL)[0].commands == (
        "link set lo up",
        "addr add 10.5.72.2/24 dev eth0",
        "addr add fd00:5:0:7::2/64 dev eth0",
        "link set eth0 up",
        "route add default via 10.5.72.1",
        "route add default via fd00:5:0:7::1",
    )


_SUBNET_ENV = """\
FLANNEL_NETWORK=10.5.0.0/16
FLANNEL_SUBNET=10.5.72.1/24
FLANNEL_IPV6_NETWORK=fd00:5::/48
FLANNEL_IPV6_SUBNET=fd00:5:0:7::1/64
FLANNEL_MTU=1430
FLANNEL_IPMASQ=false
"""


def test_subnet_env_gives_subnets_and_mtu() -> None:
    assert read_subnet_env(_SUBNET_ENV, (_IPV4, _IPV6)) == _DUAL
    assert read_subnet_env(_SUBNET_ENV, (_IPV6,)).subnets == {_IPV6: Prefix.parse("fd00:5:0:7::/64")}


def test_subnet_env_without_a_family_that_the_lab_has_is_refused() -> None:
    with pytest.raises(LabError, match="FLANNEL_IPV6_SUBNET"):
        read_subnet_env("FLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\n", (_IPV4, _IPV6))


@pytest.mark.parametrize(
    "text",
    ["", "FLANNEL_SUBNET=10.5.72.1/24\n", "FLANNEL_SUBNET=x\nFLANNEL_MTU=1\n", "FLANNEL_SUBNET=10.5"],
)
def test_subnet_env_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(LabError, match=r"read subnet\.env"):
        read_subnet_env(text, (_IPV4,))


def test_node_is_found_by_short_and_full_name() -> None:
    planned = plan(Spec(name="x", hosts=1))
    assert planned.namespace_of("h1-c1") == planned.namespace_of("x-h1-c1") == "x-h1-c1"
    with pytest.raises(LabError, match="no such host or container"):
        planned.namespace_of("h2")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (Spec(network="10.5.0.0/22", hosts=20), "too few for 20 hosts"),
        (Spec(network="10.5.0.0/24", containers=62), "room for 61 containers, too few for 62"),
        (Spec(family=Stack.DUAL, network6="fd00:5::/62", hosts=4), "fd00:5::/62 has 3 subnets of /64"),
        (Spec(family=Stack.IPV6, network6="fd00:5::/122", containers=14), "room for 13 containers"),
    ],
)
def test_network_without_room_is_refused(spec: Spec, said: str) -> None:
    with pytest.raises(LabError, match=said):
        require_room(spec, parse_network(network_text(spec)))


def test_network_with_room_is_not_refused() -> None:
    spec = Spec(network="10.5.0.0/24", hosts=3, containers=61)
    require_room(spec, parse_network(network_text(spec)))
