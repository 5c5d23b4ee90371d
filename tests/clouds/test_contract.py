# SPDX-License-Identifier: Apache-2.0
"""The route table of every cloud does what every table must."""

import pytest

from loden.tables.cloud_calls import CloudCalls
from loden.tables.cloud_plan import Census
from loden.tables.cloud_tables import CloudRouteTable
from loden.tables.entries import CloudRoute
from tests.clouds.site import RANGES, Site, subnet
from tests.contract.table import TableContract


class CloudPlace:
    """One host's route table."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._number = 0
        self.table = CloudRouteTable(CloudCalls(site.cloud(), attach_s=60.0), RANGES, self._take_census)
        site.put_foreign(subnet(200))

    async def _take_census(self) -> Census:
        return Census()

    def entry(self, number: int) -> CloudRoute:
        return CloudRoute(subnet(number + 1))

    def changed(self, number: int) -> CloudRoute:
        return self.entry(number)  # a slot says all there is to say

    def bad(self) -> CloudRoute:
        return CloudRoute(subnet(200))


class TestCloudRouteTable(TableContract):
    @pytest.fixture
    def place(self, site: Site) -> CloudPlace:
        return CloudPlace(site)
