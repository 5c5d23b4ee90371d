# SPDX-License-Identifier: Apache-2.0
"""Which keys there are in etcd, and what they say; pure.

::

    P/config             the network, as flannel reads it
    P/loden/claims/…     see loden.stores.etcd.claims
    P/loden/holders/KEY  who holds the lease KEY and contends for it: flannel's value has no room for that
    P/subnets/KEY        the lease, as flannel reads and writes it (COMPAT §2.1 to §2.3)

A holder is written with its lease, in one transaction, and goes with the same etcd lease. It counts only
where both were written at one revision: a flannel node that writes a lease of its own leaves the holder's key
as it was. Holders and leases lie side by side in the order of keys, so that one listing and one watch bring
both.
"""

from array import array
from collections.abc import Callable, Iterable

import msgspec

from loden.errors import MalformedLease
from loden.lease import Lease, decode
from loden.stores.base import Changes, Holder, Record, Snapshot
from loden.stores.etcd.messages import KeyValue, prefix_end

#: When a lease ends, on this host's boot clock, by its etcd lease. Only etcd knows of others' leases, and it
#: removes them itself.
Ends = Callable[[int], float]


class Keys:
    """The keys under a prefix.

    Args:
        prefix: without a slash at its end.
    """

    def __init__(self, prefix: str) -> None:
        root = prefix.encode()
        self.root = root
        self.config = root + b"/config"
        self.claims = root + b"/loden/claims/"
        self.holders = root + b"/loden/holders/"
        self.subnets = root + b"/subnets/"
        #: From the first holder to the last key that flannel takes for a lease (COMPAT §2.7).
        self.leases = (self.holders, prefix_end(root + b"/subnets"))
        self._foreign = root + b"/subnets"

    def subnet(self, key: str) -> bytes:
        """The key of a lease."""
        return self.subnets + key.encode()

    def holder(self, key: str) -> bytes:
        """The key of its holder."""
        return self.holders + key.encode()

    def name(self, key: bytes) -> str:
        """What a record is called whose key this is; its whole path where flannel would not write it."""
        if key.startswith(self.subnets):
            return key[len(self.subnets) :].decode(errors="backslashreplace")
        return key[len(self.root) + 1 :].decode(errors="backslashreplace")

    def is_holder(self, key: bytes) -> bool:
        return key.startswith(self.holders)

    def is_subnet(self, key: bytes) -> bool:
        """Whether flannel looks at this key for a lease: also at ``P/subnets-x``, which is nobody's."""
        return key.startswith(self._foreign)


class _Beside(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is kept beside a lease."""

    holder: Holder | None = None
    contender: Holder | None = None


_decoder = msgspec.json.Decoder(_Beside)
_NOTHING = _Beside()


def encode_beside(record: Record) -> bytes:
    """What is kept beside a lease, as JSON."""
    return msgspec.json.encode(_Beside(record.holder, record.contender))


class Reading:
    """Turns keys and values, as they come, into records, and into what is wrong with them.

    First all leases, then what goes around them (see ``loden.stores.rows``). Each key comes once.

    Args:
        keys: of the store.
        ends: when leases end.
    """

    def __init__(self, keys: Keys, ends: Ends) -> None:
        self._keys = keys
        self._ends = ends
        self._beside: dict[bytes, bytes] = {}  # by name: eight bytes of revision, then the value
        self._names: list[str] = []
        self._leases: list[Lease] = []
        self._revisions = array("q")
        self._lease_ids = array("q")
        self._malformed: dict[str, str] = {}
        self._removed: set[str] = set()

    def take(self, found: Iterable[KeyValue]) -> None:
        """Take keys that stand, holders before their leases."""
        for one in found:
            self._put(one)

    def take_events(self, events: Iterable[tuple[bool, KeyValue]]) -> None:
        """Take what happened, in order of revision; what a key came to in the end counts."""
        last = {one.key: (is_put, one) for is_put, one in events}
        for key in sorted(last):  # holders first
            is_put, one = last[key]
            if is_put:
                self._put(one)
            elif self._keys.is_subnet(key):
                self._removed.add(self._keys.name(key))

    def snapshot(self, revision: int) -> Snapshot:
        """What was taken, as what there is at a revision."""
        return Snapshot(revision, self._records(), self._malformed)

    def changes(self, revision: int) -> Changes | None:
        """What was taken, as a watch tells it; None where it says nothing of any lease."""
        if not (self._leases or self._removed or self._malformed):
            return None
        return Changes(revision, self._records(), frozenset(self._removed), self._malformed)

    def _put(self, one: KeyValue) -> None:
        keys = self._keys
        if keys.is_holder(one.key):
            self._beside[one.key[len(keys.holders) :]] = one.modified.to_bytes(8, "big") + one.value
        elif keys.is_subnet(one.key):
            name = keys.name(one.key)
            try:
                self._leases.append(self._lease(name, one))
            except MalformedLease as error:
                self._malformed[name] = error.message
            else:
                self._names.append(name)
                self._revisions.append(one.modified)
                self._lease_ids.append(one.lease)

    def _lease(self, name: str, one: KeyValue) -> Lease:
        if not one.key.startswith(self._keys.subnets):
            raise MalformedLease(f"read lease key {name!r}: it lies beside subnets/, not in it")
        if "\\" in name:
            raise MalformedLease(f"read lease key {name!r}: it is not UTF-8")
        return decode(name, one.value)

    def _records(self) -> dict[str, Record]:
        records = {}
        facts = zip(self._names, self._leases, self._revisions, self._lease_ids, strict=True)
        for name, lease, revision, lease_id in facts:
            expires = self._ends(lease_id) if lease_id else None
            beside = self._read_beside(name, revision)
            records[name] = Record(name, lease, revision, expires, beside.holder, beside.contender)
        return records

    def _read_beside(self, name: str, revision: int) -> _Beside:
        beside = self._beside.pop(name.encode(), b"")
        if beside[:8] != revision.to_bytes(8, "big"):
            return _NOTHING
        try:
            return _decoder.decode(beside[8:])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._malformed[f"loden/holders/{name}"] = f"read holder of {name!r}: {error}"
            return _NOTHING
