# SPDX-License-Identifier: Apache-2.0
"""What an agent has of the kernel: its tables, and the news of what others change in them."""

import asyncio
from collections.abc import Sequence
from typing import Any

from loden.address import Prefix
from loden.backends import open_tables
from loden.backends.base import Kernel
from loden.reconcile import Reconciler
from loden.tables import netlink
from loden.tables.addresses import AddressTable
from loden.tables.base import Table
from loden.tables.blackholes import BlackholeTable
from loden.tables.neighbours import FdbTable, NeighbourTable
from loden.tables.netlink import Monitor
from loden.tables.routes import RouteTable
from loden.tables.sysctls import SysctlTable

#: RTNLGRP_LINK, _NEIGH, _TC, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE, _IPV4_NETCONF,
#: _IPV6_NETCONF, _NEXTHOP
GROUPS = (1, 3, 4, 5, 7, 9, 11, 24, 25, 32)
_HOST_KINDS = frozenset(
    (
        *(netlink.RTM_NEWLINK, netlink.RTM_DELLINK),
        *(netlink.RTM_NEWADDR, netlink.RTM_DELADDR),
        *(netlink.RTM_NEWROUTE, netlink.RTM_DELROUTE),
    )
)


def kernel_tables(backend_type: str, networks: Sequence[Prefix], kernel: Kernel) -> list[Table[Any]]:
    """The host's tables, in the order in which entries depend on each other.

    Args:
        backend_type: whose own tables are among them.
        networks: addresses in these, on devices of ours, are the fabric's.
        kernel: what the tables work with.
    """
    requests, devices = kernel.requests, kernel.devices
    return [
        devices,
        *open_tables(backend_type, kernel),
        SysctlTable(),
        AddressTable(requests, devices, networks),
        NeighbourTable(requests, devices),
        FdbTable(requests, devices),
        RouteTable(requests, devices),
        BlackholeTable(requests),
    ]


async def follow_kernel(monitor: Monitor, reconciler: Reconciler, host_changed: asyncio.Event) -> None:
    """Hear what others change, for ever.

    Args:
        monitor: listens to :data:`GROUPS`.
        reconciler: told of every change.
        host_changed: set where links, addresses or routes changed.
    """
    loop = asyncio.get_running_loop()
    has_come = asyncio.Event()
    loop.add_reader(monitor.fileno(), has_come.set)
    try:
        while True:
            await has_come.wait()
            has_come.clear()
            _hear(monitor, reconciler, host_changed)
    finally:
        loop.remove_reader(monitor.fileno())


def _hear(monitor: Monitor, reconciler: Reconciler, host_changed: asyncio.Event) -> None:
    messages = monitor.receive()
    if messages is None:  # the kernel had more to say than we could take
        reconciler.look_soon()
        host_changed.set()
        return
    for message in messages:
        reconciler.hear(message)
        if message.kind in _HOST_KINDS:
            host_changed.set()
