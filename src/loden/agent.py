# SPDX-License-Identifier: Apache-2.0
"""The process on each host: store → leases → backend → entries → tables.

Start and recovery are the same: find out what the host is to do (:mod:`loden.plan`), take the lease (the one
this host already holds, if it does), want its entries and write subnet.env, want what every peer's lease asks
for (:mod:`loden.peers`), and look at the kernel once. What stood stays, what is missing is added, what nobody
wants goes. Nothing is undone at the end: packets flow without the agent.

No task waits for another one's trouble: a full disk keeps subnet.env from being written, and neither the
lease from being renewed nor peers from being followed.
"""

import asyncio
import logging
import random
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

import msgspec

from loden.address import Prefix
from loden.backends.base import Kernel
from loden.errors import LodenError, StoreError
from loden.firewall.keeper import Firewall
from loden.firewall.rules import make_rules
from loden.keeper import Keeper
from loden.kernel import GROUPS, follow_kernel, kernel_tables
from loden.lock import one_agent
from loden.memory import return_large_blocks
from loden.network import Network
from loden.network_watch import follow_network
from loden.options import AgentOptions
from loden.peers import Peers
from loden.plan import Plan, make_plan, read_network, require_rights
from loden.reconcile import Reconciler
from loden.retry import Backoff, Trouble, until_done
from loden.status.health import serve_health
from loden.status.systemd import notify
from loden.stores import open_store
from loden.stores.acquire import Acquired, Claim, acquire_seen
from loden.stores.base import Changes, Record, Snapshot, Store
from loden.subnet_file import read_previous, render, write_atomic
from loden.tables.devices import Devices
from loden.tables.entries import Blackhole, Entry, TunLink, VxlanLink, is_clouds
from loden.tables.netlink import Monitor, Netlink
from loden.tables.sysctls import forwarding, report_unset

if TYPE_CHECKING:
    from loden.cloud_routes import CloudRoutes

log = logging.getLogger(__name__)

_HOST_DEBOUNCE_S = 0.2
#: What a person mends is tried again so often.
_PATIENCE_S = 5.0
_RELEASE_S = 5.0
# Owners of wanted entries, beside the keys of leases.
_OWN, _HOST = "own lease", "own host"


def run(options: AgentOptions) -> int:
    """Run the agent until a signal ends it.

    Returns:
        the exit status: 0 after SIGINT or SIGTERM.

    Raises:
        LodenError: what starting again cannot mend.
    """
    return_large_blocks()
    return asyncio.run(_main(options))


async def _main(options: AgentOptions) -> int:
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()

    def first_signal() -> None:
        task.cancel()
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends the process at once
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, first_signal)
    try:
        await _work(options)
    except asyncio.CancelledError:
        stays = "routes and devices stay, and so does the lease"
        log.info("stopped%s", "" if options.release_on_exit else f": {stays}")
    except BaseExceptionGroup as group:
        ours, bugs = group.split(LodenError)
        if bugs is not None or ours is None:
            raise
        raise _first(ours) from None
    return 0


def _first(group: BaseExceptionGroup[LodenError]) -> LodenError:
    error: LodenError | BaseExceptionGroup[LodenError] = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _work(options: AgentOptions) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(one_agent())
        store = open_store(options.store.url, access=options.store.access)
        stack.push_async_callback(store.close)
        agent: Agent | None = None
        if options.healthz_port:
            await stack.enter_async_context(
                serve_health(options.healthz_ip, options.healthz_port, lambda: agent)
            )
        requests = Netlink()
        stack.callback(requests.close)
        previous = tuple(read_previous(options.subnet_file).subnets.values())
        plan, acquired = await until_done(
            Trouble(log, "starting"), lambda: _begin(options, store, requests, previous), most_s=_PATIENCE_S
        )
        log.info("interface %s: %s", plan.host.underlay.name, plan.host.underlay.reason)
        for note in plan.notes:
            log.warning("network configuration: %s", note)
        agent = Agent(options, store, plan, acquired, stack)
        del acquired  # what was seen of twenty thousand leases is known elsewhere from here on
        await agent.run()


async def _begin(
    options: AgentOptions, store: Store, requests: Netlink, previous: Sequence[Prefix]
) -> tuple[Plan, Acquired]:
    """Plan, and take a lease. Each try begins with the plan: it may be what was mended."""
    try:
        await require_rights(requests)
        plan = await make_plan(options.selection, await read_network(store), requests)
        return plan, await acquire_seen(store, plan.claim(previous), rng=random.Random())
    except LodenError as error:
        notify(STATUS=f"waiting: {error}")
        raise


class Agent:
    """One host's part in one network.

    Args:
        options: what the command line said.
        store: opened.
        plan: what was read, chosen and made.
        acquired: the lease, and what was seen when it was taken.
        stack: closes what the agent opens.
    """

    def __init__(
        self, options: AgentOptions, store: Store, plan: Plan, acquired: Acquired, stack: AsyncExitStack
    ) -> None:
        self._store = store
        self._plan = plan
        self._options = options
        self._seen: Snapshot | None = acquired.seen
        self._keeper = Keeper(store, acquired.record, self._claim, margin_s=options.renew_margin_s)
        # A socket for each task that asks: answers may not mix.
        lookups, requests = Netlink(), Netlink()
        self._questions = Netlink()
        self._monitor = Monitor(GROUPS, ignore_port=requests.port)
        self._firewall = Firewall(
            enable_nftables=plan.host.network.enable_nftables, resync_s=options.firewall.resync_s
        )
        for opened in (lookups, requests, self._questions, self._monitor, self._firewall):
            stack.callback(opened.close)
        self._devices = Devices(requests)
        self._host_changed = asyncio.Event()
        kernel = Kernel(requests, self._devices, self._look_soon, self._host_changed.set, closing=stack)
        networks = [part.network for part in plan.host.network.ranges]
        self._reconciler = Reconciler(kernel_tables(plan.host.network.backend_type, networks, kernel))
        self._cloud = self._open_cloud(self._keeper.record)
        self._peers = Peers(plan, self._reconciler, lookups)
        self._own_changed = asyncio.Event()
        self._is_published = False
        self._knows_leases = asyncio.Event()
        self._troubles = {
            family: Trouble(log, f"following the host for {family}") for family in plan.backends
        }

    def _open_cloud(self, record: Record) -> "CloudRoutes | None":
        """What keeps the routes of a cloud, where the backend wants any."""
        if not any(map(is_clouds, self._plan.own_entries(record.lease))):
            return None
        from loden.cloud_routes import CloudRoutes  # noqa: PLC0415 - nothing that a host elsewhere has to load

        return CloudRoutes(
            self._plan.backend,
            self._plan.host.network,
            self._store,
            is_held=lambda: self._keeper.is_held,
        )

    @property
    def is_ready(self) -> bool:
        """Whether the lease is ours, stands here, in the cloud and in subnet.env, and the rules stand."""
        has_way = self._cloud is None or not self._cloud.problem
        is_standing = self._firewall.statistics.is_standing
        return self._is_published and self._keeper.is_held and is_standing and has_way

    def report(self) -> bytes:
        """What the agent has to say of itself, as a JSON object."""
        return msgspec.json.encode(
            {
                "lease": str(self._keeper.record.lease),
                "is_ready": self.is_ready,
                "is_lease_held": self._keeper.is_held,
                "peers": str(self._peers),
                "entries": self._reconciler.statistics,
                "failing": self._problems(),
                "firewall": self._firewall.statistics,
                "tables": self._reconciler.reports(),
            }
        )

    def _problems(self) -> dict[str, str]:
        clouds = {} if self._cloud is None else self._cloud.problems
        return {**self._reconciler.problems, **clouds}

    async def run(self) -> None:
        """Make the lease stand, reach the peers, and keep everything as it should be, for ever."""
        try:
            await self._run()
        except asyncio.CancelledError:
            if self._options.release_on_exit:
                await self._release()
            raise

    async def _release(self) -> None:
        """Give the subnet back: first act as its owner no more, then say so to everybody."""
        record = self._keeper.record
        if record.is_reservation or not self._keeper.is_held:
            reason = "it is reserved" if record.is_reservation else "it is not ours"
            log.info("lease stays subnet=%s: %s", record.lease, reason)
            return
        self._let_go()
        try:
            async with asyncio.timeout(_RELEASE_S):
                await self._reconciler.settle()
                await self._store.delete(record)
        except LodenError as error:
            log.error("lease not released subnet=%s: %s", record.lease, error)
        except TimeoutError:
            log.error("lease not released subnet=%s: the store is silent", record.lease)
        else:
            log.info("lease released subnet=%s", record.lease)

    async def _run(self) -> None:
        network = self._plan.host.network
        self._stand(self._keeper.record)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._publish(), name="subnet file")
            group.create_task(self._firewall.run(), name="firewall")
            group.create_task(self._keeper.keep(self._stand), name="own lease")
            group.create_task(self._keeper.guard(self._let_go), name="own lease's end")
            group.create_task(self._follow_leases(), name="leases")
            group.create_task(follow_network(self._store, network, self._use_network), name="network")
            group.create_task(
                follow_kernel(self._monitor, self._reconciler, self._host_changed), name="kernel"
            )
            group.create_task(self._reconcile(), name="reconcile")
            group.create_task(self._follow_host(), name="host")
            if self._cloud is not None:
                group.create_task(self._cloud.run(), name="cloud")

    def _look_soon(self) -> None:
        self._reconciler.look_soon()

    def _claim(self, subnets: Sequence[Prefix]) -> Claim:
        return self._plan.claim(subnets)

    def _stand(self, record: Record) -> None:
        """Want what our own lease asks for; the tasks do the rest."""
        plan, subnets = self._plan, [leg.subnet for leg in record.lease.legs]
        self._devices.follow([plan.host.underlay.name])
        own = plan.own_entries(record.lease)
        self._reconciler.want(_OWN, [entry for entry in own if not is_clouds(entry)])
        if self._cloud is not None:
            self._cloud.stand(record, own)
        helpful = [*plan.optional_entries(record.lease), *self._host_entries(own, subnets)]
        self._reconciler.want(_HOST, helpful)
        self._want_rules(record)
        self._peers.set_own(record)
        self._is_published = False
        self._own_changed.set()

    def _want_rules(self, record: Record) -> None:
        subnets = {leg.subnet.family: leg.subnet for leg in record.lease.legs}
        self._firewall.want(make_rules(self._options.firewall, self._plan.host.network, subnets))

    def _let_go(self) -> None:
        """Act as no subnet's owner: want nothing that sends to the network or answers for it.

        subnet.env and the firewall's rules stay: they carry no packet.
        """
        self._is_published = False
        self._reconciler.want(_OWN, ())
        self._reconciler.want(_HOST, self._host_entries((), ()))
        self._peers.suspend()
        if self._cloud is not None:
            self._cloud.let_go()
        notify(STATUS=self._status())

    def _host_entries(self, own: Sequence[Entry], subnets: Sequence[Prefix]) -> list[Entry]:
        """What serves the fabric and must not hold it up where it does not work."""
        entries: list[Entry] = []
        if self._options.blackhole_route:
            entries += [Blackhole(subnet) for subnet in subnets]
        tunnels = [entry.name for entry in own if isinstance(entry, VxlanLink | TunLink)]
        host = self._plan.host
        settings = forwarding(host.network.families, underlay=host.underlay.name, tunnels=tunnels)
        if self._options.manage_sysctls:
            return [*entries, *settings]
        report_unset(settings)
        return entries

    async def _publish(self) -> None:
        """Write subnet.env for each lease of ours, as soon as it stands on this host."""
        while True:
            await self._own_changed.wait()
            self._own_changed.clear()
            await until_done(Trouble(log, "setting up this host"), self._settle_own, most_s=_PATIENCE_S)
            if self._keeper.has_let_go:  # it stands because nothing is wanted; _stand() says when that ends
                continue
            await until_done(Trouble(log, "writing the subnet file"), self._write_file, most_s=_PATIENCE_S)
            if not self._own_changed.is_set() and not self._keeper.has_let_go:
                self._is_published = True
                notify(READY=1, STATUS=self._status())

    async def _settle_own(self) -> None:
        await self._reconciler.settle()
        failures = self._reconciler.failures(_OWN)
        if failures:
            raise failures[0]
        if self._cloud is not None and not self._cloud.is_standing:
            notify(STATUS="waiting for the cloud's route to this host's subnet")
            await self._cloud.wait_standing()  # it says itself what it waits for

    async def _write_file(self) -> None:
        lease, mtu, path = self._keeper.record.lease, self._plan.mtu, self._options.subnet_file
        masquerade = self._options.firewall.masquerade
        text = render(self._plan.host.network, lease, mtu=mtu, ip_masq=masquerade)
        await asyncio.to_thread(write_atomic, path, text)  # a disk may take its time
        log.info("lease subnet=%s mtu=%d file=%s", lease, mtu, path)

    async def _follow_leases(self) -> None:
        """Take what was seen when we took our lease, then what changes; after a failure, from there on."""
        trouble = Trouble(log, "watching the leases")
        backoff = Backoff(most_s=_PATIENCE_S)
        revision = self._take_seen()
        self._knows_leases.set()
        while True:
            try:
                if trouble.is_on:
                    await self._store.get_network()  # a watch that works may say nothing for hours
                    trouble.ended()
                async with aclosing(self._store.watch(revision)) as events:
                    async for news in events:
                        backoff.reset()
                        revision = news.revision
                        self._take(news)
            except StoreError as error:
                trouble.happened(error)
                await asyncio.sleep(backoff.next_s())

    def _use_network(self, network: Network) -> None:
        """Live by a configuration that differs from ours in what may differ."""
        self._plan = self._plan.with_network(network)
        if self._cloud is not None:
            self._cloud.use_network(network)
        if not self._keeper.has_let_go:
            self._want_rules(self._keeper.record)

    def _take_seen(self) -> int:
        """Take what was seen when we took our lease; its revision.

        Its records go before their entries come: a tenth of the memory of an agent that knows many leases.
        """
        seen, self._seen = self._seen, None
        assert seen is not None
        revision = seen.revision
        self._keeper.hear(seen)
        changed = self._peers.note(seen)
        del seen
        self._peers.program(changed)
        notify(STATUS=self._status())
        return revision

    def _take(self, news: Changes | Snapshot) -> None:
        self._keeper.hear(news)
        self._peers.take(news)
        if self._cloud is not None:
            self._cloud.take(news)
        notify(STATUS=self._status())

    async def _reconcile(self) -> None:
        # To look before the leases are known would remove what carries packets to every peer.
        await self._knows_leases.wait()
        await self._reconciler.run()

    async def _follow_host(self) -> None:
        """Plan anew, and ask anew for the way to every peer, when links, addresses or routes changed."""
        trouble = Trouble(log, "following the host")
        loop = asyncio.get_running_loop()
        while True:
            await self._host_changed.wait()
            self._host_changed.clear()
            before = time.monotonic()
            try:
                await self._plan_again()
            except LodenError as error:  # what stands may carry packets yet, and stays
                trouble.happened(error)
                loop.call_later(_PATIENCE_S, self._host_changed.set)
            else:
                trouble.ended()
            # On a host whose routes change all the time this takes a twentieth of a core at most.
            await asyncio.sleep(max(_HOST_DEBOUNCE_S, 20 * (time.monotonic() - before)))

    async def _plan_again(self) -> None:
        before = self._plan
        network = before.host.network
        plan = await make_plan(self._options.selection, network, self._questions, current=before)
        plan = plan.with_network(self._plan.host.network)  # which may have changed while the host was read
        self._say_troubles(plan)
        changes = before.host.underlay.differences(plan.host.underlay)
        if not changes and plan.troubles.keys() == before.troubles.keys():
            if plan.needs_hops:
                self._peers.program()
            return
        self._plan = plan
        self._peers.use(plan)
        if self._cloud is not None:
            self._cloud.use(plan.backend)
        if not self._keeper.has_let_go:
            self._stand(self._keeper.record)
        if changes:
            log.warning(
                "interface changed: %s; the lease is written again, the subnet stays", "; ".join(changes)
            )
            self._keeper.publish_again()

    def _say_troubles(self, plan: Plan) -> None:
        """Say of a family that the host does not fit any more, or fits again; the other one goes on."""
        for family, trouble in self._troubles.items():
            if family in plan.troubles:
                trouble.happened(plan.troubles[family])
            else:
                trouble.ended()
        if plan.troubles:
            asyncio.get_running_loop().call_later(_PATIENCE_S, self._host_changed.set)

    def _status(self) -> str:
        failing = self._reconciler.statistics.failing
        let_go = " let go" if self._keeper.has_let_go else ""
        problem = f"; {self._cloud.problem}" if self._cloud is not None and self._cloud.problem else ""
        return f"{self._keeper.record.lease}{let_go}, {self._peers}, {failing} failing{problem}"
