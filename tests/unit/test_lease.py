# SPDX-License-Identifier: Apache-2.0
import contextlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from loden.address import Family, Prefix, parse_address
from loden.errors import MalformedLease
from loden.lease import Lease, Leg, decode, encode_value, parse_key


def leg(subnet: str, public: str = "", data: bytes | None = None) -> Leg:
    return Leg(Prefix.parse(subnet), parse_address(public) if public else None, data)


# COMPAT §2.2 and §2.3, byte for byte.
GOLDEN = [
    (
        Lease(leg("10.5.34.0/24", "192.168.64.3", b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}'), None, "vxlan"),
        "10.5.34.0-24",
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}',
    ),
    (
        Lease(
            leg("10.5.34.0/24", "192.168.64.3", b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}'),
            leg("fc00:0:0:1::/64", "fd00::1", b'{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}'),
            "vxlan",
        ),
        "10.5.34.0-24&fc00:0:0:1::-64",
        b'{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::1","BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},'
        b'"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"}}',
    ),
    (
        Lease(leg("10.5.34.0/24", "10.0.0.5"), None, "host-gw"),
        "10.5.34.0-24",
        b'{"PublicIP":"10.0.0.5","PublicIPv6":null,"BackendType":"host-gw"}',
    ),
    (
        Lease(leg("10.5.34.0/24", "10.0.0.5", b'"0a:bc"'), None, "extension"),
        "10.5.34.0-24",
        b'{"PublicIP":"10.0.0.5","PublicIPv6":null,"BackendType":"extension","BackendData":"0a:bc"}',
    ),
    (
        Lease(leg("10.5.34.0/24", "10.0.0.5")),
        "10.5.34.0-24",
        b'{"PublicIP":"10.0.0.5","PublicIPv6":null}',
    ),
    (
        Lease(None, leg("fc00:0:0:1::/64", "fd00::1"), "vxlan"),
        "0.0.0.0-0&fc00:0:0:1::-64",
        b'{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::1","BackendType":"vxlan"}',
    ),
]


@pytest.mark.parametrize(("lease", "key", "value"), GOLDEN)
def test_lease_is_written_and_read_as_flannel_does(lease: Lease, key: str, value: bytes) -> None:
    assert lease.key == key
    assert encode_value(lease) == value
    assert decode(key, value) == lease
    assert decode(f"/coreos.com/network/subnets/{key}", value) == lease


JSON = st.recursive(
    st.booleans() | st.integers(0, 9) | st.just('"c6:d2"'),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
).map(lambda found: str(found).replace("'", "").replace("True", "true").replace("False", "false").encode())


@st.composite
def legs(draw: st.DrawFn, family: Family) -> Leg:
    size, longest = family.size, family.bits - 1
    subnet = Prefix.of(draw(st.binary(min_size=size, max_size=size)), draw(st.integers(0, longest)))
    assume(family is Family.IPV6 or subnet != Prefix.parse("0.0.0.0/0"))  # it stands for no IPv4 subnet
    public = draw(st.none() | st.binary(min_size=size, max_size=size))
    assume(public != b"\0\0\0\0")
    return Leg(subnet, public, draw(st.none() | JSON))


@st.composite
def leases(draw: st.DrawFn) -> Lease:
    ipv4 = draw(st.none() | legs(Family.IPV4))
    ipv6 = draw(legs(Family.IPV6)) if ipv4 is None else draw(st.none() | legs(Family.IPV6))
    return Lease(ipv4, ipv6, draw(st.text(max_size=9)))


@given(leases())
def test_lease_round_trips_through_key_and_value(lease: Lease) -> None:
    assert decode(lease.key, encode_value(lease)) == lease


@pytest.mark.parametrize(
    ("subnet", "key"),
    [
        ("::ffff:1.2.3.0/120", "0.0.0.0-0&::ffff:102:300-120"),
        ("::1.2.0.0/112", "0.0.0.0-0&::102:0-112"),
        ("::5:6:0/96", "0.0.0.0-0&::5:0:0-96"),
        ("::/64", "0.0.0.0-0&::-64"),
    ],
)
def test_key_of_ipv6_never_has_dots(subnet: str, key: str) -> None:
    assert Lease(ipv6=leg(subnet)).key == key


@pytest.mark.parametrize(
    "key",
    [
        "",
        "config",
        "10.5.34.0",
        "10.5.34.0-32",
        "10.5.34.0-",
        "10.5.34.0-24 ",
        "10.5.34.0-24\n",
        "10.5.34.0/24",
        "10.5.034.0-24",
        "10.5.256.0-24",
        "10.5.34.0-99999999999999999999",
        "0.0.0.0-0",
        "10.5.34.0-24&",
        "10.5.34.0-24&fc00::-128",
        "10.5.34.0-24&FC00::-64",
        "10.5.34.0-24&fc00:::-64",
        "10.5.34.0-24&fc00::1.2.3.4-64",
        "fc00::-64",
        "١٠.5.34.0-24",
    ],
)
def test_key_that_is_none_is_malformed_and_named(key: str) -> None:
    with pytest.raises(MalformedLease) as caught:
        parse_key(key)
    assert repr(key) in caught.value.message


@given(st.text())
def test_key_of_any_text_is_read_or_malformed(key: str) -> None:
    with contextlib.suppress(MalformedLease):
        assert any(parse_key(key))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (b'{"PublicIP":"192.0.2.1"}', Lease(leg("10.5.1.0/24", "192.0.2.1"))),  # before v0.15
        (
            b'{"publicip":"192.0.2.1","BACKENDTYPE":"vxlan"}',
            Lease(leg("10.5.1.0/24", "192.0.2.1"), None, "vxlan"),
        ),
        (
            b'{"PublicIP":"192.0.2.1","BackendType":"vxlan","backenddata":{"VNI":1}}',
            Lease(leg("10.5.1.0/24", "192.0.2.1", b'{"VNI":1}'), None, "vxlan"),
        ),
        (
            b' {"BackendData": {"VNI": 1}, "Later": [1], "PublicIP": "192.0.2.1"} ',
            Lease(leg("10.5.1.0/24", "192.0.2.1", b'{"VNI": 1}')),
        ),
        (
            b'{"PublicIP":"192.0.2.1","BackendType":null,"BackendData":null}',
            Lease(leg("10.5.1.0/24", "192.0.2.1")),
        ),
        (b"{}", Lease(leg("10.5.1.0/24"))),
    ],
)
def test_value_of_other_writers_is_read(value: bytes, expected: Lease) -> None:
    assert decode("10.5.1.0-24", value) == expected


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b'{"PublicIP":"192.0.2.1"} x',
        b'{"PublicIP":4}',
        b'{"PublicIP":null}',
        b'{"PublicIP":"192.0.2"}',
        b'{"PublicIP":"fd00::1"}',
        b'{"PublicIP":"192.0.2.1","PublicIPv6":"192.0.2.1"}',
        b'{"PublicIP":"192.0.2.1","BackendType":7}',
        b'{"PublicIP":"192.0.2.1","BackendData":' + b"[" * 100_000,
        b'{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendData":' + b"[" * 100_000,
        b'{"PublicIP":"\\u0000"}',
        b'{"PublicIP":"\\ud800"}',
        b'{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendData":{"Acceleration":"\xff"}}',
        b'{"publicip":"192.0.2.1","BackendV6Data":{"\xff":1}}',
        b'{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendData":{"x":' + b"[" * 150 + b"]" * 150 + b"}}",
        b"\xff",
    ],
)
def test_value_that_is_none_is_malformed_and_names_its_key(value: bytes) -> None:
    with pytest.raises(MalformedLease, match=r"10\.5\.1\.0-24"):
        decode("10.5.1.0-24", value)


@given(st.binary(max_size=60))
def test_value_of_any_bytes_is_read_or_malformed(value: bytes) -> None:
    with contextlib.suppress(MalformedLease):
        decode("10.5.1.0-24", value)
