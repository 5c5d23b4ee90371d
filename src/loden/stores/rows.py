# SPDX-License-Identifier: Apache-2.0
"""How the embedded stores keep a lease: flannel's key and value, and beside them what flannel lacks."""

from collections.abc import Iterable

import msgspec

from loden.errors import MalformedLease
from loden.lease import decode
from loden.stores.base import Holder, Record

#: key, value, revision, end on the boot clock (None for a reservation), holder and contender as JSON text.
Row = tuple[str, bytes, int, float | None, str | None, str | None]

_holder_decoder = msgspec.json.Decoder(Holder)


def encode_holder(holder: Holder | None) -> str | None:
    """A holder as JSON text."""
    return None if holder is None else msgspec.json.encode(holder).decode()


def read_rows(rows: Iterable[Row]) -> tuple[dict[str, Record], dict[str, str]]:
    """The records that rows stand for, and for each row that stands for none the reason; both by key."""
    records: dict[str, Record] = {}
    malformed: dict[str, str] = {}
    read_holder = _holder_decoder.decode
    for key, value, revision, expires, holder, contender in rows:
        try:
            records[key] = Record(
                key,
                decode(key, value),
                revision,
                expires,
                read_holder(holder) if holder is not None else None,
                read_holder(contender) if contender is not None else None,
            )
        except MalformedLease as error:
            malformed[key] = error.message
        except msgspec.DecodeError as error:
            malformed[key] = f"read lease {key!r}: its holder or contender: {error}"
    return records, malformed
