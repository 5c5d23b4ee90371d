# SPDX-License-Identifier: Apache-2.0
"""When an agent tells others that its subnet can be used."""

import asyncio

from loden.address import Family, Prefix, parse_address
from loden.agent import Agent
from loden.keeper import Keeper
from loden.lease import Lease, Leg
from loden.stores.base import Holder
from loden.stores.memory import MemoryStore


class Publishing(Agent):
    """The part of an agent that publishes, on a host that takes its time."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._own_changed = asyncio.Event()
        self._is_published = False
        self.settling = asyncio.Event()
        self.stands = asyncio.Event()
        self.written = 0

    async def _settle_own(self) -> None:
        self.settling.set()
        await self.stands.wait()
        self.settling.clear()
        self.stands.clear()

    async def _write_file(self) -> None:
        self.written += 1

    def _status(self) -> str:
        return ""


async def passes() -> None:
    """Let every task do what it can."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_lease_that_was_let_go_before_it_stood_is_not_published() -> None:
    async def work() -> None:
        store = MemoryStore("publish", ttl_s=86_400.0)
        leg = Leg(Prefix.parse("10.5.1.0/24"), parse_address("192.0.2.1"))
        record = await store.create(Lease.make({Family.IPV4: leg}, "vxlan"), holder=Holder("me"))
        keeper = Keeper(store, record, lambda _: None, margin_s=60.0)  # type: ignore[arg-type, return-value]
        agent = Publishing(keeper)
        task = asyncio.create_task(agent._publish())
        agent._own_changed.set()
        await agent.settling.wait()
        keeper._has_let_go = True  # and with that nothing is wanted, and all that is wanted stands
        agent.stands.set()
        await passes()
        assert (agent.written, agent._is_published) == (0, False)
        keeper._has_let_go = False
        agent._own_changed.set()
        agent.stands.set()
        await passes()
        assert (agent.written, agent._is_published) == (1, True)
        task.cancel()

    asyncio.run(work())
