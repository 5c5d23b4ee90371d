# SPDX-License-Identifier: Apache-2.0
"""The difference between what a consumer knows and what a store holds. Pure."""

from collections.abc import Mapping

from loden.lease import Lease
from loden.stores.base import Snapshot


def difference(known: Mapping[str, Lease], snapshot: Snapshot) -> tuple[dict[str, Lease], frozenset[str]]:
    """The leases that are new or changed, and the keys that are gone.

    Whole leases are compared, so that a new address or MAC behind the same key is a change (COMPAT W10).
    A key that is malformed now is not removed: what was known of it stays (W1).

    Args:
        known: the consumer's leases, by key.
        snapshot: what the store holds.
    """
    records, malformed = snapshot.records, snapshot.malformed
    written = {key: record.lease for key, record in records.items() if known.get(key) != record.lease}
    return written, frozenset(key for key in known if key not in records and key not in malformed)
