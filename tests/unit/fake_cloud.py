# SPDX-License-Identifier: Apache-2.0
"""A cloud in memory, seen by any number of hosts, as slow and as bad as a test wants."""

import threading
from collections.abc import Callable, Mapping

import msgspec

from loden.address import Prefix
from loden.errors import CloudError
from loden.tables.cloud import Limits, Listed, Listing, Owner


class Account:
    """What all hosts share: one route table.

    Attributes:
        routes: the next hop of each destination.
        journal: a line for each call that any host made.
    """

    def __init__(self) -> None:
        self.routes: dict[Prefix, str] = {}
        self.foreign: set[Prefix] = set()
        self.unknown: set[Prefix] = set()
        self.unsettled: set[Prefix] = set()
        self.journal: list[str] = []
        self.errors: dict[str, CloudError] = {}  # by the call that fails
        self.before: dict[str, Callable[[], None]] = {}  # done once, right before a call
        self.settings: dict[str, dict[str, str]] = {}
        self.limit: int | None = None
        self.stuck: threading.Event | None = None

    def host(self, name: str) -> "FakeCloud":
        """One host's access."""
        return FakeCloud(self, name)

    def called(self, verb: str) -> list[str]:
        return [line for line in self.journal if line.startswith(f"{verb} ")]


class FakeCloud:
    """One host's access to an account; the methods are those of :class:`loden.tables.cloud.Cloud`."""

    name = "Nimbus"
    limits = Limits(10, "ask for more")

    def __init__(self, account: Account, host: str) -> None:
        self.account = account
        self.host = host
        self.is_attached = False

    def attach(self) -> str:
        self._note("attach", "")
        self.is_attached = True
        return f"host {self.host}"

    def list_routes(self) -> Listing:
        self._note("list", "")
        assert self.is_attached
        account = self.account
        listed = tuple(self._listed(dst) for dst in account.routes)
        return Listing(("t",), listed, {"t": len(account.routes)})

    def _listed(self, dst: Prefix) -> Listed:
        target = self.account.routes[dst]
        owner = Owner.SELF if target == self.host else Owner.FABRIC
        if dst in self.account.foreign:
            owner = Owner.FOREIGN
        elif dst in self.account.unknown and owner is not Owner.SELF:
            owner = Owner.UNKNOWN
        return Listed("t", dst, target, owner, is_settled=dst not in self.account.unsettled)

    def identify(self, route: Listed, address: bytes | None) -> Listed:
        self._note("identify", f"{route.dst} {address!r}")
        owner = Owner.FABRIC if address is not None else Owner.FOREIGN
        return msgspec.structs.replace(route, owner=owner)

    def add(self, table: str, dst: Prefix) -> Listed:
        self._note("add", str(dst))
        if dst in self.account.routes:
            raise CloudError("add", f"cloud route {dst}", "there is one", code="Exists")
        self.account.routes[dst] = self.host
        return Listed(table, dst, self.host, Owner.SELF)

    def replace(self, route: Listed) -> Listed:
        self._note("replace", str(route.dst))
        self.account.routes[route.dst] = self.host
        return Listed(route.table, route.dst, self.host, Owner.SELF)

    def remove(self, route: Listed) -> None:
        self._note("remove", str(route.dst))
        self.account.routes.pop(route.dst, None)

    def read_limit(self) -> int | None:
        self._note("limit", "")
        return self.account.limit

    def read_settings(self) -> Mapping[str, str]:
        self._note("settings", "")
        return self.account.settings.setdefault(self.host, {"check": "on"})

    def change_setting(self, name: str, value: str) -> None:
        self._note("change", f"{name}={value}")
        self.account.settings[self.host][name] = value

    def _note(self, verb: str, subject: str) -> None:
        act = self.account.before.pop(verb, None)
        if act is not None:
            act()
        self.account.journal.append(f"{verb} {self.host} {subject}".strip())
        if self.account.stuck is not None:
            self.account.stuck.wait()
        if verb in self.account.errors:
            raise self.account.errors[verb]
