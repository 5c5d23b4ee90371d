# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the kernel tests: each test that asks for one has a network namespace of its own."""

from collections.abc import Iterator

import pytest

from loden.tables.netlink import Monitor
from tests.kernel.kernel import BOTH, GROUPS, Kernel, Names, namespace, wire_underlay


@pytest.fixture
def underlay() -> Iterator[None]:
    """A namespace with an interface to the outside."""
    with namespace():
        wire_underlay()
        yield


@pytest.fixture(params=BOTH, ids=str)
def names(request: pytest.FixtureRequest) -> Names:
    """Each address family."""
    found = request.param
    assert isinstance(found, Names)
    return found


@pytest.fixture
def kernel(underlay: None) -> Iterator[Kernel]:
    """The tables of such a namespace."""
    del underlay
    tables = Kernel()
    yield tables
    tables.close()


@pytest.fixture(params=[None, False], ids=["nexthop-objects", "plain"])
def either(request: pytest.FixtureRequest, underlay: None) -> Iterator[Kernel]:
    """The same, with nexthop objects where the kernel has them, and as on kernels without."""
    del underlay
    tables = Kernel(nexthop_objects=request.param)
    yield tables
    tables.close()


@pytest.fixture
def after(either: Kernel) -> Iterator[Kernel]:
    """The tables of the agent that comes after that one: it knows nothing and finds all in the kernel."""
    tables = Kernel(nexthop_objects=either.nexthop_objects)
    yield tables
    tables.close()


@pytest.fixture
def witness(underlay: None) -> Iterator[Monitor]:
    """Hears every change, whoever makes it."""
    del underlay
    monitor = Monitor(GROUPS)
    yield monitor
    monitor.close()
