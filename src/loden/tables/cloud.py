# SPDX-License-Identifier: Apache-2.0
"""What a cloud is to the route table that it keeps: a few calls, each of which blocks.

A cloud is one file in :mod:`loden.clouds`. It speaks the cloud's API and decides nothing: whose a route is
follows from what the cloud says of it, what is to be done from :mod:`loden.tables.cloud_plan`, and when from
:mod:`loden.tables.cloud_tables`.
"""

import enum
from collections.abc import Mapping
from typing import Protocol

import msgspec

from loden.address import Prefix


class Owner(enum.Enum):
    """Whose a route is."""

    SELF = "this host's"
    FABRIC = "another host's of the fabric"
    UNKNOWN = "not told by the listing"  #: :meth:`Cloud.identify` finds out
    FOREIGN = "somebody else's"


class Listed(msgspec.Struct, frozen=True):
    """A route as the cloud lists it.

    Args:
        table: the table's ID, or what stands in its place.
        dst: the destination.
        target: the next hop, in the cloud's words.
        owner: as far as the listing tells.
        handle: what the cloud's other calls name the route by, where that is not its destination.
        is_usable: whether it carries packets; a route to an instance that is gone does not.
        is_settled: whether the cloud is done with it; one that is being made may yet fail.
    """

    table: str
    dst: Prefix
    target: str
    owner: Owner
    handle: str = ""
    is_usable: bool = True
    is_settled: bool = True

    def __str__(self) -> str:
        state = "" if self.is_usable else " (which does not serve)"
        return f"{self.dst} via {self.target}{state} in {self.table}"


class Listing(msgspec.Struct, frozen=True):
    """The routes of the tables that matter to this host.

    Args:
        tables: where its own route is to stand.
        routes: all that somebody made; not those that the cloud made by itself.
        counts: how many routes each table, or what the quota counts by, holds against the quota.
    """

    tables: tuple[str, ...]
    routes: tuple[Listed, ...]
    counts: Mapping[str, int]


class Limits(msgspec.Struct, frozen=True):
    """What is known of a cloud's quota of routes before anybody asks.

    Args:
        usual: what accounts have that nobody raised it for; the least where it differs.
        hint: how to raise it.
    """

    usual: int
    hint: str


class Cloud(Protocol):
    """One host's access to one cloud.

    Every method blocks on HTTP, for a bounded time, and one is called at a time.

    Raises (each method):
        CloudUnavailable: the call may work later.
        CloudDenied: the credentials do not do.
        CloudError: anything else; the message never holds a credential.
    """

    #: For people.
    name: str
    limits: Limits

    def attach(self) -> str:
        """Find out which instance this is, in which network; idempotent, and called before all others.

        Returns:
            what was found, as a sentence for the log.
        """
        ...

    def list_routes(self) -> Listing:
        """Read the tables, every page of them."""
        ...

    def identify(self, route: Listed, address: bytes | None) -> Listed:
        """Find out whose a route is that the listing says nothing of.

        Args:
            route: listed as :attr:`Owner.UNKNOWN`; any other is returned as it is.
            address: the public address (packed) that the last known lease of its destination named.
        """
        ...

    def add(self, table: str, dst: Prefix) -> Listed:
        """Make a route to this host where none is, and wait until it carries packets.

        Raises:
            RoutesFull: the quota is used up.
        """
        ...

    def replace(self, route: Listed) -> Listed:
        """Let an existing route of the fabric lead to this host: atomically, else the new before the old."""
        ...

    def remove(self, route: Listed) -> None:
        """Remove a route; one that is gone already counts as removed."""
        ...

    def read_limit(self) -> int | None:
        """The quota of routes as the account has it; None where the cloud does not tell."""
        ...

    def read_settings(self) -> Mapping[str, str]:
        """What of this instance has to be in a certain way, as it is, by name."""
        ...

    def change_setting(self, name: str, value: str) -> None:
        """Make it so.

        Raises:
            CloudError: it cannot be changed from here; the hint says how a person does it.
        """
        ...
