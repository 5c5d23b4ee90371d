# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

import pytest

from tests.stores.etcd_cluster import MISSING, Cluster

pytest.register_assert_rewrite("tests.contract.store")


@pytest.fixture(scope="session")
def etcd() -> Iterator[Cluster]:
    """One member for the whole session; each test has a prefix of its own in it."""
    if MISSING is not None:
        pytest.skip(f"{MISSING} is not installed")
    with Cluster() as cluster:
        yield cluster
