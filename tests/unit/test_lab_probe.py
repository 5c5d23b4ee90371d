# SPDX-License-Identifier: Apache-2.0
import struct

from hypothesis import given
from hypothesis import strategies as st

from loden.lab.probe import checksum, echo_request


def test_checksum_of_the_rfc_example() -> None:
    """RFC 1071 section 3: the sum of these is ddf2."""
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0xFFFF - 0xDDF2


@given(st.sampled_from([8, 128]), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=64))
def test_echo_request_verifies(kind: int, identifier: int, sequence: int, data: bytes) -> None:
    message = echo_request(kind, identifier, sequence, data)
    assert checksum(message) == 0
    assert struct.unpack_from("!BB2xHH", message) == (kind, 0, identifier, sequence)
