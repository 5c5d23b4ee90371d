# SPDX-License-Identifier: Apache-2.0
"""One host with the real agent, and a store full of peers that do not exist."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgspec

from loden.address import Family, Prefix
from loden.errors import Conflict, LabError
from loden.lab import namespaces, processes
from loden.lab.agents import Agents, loden_run
from loden.lab.lab import down
from loden.lab.state import State
from loden.lab.topology import UNDERLAY, Host, Plan, Segment, Spec, StoreKind
from loden.lab.wiring import first_settings, switch_wiring, underlay_wiring
from loden.lease import Lease, Leg
from loden.stores import DEFAULT_TTL_S, open_store
from loden.stores.base import Holder
from loden.stores.clock import SystemClock
from loden.stores.sqlite_file import open_database, transaction, translated
from loden.stores.sqlite_leases import End, create, delete, snapshot

NETWORK = Prefix.parse("10.0.0.0/8")
_READY_S = 60.0
_HOLDER = "bench/"
_HISTORY = 100_000  # tombstones that stay: who follows need not read everything again
_FIRST_PEER = 2  # behind the host's own address
_CPUCLOCK_SCHED = 2  # <linux/posix-timers.h>: a process's own clock, by its number


def lease(number: int, backend: str = "vxlan") -> Lease:
    """The lease of a peer, numbered from 0; up to 65,000 in :data:`NETWORK`, all in one underlay."""
    subnet = Prefix.from_int(Family.IPV4, NETWORK.first + (number + 1) * 256, 24)
    public = UNDERLAY[Family.IPV4].first + _FIRST_PEER + number
    mac = (0x02_4C_00_00_00_00 + number).to_bytes(6, "big").hex(":")
    data = b'{"VNI":1,"VtepMAC":"%s"}' % mac.encode() if backend == "vxlan" else None
    return Lease.make({Family.IPV4: Leg(subnet, public.to_bytes(4, "big"), data)}, backend)


def fill(path: Path, count: int, backend: str = "vxlan") -> str:
    """Make a store that holds a network and *count* peers; its URL."""
    add_leases(path, count, backend)
    url = f"sqlite://{path}"
    config = {"Network": str(NETWORK), "SubnetLen": 24, "Backend": {"Type": backend}}
    asyncio.run(_put_network(url, msgspec.json.encode(config)))
    return url


def add_leases(path: Path, count: int, backend: str = "vxlan") -> None:
    """Write the leases of *count* peers in one transaction; those whose subnets are taken are left out."""
    clock = SystemClock()
    end = End(clock.since_boot_s() + DEFAULT_TTL_S, clock.wall_s() + DEFAULT_TTL_S)
    with (
        translated(path),
        closing(open_database(path, create=True, ttl_s=DEFAULT_TTL_S, clock=clock)) as db,
        transaction(db, "IMMEDIATE"),
    ):
        for number in range(count):
            with suppress(Conflict):
                create(db, lease(number, backend), holder=Holder(f"{_HOLDER}{number}"), end=end)


def remove_leases(path: Path) -> None:
    """Delete what :func:`add_leases` wrote, in one transaction."""
    clock = SystemClock()
    with (
        translated(path),
        closing(open_database(path, create=False, ttl_s=DEFAULT_TTL_S, clock=clock)) as db,
        transaction(db, "IMMEDIATE"),
    ):
        for record in snapshot(db, clock.since_boot_s()).records.values():
            if record.holder is not None and record.holder.id.startswith(_HOLDER):
                delete(db, record, history=_HISTORY)


async def _put_network(url: str, text: bytes) -> None:
    store = open_store(url)
    try:
        await store.put_network(text)
    finally:
        await store.close()


class Agent(msgspec.Struct, frozen=True):
    """An agent that is ready.

    Args:
        started: just before its exec, on ``time.perf_counter``.
        ready_s: from there until it said that subnet.env is written.
    """

    pid: int
    started: float
    ready_s: float

    def cpu_s(self) -> float:
        """The processor time that it has used so far, all threads, in seconds."""
        return time.clock_gettime(~self.pid << 3 | _CPUCLOCK_SCHED)

    def memory_mb(self, field: str = "Rss") -> float:
        """Resident memory: ``Rss``, or ``Pss``, where pages that others use too count in part; MB."""
        return _read_kb(f"/proc/{self.pid}/smaps_rollup", field) / 1024

    def peak_mb(self) -> float:
        """The most resident memory that it ever had, in MB."""
        return _read_kb(f"/proc/{self.pid}/status", "VmHWM") / 1024

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def wait_idle(self, *, quiet_s: float = 1.0, patience_s: float = 120.0) -> None:
        """Return when it has done next to nothing for a while.

        Raises:
            LabError: it never rests.
        """
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            before = self.cpu_s()
            time.sleep(quiet_s)
            if self.cpu_s() - before < 0.01 * quiet_s:
                return
        raise LabError(f"wait for agent {self.pid}: still busy after {patience_s:g} s")


def _read_kb(path: str, field: str) -> float:
    lines = Path(path).read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(f"{field}:")))


class Site:
    """A switch and one host on it, whose network is the whole underlay."""

    def __init__(self, state: State, host: Host) -> None:
        self.state = state
        self.host = host

    @property
    def namespace(self) -> str:
        return self.host.namespace

    def start(self, store_url: str, *flags: str) -> Agent:
        """Start the agent and wait until it is ready.

        Args:
            store_url: of its store.
            flags: more than a lab's agents have; the last of one name counts.

        Raises:
            LabError: it ended instead; with its log.
        """
        with Agents(
            self.state, lambda _, subnet_file: (*loden_run(store_url, subnet_file), *flags)
        ) as agents:
            started = time.perf_counter()
            agents.start(self.host)
            agents.wait_ready(timeout_s=_READY_S, on_ready=lambda _: None)
            ready_s = time.perf_counter() - started
        found = self.state.agent(self.host.name)
        if found is None:
            raise LabError("start agent: it ended")
        return Agent(found.pid, started, ready_s)


@contextmanager
def site(name: str = "bench", *, store: StoreKind = StoreKind.SQLITE) -> Iterator[Site]:
    """One host for the length of a block; its agents end with it.

    Args:
        name: of its lab.
        store: where leases are to be; the switch has an address for an etcd, which nobody starts.
    """
    underlay = UNDERLAY[Family.IPV4]
    address = (underlay.first + 1).to_bytes(4, "big")
    segment = Segment("s0", {Family.IPV4: underlay}, {})
    host = Host("h1", f"{name}-h1", bytes.fromhex("020000000001"), {Family.IPV4: address}, segment, ())
    plan = Plan(Spec(name=name, hosts=1, store=store), f"{name}-net", (segment,), (host,))
    state = State(name)
    try:
        with state.locked_new() as lock:
            state.save(plan)
            namespaces.create(plan.namespaces, first_settings(plan.families), lock=lock)
            namespaces.wire([switch_wiring(plan), underlay_wiring(plan, host)], lock=lock)
        here = Site(state, host)
        yield here
        _empty(here)
    finally:
        down(name)


def _empty(here: Site) -> None:
    """Remove the device that all entries hang on. Left to the namespace's end, the kernel would do it later,
    in the middle of what is measured next."""
    identity = namespaces.identity(here.namespace)
    if identity is not None:
        processes.end(processes.inside([identity]), grace_s=0)
    run_batch(here, "ip", ["link del eth0"])


def make_vxlan(here: Site) -> None:
    """A VXLAN device in the host, as an agent would make it."""
    run_batch(
        here,
        "ip",
        [
            "link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 nolearning",
            "addr add 10.0.0.0/32 dev flannel.1",
            "link set flannel.1 up",
        ],
    )


def run_batch(here: Site, tool: str, lines: Sequence[str]) -> None:
    """Run ``ip`` or ``bridge`` once in the host, for many commands.

    Raises:
        LabError: one failed.
    """
    text = "".join(f"{line}\n" for line in lines)
    done = namespaces.inside(
        here.namespace,
        lambda: subprocess.run(
            [tool, "-batch", "-"], input=text, capture_output=True, text=True, check=False
        ),
    )
    if done.returncode:
        raise LabError(f"run {tool}: {done.stderr.strip()}")
