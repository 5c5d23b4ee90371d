# SPDX-License-Identifier: Apache-2.0
"""The etcd store on a real etcd of one member, which stays up."""

import itertools

import pytest

from loden.lease import Lease
from loden.stores.access import Access
from loden.stores.base import Holder, Record
from loden.stores.etcd.place import parse_location
from loden.stores.etcd.store import EtcdStore
from tests.contract.store import StoreContract
from tests.stores.etcd_cluster import Cluster, needs_etcd

pytestmark = needs_etcd

_numbers = itertools.count()


class EtcdPlace:
    """A prefix of its own in the session's etcd."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.prefix = f"/test{next(_numbers)}/network"

    def open(self, *, ttl_s: float = 86_400, history: int = 10_000) -> EtcdStore:
        kind = EtcdStore if history >= 10_000 else _Forgetting
        place = parse_location(f"{self.cluster.endpoints}{self.prefix}")
        store = kind(place, access=Access(), ttl_s=ttl_s)
        if isinstance(store, _Forgetting):
            store.cluster, store.history = self.cluster, history
        return store

    def plant(self, key: str, value: bytes) -> None:
        self.cluster.ctl("put", f"{self.prefix}/subnets/{key}", text=value.decode())


class _Forgetting(EtcdStore):
    """A store whose etcd is compacted behind each write."""

    cluster: Cluster
    history: int

    async def create(self, lease: Lease, *, holder: Holder | None, reserve: bool = False) -> Record:
        record = await super().create(lease, holder=holder, reserve=reserve)
        self.cluster.ctl("compact", str(record.revision - self.history))
        return record


@pytest.fixture
def place(etcd: Cluster) -> EtcdPlace:
    return EtcdPlace(etcd)


class TestEtcdStore(StoreContract):
    pass
