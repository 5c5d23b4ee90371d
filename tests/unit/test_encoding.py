# SPDX-License-Identifier: Apache-2.0
"""Messages byte by byte, as ``ip`` and ``bridge`` send them, and what is read from the kernel's.

Numbers are little-endian here: the golden bytes are those of x86-64 and arm64.
"""

import struct
import sys
from typing import Any

import msgspec
import pytest

from loden.address import Prefix, parse_address
from loden.tables import netlink
from loden.tables.addresses import parse_host_address
from loden.tables.devices import parse_link
from loden.tables.entries import (
    Entry,
    FdbEntry,
    LinkAddress,
    Neighbour,
    Route,
    VxlanLink,
    format_mac,
)
from loden.tables.neighbours import encode_fdb, encode_neighbour
from loden.tables.netlink import Message, attribute, attribute_u32, nested
from loden.tables.nexthops import encode_nexthop, parse_nexthop
from loden.tables.routes import encode_plain_route, encode_route_to_nexthop

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the golden bytes are little-endian")

MAC = bytes.fromhex("c6d2326f8f44")
V4, V6 = parse_address("10.5.9.0"), parse_address("fd00:5:0:9::")
CREATE, REPLACE, EXCL = 0x400, 0x100, 0x200


def golden(*fields: str) -> bytes:
    """Hex, a field a line; what follows ``#`` says which."""
    return bytes.fromhex(" ".join(field.split("#", maxsplit=1)[0] for field in fields))


def test_neighbour() -> None:
    entry = Neighbour("flannel.1", V4, MAC)
    assert encode_neighbour(netlink.RTM_NEWNEIGH, CREATE | REPLACE, 5, entry) == golden(
        "38000000 1c00 0105 00000000 00000000  # nlmsghdr: 56 bytes, RTM_NEWNEIGH, REQUEST REPLACE CREATE",
        "02 000000 05000000 8000 00 01         # ndmsg: AF_INET, index 5, NUD_PERMANENT, RTN_UNICAST",
        "0800 0100 0a050900                    # NDA_DST 10.5.9.0",
        "0a00 0200 c6d2326f8f44 0000           # NDA_LLADDR",
        "0500 0c00 4c 000000                   # NDA_PROTOCOL 76",
    )


def test_neighbour_ipv6() -> None:
    entry = Neighbour("flannel-v6.1", V6, MAC)
    assert encode_neighbour(netlink.RTM_DELNEIGH, 0, 5, entry) == golden(
        "44000000 1d00 0100 00000000 00000000  # nlmsghdr: 68 bytes, RTM_DELNEIGH, REQUEST",
        "0a 000000 05000000 8000 00 01         # ndmsg: AF_INET6",
        "1400 0100 fd000005000000090000000000000000  # NDA_DST",
        "0a00 0200 c6d2326f8f44 0000           # NDA_LLADDR",
        "0500 0c00 4c 000000                   # NDA_PROTOCOL 76",
    )


def test_forwarding_entry() -> None:
    entry = FdbEntry("flannel.1", MAC, parse_address("192.0.2.9"))
    assert encode_fdb(netlink.RTM_NEWNEIGH, CREATE | REPLACE, 5, entry) == golden(
        "30000000 1c00 0105 00000000 00000000  # nlmsghdr: 48 bytes",
        "07 000000 05000000 c000 02 00         # ndmsg: AF_BRIDGE, NUD_PERMANENT NUD_NOARP, NTF_SELF",
        "0800 0100 c0000209                    # NDA_DST 192.0.2.9",
        "0a00 0200 c6d2326f8f44 0000           # NDA_LLADDR",
    )


def test_nexthop() -> None:
    entry = Route(Prefix(V4, 24), "flannel.1", V4, onlink=True)
    assert encode_nexthop(CREATE | EXCL, 0x4C000000, 5, entry) == golden(
        "30000000 6800 0106 00000000 00000000  # nlmsghdr: 48 bytes, RTM_NEWNEXTHOP, REQUEST EXCL CREATE",
        "02 00 4c 00 04000000                  # nhmsg: AF_INET, scope 0, protocol 76, RTNH_F_ONLINK",
        "0800 0100 0000004c                    # NHA_ID",
        "0800 0500 05000000                    # NHA_OIF",
        "0800 0600 0a050900                    # NHA_GATEWAY",
    )


def test_route_to_nexthop_ipv6() -> None:
    entry = Route(Prefix(V6, 64), "flannel-v6.1", V6, onlink=True)
    assert encode_route_to_nexthop(CREATE | REPLACE, 0x4C000001, entry) == golden(
        "38000000 1800 0105 00000000 00000000  # nlmsghdr: 56 bytes, RTM_NEWROUTE",
        "0a 40 00 00 fe 4c 00 01 00000000      # rtmsg: AF_INET6, /64, main, 76, universe, unicast",
        "1400 0100 fd000005000000090000000000000000  # RTA_DST",
        "0800 1e00 0100004c                    # RTA_NH_ID",
    )


def test_plain_onlink_route() -> None:
    entry = Route(Prefix(V4, 24), "flannel.1", V4, onlink=True)
    assert encode_plain_route(CREATE | REPLACE, 5, entry) == golden(
        "34000000 1800 0105 00000000 00000000  # nlmsghdr: 52 bytes",
        "02 18 00 00 fe 4c 00 01 04000000      # rtmsg: AF_INET, /24, main, 76, unicast, RTNH_F_ONLINK",
        "0800 0100 0a050900                    # RTA_DST",
        "0800 0400 05000000                    # RTA_OIF",
        "0800 0500 0a050900                    # RTA_GATEWAY",
    )


@pytest.mark.parametrize(("dst", "scope"), [(Prefix(V4, 24), 253), (Prefix(V6, 64), 0)])
def test_route_without_router_has_link_scope_in_ipv4_only(dst: Prefix, scope: int) -> None:
    assert encode_plain_route(CREATE, 5, Route(dst, "eth0"))[16 + 6] == scope


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            VxlanLink("flannel.1", 1, parse_address("192.0.2.1"), "eth0", 1450, MAC),
            "link flannel.1 type vxlan id 1 local 192.0.2.1 dev eth0",
        ),
        (LinkAddress("flannel.1", V4, 32), "address 10.5.9.0/32 dev flannel.1"),
        (Neighbour("flannel.1", V4, MAC), "neigh 10.5.9.0 lladdr c6:d2:32:6f:8f:44 dev flannel.1"),
        (FdbEntry("flannel.1", MAC, V6), "fdb c6:d2:32:6f:8f:44 dst fd00:5:0:9:: dev flannel.1"),
        (Route(Prefix(V4, 24), "flannel.1", V4, True), "route 10.5.9.0/24 via 10.5.9.0 dev flannel.1 onlink"),
        (Route(Prefix(V6, 64), "eth0"), "route fd00:5:0:9::/64 dev eth0"),
    ],
)
def test_entries_print_as_ip_does(entry: Entry, text: str) -> None:
    assert str(entry) == text


def test_what_differs_within_a_slot_is_what_can_be_changed_in_place() -> None:
    replaced: list[tuple[Entry, dict[str, Any]]] = [
        (Neighbour("a", V4, MAC), {"mac": b"\2" * 6}),
        (FdbEntry("a", MAC, V4), {"remote": b"\2" * 4}),
        (Route(Prefix(V4, 24), "a", V4), {"device": "b", "via": None, "onlink": True}),
        (VxlanLink("a", 1, V4, "b", 1450, MAC), {"vni": 2, "mtu": 9, "port": 7}),
    ]
    for entry, change in replaced:
        assert msgspec.structs.replace(entry, **change).slot == entry.slot
    assert Neighbour("a", V4, MAC).slot != Neighbour("b", V4, MAC).slot
    assert FdbEntry("a", MAC, V4).slot != FdbEntry("b", MAC, V4).slot


def test_mac_is_lower_case_colon_hex() -> None:
    assert format_mac(bytes.fromhex("C6D2326F8F44")) == "c6:d2:32:6f:8f:44"


def received(kind: int, body: bytes) -> Message:
    return Message(kind, bytes(16) + body, 16, 16 + len(body))


def test_link_message_of_a_vxlan_device_is_read_field_by_field() -> None:
    data = (
        attribute_u32(1, 7), attribute_u32(3, 2), attribute(4, parse_address("192.0.2.1")),
        attribute(7, b"\1"), attribute(15, (4789).to_bytes(2, "big")), attribute(23, b""),
    )  # fmt: skip
    body = struct.pack("=BxHiII", 0, 1, 5, 0x1 | 0x8, 0) + b"".join(
        (
            attribute(3, b"flannel.7\0"), attribute_u32(4, 1450), attribute(1, MAC),
            attribute(20, b"loden\0"),
            nested(18, attribute(1, b"vxlan\0"), nested(2, *data)),
        )
    )  # fmt: skip
    link, state = parse_link(received(16, body))
    assert (link.index, link.name, link.kind, link.mtu, link.mac) == (5, "flannel.7", "vxlan", 1450, MAC)
    assert (link.is_up, link.is_loopback) == (True, True)
    assert state is not None
    assert (link.alias, state.vni, state.port, state.underlay_index) == (b"loden", 7, 4789, 2)
    assert (state.local, state.gbp, state.learning) == (parse_address("192.0.2.1"), True, True)


def test_link_message_of_another_kind_has_no_vxlan_state() -> None:
    body = (
        struct.pack("=BxHiII", 0, 1, 5, 0, 0) + attribute(3, b"br0\0") + nested(18, attribute(1, b"bridge\0"))
    )
    link, state = parse_link(received(16, body))
    assert (link.name, link.kind, link.is_up, state) == ("br0", "bridge", False, None)


def test_address_message_flags_beyond_the_header_count() -> None:
    body = struct.pack("=BBBBI", 10, 64, 0, 0, 5) + attribute(1, V6) + attribute_u32(8, 0x80 | 0x20 | 0x01)
    found = parse_host_address(received(20, body))
    assert found is not None
    assert (found.index, found.address, found.length) == (5, V6, 64)
    assert (found.is_permanent, found.is_deprecated, found.is_temporary) == (True, True, True)


def test_secondary_ipv4_address_is_not_temporary_and_the_peer_is_not_ours() -> None:
    peer = parse_address("192.0.2.77")
    body = struct.pack("=BBBBI", 2, 32, 0x01, 0, 5) + attribute(1, peer) + attribute(2, V4)
    found = parse_host_address(received(20, body))
    assert found is not None
    assert (found.address, found.is_temporary) == (V4, False)


def test_nexthop_of_others_is_a_number_only() -> None:
    body = struct.pack("=BBBBI", 2, 0, 4, 0, 0) + attribute_u32(1, 9)
    assert parse_nexthop(received(104, body)) == (9, None)
