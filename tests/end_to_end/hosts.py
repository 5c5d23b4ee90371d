# SPDX-License-Identifier: Apache-2.0
"""Hosts for tests: namespaces wired as in a lab, with real agents that a test starts and ends as it likes."""

import asyncio
import contextlib
import os
import selectors
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

from loden.address import Family, format_address
from loden.lab import etcd, namespaces, probe, processes, topology, wiring
from loden.lab.topology import Spec, StoreKind, Topology
from loden.lab.wiring import UPLINK
from loden.stores import open_store
from loden.stores.base import Record, Snapshot, Store

T = TypeVar("T")

#: How long anything may take; nothing is measured by it.
BOUND_S = 10.0
VXLAN = '{"Network": "10.5.0.0/16"}'
HOST_GW = '{"Network": "10.5.0.0/16", "Backend": {"Type": "host-gw"}}'


def wait_until(what: str, condition: Callable[[], T], *, most_s: float = BOUND_S) -> T:
    """The first true value of a condition."""
    deadline = time.monotonic() + most_s
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {most_s} s: {what}"
        time.sleep(0.01)
    return found


class Agent:
    """One run of ``loden run``.

    Args:
        host: it runs on.
        process: its process.
        notify: hears what it tells the service manager.
    """

    def __init__(self, host: "Host", process: subprocess.Popen[bytes], notify: socket.socket) -> None:
        self.host = host
        self.process = process
        self._notify = notify
        self._told = ""
        self._log_start = host.log.stat().st_size if host.log.exists() else 0

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        with self.host.log.open("rb") as file:
            file.seek(self._log_start)
            return file.read().decode()

    def lines(self, *parts: str) -> list[str]:
        """The lines of its log that hold all of these."""
        return [line for line in self.log.splitlines() if all(part in line for part in parts)]

    def wait_line(self, *parts: str) -> str:
        """The first line of its log that holds all of these, when it comes."""
        return self.wait_lines(1, *parts)[0]

    def wait_lines(self, count: int, *parts: str) -> list[str]:
        """So many lines that hold all of these, when they have come."""

        def found() -> list[str]:
            lines = self.lines(*parts)
            assert len(lines) >= count or self.process.poll() is None, f"it ended:\n{self.log}"
            return lines if len(lines) >= count else []

        try:
            return wait_until(f"{count} log lines with {parts}", found)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    @property
    def told(self) -> str:
        """Everything it has told the service manager so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._told += self._notify.recv(4096).decode() + "\n"
        return self._told

    def wait_ready(self) -> "Agent":
        def ready() -> bool:
            assert self.process.poll() is None, f"it ended:\n{self.log}"
            return "READY=1" in self.told

        try:
            wait_until(f"{self.host.name} is ready", ready)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None
        return self

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(BOUND_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._notify.close()


class Host:
    """One host; its agent writes into *directory*."""

    def __init__(self, directory: Path, plan: topology.Host, store_url: str, lock: int) -> None:
        directory.mkdir()
        self.name = plan.name
        self.plan = plan
        self.namespace = plan.namespace
        self.address = format_address(plan.addresses[Family.IPV4])
        self.log = directory / "agent.log"
        self.subnet_file = directory / "run" / "subnet.env"
        self._store_url = store_url
        self._lock = lock
        self.agents: list[Agent] = []

    def inside(self, act: Callable[[], T]) -> T:
        return namespaces.inside(self.namespace, act)

    def ip(self, command: str) -> str:
        """The output of one ``ip`` command."""
        return self._run("ip", *command.split())

    def bridge(self, command: str) -> str:
        return self._run("bridge", *command.split())

    def _run(self, *words: str) -> str:
        done = self.inside(lambda: subprocess.run(words, capture_output=True, text=True, check=False))
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def routes(self) -> list[str]:
        """The routes of ours: ``DST via GATEWAY dev DEVICE``, without what iproute2 adds."""
        lines = self.ip("route show proto 76").splitlines()
        return sorted(" ".join(_without_nexthop_id(line.split())[:5]) for line in lines)

    def neighbours(self, device: str = "flannel.1") -> list[str]:
        if device not in self.ip("-o link"):
            return []
        found = self.ip(f"neigh show dev {device} nud permanent").splitlines()
        return sorted(" ".join(line.split()[:3]) for line in found)

    def fdb(self, device: str = "flannel.1") -> list[str]:
        if device not in self.ip("-o link"):
            return []
        found = self.bridge(f"fdb show dev {device}").splitlines()
        return sorted(" ".join(line.split()[:3]) for line in found)

    def state(self) -> tuple[list[str], list[str], list[str]]:
        """What carries packets to peers."""
        return self.routes(), self.neighbours(), self.fdb()

    @property
    def subnet(self) -> str:
        """As subnet.env has it, masked: ``10.5.9.0/24``."""
        return str(self._read().subnets[Family.IPV4])

    def _read(self) -> wiring.HostSubnets:
        return wiring.read_subnet_env(self.subnet_file.read_text(), (Family.IPV4,))

    def _command(
        self, flags: tuple[str, ...], under: tuple[str, ...], program: tuple[str, ...]
    ) -> tuple[str, ...]:
        """The agent's command line, under a host name of its own."""
        # By the system call: /proc/sys/kernel/hostname is for the machine's own root.
        script = 'hostname "$0" && exec "$@"'
        return (
            *("unshare", "--uts", "--", "sh", "-c", script, self.name, *under),
            *(sys.executable, *program, "run", "--store", self._store_url),
            *("--subnet-file", str(self.subnet_file), *flags),
        )

    def start(
        self, *flags: str, under: tuple[str, ...] = (), program: tuple[str, ...] = ("-m", "loden.cli.main")
    ) -> Agent:
        """Start an agent.

        Args:
            flags: instead of ``--iface eth0``.
            under: a command to run it under.
            program: what the interpreter runs.
        """
        command = self._command(flags or ("--iface", UPLINK), under, program)
        agent = self.inside(lambda: self._start(command))
        self.agents.append(agent)
        return agent

    def _start(self, command: tuple[str, ...]) -> Agent:
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        notify.bind("")
        name = notify.getsockname().decode().replace("\0", "@", 1)
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("LODEN_", "FLANNELD_"))
        }
        with self.log.open("ab") as log:
            return Agent(
                self,
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**environment, "NOTIFY_SOCKET": name},
                ),
                notify,
            )

    def add_containers(self) -> None:
        """The bridge and the containers, as a container runtime makes them from subnet.env."""
        found = self._read()
        namespaces.wire(
            [wiring.bridge_wiring(self.plan, found), *wiring.container_wirings(self.plan, found)],
            lock=self._lock,
        )

    def container(self) -> probe.End:
        """The first container."""
        container = self.plan.containers[0]
        return probe.End(
            container.name,
            container.namespace,
            wiring.container_address(self._read().subnets[Family.IPV4], 0),
        )

    def get(self, path: str, port: int) -> int:
        """The status of an HTTP answer on the host's loopback."""
        with self.inside(lambda: socket.create_connection(("127.0.0.1", port), timeout=BOUND_S)) as asking:
            asking.sendall(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n".encode())
            return int(asking.makefile("rb").readline().split()[1])

    @contextlib.contextmanager
    def deletions(self) -> Iterator[list[str]]:
        """Every neighbour, route and nexthop that vanished during the block; filled at its end."""
        heard = self.log.with_name("monitor")
        command = ["ip", "-rcvbuf", "16777216", "monitor", "neigh", "route", "nexthop"]
        found: list[str] = []
        with heard.open("wb") as out:
            monitor = self.inside(lambda: subprocess.Popen(command, stdout=out))
        try:
            self._mark(heard, "203.0.113.1")  # now it listens
            yield found
            self._mark(heard, "203.0.113.2")  # it has heard everything
        finally:
            monitor.kill()
            monitor.wait()
        lines = heard.read_text().splitlines()
        found += [line for line in lines if line.startswith("Deleted ") and "203.0.113." not in line]

    def _mark(self, heard: Path, address: str) -> None:
        def is_heard() -> bool:
            self.ip(f"route replace {address}/32 dev lo")
            self.ip(f"route del {address}/32 dev lo")
            return address in heard.read_text()

        wait_until("the monitor hears", is_heard)

    def listening(self, port: int) -> socket.socket:
        """A socket of somebody else that listens on a port of the host."""
        return self.inside(lambda: socket.create_server(("0.0.0.0", port)))

    def close(self) -> None:
        for agent in self.agents:
            agent.close()


def _without_nexthop_id(words: list[str]) -> list[str]:
    if "nhid" in words:
        at = words.index("nhid")
        return words[:at] + words[at + 2 :]
    return words


class Hosts:
    """Hosts and the store that they share. Use as a context manager.

    Args:
        directory: for everything that is written.
        name: of the namespaces.
        count: of hosts.
        shape: of the underlay.
        ttl_s: how long a lease lasts.
        store: SQLite's file; or an etcd, which whoever makes the hosts starts.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "t",
        count: int = 2,
        shape: Topology = Topology.SWITCHED,
        ttl_s: float | None = None,
        store: StoreKind = StoreKind.SQLITE,
    ) -> None:
        self.directory = directory
        self.plan = topology.plan(Spec(name=name, hosts=count, topology=shape, store=store))
        self.store_file = directory / "store" / "loden.db"
        url = f"sqlite://{self.store_file}" if store is StoreKind.SQLITE else etcd.url(self.plan)
        self.store_url = url + (f"?ttl={ttl_s}" if ttl_s else "")
        self._lock = os.open(directory, os.O_RDONLY)
        self.hosts = [Host(directory / one.name, one, self.store_url, self._lock) for one in self.plan.hosts]

    def __enter__(self) -> "Hosts":
        try:
            settings = wiring.first_settings(self.plan.families)
            namespaces.create(self.plan.namespaces, settings, lock=self._lock)
            namespaces.wire([wiring.switch_wiring(self.plan)], lock=self._lock)
            for host in self.hosts:
                namespaces.wire([wiring.underlay_wiring(self.plan, host.plan)], lock=self._lock)
                host.ip("link set lo up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.close()
        known = [one for name in self.plan.namespaces if (one := namespaces.identity(name)) is not None]
        try:
            # A firewall tool that a killed agent had started ends by itself.
            wait_until("no process stays", lambda: not processes.inside(known))
        finally:
            namespaces.remove(self.plan.namespaces, lock=self._lock)
            os.close(self._lock)

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts)

    def __getitem__(self, number: int) -> Host:
        return self.hosts[number]

    def plug(self, host: Host, *, into: Host) -> None:
        """Move a host's wire to the segment that another host was made in."""
        command = ["ip", "link", "set", host.name, "master", into.plan.segment.bridge]
        namespaces.inside(self.plan.switch, lambda: subprocess.run(command, check=True))

    def up(self, network: str = VXLAN, *, containers: bool = True) -> list[Agent]:
        """Start an agent on every host, and containers when all are ready."""
        self.put_network(network)
        agents = [host.start() for host in self]
        for agent in agents:
            agent.wait_ready()
        if containers:
            for host in self:
                host.add_containers()
            self.require_all_reached()
        return agents

    def put_network(self, text: str) -> None:
        async def put(store: Store) -> None:
            await store.put_network(text.encode())

        self.with_store(put)

    @contextlib.contextmanager
    def locked_store(self) -> Iterator[None]:
        """Nobody can write to the store for the length of the block."""
        with contextlib.closing(sqlite3.connect(self.store_file, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                db.execute("ROLLBACK")

    def with_store(self, work: Callable[[Store], Awaitable[T]]) -> T:
        """What *work*, given the store, comes to."""

        async def run() -> T:
            store = open_store(self.store_url)
            try:
                return await work(store)
            finally:
                await store.close()

        return asyncio.run(run())

    def write_raw(self, *rows: tuple[str, str]) -> None:
        """Put keys and values into the store as they are, without an end, whatever they say."""
        with contextlib.closing(sqlite3.connect(self.store_file)) as db:
            for key, value in rows:
                db.execute("UPDATE state SET revision = revision + 1")
                db.execute(
                    "INSERT OR REPLACE INTO leases SELECT ?, ?, revision, NULL, NULL, NULL, NULL FROM state",
                    (key, value),
                )
            db.commit()

    def leases(self) -> dict[str, Record]:
        """What the store holds, by subnet."""

        async def read(store: Store) -> Snapshot:
            return await store.snapshot()

        return {str(one.lease): one for one in self.with_store(read).records.values()}

    def require_all_reached(self, *some: Host) -> None:
        """The containers of some hosts, or of all, answer each other."""
        ends = [host.container() for host in some or self]
        answers = probe.all_pairs(ends, tries=8, patience_s=0.5)
        missed = [one for one in answers if one.rtt_ms is None]
        assert not missed, f"{missed}\n" + "\n".join(host.log.read_text() for host in self)


class Pinger:
    """A ping each millisecond from one container to another, in a thread; counts what got lost."""

    def __init__(self, source: probe.End, target: probe.End) -> None:
        self._socket = namespaces.inside(source.namespace, _icmp_socket)
        self._target = format_address(target.address)
        self._answered: set[int] = set()
        self._sent = 0
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "Pinger":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._socket.close()

    @property
    def sent(self) -> int:
        return self._sent

    @property
    def lost(self) -> int:
        """How many were never answered; known after the block."""
        return self._sent - len(self._answered)

    def _work(self) -> None:
        selector = selectors.DefaultSelector()
        selector.register(self._socket, selectors.EVENT_READ)
        due = time.monotonic()
        while not self._is_over.is_set():
            self._socket.sendto(probe.echo_request(8, 1, self._sent), (self._target, 0))
            self._sent += 1
            due += 0.001
            while (left := due - time.monotonic()) > 0:
                self._take(selector, left)
        deadline = time.monotonic() + 2.0
        while self.lost and (left := deadline - time.monotonic()) > 0:
            self._take(selector, left)
        selector.close()

    def _take(self, selector: selectors.BaseSelector, left_s: float) -> None:
        if selector.select(left_s):
            packet = self._socket.recv(256)
            kind, identifier, sequence = packet[20], *struct.unpack_from("!HH", packet, 24)
            if (kind, identifier) == (0, 1):
                self._answered.add(sequence)


def _icmp_socket() -> socket.socket:
    opened = socket.socket(socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    return opened
