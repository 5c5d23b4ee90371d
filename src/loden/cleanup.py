# SPDX-License-Identifier: Apache-2.0
"""Stopping for good: everything that agents left in this host's kernel and firewall goes.

It is the look of an agent that wants nothing. What is not marked as ours stays, and so do settings below
``/proc/sys``, the subnet file and the lease: nobody knows what they were before, and the next agent has use
for them.
"""

import asyncio
import logging
from contextlib import AsyncExitStack

from loden.address import Family
from loden.backends.base import Kernel
from loden.errors import LodenError
from loden.firewall.keeper import Firewall
from loden.firewall.rules import Purpose, RuleSet
from loden.kernel import kernel_tables
from loden.lock import one_agent
from loden.reconcile import Reconciler
from loden.tables.devices import Devices
from loden.tables.netlink import Netlink

log = logging.getLogger(__name__)


def clean_up() -> None:
    """Remove it all; blocks until it is gone.

    Raises:
        AlreadyRunning: an agent works here; it would put everything back.
        LodenError: something cannot be removed; the first of those.
    """
    asyncio.run(_clean_up())


async def _clean_up() -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(one_agent())
        requests = Netlink()
        stack.callback(requests.close)
        kernel = Kernel(requests, Devices(requests), lambda: None, lambda: None, closing=stack)
        reconciler = Reconciler(kernel_tables("alloc", (), kernel))
        await reconciler.look()
        for entry, reason in reconciler.problems.items():
            raise LodenError(f"remove {entry}: {reason}", hint="run it again, or remove it by hand")
        firewall = Firewall()
        stack.callback(firewall.close)
        firewall.want([RuleSet(family, purpose) for family in Family for purpose in Purpose])
        await firewall.settle()
        log.info("nothing of Loden's is left in this network namespace")
