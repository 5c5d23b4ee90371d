# SPDX-License-Identifier: Apache-2.0
"""etcd's messages against a second, slow encoder; the real etcd is in tests/stores."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.stores.etcd import messages
from loden.stores.etcd.messages import KeyValue, Malformed

NUMBERS = st.one_of(st.integers(0, 300), st.integers(0, (1 << 63) - 1))


def varint(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, 64, 7) if value >> shift or shift == 0]
    return bytes(
        group | (0x80 if more else 0)
        for group, more in zip(groups, [1] * (len(groups) - 1) + [0], strict=True)
    )


def field(number: int, value: int | bytes) -> bytes:
    """Also where it is at its default, which a writer may leave out and need not."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def key_value(key: bytes, value: bytes, created: int, modified: int, lease: int) -> bytes:
    fields = (
        field(1, key),
        field(2, created),
        field(3, modified),
        field(4, 7),
        field(5, value),
        field(6, lease),
    )
    return b"".join(fields)


@given(st.binary(max_size=40), st.binary(max_size=300), NUMBERS, NUMBERS, NUMBERS)
def test_key_value_is_read(key: bytes, value: bytes, created: int, modified: int, lease: int) -> None:
    data = (
        field(1, field(3, 9) + field(4, 2))
        + field(2, key_value(key, value, created, modified, lease))
        + field(4, 1)
    )
    found = messages.read_range(data)
    assert found.found == (KeyValue(key, value, created, modified, lease),)
    assert (found.revision, found.term, found.has_more) == (9, 2, False)


@given(st.lists(st.tuples(st.booleans(), st.binary(min_size=1, max_size=9), NUMBERS), max_size=5), NUMBERS)
def test_news_is_read(events: list[tuple[bool, bytes, int]], revision: int) -> None:
    data = field(1, field(3, revision)) + b"".join(
        field(11, field(1, int(not is_put)) + field(2, key_value(key, b"v", 1, modified, 0)))
        for is_put, key, modified in events
    )
    news = messages.read_news(data)
    assert news.revision == revision
    assert [(is_put, one.key, one.modified) for is_put, one in news.events] == events
    assert (news.is_created, news.is_canceled, news.compacted) == (False, False, 0)


def test_end_of_a_watch_is_read() -> None:
    data = field(1, field(3, 5)) + field(3, 1) + field(4, 1) + field(5, 77) + field(6, "because ä".encode())
    news = messages.read_news(data)
    assert (news.is_created, news.is_canceled, news.compacted, news.reason) == (True, True, 77, "because ä")


def test_answer_is_read() -> None:
    before = key_value(b"k", b"old", 1, 2, 3)
    listed = field(1, field(3, 4)) + field(2, key_value(b"r", b"s", 1, 1, 0))
    data = (
        field(1, field(3, 8))
        + field(2, 1)
        + field(3, field(2, field(1, b"") + field(2, before)))
        + field(3, field(3, field(2, 1) + field(3, before)))
        + field(3, field(1, listed))
    )
    answer = messages.read_answer(data)
    assert (answer.revision, answer.succeeded) == (8, True)
    assert [one.value for one in answer.previous] == [b"old", b"old"]
    assert [one.key for one in answer.ranges[0].found] == [b"r"]


@pytest.mark.parametrize(("written", "ttl_s"), [(60, 60), ((1 << 64) - 1, -1)])
def test_time_of_a_lease_is_signed(written: int, ttl_s: int) -> None:
    found = messages.read_grant(
        field(1, field(4, 3)) + field(2, 1 << 62) + field(3, written) + field(5, b"key")
    )
    assert (found.id, found.ttl_s, found.keys, found.term) == (1 << 62, ttl_s, (b"key",), 3)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_malformed(data: bytes) -> None:
    for read in (
        messages.read_range,
        messages.read_answer,
        messages.read_grant,
        messages.read_news,
        messages.read_token,
    ):
        with contextlib.suppress(Malformed):
            read(data)


@pytest.mark.parametrize(
    "data", [b"\x0a", b"\x0a\x05ab", b"\xff", b"\x0b", field(2, b"\x0a\x05ab"), field(2, b"\x0b\x01")]
)
def test_message_that_is_cut_short_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed, match="read etcd's answer"):
        messages.read_range(data)


def test_fields_that_are_not_known_are_passed_over() -> None:
    data = field(99, b"x") + b"\xa1\x06" + bytes(8) + b"\xa5\x06" + bytes(4) + field(4, 1)
    assert messages.read_range(data).found == ()


def test_requests_leave_out_what_is_at_its_default() -> None:
    assert messages.get(b"k") == field(1, b"k")
    assert messages.get(b"k", b"l", limit=300) == field(1, b"k") + field(2, b"l") + field(3, 300)
    assert messages.grant(86_400) == field(1, 86_400)
    assert messages.lease_id(5) == field(1, 5)


def test_end_of_a_prefix() -> None:
    assert messages.prefix_end(b"/a/subnets") == b"/a/subnett"
