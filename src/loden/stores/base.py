# SPDX-License-Identifier: Apache-2.0
"""What every store does: the protocol, and the values that go through it.

A store holds the network configuration and one record a lease. It decides nothing: which subnet a host
takes is :mod:`loden.stores.allocate` (pure) and :mod:`loden.stores.acquire` (the steps, on any store).
The suite in ``tests/contract/store.py`` says in tests what the docstrings here say in words.
"""

from collections.abc import AsyncGenerator, Mapping
from typing import Protocol

import msgspec

from loden.lease import Lease


class Holder(msgspec.Struct, frozen=True, gc=False):
    """Who holds a lease, to tell a host that returns from another host with its address (COMPAT W33).

    Args:
        id: differs between any two agents that could run at once: boot id and network namespace.
        name: the host's name, for people.
    """

    id: str
    name: str = ""


class Record(msgspec.Struct, frozen=True, gc=False):
    """A lease as it stands in a store.

    Args:
        key: the lease's key (COMPAT §2.2), without the store's own prefix.
        lease: what the key and the value say.
        revision: of the store when the record was last written; the token of compare-and-swap.
        expires: on this host's ``CLOCK_BOOTTIME``, in seconds; None for a reservation, which never does;
            infinity where the store knows, and would have to be asked (:meth:`Store.with_ends`). A holder's
            own store always says.
        holder: who wrote it; None where the writer keeps none (flannel nodes, reservations).
        contender: who asks whether the holder still lives; see :mod:`loden.stores.acquire`.
    """

    key: str
    lease: Lease
    revision: int
    expires: float | None = None
    holder: Holder | None = None
    contender: Holder | None = None

    @property
    def is_reservation(self) -> bool:
        return self.expires is None


class Snapshot(msgspec.Struct, frozen=True):
    """Every lease at one revision.

    Args:
        revision: of the store.
        records: by key.
        malformed: for each key that is no lease, what is wrong with it; it concerns that key alone (W1).
    """

    revision: int
    records: Mapping[str, Record]
    malformed: Mapping[str, str] = {}


class Changes(msgspec.Struct, frozen=True):
    """What happened after an earlier revision, at most one fact a key.

    Args:
        revision: of the store after the last of them.
        written: records that are new or changed, by key.
        removed: keys that are gone: released or expired.
        malformed: as in :class:`Snapshot`. A key that turns malformed stays what it was until it is removed.
    """

    revision: int
    written: Mapping[str, Record] = {}
    removed: frozenset[str] = frozenset()
    malformed: Mapping[str, str] = {}


class Store(Protocol):
    """Where the network and the leases live.

    Every method may block on I/O, is safe to cancel (the write may or may not have happened) and raises
    :class:`~loden.errors.StoreUnavailable` where trying again can help and
    :class:`~loden.errors.StoreUnusable` where it cannot. Any number of processes may use one store at once.
    """

    @property
    def ttl_s(self) -> float:
        """How long a lease lasts after a write, in seconds."""
        ...

    async def get_network(self) -> bytes | None:
        """The network configuration's JSON text as it was put; None where there is none yet."""
        ...

    async def put_network(self, text: bytes) -> None:
        """Write the network configuration. It is not checked here."""
        ...

    def watch_network(self) -> AsyncGenerator[bytes | None, None]:
        """The network configuration as it is now, then each other that is put in its place, for ever.

        Of several that follow each other fast, only the last is sure to be told. As with :meth:`watch`, it
        raises rather than retries, and its consumer closes it.
        """
        ...

    async def snapshot(self) -> Snapshot:
        """Every lease that has not expired, at one revision."""
        ...

    async def with_ends(self, snapshot: Snapshot) -> Snapshot:
        """The same with the ends of leases for which the store has to be asked one by one: for people."""
        ...

    async def create(self, lease: Lease, *, holder: Holder | None, reserve: bool = False) -> Record:
        """Write a lease where none is.

        Args:
            lease: its key names the record.
            holder: kept beside it.
            reserve: without an end.

        Raises:
            MalformedLease: its key is none that could be read back, such as that of a whole family.
            Conflict: the key exists, or (where the store can tell atomically) one of the lease's subnets
                overlaps another lease's (W7).
        """
        ...

    async def replace(self, record: Record, *, extend: bool = True) -> Record:
        """Write a record where it still is what its reader last saw; the new state, with its new revision.

        Args:
            record: *revision* is the one last seen; lease (same key), holder and contender are the new ones.
                A reservation stays one; ``expires=None`` turns a lease into one.
            extend: give it its full time again; otherwise its end stays what it was.

        Raises:
            Conflict: the record is gone or was written since.
        """
        ...

    async def delete(self, record: Record) -> None:
        """Remove a record where it still is what its reader last saw.

        Raises:
            Conflict: the record is gone or was written since.
        """
        ...

    def watch(self, revision: int) -> AsyncGenerator[Changes | Snapshot, None]:
        """What happens after a revision, for ever: expiry included.

        It yields within 50 ms of another process's write. Nothing is lost: when the store cannot tell any
        more what happened since, it yields a whole :class:`Snapshot` instead, and the consumer computes the
        difference. It does not end by itself and does not retry: it raises. A consumer that leaves it early
        closes it (``contextlib.aclosing``).

        Args:
            revision: of a snapshot or of the last value this yielded.
        """
        ...

    async def close(self) -> None:
        """Let go of files and connections; idempotent. A watch that is running ends."""
        ...
