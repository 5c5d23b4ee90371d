# SPDX-License-Identifier: Apache-2.0
import pytest

from loden.address import Family, parse_address
from loden.errors import ConfigError, InterfaceError
from loden.interface import (
    DefaultRoute,
    Hop,
    HostAddress,
    HostFacts,
    Link,
    Selection,
    Underlay,
    select,
    select_again,
)

V4 = (Family.IPV4,)
V6 = (Family.IPV6,)
DUAL = (Family.IPV4, Family.IPV6)

LO = Link(1, "lo", mtu=65536, is_loopback=True)
ETH0 = Link(2, "eth0")
ETH1 = Link(3, "eth1", mtu=9000)
DOWN = Link(4, "eth2", is_up=False)


def own(index: int, text: str, **more: bool | int) -> HostAddress:
    address = parse_address(text)
    return HostAddress(index, address, len(address) * 8 - 8, **more)  # type: ignore[arg-type]  # by name


def facts(
    *, extra: tuple[HostAddress, ...] = (), routes: tuple[DefaultRoute, ...] | None = None
) -> HostFacts:
    """A host with two interfaces, IPv4 and IPv6 on both; the default routes go through the second."""
    defaults = (DefaultRoute(Family.IPV4, 3), DefaultRoute(Family.IPV6, 3))
    return HostFacts(
        links=(LO, ETH0, ETH1, DOWN),
        addresses=(
            own(1, "127.0.0.1", scope=254),
            own(1, "::1", scope=254),
            own(2, "10.0.0.5"),
            own(2, "fe80::5", scope=253),
            own(2, "fd00::5"),
            own(3, "192.0.2.7"),
            own(3, "fd01::7"),
            own(4, "10.9.9.9"),
            *extra,
        ),
        default_routes=defaults if routes is None else routes,
    )


def chosen(
    selection: Selection,
    families: tuple[Family, ...] = V4,
    host: HostFacts | None = None,
    hop: Hop | None = None,
) -> Underlay:
    return select(selection, families, host or facts(), lambda _: hop)


def texts(addresses: object) -> list[str]:
    from loden.address import format_address

    assert isinstance(addresses, dict)
    return [format_address(address) for address in addresses.values()]


@pytest.mark.parametrize(
    ("selection", "families", "name", "addresses"),
    [
        (Selection(), V4, "eth1", ["192.0.2.7"]),
        (Selection(), V6, "eth1", ["fd01::7"]),
        (Selection(), DUAL, "eth1", ["192.0.2.7", "fd01::7"]),
        (Selection(iface=("eth0",)), V4, "eth0", ["10.0.0.5"]),
        (Selection(iface=("eth9", "eth0")), V4, "eth0", ["10.0.0.5"]),
        (Selection(iface=("10.0.0.5",)), V4, "eth0", ["10.0.0.5"]),
        (Selection(iface=("10.0.0.5",)), DUAL, "eth0", ["10.0.0.5", "fd00::5"]),
        (Selection(iface=("fd00::5",)), V6, "eth0", ["fd00::5"]),
        (Selection(iface=("fd00::5",)), V4, "eth0", ["10.0.0.5"]),
        (Selection(iface=("fe80::5",)), V6, "eth0", ["fe80::5"]),
        (Selection(iface_regex=("^10[.]0",)), V4, "eth0", ["10.0.0.5"]),
        (Selection(iface_regex=("0",)), DUAL, "eth0", ["10.0.0.5", "fd00::5"]),
        (Selection(iface_regex=("h1$",)), V4, "eth1", ["192.0.2.7"]),
        (Selection(iface_regex=("nothing", "eth0")), V4, "eth0", ["10.0.0.5"]),
        (Selection(iface=("eth9",), iface_regex=("eth0",)), V4, "eth0", ["10.0.0.5"]),
        (Selection(public_ip="10.0.0.5"), V4, "eth0", ["10.0.0.5"]),
        (Selection(public_ip="10.0.0.5"), DUAL, "eth0", ["10.0.0.5", "fd00::5"]),
        (Selection(public_ipv6="fd00::5"), V6, "eth0", ["fd00::5"]),
        (Selection(iface=("eth1",), public_ip="10.0.0.5"), V4, "eth1", ["192.0.2.7"]),
    ],
)
def test_interface_and_its_addresses_follow_the_order_of_flannel(
    selection: Selection, families: tuple[Family, ...], name: str, addresses: list[str]
) -> None:
    underlay = chosen(selection, families)
    assert (underlay.name, texts(underlay.addresses)) == (name, addresses)
    assert list(underlay.addresses) == list(families)
    assert underlay.reason


def test_can_reach_takes_the_kernels_interface_and_source() -> None:
    host = facts(extra=(own(2, "10.0.0.6"),))
    asked = Selection(can_reach="10.77.0.1")
    underlay = chosen(asked, V4, host, Hop(2, parse_address("10.0.0.6"), parse_address("10.0.0.1")))
    assert (underlay.name, texts(underlay.addresses)) == ("eth0", ["10.0.0.6"])
    with pytest.raises(InterfaceError, match=r"10\.77\.0\.1: the kernel has no route"):
        chosen(asked, V4, host, None)


def test_pattern_matches_addresses_of_all_interfaces_before_any_name() -> None:
    host = HostFacts((Link(1, "net-7"), Link(2, "eth0")), (own(1, "10.0.0.1"), own(2, "10.0.7.1")))
    assert chosen(Selection(iface_regex=("7",)), V4, host).name == "eth0"


def test_public_addresses_replace_the_interfaces_own_only_for_peers() -> None:
    underlay = chosen(Selection(iface=("eth0",), public_ip="203.0.113.9", public_ipv6="2001:db8::9"), V4)
    assert texts(underlay.addresses) == ["10.0.0.5"]
    assert texts(underlay.public) == ["203.0.113.9", "2001:db8::9"]


def test_public_address_of_no_interface_leads_to_the_default_route() -> None:
    """COMPAT W31: a host behind NAT needs no --iface."""
    underlay = chosen(Selection(public_ip="203.0.113.9"))
    assert (underlay.name, texts(underlay.public)) == ("eth1", ["203.0.113.9"])
    assert "203.0.113.9 is on no interface" in underlay.reason


def test_address_selector_of_ipv6_in_dual_stack_needs_no_public_address() -> None:
    """COMPAT W30."""
    underlay = chosen(Selection(iface=("fd00::5",)), DUAL)
    assert texts(underlay.addresses) == ["10.0.0.5", "fd00::5"]


def test_dual_stack_addresses_on_two_interfaces_are_refused() -> None:
    with pytest.raises(InterfaceError, match="fd01::7 is on eth1"):
        chosen(Selection(iface=("10.0.0.5",), public_ipv6="fd01::7"), DUAL)
    with pytest.raises(InterfaceError, match="is on eth1"):
        chosen(Selection(public_ip="10.0.0.5", public_ipv6="fd01::7"), DUAL)


def test_multipath_default_route_is_accepted() -> None:
    """COMPAT W47."""
    routes = (DefaultRoute(Family.IPV4, 2), DefaultRoute(Family.IPV4, 3))
    assert chosen(Selection(), V4, facts(routes=routes)).name == "eth0"


def test_dual_stack_default_is_the_interface_that_both_families_share() -> None:
    routes = (DefaultRoute(Family.IPV4, 2), DefaultRoute(Family.IPV4, 3), DefaultRoute(Family.IPV6, 3))
    assert chosen(Selection(), DUAL, facts(routes=routes)).name == "eth1"
    apart = (DefaultRoute(Family.IPV4, 2), DefaultRoute(Family.IPV6, 3))
    with pytest.raises(InterfaceError, match="default route of IPv4 and IPv6"):
        chosen(Selection(), DUAL, facts(routes=apart))


@pytest.mark.parametrize("index", [0, 1, 4, 99])
def test_default_is_never_a_link_that_is_loopback_down_or_gone(index: int) -> None:
    host = facts(routes=(DefaultRoute(Family.IPV4, index),))
    with pytest.raises(InterfaceError) as caught:
        chosen(Selection(), V4, host)
    assert "--iface" in caught.value.hint


def test_interface_that_is_down_is_taken_when_named_and_said_to_be_down() -> None:
    underlay = chosen(Selection(iface=("eth2",)))
    assert (underlay.name, underlay.reason) == ("eth2", "--iface eth2; eth2 is down")


def test_addresses_are_preferred_as_flannel_does() -> None:
    ranked = [
        own(9, "10.1.0.1"),
        own(9, "10.1.0.2", is_temporary=True),
        own(9, "10.1.0.3", is_permanent=False),
        own(9, "10.1.0.4", is_permanent=False, is_temporary=True),
        own(9, "169.254.0.5"),
    ]
    link = Link(9, "eth9")
    for count in range(len(ranked)):
        host = HostFacts((link,), tuple(reversed(ranked[count:])))
        assert chosen(Selection(iface=("eth9",)), V4, host).addresses[Family.IPV4] == ranked[count].address


@pytest.mark.parametrize(
    "unusable",
    [
        own(9, "127.0.0.9"),
        own(9, "224.0.0.1"),
        own(9, "255.255.255.255"),
        own(9, "0.0.0.0"),
        own(9, "10.0.0.9", is_deprecated=True),
        own(9, "10.0.0.9", scope=254),
        own(9, "fd00::9"),
    ],
)
def test_interface_without_a_usable_address_is_named_with_what_there_is(unusable: HostAddress) -> None:
    host = HostFacts((Link(9, "eth9"), ETH0), (unusable, own(2, "10.0.0.5")))
    with pytest.raises(InterfaceError, match="eth9: it has no usable IPv4 address") as caught:
        chosen(Selection(iface=("eth9",)), V4, host)
    assert "eth0 (10.0.0.5)" in caught.value.hint


def test_no_such_interface_is_never_replaced_by_the_default_route() -> None:
    with pytest.raises(InterfaceError) as caught:
        chosen(Selection(iface=("eth9", "10.9.0.1"), iface_regex=("zzz",)))
    assert "--iface eth9: no interface has this name" in caught.value.message
    assert "--iface 10.9.0.1: no interface has this address" in caught.value.message
    assert "--iface-regex zzz" in caught.value.message
    assert "eth1 (192.0.2.7, fd01::7)" in caught.value.hint


def test_hint_stays_short_on_a_host_with_many_interfaces() -> None:
    host = HostFacts(tuple(Link(index, f"veth{index}") for index in range(1, 2000)))
    with pytest.raises(InterfaceError) as caught:
        chosen(Selection(iface=("eth9",)), V4, host)
    assert caught.value.hint.endswith("and 1987 more")


def test_mtu_that_took_the_ipv6_addresses_is_named() -> None:
    host = HostFacts((Link(9, "eth9", mtu=1200),), (own(9, "10.0.0.9"),))
    with pytest.raises(InterfaceError, match="no usable IPv6 address: its MTU is 1200, and IPv6 needs 1280"):
        chosen(Selection(iface=("eth9",)), DUAL, host)


def test_interface_without_mtu_is_refused() -> None:
    host = HostFacts((Link(9, "eth9", mtu=0),), (own(9, "10.0.0.9"),))
    with pytest.raises(InterfaceError, match="MTU is 0"):
        chosen(Selection(iface=("eth9",)), V4, host)


@pytest.mark.parametrize(
    ("selection", "flag"),
    [
        (Selection(public_ip="10.0.0"), "--public-ip"),
        (Selection(public_ip="fd00::1"), "--public-ip"),
        (Selection(public_ipv6="10.0.0.1"), "--public-ipv6"),
        (Selection(can_reach="example.org"), "--iface-can-reach"),
        (Selection(iface_regex=("(",)), "--iface-regex"),
    ],
)
def test_flag_that_is_no_address_or_pattern_is_named(selection: Selection, flag: str) -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(selection)
    assert caught.value.key == flag
    assert caught.value.hint


def again(current: Underlay, host: HostFacts, selection: Selection = Selection()) -> Underlay:  # noqa: B008 - frozen
    return select_again(current, selection, V4, host, lambda _: None)


def test_interface_stays_when_the_default_route_moves_away() -> None:
    current = chosen(Selection())
    assert current.name == "eth1"
    moved = facts(routes=(DefaultRoute(Family.IPV4, 2),))
    assert again(current, moved).name == "eth1"
    assert not current.differences(again(current, moved))


def test_interface_that_lost_its_address_gives_way_to_another() -> None:
    current = chosen(Selection())
    host = facts(routes=(DefaultRoute(Family.IPV4, 2),))
    bare = HostFacts(
        links=host.links,
        addresses=tuple(own for own in host.addresses if own.index != 3),
        default_routes=host.default_routes,
    )
    found = again(current, bare)
    assert found.name == "eth0"
    assert "eth1 (index 3) is now eth0 (index 2)" in current.differences(found)


def test_address_that_vanishes_does_not_make_way_for_a_link_local_one() -> None:
    selection = Selection(iface=("eth0",))
    link_local = own(2, "169.254.7.7", scope=253)
    current = chosen(selection)
    with pytest.raises(InterfaceError, match="eth0: it has no usable IPv4 address"):
        again(current, HostFacts(links=(LO, ETH0), addresses=(link_local,)), selection)
    bare = HostFacts(links=(LO, ETH0), addresses=(link_local,))
    assert again(chosen(selection, host=bare), bare, selection).addresses[Family.IPV4] == link_local.address


def test_interface_that_was_asked_for_by_name_is_waited_for() -> None:
    current = chosen(Selection(iface=("eth0",)))
    bare = HostFacts(links=(LO, ETH1), addresses=(own(3, "192.0.2.7"),))
    with pytest.raises(InterfaceError, match="--iface eth0: no interface has this name"):
        again(current, bare, Selection(iface=("eth0",)))


def test_tunnel_that_is_all_that_fits_is_said_to_be_one() -> None:
    host = HostFacts(links=(LO, Link(9, "wg0", kind="wireguard")), addresses=(own(9, "10.0.0.1"),))
    reason = chosen(Selection(iface_regex=("^10\\.0",)), host=host).reason
    assert reason.endswith("; wg0 is a wireguard interface")


def test_pattern_prefers_a_real_interface_to_a_tunnel() -> None:
    tunnel = Link(9, "wg0", kind="wireguard")
    host = HostFacts(links=(LO, tunnel, ETH0), addresses=(own(9, "10.0.0.1"), own(2, "10.0.0.5")))
    found = chosen(Selection(iface_regex=("^10\\.0",)), host=host)
    assert found.name == "eth0"
