# SPDX-License-Identifier: Apache-2.0
import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Family, Prefix, format_address, parse_address

ADDRESSES = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))


@st.composite
def prefixes(draw: st.DrawFn) -> Prefix:
    address = draw(ADDRESSES)
    return Prefix.of(address, draw(st.integers(0, len(address) * 8)))


@given(ADDRESSES)
def test_address_round_trips_through_its_text(address: bytes) -> None:
    assert parse_address(format_address(address)) == address


@given(ADDRESSES)
def test_address_text_is_the_usual_one(address: bytes) -> None:
    text = format_address(address)
    assert ipaddress.ip_address(text).packed == address
    if "." not in text:  # inet_ntop writes the last four bytes of v4-mapped addresses with dots
        assert text == ipaddress.ip_address(address).compressed


@pytest.mark.parametrize(
    "text",
    ["", "10.5.1", "10.5.1.01", "10.5.1.256", "10.5.1.0/24", " 10.5.1.0", "fe80::1%eth0", "::g", "é", "1\0"],
)
def test_parse_address_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"no IP address|null"):
        parse_address(text)


@given(prefixes())
def test_prefix_round_trips_through_its_text(prefix: Prefix) -> None:
    assert Prefix.parse(str(prefix)) == prefix
    assert Prefix.from_int(prefix.family, prefix.first, prefix.length) == prefix


@given(prefixes(), prefixes())
def test_prefix_relations_are_those_of_ipaddress(one: Prefix, two: Prefix) -> None:
    a, b = ipaddress.ip_network(str(one)), ipaddress.ip_network(str(two))
    assert one.overlaps(two) == a.overlaps(b)
    if isinstance(a, ipaddress.IPv4Network) and isinstance(b, ipaddress.IPv4Network):
        assert one.contains(two) == b.subnet_of(a)
    assert one.size == a.num_addresses
    assert one.last == int(a.broadcast_address)


@given(ADDRESSES, st.data())
def test_prefix_holds_the_address_it_was_made_from(address: bytes, data: st.DataObject) -> None:
    prefix = Prefix.of(address, data.draw(st.integers(0, len(address) * 8)))
    assert prefix.holds(address)
    assert not prefix.holds(b"\0" * (20 - len(address)))


def test_prefix_masks_host_bits() -> None:
    assert str(Prefix.parse("10.5.1.0/16")) == "10.5.0.0/16"
    assert str(Prefix.parse("FC00:0:0:1::5/64")) == "fc00:0:0:1::/64"


def test_prefix_gateway_is_the_first_address_after_the_base() -> None:
    assert format_address(Prefix.parse("10.5.34.0/24").gateway) == "10.5.34.1"


@pytest.mark.parametrize(
    "text",
    [
        "10.5.0.0",
        "10.5.0.0/",
        "10.5.0.0/33",
        "10.5.0.0/-1",
        "10.5.0.0/+8",
        "10.5.0.0/08",
        "10.5.0.0/٨",
        "/8",
        "::/129",
    ],
)
def test_prefix_refuses_what_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"no(t| IP) an? ?address|prefix length|no IP address"):
        Prefix.parse(text)


def test_family_of_an_odd_length_is_an_error() -> None:
    assert Family.of(b"1234") is Family.IPV4
    with pytest.raises(ValueError, match="4 or 16 bytes, not 5"):
        Family.of(b"12345")
