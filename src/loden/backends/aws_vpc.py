# SPDX-License-Identifier: Apache-2.0
"""``aws-vpc``: a route for this host's subnet in the route table of an Amazon VPC (COMPAT §8.1)."""

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from loden.address import Family
from loden.backends.cloud import COMMON_NAMES, CloudBackend, CloudOptions
from loden.clouds.aws import CHECK, MARK, Aws
from loden.tables.cloud import Cloud
from loden.tables.entries import CloudSetting


class Options(CloudOptions, frozen=True, rename={**COMMON_NAMES, "route_table_id": "RouteTableID"}):
    """The options of ``aws-vpc``.

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


class AwsVpc(CloudBackend):
    """One route, in each table."""

    Options: ClassVar[type[msgspec.Struct]] = Options
    type_name: ClassVar[str] = "aws-vpc"
    families: ClassVar[tuple[Family, ...]] = (Family.IPV4, Family.IPV6)
    client: ClassVar[tuple[str, str]] = ("boto3", "aws")
    settings: ClassVar[tuple[CloudSetting, ...]] = (CloudSetting(CHECK, "off"),)

    def _settings(self) -> Sequence[CloudSetting]:
        return (*self.settings, CloudSetting(MARK, self.network))

    def open(self) -> Cloud:
        assert isinstance(self.options, Options)
        return Aws(address=self.address, network=self.network, tables=self.options.tables)
