# SPDX-License-Identifier: Apache-2.0
"""A host of a cloud from its configuration on, without a kernel: backend, wanted entries, reconciler, API."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec

from loden.address import Family, Prefix
from loden.backend_options import decode_options
from loden.backends import find
from loden.backends.base import Host
from loden.backends.cloud import CloudBackend
from loden.cloud_routes import CloudRoutes
from loden.errors import LodenError
from loden.interface import HostFacts, Underlay
from loden.lab.clouds.alibaba import KEY_ID
from loden.lease import Lease, Leg
from loden.network import parse_network
from loden.stores.base import Holder, Record, Store
from loden.tables.cloud_tables import CloudRouteTable
from tests.clouds.site import CANARY, AlibabaSite, AwsSite, GoogleSite, Site

T = TypeVar("T")

_BACKENDS: Mapping[type[Site], tuple[str, Mapping[str, object]]] = {
    AwsSite: ("aws-vpc", {}),
    GoogleSite: ("gce", {}),
    AlibabaSite: ("ali-vpc", {"AccessKeyID": KEY_ID, "AccessKeySecret": CANARY}),
}


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, and fail rather than hang."""

    async def bounded() -> T:
        async with asyncio.timeout(60):
            return await work

    return asyncio.run(bounded())


class Agent:
    """The part of an agent that has to do with a cloud.

    Args:
        site: where it runs.
        number: of its host.
        options: of the backend.
        address: its own (packed), where that is not the machine's.
    """

    def __init__(
        self,
        site: Site,
        number: int = 1,
        options: Mapping[str, object] | None = None,
        *,
        address: bytes | None = None,
    ) -> None:
        kind, needed = _BACKENDS[type(site)]
        text = {"Network": "10.5.0.0/16", "Backend": {"Type": kind, **needed, **(options or {})}}
        self.network = parse_network(msgspec.json.encode(text))
        own = {Family.IPV4: address or site.machines[number - 1].address}
        host = Host(self.network, Underlay("eth0", 2, 9001, own, own), HostFacts(()))
        found = find(kind)
        backend = found(host, decode_options(self.network.backend, found.Options)[0])
        assert isinstance(backend, CloudBackend)
        self.backend = backend
        self.site = site
        self.number = number
        self.now_s = 0.0

    async def join(self, store: Store, subnet: Prefix) -> Record:
        """Take a lease for a subnet and want what follows from it."""
        public = self.site.machines[self.number - 1].address
        lease = Lease.make({Family.IPV4: Leg(subnet, public, self.backend.data(Family.IPV4))})
        record = await store.create(lease, holder=Holder(f"host-{self.number}", f"h{self.number}"))
        self.routes = CloudRoutes(self.backend, self.network, store)
        self.routes._calls._attach_s = 60.0  # a busy machine is no missing cloud
        cloud = self.routes._calls.cloud
        if hasattr(cloud, "poll_s"):
            cloud.poll_s = 0.03
        self.table._clock = lambda: self.now_s
        self.stand(record)
        return record

    @property
    def table(self) -> CloudRouteTable:
        table = self.routes._reconciler._tables[0]
        assert isinstance(table, CloudRouteTable)
        return table

    def stand(self, record: Record) -> None:
        """Want what a lease asks for."""
        entries = [entry for leg in record.lease.legs for entry in self.backend.own_entries(leg)]
        self.routes.stand(record, entries)

    async def look(self) -> None:
        """One look, as the reconciler has every few minutes."""
        with self.site.on(self.number):
            await self.routes._reconciler.look()

    async def try_to_look(self) -> LodenError:
        """One look that cannot be had; why."""
        try:
            await self.look()
        except LodenError as error:
            return error
        raise AssertionError("it worked")

    async def settle(self) -> None:
        """What changed since."""
        with self.site.on(self.number):
            await self.routes._reconciler.settle()

    @property
    def failures(self) -> list[str]:
        """What does not stand, and why."""
        return [str(error) for error in self.routes._reconciler.failures("own lease")]
