# SPDX-License-Identifier: Apache-2.0
"""From leases to entries: what every lease in the store asks of this host.

The one place where a lease meets the backend. What :meth:`Backend.entries` returns for a peer's lease goes,
under the lease's key, to the reconciler; what it returned before goes.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence

from loden.errors import LeaseError, PeerUnreachable
from loden.interface import Hop
from loden.lease import Lease, Leg
from loden.plan import Plan, host_networks, require_harmless
from loden.reconcile import Reconciler
from loden.stores.base import Changes, Record, Snapshot
from loden.stores.changes import difference
from loden.tables.entries import Entry
from loden.tables.host import find_hops
from loden.tables.netlink import Netlink

log = logging.getLogger(__name__)


class Peers:
    """Every lease that is known, our own among them, and which of them cannot be served.

    Args:
        plan: what turns leases into entries.
        reconciler: is told what is wanted.
        lookups: a socket of our own, to ask the kernel for the way to a peer.
    """

    def __init__(self, plan: Plan, reconciler: Reconciler, lookups: Netlink) -> None:
        self.use(plan)
        self._reconciler = reconciler
        self._lookups = lookups
        self._own: Record | None = None
        # Not their records: of twenty thousand, who holds them is a tenth of the agent's memory.
        self._leases: dict[str, Lease] = {}
        self._malformed: dict[str, str] = {}
        self._refused: dict[str, str] = {}
        self._is_suspended = False

    def __str__(self) -> str:
        peers = len(self._leases) - (self._own is not None and self._own.key in self._leases)
        return f"{peers} peers, {len(self._refused) + len(self._malformed)} refused"

    def set_own(self, record: Record) -> None:
        """Say which lease is our own: it is no peer's, and no peer's may overlap it."""
        self._own = record
        self._is_suspended = False
        self.program()

    def suspend(self) -> None:
        """Want nothing of any peer until :meth:`set_own` says which lease is our own."""
        self._is_suspended = True
        self.program()

    def use(self, plan: Plan) -> None:
        """Turn leases into entries by this plan from the next time on."""
        self._plan = plan
        self._near = tuple(host_networks(plan.host.underlay, plan.host.facts))

    def take(self, news: Changes | Snapshot) -> None:
        """Take note of what the store says, and want what follows from it."""
        self.program(self.note(news))

    def note(self, news: Changes | Snapshot) -> list[str]:
        """Take note of what the store says; the keys that :meth:`program` is to be called with.

        Between the two, the caller of twenty thousand records may let them go.
        """
        if isinstance(news, Snapshot):
            self._malformed = {
                key: reason for key, reason in self._malformed.items() if key in news.malformed
            }
            written, removed = difference(self._leases, news)
        else:
            written, removed = {key: record.lease for key, record in news.written.items()}, news.removed
        for key, reason in news.malformed.items():
            if self._malformed.get(key) != reason:
                self._malformed[key] = reason
                log.warning("lease unreadable key=%s: %s; what is known of it stays", key, reason)
        for key in removed:
            self._leases.pop(key, None)
        self._leases.update(written)
        changed = [*removed, *written]
        for key in changed:
            self._malformed.pop(key, None)
        return changed

    def program(self, keys: Sequence[str] | None = None) -> None:
        """Ask anew what leases ask for: they changed; or all, as the host or our own lease did.

        Args:
            keys: of the leases; None for all.
        """
        self._program(list(self._leases) if keys is None else keys)

    def _program(self, keys: Sequence[str]) -> None:
        known = [self._leases[key] for key in keys if key in self._leases]
        hops = self._find_hops(known) if self._plan.needs_hops else {}
        for key in keys:
            if key in self._leases:
                self._reconciler.want(key, self._serve(key, self._leases[key], hops))
            else:
                self._refused.pop(key, None)
                self._reconciler.want(key, ())

    def _find_hops(self, leases: Iterable[Lease]) -> Mapping[bytes, Hop | None]:
        return find_hops(self._lookups, (leg.public for lease in leases for leg in lease.legs if leg.public))

    def _serve(self, key: str, lease: Lease, hops: Mapping[bytes, Hop | None]) -> Sequence[Entry]:
        """What a lease asks for; a family that cannot be served is said once and leaves the other alone."""
        entries: list[Entry] = []
        refusals = [] if self._is_suspended else self._remarks(key, lease)
        for leg in self._legs(key, lease):
            try:
                entries += self._entries(leg, hops)
            except LeaseError as error:
                refusals.append(str(error))
        reason = "; ".join(refusals)
        if reason:
            if self._refused.get(key) != reason:
                self._refused[key] = reason
                log.warning("peer refused lease=%s: %s", key, reason)
        elif self._refused.pop(key, None):
            log.info("peer no longer refused lease=%s", key)
        return entries

    def _remarks(self, key: str, lease: Lease) -> list[str]:
        """What of a lease is nothing for this host: another backend, another family (COMPAT W5)."""
        if self._own is not None and key == self._own.key:
            return []
        if lease.backend_type != self._plan.lease_type:
            return [f"its backend is {lease.backend_type!r}, ours is {self._plan.lease_type!r}"]
        return [
            f"{leg.subnet}: this network has no {leg.subnet.family}"
            for leg in lease.legs
            if leg.subnet.family not in self._plan.backends
        ]

    def _legs(self, key: str, lease: Lease) -> Iterable[Leg]:
        own = self._own
        if self._is_suspended:
            return ()
        # Peers of another backend are served by nobody (COMPAT §2.3), also where they were of ours (W12).
        if lease.backend_type != self._plan.lease_type or (own is not None and key == own.key):
            return ()
        return (leg for leg in lease.legs if leg.subnet.family in self._plan.backends)

    def _entries(self, leg: Leg, hops: Mapping[bytes, Hop | None]) -> Sequence[Entry]:
        if self._own is not None and any(leg.subnet.overlaps(it.subnet) for it in self._own.lease.legs):
            raise PeerUnreachable(f"route {leg.subnet}: another host's lease overlaps our own subnet")
        require_harmless(leg, self._plan.host.network, self._near)
        return self._plan.backends[leg.subnet.family].entries(leg, hops.get(leg.public or b""))
