# SPDX-License-Identifier: Apache-2.0
"""A real etcd for tests, of one member or more, on free ports of the loopback.

Nothing outlives the run: the kernel ends each member with the thread that started it, also after ``kill -9``,
and its data lie in the run's temporary directory.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

#: Nobody waits for so long unless something is broken.
PATIENCE_S = 30.0

MISSING = next((tool for tool in ("etcd", "etcdctl", "setpriv") if shutil.which(tool) is None), None)
needs_etcd = pytest.mark.skipif(
    MISSING is not None,
    reason=f"{MISSING} is not installed: apt-get install etcd-server etcd-client util-linux",
)


class Member:
    """One member: a process that can be ended, stopped and started again with the same data."""

    def __init__(
        self, command: Sequence[str], log: Path, client: str, data: Path, identity: Sequence[str]
    ) -> None:
        self._command = command
        self._log = log
        self.client = client
        self.data = data
        self.identity = identity
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; :meth:`wait_ready` says when it serves."""
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind("")  # the kernel chooses a free abstract name
        name = self._notify.getsockname().decode().replace("\0", "@", 1)
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ETCD")}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment, "NOTIFY_SOCKET": name},
            )

    def wait_ready(self) -> None:
        """Return when it serves clients: it says so as sd_notify(3) has it."""
        with self._notify:
            self._notify.settimeout(PATIENCE_S)
            try:
                while b"READY=1" not in self._notify.recv(4096):
                    pass
            except TimeoutError:
                raise AssertionError(f"etcd does not start:\n{self._log.read_text()[-4000:]}") from None

    def kill(self) -> None:
        """As a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """It keeps its connections and says nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


class Cluster:
    """Some members. Use as a context manager.

    Args:
        members: how many.
        flags: of etcd, for each of them.
        scheme: what clients speak.
        serve: the address that clients come to.
        fast: elect a new leader within a fraction of a second.
        token: makes it another cluster.
    """

    def __init__(
        self,
        members: int = 1,
        *flags: str,
        scheme: str = "http",
        serve: str = "127.0.0.1",
        fast: bool = False,
        token: str = "etcd",
    ) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="loden-etcd-"))
        ports = _free_ports(2 * members)
        peers = [f"http://127.0.0.1:{port}" for port in ports[members:]]
        together = ",".join(f"m{number}={peer}" for number, peer in enumerate(peers))
        speed = ("--heartbeat-interval", "20", "--election-timeout", "200") if fast else ()
        self.scheme = scheme
        self.members = []
        for number, (port, peer) in enumerate(zip(ports, peers, strict=False)):
            client = f"{serve}:{port}"
            data = self.directory / f"m{number}"
            identity = (
                *("--name", f"m{number}", "--initial-advertise-peer-urls", peer),
                *("--initial-cluster", together),
            )
            command = (
                *("etcd", *identity, "--data-dir", str(data)),
                *("--listen-client-urls", f"{scheme}://{client}"),
                *("--advertise-client-urls", f"{scheme}://{client}"),
                *("--listen-peer-urls", peer, "--initial-cluster-token", token),
                *("--logger", "zap", "--log-outputs", "stderr"),
                *(*speed, *flags),
            )
            self.members.append(Member(command, self.directory / f"m{number}.log", client, data, identity))

    def __enter__(self) -> "Cluster":
        try:
            for member in self.members:
                member.start()
            for member in self.members:
                member.wait_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for member in self.members:
            member.close()
        shutil.rmtree(self.directory)

    @property
    def endpoints(self) -> str:
        return ",".join(member.client for member in self.members)

    def url(self, prefix: str = "/coreos.com/network", *, ttl_s: float | None = None) -> str:
        scheme = "etcds" if self.scheme == "https" else "etcd"
        return f"{scheme}://{self.endpoints}{prefix}" + (f"?ttl={ttl_s}" if ttl_s else "")

    def ctl(
        self, *words: str, text: str | None = None, at: Member | None = None, flags: Sequence[str] = ()
    ) -> str:
        """What ``etcdctl`` says: somebody else's view of the same keys.

        Args:
            words: the command.
            text: its standard input.
            at: whom to ask; any member otherwise.
            flags: more of them.
        """
        urls = ",".join(f"{self.scheme}://{member.client}" for member in ([at] if at else self.members))
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ETCD")}
        done = subprocess.run(
            ["etcdctl", "--endpoints", urls, *flags, *words],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            env={**environment, "ETCDCTL_API": "3"},
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, f"etcdctl {words}: {done.stderr}"
        return done.stdout

    def put_back(self, member: Member, copy: str) -> None:
        """Have a lone member start again with what a copy holds (``etcdctl snapshot save``)."""
        member.kill()
        shutil.rmtree(member.data)
        self.ctl("snapshot", "restore", copy, "--data-dir", str(member.data), *member.identity)
        member.start()
        member.wait_ready()

    def leader(self) -> Member:
        """The member that leads, as soon as one does."""

        def find() -> Member | None:
            for member in self.members:
                if member.process is None or member.process.poll() is not None:
                    continue
                with contextlib.suppress(AssertionError, KeyError, IndexError):
                    found = json.loads(self.ctl("endpoint", "status", "-w", "json", at=member))[0]["Status"]
                    if found["leader"] and found["leader"] == found["header"]["member_id"]:
                        return member
            return None

        return wait_until("somebody leads", find)

    def keys(self, prefix: str) -> list[str]:
        return [line for line in self.ctl("get", prefix, "--prefix", "--keys-only").splitlines() if line]

    def leases(self) -> list[str]:
        """The ids of all etcd leases."""
        return self.ctl("lease", "list").split("\n")[1:-1]


def wait_until(what: str, condition: Callable[[], T | None]) -> T:
    """The first true value of a condition."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)
    return found


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [taken.getsockname()[1] for taken in sockets]
