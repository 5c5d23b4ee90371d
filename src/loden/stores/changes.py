# SPDX-License-Identifier: Apache-2.0
"""The difference between what a consumer knows and what a store holds. Pure."""

from collections.abc import Mapping

from loden.stores.base import Changes, Record, Snapshot


def difference(known: Mapping[str, Record], snapshot: Snapshot) -> Changes:
    """What a consumer missed, as a watch would have told it.

    Whole records are compared, so that a new address or MAC behind the same key is a change (COMPAT W10).
    A key that is malformed now is not removed: what was known of it stays (W1).

    Args:
        known: the consumer's records, by key.
        snapshot: what the store holds.
    """
    records, malformed = snapshot.records, snapshot.malformed
    return Changes(
        revision=snapshot.revision,
        written={key: record for key, record in records.items() if known.get(key) != record},
        removed=frozenset(key for key in known if key not in records and key not in malformed),
        malformed=malformed,
    )
