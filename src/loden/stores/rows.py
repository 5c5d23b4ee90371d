# SPDX-License-Identifier: Apache-2.0
"""How the embedded stores keep a lease: flannel's key and value, and beside them what flannel lacks."""

from array import array
from collections.abc import Iterable
from math import isnan, nan

import msgspec

from loden.errors import MalformedLease
from loden.lease import Lease, decode
from loden.stores.base import Holder, Record

#: key, value, revision, end on the boot clock (None for a reservation), holder and contender as JSON text.
Row = tuple[str, bytes, int, float | None, str | None, str | None]

_holder_decoder = msgspec.json.Decoder(Holder)


def encode_holder(holder: Holder | None) -> str | None:
    """A holder as JSON text."""
    return None if holder is None else msgspec.json.encode(holder).decode()


def read_rows(rows: Iterable[Row]) -> tuple[dict[str, Record], dict[str, str]]:
    """The records that rows stand for, and for each row that stands for none the reason; both by key.

    First all leases, then what goes around them: an agent keeps the ones and lets go of the others, and what
    lies between things that stay is memory that nobody else can use.
    """
    malformed: dict[str, str] = {}
    keys: list[str] = []
    leases: list[Lease] = []
    revisions, ends, texts, cuts = array("q"), array("d"), bytearray(), array("q")
    for key, value, revision, expires, holder, contender in rows:
        try:
            leases.append(decode(key, value))
        except MalformedLease as error:
            malformed[key] = error.message
            continue
        keys.append(key)
        revisions.append(revision)
        ends.append(nan if expires is None else expires)
        texts += (holder or "").encode() + b"\0" + (contender or "").encode()
        cuts.append(len(texts))
    records: dict[str, Record] = {}
    start = 0
    for key, lease, revision, end, cut in zip(keys, leases, revisions, ends, cuts, strict=True):
        holder_text, _, contender_text = bytes(texts[start:cut]).partition(b"\0")
        start = cut
        try:
            around = _read_holder(holder_text), _read_holder(contender_text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            malformed[key] = f"read lease {key!r}: its holder or contender: {error}"
        else:
            records[key] = Record(key, lease, revision, None if isnan(end) else end, *around)
    return records, malformed


def _read_holder(text: bytes) -> Holder | None:
    return _holder_decoder.decode(text) if text else None
