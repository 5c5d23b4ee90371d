# SPDX-License-Identifier: Apache-2.0
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Family, Prefix
from loden.errors import ConfigError
from loden.network import Network, Range, check_network, parse_network


def parse(**members: object) -> Network:
    return parse_network(json.dumps(members).encode())


def errors_of(text: str | bytes) -> dict[str, ConfigError]:
    network, errors = check_network(text.encode() if isinstance(text, str) else text)
    assert (network is None) == bool(errors)
    return {error.key: error for error in errors}


def ipv4(part: Range) -> tuple[str, str, str]:
    return str(part.network), str(part.first), str(part.last)


@pytest.mark.parametrize(
    ("network", "first", "last"),
    [
        ("10.5.0.0/16", "10.5.1.0/24", "10.5.255.0/24"),
        ("10.5.0.0/22", "10.5.1.0/24", "10.5.3.0/24"),
        ("10.5.0.0/23", "10.5.0.128/25", "10.5.1.128/25"),
        ("10.5.0.0/28", "10.5.0.4/30", "10.5.0.12/30"),
        ("255.255.0.0/16", "255.255.1.0/24", "255.255.255.0/24"),
        ("128.0.0.0/1", "128.0.1.0/24", "255.255.255.0/24"),
        ("fc00::/48", "fc00:0:0:1::/64", "fc00:0:0:ffff::/64"),
        ("fd00::/63", "fd00:0:0:0:8000::/65", "fd00:0:0:1:8000::/65"),
        ("fd00::/124", "fd00::4/126", "fd00::c/126"),
    ],
)
def test_subnets_by_default_are_flannels(network: str, first: str, last: str) -> None:
    """The worked values of COMPAT §1.2, and the edges of the address space."""
    is_v6 = ":" in network
    members = (
        {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": network} if is_v6 else {"Network": network}
    )
    (part,) = parse(**members).ranges
    expected = Range(
        Prefix.parse(network), Prefix.parse(first).length, Prefix.parse(first), Prefix.parse(last)
    )
    assert part == expected
    assert part.subnet_count == (part.last.first - part.first.first) // part.first.size + 1


@pytest.mark.parametrize("family", Family)
@given(data=st.data())
def test_subnets_by_default_lie_in_the_network_and_leave_the_first(
    family: Family, data: st.DataObject
) -> None:
    longest = 28 if family is Family.IPV4 else 124
    length = data.draw(st.integers(1, longest))
    address = data.draw(st.binary(min_size=family.size, max_size=family.size))
    network = Prefix.of(address, length)
    key = "Network" if family is Family.IPV4 else "IPv6Network"
    enabled = {"EnableIPv4": family is Family.IPV4, "EnableIPv6": family is Family.IPV6}
    (part,) = parse(**enabled, **{key: str(network)}).ranges
    assert part.network == network
    assert network.contains(part.first)
    assert network.contains(part.last)
    assert part.first.first == network.first + part.first.size
    assert part.last.last == network.last
    assert part.subnet_count == (1 << (part.subnet_length - length)) - 1 >= 3


def test_host_bits_of_the_network_are_masked() -> None:
    assert ipv4(parse(Network="10.5.1.7/16").ranges[0])[0] == "10.5.0.0/16"


def test_keys_match_in_any_case_and_the_last_of_equals_counts() -> None:
    network = parse_network(
        b'{"Network":"10.1.0.0/16","NETWORK":"10.2.0.0/16","Network":"10.3.0.0/16","SUBNETLEN":26}'
    )
    assert ipv4(network.ranges[0]) == ("10.3.0.0/16", "10.3.0.64/26", "10.3.255.192/26")
    last_is_lower = parse_network(
        b'{"Network":"10.1.0.0/16","Network":"10.3.0.0/16","network":"10.2.0.0/16"}'
    )
    assert ipv4(last_is_lower.ranges[0])[0] == "10.2.0.0/16"


def test_bounds_are_taken_as_written_and_mapped_addresses_are_ipv4() -> None:
    (part,) = parse(Network="10.5.0.0/16", SubnetMin="::ffff:10.5.16.0", SubnetMax="10.5.32.0").ranges
    assert ipv4(part) == ("10.5.0.0/16", "10.5.16.0/24", "10.5.32.0/24")
    assert part.subnet_count == 17


def test_zero_addresses_and_nulls_count_as_absent() -> None:
    plain = parse(Network="10.5.0.0/16", EnableIPv6=True, IPv6Network="fd00::/48")
    assert plain == parse(
        Network="10.5.0.0/16",
        EnableIPv4=None,
        EnableIPv6=True,
        EnableNFTables=None,
        IPv6Network="fd00::/48",
        SubnetMin="0.0.0.0",
        SubnetLen=None,
        IPv6SubnetMin=None,
        IPv6SubnetMax="::",
        IPv6SubnetLen=0,
    )
    assert plain.families == (Family.IPV4, Family.IPV6)


@pytest.mark.parametrize("key", ["Network", "IPv6Network", "SubnetMin", "SubnetMax"])
def test_null_is_no_address(key: str) -> None:
    assert key in errors_of(json.dumps({"Network": "10.5.0.0/16", key: None}))


@pytest.mark.parametrize(
    ("members", "key", "said", "allowed"),
    [
        ({}, "Network", "missing", "10.5.0.0/16"),
        ({"Network": "0.0.0.0/0"}, "Network", "missing", "10.5.0.0/16"),
        ({"Network": "10.5.0.0"}, "Network", '"10.5.0.0"', "10.5.0.0/16"),
        ({"Network": "10.5.0.0/33"}, "Network", '"10.5.0.0/33"', "10.5.0.0/16"),
        ({"Network": "10.05.0.0/16"}, "Network", '"10.05.0.0/16"', "10.5.0.0/16"),
        ({"Network": "fd00::/48"}, "Network", "IPv4", "10.5.0.0/16"),
        ({"Network": 10}, "Network", "10", "10.5.0.0/16"),
        ({"Network": "10.5.0.0/29"}, "Network", "10.5.0.0/29", "/28"),
        ({"SubnetLen": 31}, "SubnetLen", "31", "from 18 to 30"),
        ({"SubnetLen": 17}, "SubnetLen", "17", "from 18 to 30"),
        ({"SubnetLen": "24"}, "SubnetLen", '"24"', "up to 30"),
        ({"SubnetLen": -1}, "SubnetLen", "-1", "up to 30"),
        ({"SubnetLen": 24.5}, "SubnetLen", "24.5", "up to 30"),
        ({"SubnetLen": True}, "SubnetLen", "true", "up to 30"),
        ({"SubnetMin": "10.6.0.0"}, "SubnetMin", "10.6.0.0", "10.5.0.0/16"),
        ({"SubnetMax": "10.6.0.0"}, "SubnetMax", "10.6.0.0", "10.5.0.0/16"),
        ({"SubnetMin": "10.5.1.1"}, "SubnetMin", "10.5.1.1", "10.5.1.0"),
        ({"SubnetMin": "fd00::"}, "SubnetMin", '"fd00::"', "inside Network"),
        ({"SubnetMin": "10.5.9.0", "SubnetMax": "10.5.8.0"}, "SubnetMin", "10.5.8.0", "lower"),
        ({"SubnetMax": "10.5.0.0"}, "SubnetMax", "10.5.1.0", "lower"),
        ({"EnableIPv4": "true"}, "EnableIPv4", '"true"', "true or false"),
        ({"EnableIPv4": False}, "EnableIPv4", "both false", "enable"),
        ({"EnableIPv6": True}, "IPv6Network", "missing", "fd00:5::/48"),
        ({"EnableIPv6": True, "IPv6Network": "10.0.0.0/8"}, "IPv6Network", "10.0.0.0/8", "fd00:5::/48"),
        ({"EnableIPv6": True, "IPv6Network": "fd00::/125"}, "IPv6Network", "fd00::/125", "/124"),
        (
            {"EnableIPv6": True, "IPv6Network": "fd00::/48", "IPv6SubnetLen": 127},
            "IPv6SubnetLen",
            "127",
            "50 to 126",
        ),
        ({"Backend": "vxlan"}, "Backend", '"vxlan"', '{"Type": "vxlan"}'),
        ({"Backend": {}}, "Backend.Type", "missing", "host-gw"),
        ({"Backend": None}, "Backend.Type", "missing", "host-gw"),
        ({"Backend": {"Type": 1}}, "Backend.Type", "1", "host-gw"),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(
    members: dict[str, object], key: str, said: str, allowed: str
) -> None:
    defaults = {} if members in ({}, {"Network": "0.0.0.0/0"}) else {"Network": "10.5.0.0/16"}
    error = errors_of(json.dumps({**defaults, **members}))[key]
    assert said in error.reason
    assert allowed in error.hint
    assert str(error).startswith(f"{key}: ")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b'{"Network":"10.5.0.0/16"} x',
        b'{"Network":"10.5.0.0/16"}{}',
        b"[]",
        b"null",
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        b'{"SubnetLen": NaN}',
        b"[" * 200_000,
        b'{"SubnetLen": ' + b"9" * 5000 + b"}",
    ],
)
def test_text_that_is_no_object_is_one_error_about_the_whole(text: bytes) -> None:
    (error,) = errors_of(text).values()
    assert error.key == ""
    assert error.hint


def test_the_place_of_a_slip_is_named() -> None:
    (error,) = errors_of('{"Network": "10.5.0.0/16",\n "SubnetLen": 24,\n}').values()
    assert "line 3 column 1" in error.reason


def test_all_errors_are_found_at_once_and_parse_raises_the_first() -> None:
    text = '{"Network": 1, "SubnetLen": "x", "Backend": {}, "EnableNFTables": 1}'
    assert list(errors_of(text)) == ["Network", "SubnetLen", "Backend.Type", "EnableNFTables"]
    with pytest.raises(ConfigError, match="Network: 1 is not"):
        parse_network(text.encode())


@given(st.binary(max_size=80) | st.text(alphabet='{}[]":,1.\\nulTrueNetwork /0', max_size=80).map(str.encode))
def test_any_text_is_a_network_or_a_config_error(text: bytes) -> None:
    network, errors = check_network(text)
    assert (network is None) == bool(errors)


def test_backend_is_vxlan_where_nobody_says_otherwise_and_a_note_says_so() -> None:
    """COMPAT W42."""
    network = parse(Network="10.5.0.0/16")
    assert (network.backend_type, network.backend) == ("vxlan", b"{}")
    assert any("vxlan" in note and "udp" in note for note in network.notes)


def test_backend_type_is_lower_case_and_its_members_stay_as_written() -> None:
    network = parse(Network="10.5.0.0/16", Backend={"TYPE": "Host-GW", "dirEctRouting": True, "Port": 1})
    assert network.backend_type == "host-gw"
    assert json.loads(network.backend) == {"dirEctRouting": True, "Port": 1}
    assert network.notes == ()


def test_unknown_and_retired_keys_are_noted_not_refused() -> None:
    backend = {"Type": "alloc"}
    network = parse(Network="10.5.0.0/16", SubnetLn=24, networks=[], Foo=1, Backend=backend)
    assert sorted(network.notes) == [
        "Foo: unknown key, ignored",
        "Networks: no longer read, Network is",
        "SubnetLn: unknown key, ignored; did you mean SubnetLen?",
    ]


def test_network_of_a_family_that_is_off_has_no_range() -> None:
    """COMPAT W20: the family is what counts, not that a network stands there."""
    network = parse(
        Network="10.5.0.0/16",
        EnableIPv4=False,
        EnableIPv6=True,
        IPv6Network="fd00::/48",
        Backend={"Type": "alloc"},
    )
    assert network.families == (Family.IPV6,)
    assert network.range_of(Family.IPV4) is None
    assert network.notes == ("Network: without effect, EnableIPv4 is false",)


def test_excluded_destinations_are_ranges_of_both_families() -> None:
    network = parse(Network="10.5.0.0/16", IPMasqExclude=["192.0.2.9/24", "2001:db8::/32"])
    assert [str(prefix) for prefix in network.masquerade_exclude] == ["192.0.2.0/24", "2001:db8::/32"]
    assert parse(Network="10.5.0.0/16", IPMasqExclude=None).masquerade_exclude == ()


@pytest.mark.parametrize("value", ["192.0.2.0/24", ["192.0.2.0"], [7], [None], [["192.0.2.0/24"]], {}])
def test_excluded_destinations_that_are_no_ranges_are_refused(value: object) -> None:
    assert "IPMasqExclude" in errors_of(json.dumps({"Network": "10.5.0.0/16", "IPMasqExclude": value}))


@pytest.mark.parametrize("members", ['"\\ud800": 1', '"x": "\\udfff"', '"Backend": {"Type": "\\ud800"}'])
def test_half_a_character_is_refused(members: str) -> None:
    """Nothing could print it, nor write it down."""
    errors = errors_of(f'{{"Network": "10.5.0.0/16", {members}}}')
    assert "is half a character" in errors[""].reason
