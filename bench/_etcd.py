# SPDX-License-Identifier: Apache-2.0
"""An etcd beside the one host of :mod:`bench._site`, with the leases of peers that do not exist."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from bench._site import NETWORK, Site, lease, site
from loden.lab import etcd, namespaces
from loden.lab.topology import StoreKind, store_address
from loden.lease import Lease
from loden.stores import open_store
from loden.stores.base import Holder, Record
from loden.stores.etcd.store import EtcdStore

T = TypeVar("T")

#: etcd allows 128 operations in a transaction, and each lease is three.
_AT_ONCE = 40


class EtcdSite(msgspec.Struct, frozen=True):
    """A host, and an etcd that it reaches.

    Args:
        site: the host.
        url: of the store.
    """

    site: Site
    url: str

    def with_store(self, work: Callable[[EtcdStore], Awaitable[T]]) -> T:
        """What *work*, given a handle, comes to; in the namespace of etcd."""

        async def run() -> T:
            store = open_store(self.url)
            assert isinstance(store, EtcdStore)
            try:
                return await work(store)
            finally:
                await store.close()

        return namespaces.inside(self.site.state.load().switch, lambda: asyncio.run(run()))

    def fill(self, count: int, backend: str = "vxlan") -> None:
        """Put a network and the leases of *count* peers."""

        async def work(store: EtcdStore) -> None:
            config = {"Network": str(NETWORK), "SubnetLen": 24, "Backend": {"Type": backend}}
            await store.put_network(msgspec.json.encode(config))
            granted = await store._grant()
            for start in range(0, count, _AT_ONCE):
                numbers = range(start, min(count, start + _AT_ONCE))
                await put(store, (lease(number, backend) for number in numbers), granted)

        self.with_store(work)


async def put(store: EtcdStore, leases: Iterable[Lease], granted: int) -> None:
    """Write leases as their hosts have them, in one transaction, whatever stands there."""
    operations: list[bytes] = []
    for one in leases:
        operations += store._puts(
            Record(one.key, one, 0, holder=Holder(f"bench/{one.key}", one.key)), granted
        )
    await store._txn((), operations)


@contextmanager
def etcd_site(directory: Path) -> Iterator[EtcdSite]:
    """A host and an etcd for the length of a block.

    Args:
        directory: for etcd's data.
    """
    with site(store=StoreKind.ETCD) as here:
        plan = here.state.load()
        etcd.start(plan.switch, store_address(plan), directory)
        yield EtcdSite(here, etcd.url(plan))
