# SPDX-License-Identifier: Apache-2.0
"""This host's part in a cloud: its routes, kept by a reconciler of their own.

A cloud is slow, far away and asked by many. It gets its own loop, so that nothing in the kernel waits for it;
what is wanted, put, dropped and repaired works as for the kernel's tables.
"""

import logging
from collections.abc import Callable, Iterable, Mapping

from loden.address import Prefix
from loden.backends.base import Backend
from loden.backends.cloud import CloudBackend
from loden.errors import MalformedLease
from loden.lease import parse_key
from loden.network import Network
from loden.reconcile import Pace, Reconciler
from loden.stores.base import Changes, Record, Snapshot, Store
from loden.tables.cloud_calls import CloudCalls
from loden.tables.cloud_plan import Census
from loden.tables.cloud_tables import CloudRouteTable, CloudSettingTable, Terms
from loden.tables.entries import CloudRoute, CloudSetting, Entry, is_clouds

log = logging.getLogger(__name__)

_OWN = "own lease"
_RETRY_FIRST_S, _SPREAD = 2.0, 0.2


class CloudRoutes:
    """Keeps what this host wants of its cloud.

    Args:
        backend: a cloud's; it opens the cloud.
        network: the cluster's configuration.
        store: says who holds which subnet.
        is_held: whether the own lease is held now.
    """

    def __init__(
        self,
        backend: Backend,
        network: Network,
        store: Store,
        *,
        is_held: Callable[[], bool] = lambda: True,
    ) -> None:
        assert isinstance(backend, CloudBackend), "no other wants anything of a cloud"
        options = backend.options
        self._store = store
        self._record: Record | None = None
        self._addresses: dict[Prefix, bytes] = {}
        self._calls = CloudCalls(backend.open(), attached=lambda found: log.info("cloud: %s", found))
        self._routes = CloudRouteTable(
            self._calls,
            network.ranges,
            self._take_census,
            terms=Terms(limit=options.route_limit, grace_s=float(options.grace_period)),
            is_held=is_held,
        )
        self._settings = CloudSettingTable(self._calls)
        self._wanted: list[Entry] = []
        self._reconciler = Reconciler(
            [self._routes, self._settings],
            pace=Pace(
                look_s=float(options.check_interval),
                # What fails is due no sooner than the next look, in the end.
                retry_first_s=min(_RETRY_FIRST_S, float(options.check_interval)),
                retry_most_s=float(options.check_interval),
                spread=_SPREAD,
            ),
            place=f"the routes of {self._calls.cloud.name}",
        )

    @property
    def is_standing(self) -> bool:
        """Whether everything wanted of the cloud was seen to be there, or put there."""
        return self._reconciler.has_settled and not self._reconciler.failures(_OWN)

    @property
    def problem(self) -> str:
        """What does not stand, and why; empty where nothing is known to be wrong."""
        return next((str(error) for error in self._reconciler.failures(_OWN)), "")

    @property
    def problems(self) -> Mapping[str, str]:
        """What cannot be put or removed now, routes of hosts that are gone among it, each with the reason."""
        return self._reconciler.problems

    def stand(self, record: Record, entries: Iterable[Entry]) -> None:
        """Want what the own lease asks for, in place of what was wanted before. Does not block.

        Args:
            record: the lease.
            entries: of it; those of the kernel are passed over.
        """
        self._record = record
        self._remember([record])
        self._wanted = [entry for entry in entries if is_clouds(entry)]
        self._reconciler.want(_OWN, self._wanted)

    def let_go(self) -> None:
        """Want nothing of the cloud: the lease is not ours. Does not block."""
        self._wanted = []
        self._reconciler.want(_OWN, ())

    def use(self, backend: Backend) -> None:
        """Work with this backend's cloud from now on: the host has another address. Does not block."""
        assert isinstance(backend, CloudBackend)
        self._calls.change(backend.open())
        self._reconciler.look_soon()

    def use_network(self, network: Network) -> None:
        """Hosts get their subnets from these ranges from now on. Does not block."""
        self._routes.use(network.ranges)

    def take(self, news: Changes | Snapshot) -> None:
        """Remember which subnet was whose, also after its lease ended. Does not block."""
        self._remember((news.records if isinstance(news, Snapshot) else news.written).values())

    async def run(self) -> None:
        """Keep the routes, for ever; the first thing is a look."""
        try:
            await self._reconciler.run()
        finally:
            self._calls.close()

    async def preview(self) -> list[str]:
        """What a look would change, a line each; nothing is changed.

        Raises:
            LodenError: the cloud or the store cannot be read.
        """
        wanted = [entry.dst for entry in self._wanted if isinstance(entry, CloudRoute)]
        lines = await self._routes.preview(wanted)
        settings = {entry.slot: entry for entry in self._wanted if isinstance(entry, CloudSetting)}
        found = await self._settings.read(settings)
        for slot, entry in settings.items():
            now = found.get(slot)
            if now != entry:
                lines.append(f"change {entry}: it is {now.value if now else 'not known'}")
        self._calls.close()
        return lines

    async def wait_standing(self) -> None:
        """Return when everything wanted of the cloud is there."""
        while not self.is_standing:
            await self._reconciler.wait_pass()

    @staticmethod
    def _who_acts(snapshot: Snapshot) -> set[str]:
        """The keys of hosts that remove routes of others: not those of reservations or of flannel's nodes.

        Where the store does not tell (it keeps no holders at all), they are all taken for ours.
        """
        return {key for key, record in snapshot.records.items() if record.holder is not None} or set(
            snapshot.records
        )

    def _is_ours(self, found: Record | None) -> bool:
        """Whether the record under our key still is our lease: who lost it may not have heard of that yet."""
        own = self._record
        if found is None or own is None:
            return False
        return found.lease == own.lease and (found.holder is None or found.holder == own.holder)

    def _remember(self, records: Iterable[Record]) -> None:
        for record in records:
            for leg in record.lease.legs:
                if leg.public is not None:
                    self._addresses[leg.subnet] = leg.public

    async def _take_census(self) -> Census:
        """Read the leases, now: what a watch said may be old, and routes of others depend on it."""
        snapshot = await self._store.snapshot()
        self._remember(snapshot.records.values())
        held = {
            key: frozenset(leg.subnet for leg in record.lease.legs)
            for key, record in snapshot.records.items()
        }
        own = self._record.key if self._record is not None else ""
        if not self._is_ours(snapshot.records.get(own)):
            own = ""
        live = {subnet for subnets in held.values() for subnet in subnets}
        live |= {subnet for key in snapshot.malformed for subnet in _subnets(key)}
        return Census(
            live=frozenset(live),
            own=held.get(own, frozenset()),
            holders=frozenset(self._who_acts(snapshot)),
            me=own,
            addresses=dict(self._addresses),
        )


def _subnets(key: str) -> list[Prefix]:
    """What a key claims, whatever its value says."""
    try:
        return [subnet for subnet in parse_key(key) if subnet is not None]
    except MalformedLease:
        return []
