# SPDX-License-Identifier: Apache-2.0
"""A lab's life, step by step: up, ask, down.

``up`` writes down what it is going to make before it makes it, and ``down`` removes whatever of it there is,
so that one ``down`` cleans after any end of ``up``, also one by SIGKILL.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec

from loden.address import Family, format_address
from loden.backends import describe
from loden.errors import LabError
from loden.lab import etcd, namespaces, probe, processes, throughput
from loden.lab.agents import READY_S, Agents, Launch, loden_run
from loden.lab.clouds.catalogue import CLOUDS, require_installed
from loden.lab.network import container_ranges, network_text, require_room
from loden.lab.report import HostReport, HostStatus, Pair, Report, Status, complaints
from loden.lab.state import State
from loden.lab.topology import (
    Host,
    Plan,
    Spec,
    StoreKind,
    family_name,
    measured_family,
    plan,
    store_address,
)
from loden.lab.wiring import (
    HostSubnets,
    bridge_wiring,
    container_address,
    container_wirings,
    first_settings,
    read_subnet_env,
    switch_wiring,
    underlay_wiring,
)
from loden.network import check_network
from loden.stores import open_store


class Progress(Protocol):
    """Who watches the work."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """One more step of a stage is done; total is constant within a stage."""
        ...


def unwatched(stage: str, done: int, total: int) -> None:
    """A :class:`Progress` that nobody looks at."""


class Lab:
    """A lab that is up.

    Args:
        state: its directory.
        plan: as :meth:`State.load` reads it.

    Raises:
        LabError: a host has no subnet.
    """

    def __init__(self, state: State, plan: Plan) -> None:
        self.state = state
        self.plan = plan
        self.found = {host.name: _subnets(state, host, plan.families) for host in plan.hosts}

    @classmethod
    def open(cls, name: str) -> "Lab":
        """A lab that is up already.

        Raises:
            LabError: there is none of that name.
        """
        state = State(name)
        return cls(state, state.load())

    def host_reports(self) -> tuple[HostReport, ...]:
        return tuple(self._host_report(host) for host in self.plan.hosts)

    def _host_report(self, host: Host) -> HostReport:
        address, *address6 = map(format_address, host.addresses.values())
        subnet, *subnet6 = map(str, self.found[host.name].subnets.values())
        return HostReport(host.name, address, subnet, *address6, *subnet6)

    def status(self) -> Status:
        """The hosts, and which agents run."""
        spec = self.plan.spec
        hosts = tuple(
            HostStatus(**msgspec.structs.asdict(one), agent_pid=self._agent_pid(one.name))
            for one in self.host_reports()
        )
        network, *network6 = map(str, container_ranges(spec).values())
        return Status(spec.name, spec.backend, spec.topology, network, hosts, *network6)

    def _agent_pid(self, host: str) -> int | None:
        agent = self.state.agent(host)
        return agent.pid if agent is not None and agent.is_alive else None

    def check(
        self,
        *,
        with_throughput: bool = False,
        tries: int = probe.TRIES,
        progress: Progress = unwatched,
    ) -> Report:
        """Ask from every container to every other; on demand, also how much goes through if all answer.

        Raises:
            LabError: a namespace is gone, or throughput cannot be measured.
        """
        pairs = tuple(self._ask(tries, progress))
        reachable = all(pair.ok for pair in pairs)
        return Report(
            self.plan.spec.backend,
            self.host_reports(),
            pairs,
            reachable,
            self.throughput(progress=progress) if with_throughput and reachable else None,
        )

    def _ask(self, tries: int, progress: Progress) -> Iterator[Pair]:
        """Every pair in one family, then in the other."""
        ends = {family: self._all_containers(family) for family in self.plan.families}
        count = sum(len(row) * (len(row) - 1) for row in ends.values())
        step = _counter("reach every container from every other", count, progress)
        for family, row in ends.items():
            for one in probe.all_pairs(row, tries=tries, on_answer=step):
                rtt_ms = None if one.rtt_ms is None else round(one.rtt_ms, 3)
                yield Pair(one.source, one.target, rtt_ms is not None, rtt_ms, self._label(family))

    def _label(self, family: Family) -> str | msgspec.UnsetType:
        """How JSON names a family; not at all where there is IPv4 alone."""
        return msgspec.UNSET if self.plan.families == (Family.IPV4,) else family_name(family)

    def throughput(
        self,
        *,
        underlay: str | None = None,
        round_s: float = throughput.ROUND_S,
        progress: Progress = unwatched,
    ) -> throughput.Throughput:
        """What goes from the first host to the second.

        Args:
            underlay: ``ipv4`` or ``ipv6``; None for what the lab was made with.
            round_s: how long each path is measured at a time, in seconds.
            progress: is told of each round.

        Raises:
            LabError: there is no second one, no such underlay, or a path does not connect.
        """
        spec = self.plan.spec
        family = measured_family(msgspec.structs.replace(spec, underlay=underlay or spec.underlay))
        if len(self.plan.hosts) < 2:
            raise LabError(f"measure throughput of lab {spec.name}: it has one host", hint="--hosts 2")
        first, second = self.plan.hosts[:2]
        measured = throughput.measure(
            underlay=throughput.Path(_own(first, family), _own(second, family)),
            overlay=throughput.Path(self._gateway(first, family), self._gateway(second, family)),
            container=throughput.Path(self.containers(first, family)[0], self.containers(second, family)[0]),
            round_s=round_s,
            on_round=_counter("measure throughput", 3 * throughput.ROUNDS, progress),
        )
        return msgspec.structs.replace(measured, family=self._label(family))

    def reasons(self, pair: Pair) -> tuple[str, ...]:
        """Why a pair may not have been reached: what the sender's agent logged about the peer's subnets."""
        sender, peer = pair.source.partition("-")[0], pair.target.partition("-")[0]
        return complaints(self.state.log_lines(sender), [str(it) for it in self.found[peer].subnets.values()])

    def containers(self, host: Host, family: Family) -> list[probe.End]:
        """A host's containers, each with its address of a family."""
        subnet = self.found[host.name].subnets[family]
        return [
            probe.End(container.name, container.namespace, container_address(subnet, index))
            for index, container in enumerate(host.containers)
        ]

    def _all_containers(self, family: Family) -> list[probe.End]:
        return [end for host in self.plan.hosts for end in self.containers(host, family)]

    def _gateway(self, host: Host, family: Family) -> probe.End:
        address = self.found[host.name].subnets[family].gateway
        return probe.End(f"{host.name}'s gateway", host.namespace, address)


def _own(host: Host, family: Family) -> probe.End:
    return probe.End(host.name, host.namespace, host.addresses[family])


def _subnets(state: State, host: Host, families: Sequence[Family]) -> HostSubnets:
    try:
        return read_subnet_env(state.subnet_file(host.name).read_text(), families)
    except OSError as error:
        raise LabError(
            f"read subnet of {host.name} in lab {state.name}: {error.strerror}",
            hint=f"the lab did not come up whole: `loden lab down --name {state.name}`",
        ) from error


def _counter(stage: str, total: int, progress: Progress) -> Callable[[], None]:
    """A function that reports one more step each time it is called."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total)

    progress(stage, 0, total)
    return step


def up(
    spec: Spec, *, launch: Launch = loden_run, ready_s: float = READY_S, progress: Progress = unwatched
) -> Lab:
    """Make a lab; on any failure nothing of it stays.

    Args:
        spec: what to make.
        launch: the command line of an agent.
        ready_s: how long to wait for the next agent to become ready, in seconds.
        progress: is told of each step.

    Raises:
        LodenError: nothing was made, or everything was removed again.
    """
    planned = plan(spec)
    _require_usable_network(spec)
    if spec.backend in CLOUDS:
        require_installed(spec.backend)
    state = State(spec.name)
    with state.locked_new() as lock:
        try:
            _refuse_foreign(planned)
        except BaseException:
            state.remove()
            raise
        try:
            state.save(planned)
            return _make(state, planned, lock=lock, launch=launch, ready_s=ready_s, progress=progress)
        except BaseException:
            _remove(state, planned, lock)
            raise


def _require_usable_network(spec: Spec) -> None:
    """Refuse a network configuration that not every agent of the lab can live by."""
    network, errors = check_network(network_text(spec), describe)
    if network is None:
        raise errors[0]
    require_room(spec, network)


def _refuse_foreign(planned: Plan) -> None:
    taken = [name for name in planned.namespaces if namespaces.exists(name)]
    if taken:
        raise LabError(
            f"make lab {planned.spec.name}: namespace {taken[0]} exists and belongs to no lab",
            hint=f"choose another --name, or remove it with `ip netns del {taken[0]}`",
        )


async def _put_network(url: str, text: bytes) -> None:
    store = open_store(url)
    try:
        await store.put_network(text)
    finally:
        await store.close()


def _start_store(state: State, planned: Plan) -> str:
    """Have a store that holds the network; its URL, for whoever is in a host."""
    text = network_text(planned.spec)
    if planned.spec.store is StoreKind.SQLITE:
        asyncio.run(_put_network(state.store_url, text))
        return state.store_url
    url = etcd.url(planned)
    etcd.start(planned.switch, store_address(planned), state.path / "etcd")
    namespaces.inside(planned.switch, lambda: asyncio.run(_put_network(url, text)))
    return url


def _make(
    state: State, planned: Plan, *, lock: int, launch: Launch, ready_s: float, progress: Progress
) -> Lab:
    hosts = planned.hosts
    step = _counter("make hosts", len(hosts), progress)
    namespaces.create(planned.namespaces, first_settings(planned.families), lock=lock)
    namespaces.wire([switch_wiring(planned)], lock=lock)
    for host in hosts:
        namespaces.wire([underlay_wiring(planned, host)], lock=lock)
        step()
    if planned.spec.backend in CLOUDS:
        with Agents(state) as cloud:
            starting = _counter("start the cloud", 1, progress)
            cloud.start_cloud(planned)
            cloud.wait_ready(timeout_s=ready_s, on_ready=lambda _: starting())
    url = _start_store(state, planned)
    with Agents(
        state, lambda _, subnet_file: launch(url, subnet_file), backend=planned.spec.backend
    ) as agents:
        ready = _counter("start agents", len(hosts), progress)
        for host in hosts:
            agents.start(host)
        agents.wait_ready(timeout_s=ready_s, on_ready=lambda _: ready())
    lab = Lab(state, planned)
    step = _counter("start containers", len(hosts), progress)
    for host in hosts:
        found = lab.found[host.name]
        namespaces.wire([bridge_wiring(host, found), *container_wirings(host, found)], lock=lock)
        step()
    return lab


def down(name: str) -> bool:
    """Remove all of a lab, also of one that was killed while it was made; whether there was one.

    Raises:
        LabError: another command works on it, or something cannot be removed.
    """
    state = State(name)
    with state.locked() as lock:
        if lock is None:
            return False
        _remove(state, state.find(), lock)
        return True


def _remove(state: State, planned: Plan | None, lock: int) -> None:
    """The processes first: a namespace lives as long as anything runs in it."""
    if planned is not None:
        processes.end(_processes(state, planned))
        namespaces.remove(planned.namespaces, lock=lock)
    state.remove()


def _processes(state: State, planned: Plan) -> Sequence[processes.Process]:
    """Whatever runs in the lab's namespaces, and the agents even where their namespace lost its name."""
    agents = (state.agent(host.name) for host in planned.hosts)
    found = (namespaces.identity(name) for name in planned.namespaces)
    here = processes.inside(namespace for namespace in found if namespace is not None)
    return tuple({*(agent for agent in agents if agent is not None), *here})


@contextlib.contextmanager
def running(
    spec: Spec, *, launch: Launch = loden_run, ready_s: float = READY_S, progress: Progress = unwatched
) -> Iterator[Lab]:
    """A lab for the length of a block.

    Raises:
        LabError: as :func:`up` and :func:`down` do.
    """
    lab = up(spec, launch=launch, ready_s=ready_s, progress=progress)
    try:
        yield lab
    finally:
        down(spec.name)
