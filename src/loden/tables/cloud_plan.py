# SPDX-License-Identifier: Apache-2.0
"""What is to be done about a cloud's routes, from what was listed; pure.

*Own routes.* What leads to this host and is not wanted goes at once. What is wanted is added, or a route of
the fabric is turned to this host. A route of somebody else is left alone and named.

*Routes of hosts that are gone.* Their leases ended; nobody is left to remove them but the others. All see the
same routes and the same leases, so all can compute whose turn it is without asking each other: the hosts are
ordered by a hash of host and route (rendezvous hashing), which differs from route to route. The first waits
one grace period after it first saw the route without a lease, the second two, and so on: one of them acts at
a time, and when the first cannot, the next one does. Who cannot read the leases never acts, nor does a host
that holds none itself: its view of the store may be the one that is wrong.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from loden.address import Prefix
from loden.network import Range
from loden.tables.cloud import Listed, Listing, Owner


class Census(msgspec.Struct, frozen=True):
    """The leases, read a moment ago.

    Args:
        live: every subnet that somebody holds, or that a key names whose value cannot be read.
        own: this host's.
        holders: the keys of all leases: who may have a turn.
        me: this host's key; empty where it holds no lease.
        addresses: the public address (packed) that the last known lease of a subnet named, ended ones too.
    """

    live: frozenset[Prefix] = frozenset()
    own: frozenset[Prefix] = frozenset()
    holders: frozenset[str] = frozenset()
    me: str = ""
    addresses: Mapping[Prefix, bytes] = {}


class Add(msgspec.Struct, frozen=True):
    """Make a route where none is."""

    table: str
    dst: Prefix

    def __str__(self) -> str:
        return f"add {self.dst} via this host in {self.table}"


class Replace(msgspec.Struct, frozen=True):
    """Turn a route to this host."""

    route: Listed

    def __str__(self) -> str:
        return f"replace {self.route}: it shall lead to this host"


class Remove(msgspec.Struct, frozen=True):
    """Remove a route."""

    route: Listed

    def __str__(self) -> str:
        return f"remove {self.route}"


class Identify(msgspec.Struct, frozen=True):
    """Find out whose a route is, and decide again."""

    route: Listed


class Wait(msgspec.Struct, frozen=True):
    """The cloud is still at work on this one."""

    route: Listed

    def __str__(self) -> str:
        return f"wait for {self.route}"


class Refuse(msgspec.Struct, frozen=True):
    """A route of somebody else is in the way."""

    route: Listed

    def __str__(self) -> str:
        return f"refuse: {self.route} is somebody else's"


Step = Add | Replace | Remove | Identify | Wait | Refuse


def steps_to_stand(dst: Prefix, listing: Listing) -> list[Step]:
    """What makes this host's route stand in every table; nothing where it does.

    Args:
        dst: this host's subnet.
        listing: as read.
    """
    return [
        step for table in listing.tables for step in _steps_in(table, dst, routes_to(dst, listing, table))
    ]


def routes_to(dst: Prefix, listing: Listing, table: str | None = None) -> list[Listed]:
    """The routes to exactly this destination, in one table or in all."""
    return [route for route in listing.routes if route.dst == dst and table in (None, route.table)]


def _steps_in(table: str, dst: Prefix, here: Sequence[Listed]) -> Sequence[Step]:
    for owner, step in ((Owner.FOREIGN, Refuse), (Owner.UNKNOWN, Identify)):
        found = [route for route in here if route.owner is owner]
        if found:
            return [step(found[0])]
    right = [route for route in here if route.owner is Owner.SELF and route.is_usable]
    if right:  # beside it, what an interrupted replacement left
        kept = next((route for route in right if route.is_settled), right[0])
        rest: list[Step] = [Remove(route) for route in here if route != kept]
        return rest if kept.is_settled else [Wait(kept)]
    if here:
        return [*(Remove(route) for route in here[1:]), Replace(here[0])]
    return [Add(table, dst)]


def is_subnet(dst: Prefix, ranges: Iterable[Range]) -> bool:
    """Whether a destination is one that the network hands out to hosts.

    Whatever has another shape is none of the fabric's business, whoever it leads to.
    """
    return any(
        dst.length == part.subnet_length and part.first.first <= dst.first <= part.last.first
        for part in ranges
        if part.family is dst.family
    )


def strays(listing: Listing, ranges: Sequence[Range], wanted: Iterable[Prefix]) -> list[Listed]:
    """The routes that may be the fabric's, and that this host does not want for itself."""
    own = frozenset(wanted)
    return [
        route
        for route in listing.routes
        if route.owner is not Owner.FOREIGN and route.dst not in own and is_subnet(route.dst, ranges)
    ]


def without_lease(routes: Iterable[Listed], census: Census) -> list[Listed]:
    """Those of the routes whose subnet nobody holds."""
    return [
        route
        for route in routes
        if route.dst not in census.live and not any(route.dst.overlaps(other) for other in census.live)
    ]


def turn(census: Census, dst: Prefix) -> int | None:
    """After how many others it is this host's turn to remove a route; None where it never is.

    Args:
        census: read at the same moment as the decision is for.
        dst: of the route.
    """
    if census.me not in census.holders:
        return None
    order = sorted(census.holders, key=lambda key: hashlib.sha256(f"{key} {dst}".encode()).digest())
    return order.index(census.me)


def is_due(census: Census, dst: Prefix, *, absent_s: float, grace_s: float) -> bool:
    """Whether this host is to remove a route now that nobody has had a lease for, for so long.

    Args:
        census: as :func:`turn` takes it.
        dst: of the route.
        absent_s: since this host first saw it without a lease, seconds.
        grace_s: one turn, seconds.
    """
    place = turn(census, dst)
    return place is not None and absent_s >= grace_s * (place + 1)
