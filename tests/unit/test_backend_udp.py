# SPDX-License-Identifier: Apache-2.0
"""What ``udp`` makes of options, hosts and leases (COMPAT §7.5)."""

import json

import msgspec
import pytest

from loden.address import Family, Prefix, parse_address
from loden.backend_options import decode_options
from loden.backends.base import Host
from loden.backends.udp import Udp
from loden.errors import ConfigError, PeerUnreachable
from loden.interface import Hop
from loden.lease import Leg, public_port
from loden.tables.entries import LinkAddress, Route, TunLink, UdpPeer, UdpTunnel
from loden.tables.udp_detour import detour_link
from tests.unit.test_backends import ADDRESSES, OWN, ROUTED, host

LACKS = {family: {"ebpf": "no eBPF here"} for family in Family}


def udp(given: Host | None = None, options: str = "{}", *, lacks: bool = False, public_port: int = 0) -> Udp:
    decoded, _notes = decode_options(options.encode(), Udp.Options)
    given = given or host()
    underlay = msgspec.structs.replace(given.underlay, public_port=public_port)
    return Udp(msgspec.structs.replace(given, underlay=underlay, lacks=LACKS if lacks else {}), decoded)


def peer(data: bytes | None = None, public: str | None = "192.0.2.9", subnet: str = "10.5.9.0/24") -> Leg:
    return Leg(Prefix.parse(subnet), parse_address(public) if public else None, data)


def test_host_itself() -> None:
    assert tuple(udp().own_entries(OWN["v4"])) == (
        TunLink("flannel0", 1472),
        UdpTunnel(
            *("flannel0", "eth0", ADDRESSES[Family.IPV4], parse_address("10.5.1.0"), 8285),
            detour="flannel0.in",
        ),
        LinkAddress("flannel0", parse_address("10.5.1.0"), 32),
        Route(Prefix.parse("10.5.0.0/16"), "flannel0"),
    )


def test_host_itself_ipv6_has_a_device_of_its_own() -> None:
    assert tuple(udp(host("dual")).own_entries(OWN["v6"])) == (
        TunLink("flannel-v6", 1452),
        UdpTunnel(
            *("flannel-v6", "eth0", ADDRESSES[Family.IPV6], parse_address("fd00:5:0:1::"), 8285),
            detour="flannel-v6.in",
        ),
        LinkAddress("flannel-v6", parse_address("fd00:5:0:1::"), 128),
        Route(Prefix.parse("fd00:5::/48"), "flannel-v6"),
    )


@pytest.mark.parametrize(("network", "mtu"), [("v4", 1472), ("v6", 1452), ("dual", 1452)])
def test_containers_get_what_every_family_carries(network: str, mtu: int) -> None:
    assert udp(host(network)).mtu == mtu


def test_mtu_option_is_of_the_underlay_and_never_more_than_it_has() -> None:
    assert (udp(options='{"MTU": 1400}').mtu, udp(options='{"MTU": 9000}').mtu) == (1372, 1472)


@pytest.mark.parametrize(("network", "mtu", "needed"), [("v4", 603, 604), ("v6", 1327, 1328)])
def test_underlay_that_is_too_narrow_is_refused(network: str, mtu: int, needed: int) -> None:
    udp(host(network, mtu=needed))
    with pytest.raises(ConfigError, match=r"Backend\.MTU") as caught:
        udp(host(network, mtu=mtu))
    assert f"Backend.MTU to {needed}" in caught.value.hint


class TestAcceleration:
    @pytest.mark.parametrize(
        ("options", "lacks", "expected", "reason"),
        [
            ("{}", False, "auto", ""),
            ("{}", True, "engine", "no eBPF here"),
            ('{"Acceleration": "ebpf"}', True, "ebpf", ""),
            ('{"Acceleration": "engine"}', False, "engine", "asks for the engine"),
        ],
    )
    def test_follows_the_configuration_and_the_host(
        self, options: str, lacks: bool, expected: str, reason: str
    ) -> None:
        backend = udp(options=options, lacks=lacks)
        _link, tunnel, _address, _route = backend.own_entries(OWN["v4"])
        assert isinstance(tunnel, UdpTunnel)
        assert tunnel.acceleration == expected
        assert reason in tunnel.reason
        detours = () if expected == "engine" else (detour_link("flannel0", "eth0", tunnel.local),)
        assert tuple(backend.optional_entries(OWN["v4"])) == detours
        assert tunnel.detour == "".join(one.name for one in detours)

    def test_detour_that_is_not_to_be_had_is_done_without(self) -> None:
        lacks = {Family.IPV4: {"detour": "no VXLAN here"}}
        backend = Udp(msgspec.structs.replace(host(), lacks=lacks), Udp.Options())
        _link, tunnel, _address, _route = backend.own_entries(OWN["v4"])
        assert isinstance(tunnel, UdpTunnel)
        assert (tunnel.acceleration, tunnel.detour) == ("auto", "")
        assert tunnel.detour_reason == "no VXLAN here"
        assert backend.optional_entries(OWN["v4"]) == ()

    def test_is_announced_where_programs_take_packets_in(self) -> None:
        assert udp().data(Family.IPV4) == b'{"Acceleration":"ebpf"}'
        assert udp(lacks=True).data(Family.IPV4) is None
        assert udp(options='{"Acceleration": "engine"}').data(Family.IPV4) is None

    @pytest.mark.parametrize(
        ("data", "is_fast"),
        [(b'{"Acceleration":"ebpf"}', True), (None, False), (b'{"Acceleration":5}', False), (b"[]", False)],
    )
    def test_of_a_peer_is_what_its_lease_says(self, data: bytes | None, is_fast: bool) -> None:
        (entry,) = udp().entries(peer(data), ROUTED)
        assert isinstance(entry, UdpPeer)
        assert entry.is_fast is is_fast

    @pytest.mark.parametrize("text", ['{"Acceleration": "xdp"}', '{"Acceleration": 1}', '{"Port": 0}'])
    def test_options_that_are_none_are_refused(self, text: str) -> None:
        with pytest.raises(ConfigError):
            udp(options=text)


class TestPeers:
    def test_one_line_and_no_route(self) -> None:
        expected = UdpPeer("flannel0", Prefix.parse("10.5.9.0/24"), parse_address("192.0.2.9"), 8285, "eth0")
        assert tuple(udp().entries(peer(), ROUTED)) == (expected,)

    @pytest.mark.parametrize(("via", "is_near"), [(None, True), ("192.0.2.254", False)])
    def test_is_near_where_no_router_stands_between(self, via: str | None, is_near: bool) -> None:
        hop = Hop(2, via=None if via is None else parse_address(via), device="eth0")
        (entry,) = udp().entries(peer(), hop)
        assert isinstance(entry, UdpPeer)
        assert entry.is_near is is_near

    def test_port_of_the_configuration_is_everybodys(self) -> None:
        (entry,) = udp(options='{"Port": 9000}').entries(peer(), ROUTED)
        assert isinstance(entry, UdpPeer)
        assert entry.port == 9000

    def test_several_behind_one_address_are_told_apart_by_port(self) -> None:
        backend = udp(public_port=18285)
        assert json.loads(backend.data(Family.IPV4) or b"") == {"Port": 18285, "Acceleration": "ebpf"}
        own = "192.0.2.1"
        (entry,) = backend.entries(peer(b'{"Port":28285}', own), ROUTED)
        assert isinstance(entry, UdpPeer)
        assert (entry.remote, entry.port) == (ADDRESSES[Family.IPV4], 28285)
        with pytest.raises(PeerUnreachable, match="our own"):
            backend.entries(peer(b'{"Port":18285}', own), ROUTED)

    @pytest.mark.parametrize(
        ("data", "port"),
        [
            (b'{"Port":1}', 1),
            (b'{"Port":70000}', 0),
            (b'{"Port":"1"}', 0),
            (b"null", 0),
            (None, 0),
            (b"{}", 0),
        ],
    )
    def test_public_port_is_one_or_none(self, data: bytes | None, port: int) -> None:
        assert public_port(peer(data)) == port

    def test_narrow_path_gets_a_route_of_its_own(self) -> None:
        narrow = msgspec.structs.replace(ROUTED, mtu=1400)
        line, route = udp().entries(peer(), narrow)
        assert isinstance(line, UdpPeer)
        assert line.mtu == 1372
        assert route == Route(Prefix.parse("10.5.9.0/24"), "flannel0", mtu=1372)

    def test_path_that_is_no_narrower_than_the_device_gets_none(self) -> None:
        assert len(udp().entries(peer(), msgspec.structs.replace(ROUTED, mtu=1500))) == 1

    def test_path_too_narrow_for_ipv6_leaves_it_what_it_needs(self) -> None:
        backend = udp(host("v6"))
        _line, route = backend.entries(
            peer(None, "2001:db8::9", "fd00:5:0:9::/64"), msgspec.structs.replace(ROUTED, mtu=1280)
        )
        assert isinstance(route, Route)
        assert route.mtu == 1280

    @pytest.mark.parametrize("public", [None, "192.0.2.1", "127.0.0.1", "224.0.0.1"])
    def test_address_that_is_no_other_hosts_is_refused(self, public: str | None) -> None:
        with pytest.raises(PeerUnreachable):
            udp().entries(peer(public=public), ROUTED)

    def test_address_without_a_route_is_refused(self) -> None:
        no_way: Hop | None = None
        with pytest.raises(PeerUnreachable, match="no route to the peer's address"):
            udp().entries(peer(), no_way)
