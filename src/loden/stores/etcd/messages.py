# SPDX-License-Identifier: Apache-2.0
"""etcd's messages, as far as they are used here: requests as bytes, answers as values; pure.

They are protobuf, whose encoding is short: a field is a tag (its number and how its value is written) and a
value, which is a varint or a length and so many bytes. Fields at their default are left out. The names and
numbers are those of etcd's ``rpc.proto``, ``kv.proto`` and gRPC's paths, the same since etcd 3.0.

The decoder of key-values is spelt out, because fifty thousand leases are a hundred thousand of them.
"""

from collections.abc import Iterable, Iterator
from enum import IntEnum

import msgspec

from loden.errors import StoreUnavailable

RANGE = "/etcdserverpb.KV/Range"
TXN = "/etcdserverpb.KV/Txn"
WATCH = "/etcdserverpb.Watch/Watch"
GRANT = "/etcdserverpb.Lease/LeaseGrant"
REVOKE = "/etcdserverpb.Lease/LeaseRevoke"
KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"
TIME_TO_LIVE = "/etcdserverpb.Lease/LeaseTimeToLive"
AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DELETE = 1  # mvccpb.Event.EventType


class Malformed(StoreUnavailable):
    """Bytes that are no protobuf message."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"read etcd's answer: {reason}", hint="is it etcd that answers?")


class KeyValue(msgspec.Struct, frozen=True, gc=False):
    """A key as it stands; in a deletion, with its revision alone.

    Args:
        key, value: bytes.
        created, modified: revisions; *modified* is the token of compare-and-swap.
        lease: the etcd lease that it goes with; 0 for none.
    """

    key: bytes
    value: bytes = b""
    created: int = 0
    modified: int = 0
    lease: int = 0


class Range(msgspec.Struct, frozen=True):
    """Some keys, at one revision.

    Args:
        revision: of the store.
        found: in key order.
        has_more: whether a limit cut them short.
        term: the reign of the leader that the member knew of: it changes with the leader.
        cluster: which one it is: another, where somebody made it anew.
    """

    revision: int
    found: tuple[KeyValue, ...]
    has_more: bool = False
    term: int = 0
    cluster: int = 0


class Answer(msgspec.Struct, frozen=True):
    """What a transaction came to.

    Args:
        revision: of the store after it.
        succeeded: whether all comparisons held.
        ranges: what was read, in the order of the operations that read.
        previous: what stood before, for each operation that was asked to say so.
    """

    revision: int
    succeeded: bool
    ranges: tuple[Range, ...] = ()
    previous: tuple[KeyValue, ...] = ()


class Grant(msgspec.Struct, frozen=True):
    """An etcd lease.

    Args:
        id: never 0.
        ttl_s: seconds left; 0 or less where there is no such lease.
        keys: that go with it, where that was asked for.
        term: as in :class:`Range`, before it was kept alive.
    """

    id: int
    ttl_s: int
    keys: tuple[bytes, ...] = ()
    term: int = 0


class News(msgspec.Struct, frozen=True):
    """One message of a watch.

    Args:
        revision: of the store when it was sent; events of earlier revisions may be yet to come.
        events: in order of revision, those of one revision always together; each with whether it is a put.
        is_created: the first message.
        is_canceled: the last message.
        reason: why it was canceled.
        compacted: what happened before this revision is forgotten; 0 where nothing asked for is.
        cluster: as in :class:`Range`.
    """

    revision: int
    events: tuple[tuple[bool, KeyValue], ...] = ()
    is_created: bool = False
    is_canceled: bool = False
    reason: str = ""
    compacted: int = 0
    cluster: int = 0


class Target(IntEnum):
    """What of a key is compared, and with which field of ``Compare``."""

    VERSION = 0
    CREATED = 1
    MODIFIED = 2
    LEASE = 4


_TARGET_FIELD = {Target.VERSION: 4, Target.CREATED: 5, Target.MODIFIED: 6, Target.LEASE: 8}


def _varint(value: int) -> bytes:
    value &= 0xFFFF_FFFF_FFFF_FFFF  # negative numbers are written as 64 bits of two's complement
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""


def _bytes(field: int, value: bytes) -> bytes:
    return _message(field, value) if value else b""


def _message(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(value)) + value


def prefix_end(prefix: bytes) -> bytes:
    """The first key behind all that begin with a prefix, which does not end in ``\\xff``."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def get(key: bytes, end: bytes = b"", *, limit: int = 0, revision: int = 0, keys_only: bool = False) -> bytes:
    """A ``RangeRequest``: one key, or those from *key* up to *end*.

    Args:
        key, end: where to begin, and where to stop before; no end for the key alone.
        limit: how many at most; 0 for all.
        revision: to look back at; 0 for now.
        keys_only: leave the values out.
    """
    fields = (_bytes(1, key), _bytes(2, end), _number(3, limit), _number(4, revision), _number(8, keys_only))
    return b"".join(fields)


def op_get(key: bytes, end: bytes = b"", *, keys_only: bool = False) -> bytes:
    """A range read inside a transaction; the arguments are those of :func:`get`."""
    return _message(1, get(key, end, keys_only=keys_only))


def op_put(key: bytes, value: bytes, *, lease: int = 0, previous: bool = False) -> bytes:
    """A put inside a transaction.

    Args:
        key, value: bytes.
        lease: the etcd lease that it goes with; 0 for none.
        previous: answer with what stood before.
    """
    return _message(2, _bytes(1, key) + _bytes(2, value) + _number(3, lease) + _number(4, previous))


def op_delete(key: bytes, *, previous: bool = False) -> bytes:
    """A deletion inside a transaction; the arguments are those of :func:`op_put`."""
    return _message(3, _bytes(1, key) + _number(3, previous))


def equal(target: Target, key: bytes, value: int, *, end: bytes = b"") -> bytes:
    """A comparison: every key from *key* up to *end* has this; where there is none, all of it is 0."""
    return _number(2, target) + _bytes(3, key) + _number(_TARGET_FIELD[target], value) + _bytes_at_64(end)


def differs(target: Target, key: bytes, value: int) -> bytes:
    """A comparison: the key does not have this."""
    return _number(1, 3) + equal(target, key, value)


def _bytes_at_64(value: bytes) -> bytes:
    return _bytes(64, value)


def txn(compare: Iterable[bytes], success: Iterable[bytes], failure: Iterable[bytes] = ()) -> bytes:
    """A ``TxnRequest``: do *success* where every comparison holds, else *failure*."""
    parts = [_message(1, one) for one in compare]
    parts += [_message(2, one) for one in success]
    parts += [_message(3, one) for one in failure]
    return b"".join(parts)


def watch(key: bytes, end: bytes = b"", *, since: int) -> bytes:
    """A ``WatchRequest`` for what happens from the revision *since* on, with a sign of life now and then."""
    return _message(1, _bytes(1, key) + _bytes(2, end) + _number(3, since) + _number(4, 1))


def grant(ttl_s: int) -> bytes:
    """A ``LeaseGrantRequest``."""
    return _number(1, ttl_s)


def lease_id(number: int, *, keys: bool = False) -> bytes:
    """A request about one lease: revoke it, keep it alive, how long it has left, and of which *keys*."""
    return _number(1, number) + _number(2, keys)


def authenticate(name: str, password: str) -> bytes:
    """An ``AuthenticateRequest``."""
    return _bytes(1, name.encode()) + _bytes(2, password.encode())


def read_token(data: bytes) -> str:
    """What an ``AuthenticateResponse`` brings."""
    return next((chunk.decode("latin-1") for field, _, chunk in _fields(data) if field == 2), "")


def read_range(data: bytes) -> Range:
    """A ``RangeResponse``.

    Raises:
        Malformed: it is none.
    """
    revision, term, cluster, has_more = 0, 0, 0, False
    found: list[KeyValue] = []
    for field, number, chunk in _fields(data):
        if field == 2:
            found.append(_key_value(chunk))
        elif field == 1:
            revision, term, cluster = _header(chunk)
        elif field == 3:
            has_more = bool(number)
    return Range(revision, tuple(found), has_more, term, cluster)


def read_answer(data: bytes) -> Answer:
    """A ``TxnResponse``.

    Raises:
        Malformed: it is none.
    """
    revision, succeeded = 0, False
    ranges: list[Range] = []
    previous: list[KeyValue] = []
    for field, number, chunk in _fields(data):
        if field == 1:
            revision, *_ = _header(chunk)
        elif field == 2:
            succeeded = bool(number)
        elif field == 3:
            for kind, _, answer in _fields(chunk):
                if kind == 1:
                    ranges.append(read_range(answer))
                else:  # prev_kv of a put is field 2, prev_kvs of a deletion field 3
                    before = 2 if kind == 2 else 3
                    previous += [_key_value(kv) for at, _, kv in _fields(answer) if at == before and kv]
    return Answer(revision, succeeded, tuple(ranges), tuple(previous))


def read_grant(data: bytes) -> Grant:
    """A ``LeaseGrantResponse``, ``LeaseKeepAliveResponse`` or ``LeaseTimeToLiveResponse``.

    Raises:
        Malformed: it is none.
    """
    number_of, ttl_s, term = 0, 0, 0
    keys: list[bytes] = []
    for field, number, chunk in _fields(data):
        if field == 2:
            number_of = _signed(number)
        elif field == 3:
            ttl_s = _signed(number)
        elif field == 5:
            keys.append(chunk)
        elif field == 1:
            _, term, _ = _header(chunk)
    return Grant(number_of, ttl_s, tuple(keys), term)


def read_news(data: bytes) -> News:
    """A ``WatchResponse``.

    Raises:
        Malformed: it is none.
    """
    revision, cluster, is_created, is_canceled, reason, compacted = 0, 0, False, False, "", 0
    events: list[tuple[bool, KeyValue]] = []
    for field, number, chunk in _fields(data):
        if field == 11:
            events.append(_event(chunk))
        elif field == 1:
            revision, _, cluster = _header(chunk)
        elif field == 3:
            is_created = bool(number)
        elif field == 4:
            is_canceled = bool(number)
        elif field == 5:
            compacted = number
        elif field == 6:
            reason = chunk.decode(errors="replace")
    return News(revision, tuple(events), is_created, is_canceled, reason, compacted, cluster)


def _event(data: bytes) -> tuple[bool, KeyValue]:
    is_put, found = True, KeyValue(b"")
    for field, number, chunk in _fields(data):
        if field == 1:
            is_put = number != _DELETE
        elif field == 2:
            found = _key_value(chunk)
    return is_put, found


def _header(data: bytes) -> tuple[int, int, int]:
    """What every answer begins with: the store's revision, the leader's term, and which cluster it is."""
    found = {field: number for field, number, _ in _fields(data)}
    return found.get(3, 0), found.get(4, 0), found.get(1, 0)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _fields(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Each field of a message: its number, and its value as a number or as bytes; the other is 0 or empty."""
    at, end = 0, len(data)
    while at < end:
        tag, at = _read_varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            number, at = _read_varint(data, at)
            yield tag >> 3, number, b""
        elif kind == _BYTES:
            length, at = _read_varint(data, at)
            start, at = at, at + length
            if at > end:
                raise Malformed("a field is longer than its message")
            yield tag >> 3, 0, data[start:at]
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise Malformed(f"a field of kind {kind}")


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number, and where the next begins."""
    value = shift = 0
    try:
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
    except IndexError:
        raise Malformed("it ends in the middle of a number") from None


def _key_value(data: bytes) -> KeyValue:
    """A ``mvccpb.KeyValue``: key 1, create_revision 2, mod_revision 3, version 4, value 5, lease 6."""
    key = value = b""
    numbers = [0, 0, 0, 0, 0, 0, 0]
    at, end = 0, len(data)
    try:
        while at < end:
            tag = data[at]
            number = data[at + 1]
            at += 2
            if number > 0x7F:
                number &= 0x7F
                shift = 7
                while True:
                    byte = data[at]
                    at += 1
                    number |= (byte & 0x7F) << shift
                    if byte < 0x80:
                        break
                    shift += 7
            if tag == 0x0A:
                key = data[at : at + number]
                at += number
            elif tag == 0x2A:
                value = data[at : at + number]
                at += number
            elif tag & 7 == 0 and tag < 0x38:
                numbers[tag >> 3] = number
            else:
                raise Malformed(f"a key-value with the tag {tag}")
    except IndexError:
        raise Malformed("a key-value is cut short") from None
    if at != end:
        raise Malformed("a field is longer than its key-value")
    return KeyValue(key, value, numbers[2], numbers[3], numbers[6])
