# SPDX-License-Identifier: Apache-2.0
"""What each backend makes of options, hosts and leases (COMPAT §7.1 to §7.3)."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Family, Prefix, parse_address
from loden.backend_options import decode_options
from loden.backends import describe, find
from loden.backends.alloc import Alloc
from loden.backends.base import Backend, Host
from loden.backends.host_gw import HostGw
from loden.backends.vxlan import Vxlan, stable_mac, vtep_mac
from loden.errors import ConfigError, LeaseError, MalformedLease, PeerUnreachable
from loden.interface import Hop, HostFacts, Link, Underlay
from loden.lease import Leg
from loden.network import Network, parse_network
from loden.tables.entries import FdbEntry, LinkAddress, Neighbour, Route, VxlanLink

NETWORKS = {
    "v4": b'{"Network": "10.5.0.0/16"}',
    "v6": b'{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}',
    "dual": b'{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}',
}
ADDRESSES = {Family.IPV4: parse_address("192.0.2.1"), Family.IPV6: parse_address("2001:db8::1")}
MAC = bytes.fromhex("c6d2326f8f44")


def host(
    network: str = "v4",
    *,
    mtu: int = 1500,
    public: dict[Family, bytes] | None = None,
    links: tuple[Link, ...] = (),
) -> Host:
    parsed: Network = parse_network(NETWORKS[network])
    addresses = {family: ADDRESSES[family] for family in parsed.families}
    underlay = Underlay(name="eth0", index=2, mtu=mtu, addresses=addresses, public=addresses | (public or {}))
    return Host(network=parsed, underlay=underlay, facts=HostFacts(links))


def vxlan(given_host: Host | None = None, options: str = "{}") -> Vxlan:
    decoded, _notes = decode_options(options.encode(), Vxlan.Options)
    return Vxlan(given_host or host(), decoded)


def host_gw(given_host: Host | None = None) -> HostGw:
    return HostGw(given_host or host(), HostGw.Options())


def leg(
    subnet: str = "10.5.9.0/24",
    public: str | None = "192.0.2.9",
    data: bytes | None = b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}',
) -> Leg:
    return Leg(Prefix.parse(subnet), parse_address(public) if public else None, data)


PEERS = {"v4": leg(), "v6": leg("fd00:5:0:9::/64", "2001:db8::9")}
OWN = {"v4": leg("10.5.1.0/24", "192.0.2.1"), "v6": leg("fd00:5:0:1::/64", "2001:db8::1")}
ON_LINK = Hop(index=2, device="eth0")
ROUTED = Hop(index=2, device="eth0", via=parse_address("192.0.2.254"))


class TestAlloc:
    def test_wants_nothing(self) -> None:
        backend = Alloc(host(), Alloc.Options())
        assert (backend.lease_type, backend.mtu, backend.needs_hops) == ("", 1500, False)
        assert backend.data(Family.IPV4) is None
        assert backend.own_entries(OWN["v4"]) == backend.entries(PEERS["v4"], None) == ()


class TestHostGw:
    @pytest.mark.parametrize("family", ["v4", "v6"])
    def test_one_route_over_the_peer_itself(self, family: str) -> None:
        backend = host_gw(host(family))
        peer = PEERS[family]
        assert backend.entries(peer, ON_LINK) == (Route(peer.subnet, "eth0", peer.public),)
        assert backend.own_entries(OWN[family]) == ()
        assert (backend.lease_type, backend.mtu, backend.needs_hops) == ("host-gw", 1500, True)
        assert backend.data(Family.IPV4) is None

    def test_route_goes_over_the_device_that_leads_to_the_peer(self) -> None:
        (route,) = host_gw().entries(PEERS["v4"], Hop(index=3, device="eth1"))
        assert isinstance(route, Route)
        assert route.device == "eth1"

    def test_peer_behind_a_router_is_refused_and_the_router_named(self) -> None:
        with pytest.raises(PeerUnreachable) as caught:
            host_gw().entries(PEERS["v4"], ROUTED)
        assert caught.value.message == (
            "route 10.5.9.0/24: the peer 192.0.2.9 is behind the router 192.0.2.254, "
            "not on the network of eth0"
        )
        assert "use vxlan" in caught.value.hint

    def test_peer_that_nothing_leads_to_is_refused(self) -> None:
        with pytest.raises(PeerUnreachable, match=r"no route to the peer's address 192\.0\.2\.9"):
            host_gw().entries(PEERS["v4"], None)

    def test_peer_without_an_address_of_the_family_is_refused(self) -> None:
        with pytest.raises(PeerUnreachable, match="names no IPv6 address"):
            host_gw(host("v6")).entries(leg("fd00:5:0:9::/64", None), ON_LINK)

    @pytest.mark.parametrize("family", [Family.IPV4, Family.IPV6])
    def test_public_address_that_is_not_on_the_interface_is_refused_in_both_families(
        self, family: Family
    ) -> None:
        """Flannel looks at IPv4 only (W38)."""
        elsewhere = {Family.IPV4: parse_address("198.51.100.1"), Family.IPV6: parse_address("2001:db8:1::1")}
        with pytest.raises(ConfigError, match="host-gw needs the public address") as caught:
            host_gw(host("dual", public={family: elsewhere[family]}))
        assert "--public-ip" in caught.value.hint


class TestVxlan:
    def test_host_itself_ipv4(self) -> None:
        backend = vxlan()
        link = VxlanLink(
            name="flannel.1",
            vni=1,
            local=ADDRESSES[Family.IPV4],
            underlay="eth0",
            mtu=1450,
            mac=stable_mac(ADDRESSES[Family.IPV4], "flannel.1"),
        )
        assert tuple(backend.own_entries(OWN["v4"])) == (
            link, LinkAddress("flannel.1", parse_address("10.5.1.0"), 32),
        )  # fmt: skip
        assert (backend.lease_type, backend.needs_hops) == ("vxlan", False)

    def test_host_itself_ipv6(self) -> None:
        link, address = vxlan(host("v6")).own_entries(OWN["v6"])
        assert isinstance(link, VxlanLink)
        assert (link.name, link.local, link.mtu) == ("flannel-v6.1", ADDRESSES[Family.IPV6], 1430)
        assert address == LinkAddress("flannel-v6.1", parse_address("fd00:5:0:1::"), 128)

    @pytest.mark.parametrize(("family", "device"), [("v4", "flannel.1"), ("v6", "flannel-v6.1")])
    def test_peer_gets_neighbour_forwarding_entry_and_onlink_route(self, family: str, device: str) -> None:
        peer = PEERS[family]
        assert peer.public is not None
        assert tuple(vxlan(host(family)).entries(peer, None)) == (
            Neighbour(device, peer.subnet.address, MAC),
            FdbEntry(device, MAC, peer.public),
            Route(peer.subnet, device, peer.subnet.address, onlink=True),
        )

    def test_every_option_arrives_at_the_device(self) -> None:
        options = '{"Type":"vxlan","VNI":7,"port":4789,"Mtu":1400,"GBP":true,"Learning":true}'
        (link, _), (neighbour, *_) = (
            vxlan(options=options).own_entries(OWN["v4"]), vxlan(options=options).entries(PEERS["v4"], None)
        )  # fmt: skip
        assert isinstance(link, VxlanLink)
        assert isinstance(neighbour, Neighbour)
        assert (link.name, link.vni, link.port, link.mtu) == ("flannel.7", 7, 4789, 1350)
        assert (link.gbp, link.learning, neighbour.device) == (True, True, "flannel.7")

    @pytest.mark.parametrize(
        ("option", "value"),
        [("VNI", -1), ("VNI", 1 << 24), ("Port", 65536), ("MTU", -1), ("GBP", 1), ("Learning", '"yes"')],
    )
    def test_option_out_of_range_is_named(self, option: str, value: object) -> None:
        with pytest.raises(ConfigError, match=rf"Backend\.{option}: .*{value} is not allowed"):
            vxlan(options=f'{{"{option}": {value}}}')

    @pytest.mark.parametrize(
        ("network", "underlay", "option", "inner"),
        [
            ("v4", 1500, 0, 1450),
            ("v6", 1500, 0, 1430),  # W16: flannel takes 50 here too
            ("dual", 1500, 0, 1430),
            ("v4", 9001, 0, 8951),
            ("v4", 9001, 1500, 1450),
            ("v4", 1500, 9001, 1450),  # the kernel would not give it more
            ("v6", 1350, 0, 1280),
            ("v4", 626, 0, 576),
        ],
    )
    def test_mtu(self, network: str, underlay: int, option: int, inner: int) -> None:
        assert vxlan(host(network, mtu=underlay), f'{{"MTU": {option}}}').mtu == inner

    @pytest.mark.parametrize(
        ("network", "mtu", "needed"), [("v4", 625, 626), ("v6", 1349, 1350), ("dual", 1349, 1350)]
    )
    def test_mtu_that_leaves_too_little_is_refused(self, network: str, mtu: int, needed: int) -> None:
        with pytest.raises(ConfigError, match=r"Backend\.MTU: .* inside VXLAN") as caught:
            vxlan(host(network, mtu=mtu))
        assert f"set Backend.MTU to {needed} or more" in caught.value.hint

    def test_data_is_what_flannel_picks_apart_as_text(self) -> None:
        """Compact, VNI first, no other text member (COMPAT §7.3)."""
        given_host = host(links=(Link(index=5, name="flannel.1", kind="vxlan", mac=MAC),))
        assert vxlan(given_host).data(Family.IPV4) == b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}'

    def test_address_of_a_standing_device_is_kept(self) -> None:
        given_host = host("dual", links=(Link(index=5, name="flannel.1", kind="vxlan", mac=MAC),))
        backend = vxlan(given_host)
        (ipv4, _), (ipv6, _) = backend.own_entries(OWN["v4"]), backend.own_entries(OWN["v6"])
        assert isinstance(ipv4, VxlanLink)
        assert isinstance(ipv6, VxlanLink)
        assert ipv4.mac == MAC
        assert ipv6.mac != MAC

    def test_address_is_the_same_after_every_reboot_and_another_on_every_host_and_device(self) -> None:
        """Peers that missed a change would send into the void (users' pain 5, W9)."""
        assert stable_mac(ADDRESSES[Family.IPV4], "flannel.1").hex(":") == "ee:8e:1c:ec:b1:20"
        macs = {stable_mac(bytes((192, 0, 2, last)), name) for last in range(256) for name in ("a", "b")}
        assert len(macs) == 512
        assert all(mac[0] & 3 == 2 and len(mac) == 6 for mac in macs)  # unicast, locally administered

    def test_direct_routing_goes_around_the_device_where_it_can(self) -> None:
        backend = vxlan(options='{"DirectRouting": true}')
        assert backend.needs_hops
        peer = PEERS["v4"]
        assert backend.entries(peer, ON_LINK) == (Route(peer.subnet, "eth0", peer.public),)
        assert len(backend.entries(peer, ROUTED)) == 3
        assert len(backend.entries(peer, None)) == 3

    def test_direct_peer_needs_no_data(self) -> None:
        backend = vxlan(options='{"DirectRouting": true}')
        assert len(backend.entries(leg(data=None), ON_LINK)) == 1

    def test_peer_without_an_address_of_the_family_is_refused(self) -> None:
        with pytest.raises(PeerUnreachable, match="names no IPv6 address"):
            vxlan(host("v6")).entries(leg("fd00:5:0:9::/64", None), None)

    @pytest.mark.parametrize(
        "data",
        [
            b'{"VNI":99,"VtepMAC":"c6:d2:32:6f:8f:44"}',  # receivers ignore the VNI
            b'{"VtepMAC":"c6:d2:32:6f:8f:44"}',
            b'{"VNI":"x","VtepMAC":"C6:D2:32:6F:8F:44","More":[1]}',
        ],
    )
    def test_data_of_peers_may_vary(self, data: bytes) -> None:
        assert vtep_mac(leg(data=data)) == MAC

    @pytest.mark.parametrize(
        "data",
        [
            None, b"null", b"[]", b"{}", b'""', b'{"VNI":1}', b'{"VNI":1,"VtepMAC":null}', b"{", b"\xff",
            b'{"VtepMAC":""}', b'{"VtepMAC":"c6:d2:32"}', b'{"VtepMAC":"00:00:00:00:00:00"}',
            b'{"VtepMAC":"ff:ff:ff:ff:ff:ff"}', b'{"VtepMAC":"01:00:5e:00:00:01"}',
            b'{"VtepMAC":"zz:d2:32:6f:8f:44"}',
            b'{"VtepMAC":"c6:d2:32:6f:8f:44:00"}', b'{"VtepMAC":7}', b'{"VtepMAC":"\xff"}',
        ],
    )  # fmt: skip
    def test_malformed_data_names_the_lease(self, data: bytes | None) -> None:
        with pytest.raises(MalformedLease, match=r"read BackendData of 10\.5\.9\.0/24: "):
            vxlan().entries(leg(data=data), None)

    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["VNI", "VtepMAC", "x"]), inner),
    )

    @given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
    def test_no_data_does_more_than_be_refused(self, data: bytes) -> None:
        try:
            entries = vxlan().entries(leg(data=data), None)
        except LeaseError:
            return
        assert len(entries) == 3


THIRD_PARTY = """
import msgspec

class Options(msgspec.Struct, frozen=True):
    speed: int = 7

class Carrier:
    Options = Options
    lease_type = "pigeon"
"""


class TestDiscovery:
    @pytest.fixture
    def third_party(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """An installed distribution that brings two backends, one of which is broken."""
        (tmp_path / "pigeon_post.py").write_text(THIRD_PARTY)
        metadata = tmp_path / "pigeon_post-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeon-post\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(
            "[loden.backends]\npigeon = pigeon_post:Carrier\nowl = pigeon_post:Owl\nbat = cave:Bat\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        return tmp_path

    @pytest.mark.parametrize(("name", "kind"), [("alloc", Alloc), ("host-gw", HostGw), ("vxlan", Vxlan)])
    def test_built_in_ones_go_by_name(self, name: str, kind: type[Backend]) -> None:
        assert find(name) is kind
        assert describe(name) is kind.Options

    def test_unknown_one_is_named_with_those_there_are(self) -> None:
        with pytest.raises(ConfigError, match=r"Backend\.Type: unknown backend 'vlan'") as caught:
            find("vlan")
        assert "ali-vpc, alloc, aws-vpc, gce, host-gw, udp, vxlan" in caught.value.hint

    @pytest.mark.usefixtures("third_party")
    def test_third_partys_are_found_by_their_entry_points(self) -> None:
        assert find("pigeon").lease_type == "pigeon"
        assert decode_options(b'{"Speed": 9}', describe("pigeon")) == (describe("pigeon")(9), ())
        with pytest.raises(ConfigError) as caught:
            find("vlan")
        assert "pigeon" in caught.value.hint

    @pytest.mark.usefixtures("third_party")
    @pytest.mark.parametrize("name", ["owl", "bat"])
    def test_one_that_cannot_be_loaded_is_named_with_its_place(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"backend '{name}' cannot be loaded from") as caught:
            find(name)
        assert "install" in caught.value.hint

    def test_entries_are_values(self) -> None:
        entries = vxlan().entries(PEERS["v4"], None)
        assert len({*entries, *vxlan().entries(PEERS["v4"], None)}) == 3
        assert all(isinstance(entry, msgspec.Struct) for entry in entries)
