# SPDX-License-Identifier: Apache-2.0
"""Which ICMP messages say that a datagram of ours was too big (RFC 792, RFC 1191, RFC 4443)."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Family
from loden.tables.path_mtu import is_too_big

PORT = 8285


def ipv4(protocol: int, payload: bytes, *, options: bytes = b"") -> bytes:
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH8x", 0x40 | words, 0, 20 + len(payload), 0, 0x4000, 64, protocol, 0)
    return head + options + payload


def message4(
    kind: int = 3, code: int = 4, *, port: int = PORT, protocol: int = 17, options: bytes = b""
) -> bytes:
    quoted = ipv4(protocol, struct.pack("!HHHH", port, PORT, 8, 0))
    return ipv4(1, struct.pack("!BBHHH", kind, code, 0, 0, 1400) + quoted, options=options)


def message6(kind: int = 2, code: int = 0, *, port: int = PORT, protocol: int = 17) -> bytes:
    quoted = struct.pack("!IHBB32x", 6 << 28, 8, protocol, 64) + struct.pack("!HHHH", port, PORT, 8, 0)
    return struct.pack("!BBHI", kind, code, 0, 1400) + quoted


@pytest.mark.parametrize(
    ("family", "packet", "expected"),
    [
        (Family.IPV4, message4(), True),
        (Family.IPV4, message4(options=b"\x01" * 8), True),
        (Family.IPV4, message4(code=3), False),
        (Family.IPV4, message4(kind=11), False),
        (Family.IPV4, message4(port=53), False),
        (Family.IPV4, message4(protocol=6), False),
        (Family.IPV6, message6(), True),
        (Family.IPV6, message6(kind=1), False),
        (Family.IPV6, message6(port=53), False),
        (Family.IPV6, message6(protocol=6), False),
    ],
)
def test_only_ours_and_only_too_big(family: Family, packet: bytes, expected: bool) -> None:
    assert is_too_big(family, packet, PORT) is expected


@pytest.mark.parametrize(("family", "packet"), [(Family.IPV4, message4()), (Family.IPV6, message6())])
def test_cut_anywhere_it_says_nothing_or_the_same(family: Family, packet: bytes) -> None:
    found = [is_too_big(family, packet[:length], PORT) for length in range(len(packet) + 1)]
    assert found[-1]
    assert found == sorted(found)  # False up to the port, True from there on


@given(family=st.sampled_from(Family), packet=st.binary(max_size=100))
def test_takes_whatever_comes(family: Family, packet: bytes) -> None:
    is_too_big(family, packet, PORT)
