# SPDX-License-Identifier: Apache-2.0
"""What the backends of clouds share: the cloud's own network carries the packets, without encapsulation.

Each host keeps one route for its own subnet in the cloud's route table, and nothing for its peers: whatever
leaves the host goes to the cloud's router, which knows them all. A backend for another cloud names its
options, and opens the cloud (:class:`loden.tables.cloud.Cloud`).
"""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Annotated, ClassVar

import msgspec

from loden.address import Family
from loden.backends.base import Host, Plain
from loden.errors import ConfigError
from loden.interface import Hop
from loden.lease import Leg
from loden.tables.cloud import Cloud
from loden.tables.entries import CloudRoute, CloudSetting, Entry

COMMON_NAMES = {"route_limit": "RouteLimit", "check_interval": "CheckInterval", "grace_period": "GracePeriod"}
TABLE_NAMES = {**COMMON_NAMES, "route_table_id": "RouteTableID"}


class CloudOptions(msgspec.Struct, frozen=True, rename=COMMON_NAMES):
    """The options of every cloud.

    Args:
        route_limit: how many routes a table may hold; None to ask the cloud.
        check_interval: how often the routes are looked at, seconds.
        grace_period: how long a route may be without a lease before it is removed, seconds.
    """

    route_limit: Annotated[int, msgspec.Meta(ge=1, le=100_000)] | None = None
    check_interval: Annotated[int, msgspec.Meta(ge=1, le=86_400)] = 300
    grace_period: Annotated[int, msgspec.Meta(ge=1, le=604_800)] = 600


class TableOptions(CloudOptions, frozen=True, rename=TABLE_NAMES):
    """The options of clouds with route tables.

    Args:
        route_table_id: one or several route tables; None for the one that serves the host's subnet.
    """

    route_table_id: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.route_table_id is not None and not all(self.tables):
            raise ValueError("RouteTableID: an empty ID; leave it out to find the table by the host's subnet")

    @property
    def tables(self) -> tuple[str, ...]:
        """The route tables' IDs."""
        given = self.route_table_id
        return (given,) if isinstance(given, str) else given or ()


class CloudBackend(Plain):
    """A route for the own lease, in a cloud.

    Args:
        host: what it works on.
        options: decoded.

    Raises:
        ConfigError: the vendor's client is not installed, or the network has an address family that the
            cloud does not route.
    """

    Options: ClassVar[type[msgspec.Struct]] = CloudOptions
    lease_type: ClassVar[str] = ""
    #: ``Backend.Type``.
    type_name: ClassVar[str] = ""
    families: ClassVar[tuple[Family, ...]] = (Family.IPV4,)
    #: The module that the vendor's client is imported as, and the extra that installs it.
    client: ClassVar[tuple[str, str]] = ("", "")
    #: What has to be true of the instance.
    settings: ClassVar[tuple[CloudSetting, ...]] = ()

    def __init__(self, host: Host, options: msgspec.Struct) -> None:
        assert isinstance(options, CloudOptions)
        self.options = options
        self._host = host
        self.needs_hops = False
        self.mtu = host.underlay.mtu
        module, extra = self.client
        if module and find_spec(module.partition(".")[0]) is None:
            raise ConfigError(
                "Backend.Type",
                f"{self.type_name} needs the Python package {module}, which is not installed",
                hint=f"pip install 'loden[{extra}]'",
            )
        for family in host.network.families:
            if family not in self.families:
                raise ConfigError(
                    "Backend.Type",
                    f"{self.type_name} does not route {family}",
                    hint=f"a network of {' and '.join(map(str, self.families))} alone, or another backend",
                )

    @property
    def address(self) -> bytes:
        """The instance's own address (packed) in the first family: the cloud knows its interface by it."""
        return self._host.underlay.addresses[self._host.network.families[0]]

    @property
    def network(self) -> str:
        """The network's ranges, as the mark of what is the fabric's."""
        return " ".join(str(part.network) for part in self._host.network.ranges)

    def open(self) -> Cloud:
        """The cloud. It does not block, and loads no vendor's client yet."""
        raise NotImplementedError

    def data(self, family: Family) -> bytes | None:
        del family
        return None

    def own_entries(self, leg: Leg) -> Sequence[Entry]:
        is_first = leg.subnet.family is self._host.network.families[0]
        return (*(self._settings() if is_first else ()), CloudRoute(leg.subnet))

    def _settings(self) -> Sequence[CloudSetting]:
        return self.settings

    def entries(self, leg: Leg, hop: Hop | None) -> Sequence[Entry]:
        del leg, hop
        return ()
