# SPDX-License-Identifier: Apache-2.0
"""How many routes a cloud lets a table hold, and what is said before and when that many are there."""

import logging
from collections.abc import Callable, Iterable

from loden.address import Prefix
from loden.errors import CloudError, RoutesFull
from loden.tables.cloud import Listing
from loden.tables.cloud_calls import CloudCalls

log = logging.getLogger(__name__)

#: From this share of the quota on there is a warning.
_NEARLY_FULL = 0.8
_LIMIT_AGE_S = 86_400.0


class Room:
    """How many routes there may be.

    Args:
        calls: of the cloud.
        limit: as a person gave it; None to find out.
        clock: monotonic seconds.
    """

    def __init__(self, calls: CloudCalls, limit: int | None, clock: Callable[[], float]) -> None:
        self._calls = calls
        self._limits = calls.cloud.limits
        self._given = limit
        self._clock = clock
        self._read: int | None = None
        self._read_at = -_LIMIT_AGE_S
        self._warned: frozenset[str] = frozenset()

    @property
    def limit(self) -> int:
        """As given, else as the account has it, else as it usually is."""
        return self._given or self._read or self._limits.usual

    @property
    def _how_known(self) -> str:
        if self._given:
            return "RouteLimit says"
        return "the account's quota is" if self._read else "the quota usually is"

    async def judge(self, listing: Listing) -> None:
        """Warn once when a table of ours is nearly full; the quota is asked for only then."""
        if not self._given and self._clock() - self._read_at >= _LIMIT_AGE_S and self._nearly_full(listing):
            self._read_at = self._clock()
            try:
                self._read = await self._calls.call("read quota of routes", lambda cloud: cloud.read_limit())
            except CloudError as error:
                log.info("quota of routes not read: %s", error)
        nearly = frozenset(self._nearly_full(listing))
        for table in sorted(nearly - self._warned):
            log.warning(
                "cloud routes nearly full table=%s routes=%d: %s %d; %s",
                table, listing.counts[table], self._how_known, self.limit, self._limits.hint,
            )  # fmt: skip
        self._warned = nearly

    def _nearly_full(self, listing: Listing) -> Iterable[str]:
        return [table for table, count in listing.counts.items() if count >= _NEARLY_FULL * self.limit]

    def require(self, listing: Listing, table: str, dst: Prefix) -> None:
        """Raise where RouteLimit leaves no room. What the cloud itself allows, the cloud says."""
        if self._given and listing.counts.get(table, 0) >= self._given:
            raise self.full(listing, table, dst, "")

    def full(self, listing: Listing, table: str, dst: Prefix, code: str) -> RoutesFull:
        """There is no room, in words."""
        count = listing.counts.get(table, 0)
        return RoutesFull(
            "add",
            f"cloud route {dst} via this host",
            f"{table} holds {count} routes, {self._how_known} {self.limit}",
            code=code,
            hint=self._limits.hint,
        )
