# SPDX-License-Identifier: Apache-2.0
"""``aws-vpc``: a route for this host's subnet in the route table of an Amazon VPC (COMPAT §8.1)."""

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from loden.address import Family
from loden.backends.cloud import CloudBackend, TableOptions
from loden.clouds.aws import CHECK, MARK, Aws
from loden.tables.cloud import Cloud
from loden.tables.entries import CloudSetting


class AwsVpc(CloudBackend):
    """One route, in each table."""

    Options: ClassVar[type[msgspec.Struct]] = TableOptions
    type_name: ClassVar[str] = "aws-vpc"
    families: ClassVar[tuple[Family, ...]] = (Family.IPV4, Family.IPV6)
    client: ClassVar[tuple[str, str]] = ("boto3", "aws")
    settings: ClassVar[tuple[CloudSetting, ...]] = (CloudSetting(CHECK, "off"),)

    def _settings(self) -> Sequence[CloudSetting]:
        return (*self.settings, CloudSetting(MARK, self.network))

    def open(self) -> Cloud:
        assert isinstance(self.options, TableOptions)
        return Aws(address=self.address, network=self.network, tables=self.options.tables)
