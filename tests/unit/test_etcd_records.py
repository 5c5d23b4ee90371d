# SPDX-License-Identifier: Apache-2.0
"""What keys in etcd, and values in SQLite, are read as, whatever somebody wrote there."""

import math

import pytest

from loden.stores.etcd.messages import KeyValue
from loden.stores.etcd.records import Keys, Reading
from loden.stores.rows import read_rows

LEASE = b'{"PublicIP":"192.0.2.1","PublicIPv6":null}'
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "holder", [b'{"holder":{"id":"\xff","name":"h"}}', b"\xff", DEEP.encode(), b"null", b""]
)
def test_holder_that_cannot_be_read_costs_only_itself(holder: bytes) -> None:
    keys = Keys("/n")
    reading = Reading(keys, lambda _: math.inf)
    reading.take(
        [
            KeyValue(keys.holder("10.5.1.0-24"), holder, modified=7),
            KeyValue(keys.subnet("10.5.1.0-24"), LEASE, modified=7),
        ]
    )
    found = reading.snapshot(7)
    assert found.records["10.5.1.0-24"].holder is None
    assert list(found.malformed) == ["loden/holders/10.5.1.0-24"]


@pytest.mark.parametrize("holder", ["null", "[]", DEEP, '{"id":' + DEEP])
def test_row_whose_holder_cannot_be_read_costs_only_itself(holder: str) -> None:
    records, malformed = read_rows(
        [("10.5.1.0-24", LEASE, 1, None, holder, None), ("10.5.2.0-24", LEASE, 2, None, None, None)]
    )
    assert list(records) == ["10.5.2.0-24"]
    assert list(malformed) == ["10.5.1.0-24"]
