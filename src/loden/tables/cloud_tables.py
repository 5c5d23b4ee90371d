# SPDX-License-Identifier: Apache-2.0
"""A cloud's route tables, and what its routes need of the instance, as tables of the reconciler.

One listing serves a whole pass. What other hosts want is none of this host's business, but for routes of
hosts that are gone (:mod:`loden.tables.cloud_plan`).
"""

import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence

import msgspec

from loden.address import Prefix
from loden.errors import CloudDenied, CloudError, CloudUnavailable, ForeignRoute, LodenError, RoutesFull
from loden.network import Range
from loden.retry import Trouble
from loden.tables.base import Failures
from loden.tables.cloud import Cloud, Listed, Listing, Owner
from loden.tables.cloud_calls import CloudCalls
from loden.tables.cloud_plan import (
    Add,
    Census,
    Identify,
    Refuse,
    Remove,
    Replace,
    Step,
    Wait,
    is_due,
    routes_to,
    steps_to_stand,
    strays,
    without_lease,
)
from loden.tables.cloud_room import Room
from loden.tables.entries import HERE, CloudRoute, CloudSetting
from loden.tables.netlink import Message

log = logging.getLogger(__name__)

#: A listing serves what is decided within this time.
_FRESH_S = 5.0
#: What was found to be somebody else's is asked for again so late: a tag may be put on.
_FOREIGN_AGE_S = 3600.0
#: A route that the listing says nothing of is asked for; a race may need one more look.
_TRIES = 4

#: The leases now. Raises StoreError where they cannot be read.
TakeCensus = Callable[[], Awaitable[Census]]


class Terms(msgspec.Struct, frozen=True):
    """What a person may say about a cloud's routes.

    Args:
        limit: how many routes a table may hold; None to find out.
        grace_s: one turn in the removal of routes of hosts that are gone, seconds.
    """

    limit: int | None = None
    grace_s: float = 600.0


USUAL_TERMS = Terms()


class CloudRouteTable:
    """Routes to this host's subnets, in every route table that matters to it.

    Args:
        calls: of the cloud.
        ranges: of the network.
        take_census: reads the leases.
        terms: limit and grace period.
        is_held: whether this host's lease is its own now, as far as it can tell without asking.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        calls: CloudCalls,
        ranges: Sequence[Range],
        take_census: TakeCensus,
        *,
        terms: Terms = USUAL_TERMS,
        is_held: Callable[[], bool] = lambda: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls = calls
        self._ranges = tuple(ranges)
        self._take_census = take_census
        self._grace_s = terms.grace_s
        self._is_held = is_held
        self._clock = clock
        self._room = Room(calls, terms.limit, clock)
        self._listing: Listing | None = None
        self._listed_at = 0.0
        self._absent_since: dict[tuple[str, Prefix, str], float] = {}
        self._foreign_since: dict[tuple[str, Prefix, str], float] = {}
        self._store_trouble = Trouble(log, "reading the leases for the cloud's routes")

    @property
    def entry_type(self) -> type[CloudRoute]:
        return CloudRoute

    def use(self, ranges: Sequence[Range]) -> None:
        """Look after routes to subnets of these ranges from now on."""
        self._ranges = tuple(ranges)

    async def read(self, wanted: Mapping[Hashable, CloudRoute]) -> dict[Hashable, CloudRoute]:
        listing = await self._list(max_age_s=0.0)
        await self._room.judge(listing)
        found: dict[Hashable, CloudRoute] = {}
        for entry in wanted.values():
            if not steps_to_stand(entry.dst, listing):
                found[entry.slot] = entry
        for route in await self._garbage(listing, [entry.dst for entry in wanted.values()]):
            via = HERE if route.owner is Owner.SELF else route.target
            found[route.dst] = CloudRoute(route.dst, via)
        return found

    async def put(self, entries: Sequence[CloudRoute]) -> Failures:
        failures: Failures = {}
        for entry in entries:
            try:
                await self._stand(entry.dst)
            except LodenError as error:
                failures[entry.slot] = error
        return failures

    async def drop(self, entries: Sequence[CloudRoute]) -> Failures:
        failures: Failures = {}
        for entry in entries:
            try:
                await self._clear(entry.dst)
            except LodenError as error:
                failures[entry.slot] = error
        return failures

    async def preview(self, wanted: Sequence[Prefix]) -> list[str]:
        """What would be done, a line each; only questions are asked.

        Args:
            wanted: this host's subnets.

        Raises:
            LodenError: the cloud or the leases cannot be read.
        """
        steps: list[Step] = []
        for dst in wanted:
            while any(isinstance(step, Identify) for step in steps_to_stand(dst, await self._list())):
                for step in steps_to_stand(dst, await self._list()):
                    if isinstance(step, Identify):
                        await self._identify(step.route)
            steps += steps_to_stand(dst, await self._list())
        found = strays(await self._list(), self._ranges, wanted)
        lines = [str(step) for step in steps]
        lines += [str(Remove(route)) for route in found if route.owner is Owner.SELF]
        others = [route for route in found if route.owner is not Owner.SELF]
        absent = without_lease(others, await self._take_census()) if others else []
        for route in [await self._identify(one) if one.owner is Owner.UNKNOWN else one for one in absent]:
            if route.owner is Owner.FABRIC:
                lines.append(
                    f"{Remove(route)}: no host has a lease for it; one of the hosts does it, "
                    f"{self._grace_s:g} s or more after it first saw that"
                )
        return lines

    def heard(self, message: Message, wanted: Mapping[Hashable, CloudRoute]) -> Hashable | None:
        del message, wanted  # the kernel's news are not about a cloud
        return None

    async def _list(self, *, max_age_s: float = _FRESH_S) -> Listing:
        if self._listing is None or self._clock() - self._listed_at > max_age_s or not max_age_s:
            self._listing = None
            self._listing = await self._calls.call("list routes", lambda cloud: cloud.list_routes())
            self._listed_at = self._clock()
        return self._listing

    async def _stand(self, dst: Prefix) -> None:
        """Make this host's route stand, whatever another host does meanwhile."""
        if not self._is_held():  # it may have another holder by now, who would not hear of our route
            raise CloudUnavailable("add", f"cloud route {dst}", "this host's lease for it has ended")
        for left in reversed(range(_TRIES)):
            steps = steps_to_stand(dst, await self._list())
            unknown = [step.route for step in steps if isinstance(step, Identify)]
            for route in unknown:
                await self._identify(route)
            if unknown:
                continue
            try:
                for step in steps:
                    await self._take_step(step)
            except CloudUnavailable:
                self._listing = None
                raise
            except (CloudDenied, ForeignRoute, RoutesFull):
                raise
            except CloudError:
                was, self._listing = self._listing, None  # somebody was faster, perhaps
                if not left or await self._list() == was:
                    raise
            else:
                return
        raise CloudUnavailable("add", f"cloud route {dst}", "it changes faster than it can be read")

    async def _identify(self, route: Listed) -> Listed:
        try:
            address = (await self._take_census()).addresses.get(route.dst)
        except LodenError:
            address = None
        known = await self._calls.call("identify routes", lambda cloud: cloud.identify(route, address))
        if known.owner is Owner.UNKNOWN:
            known = msgspec.structs.replace(known, owner=Owner.FOREIGN)
        self._exchange(route, known)
        return known

    async def _take_step(self, step: Step) -> None:
        match step:
            case Add(table, dst):
                await self._add(table, dst)
            case Replace(route):
                await self._require_ours(route)
                turned = await self._calls.call("replace route", lambda cloud: cloud.replace(route))
                log.warning("cloud route replaced %s: it leads to this host now", route)
                self._exchange(route, turned)
            case Remove(route):
                await self._require_ours(route)
                await self._remove(route)
            case Wait(route):
                raise CloudUnavailable("add", f"cloud route {route}", "the cloud is still at work on it")
            case Refuse(route):
                raise ForeignRoute(
                    "add",
                    f"cloud route {route.dst} via this host",
                    f"{route}{f' ({route.handle})' if route.handle else ''} is somebody else's",
                    hint="remove that route, or give this network another range",
                )
            case Identify(_):
                raise AssertionError("identified before")

    async def _add(self, table: str, dst: Prefix) -> None:
        listing = await self._list()
        self._room.require(listing, table, dst)
        try:
            made = await self._calls.call("add route", lambda cloud: cloud.add(table, dst))
        except RoutesFull as error:
            raise self._room.full(listing, table, dst, error.code) from error
        log.info("cloud route added %s", made)
        self._exchange(None, made)

    async def _require_ours(self, route: Listed) -> None:
        """Raise where a route of another host is to be touched and our lease is not certain.

        Two hosts may both believe that a subnet is theirs, one of them on the strength of a lease that has
        ended. The store knows; who cannot ask it touches nothing that carries another one's packets.
        """
        if route.owner is Owner.SELF:
            return
        census = await self._take_census()
        if route.dst not in census.own:
            raise CloudUnavailable(
                "replace", f"cloud route {route}", "the store has no lease of this host for that subnet"
            )

    async def _clear(self, dst: Prefix) -> None:
        """Remove what leads to this host, and what leads to a host that is gone if that is due yet."""
        routes = routes_to(dst, await self._list())
        for route in routes:
            if route.owner is Owner.SELF:
                await self._remove(route)
        others = [route for route in routes if route.owner in (Owner.FABRIC, Owner.UNKNOWN)]
        # The store is asked anew right before: somebody may have taken the subnet since.
        for route in await self._due(others):
            await self._remove(route)
            log.warning("cloud route removed %s: no host has had a lease for it for a while", route)

    async def _remove(self, route: Listed) -> None:
        await self._calls.call("remove route", lambda cloud: cloud.remove(route))
        log.info("cloud route gone %s", route)
        self._exchange(route, None)

    async def _garbage(self, listing: Listing, wanted: Sequence[Prefix]) -> list[Listed]:
        found = strays(listing, self._ranges, wanted)
        others = [route for route in found if route.owner is not Owner.SELF]
        ours = [route for route in found if route.owner is Owner.SELF]
        return ours + await self._due(others, is_complete=True)

    async def _due(self, routes: Sequence[Listed], *, is_complete: bool = False) -> list[Listed]:
        """Those of the routes that this host is to remove now.

        Args:
            routes: of other hosts.
            is_complete: these are all there are, so that what is known of others can be forgotten.
        """
        if not routes:
            if is_complete:
                self._absent_since.clear()
            return []
        try:
            census = await self._take_census()
        except LodenError as error:
            self._store_trouble.happened(error)
            return []
        self._store_trouble.ended()
        absent = without_lease(routes, census)
        now = self._clock()
        since = {_key(route): self._absent_since.get(_key(route), now) for route in absent}
        for route in routes:
            self._absent_since.pop(_key(route), None)
        self._absent_since = since if is_complete else self._absent_since | since
        due = [
            route
            for route in absent
            if is_due(census, route.dst, absent_s=now - since[_key(route)], grace_s=self._grace_s)
        ]
        return [route for route in due if await self._is_fabrics(route)]

    async def _is_fabrics(self, route: Listed) -> bool:
        """Whether a route is another host's of the fabric; the answer no is remembered."""
        if route.owner is not Owner.UNKNOWN:
            return route.owner is Owner.FABRIC
        key, now = _key(route), self._clock()
        if now - self._foreign_since.get(key, -_FOREIGN_AGE_S) < _FOREIGN_AGE_S:
            return False
        if (await self._identify(route)).owner is Owner.FABRIC:
            return True
        self._foreign_since[key] = now
        return False

    def _exchange(self, old: Listed | None, new: Listed | None) -> None:
        """Keep the listing true to what was done."""
        if self._listing is None:
            return
        routes = [route for route in self._listing.routes if route != old]
        counts = dict(self._listing.counts)
        for route, change in ((old, -1), (new, 1)):
            if route is not None and route.table in counts:
                counts[route.table] += change
        if new is not None:
            routes.append(new)
        self._listing = Listing(self._listing.tables, tuple(routes), counts)


def _key(route: Listed) -> tuple[str, Prefix, str]:
    return route.table, route.dst, route.target


class CloudSettingTable:
    """What this host's instance has to be like for its routes to work.

    Args:
        calls: of the cloud.
    """

    def __init__(self, calls: CloudCalls) -> None:
        self._calls = calls

    @property
    def entry_type(self) -> type[CloudSetting]:
        return CloudSetting

    async def read(self, wanted: Mapping[Hashable, CloudSetting]) -> dict[Hashable, CloudSetting]:
        values = await self._calls.call("read settings of this instance", lambda cloud: cloud.read_settings())
        return {
            slot: entry if values[entry.name] == entry.value else CloudSetting(entry.name, values[entry.name])
            for slot, entry in wanted.items()
            if entry.name in values
        }

    async def put(self, entries: Sequence[CloudSetting]) -> Failures:
        failures: Failures = {}
        for entry in entries:
            try:
                await self._calls.call(f"change {entry}", _change(entry))
            except CloudError as error:
                failures[entry.slot] = error
        return failures

    async def drop(self, entries: Sequence[CloudSetting]) -> Failures:
        del entries  # an instance that forwards stays one: nobody knows who else needs it
        return {}

    def heard(self, message: Message, wanted: Mapping[Hashable, CloudSetting]) -> Hashable | None:
        del message, wanted
        return None


def _change(entry: CloudSetting) -> Callable[[Cloud], None]:
    return lambda cloud: cloud.change_setting(entry.name, entry.value)
