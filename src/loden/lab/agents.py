# SPDX-License-Identifier: Apache-2.0
"""Start an agent in each host and wait until all are ready, as sd_notify(3) defines it."""

import contextlib
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from loden.errors import LabError
from loden.lab import namespaces
from loden.lab.clouds.catalogue import CLOUDS, environment
from loden.lab.processes import Process
from loden.lab.state import State
from loden.lab.topology import Host, Plan
from loden.lab.wiring import UPLINK

READY_S = 20.0
#: Who is waited for, beside the hosts.
CLOUD = "the cloud"
_TAIL = 15

#: How to run an agent: the command line from the store's URL and the subnet file's path.
Launch = Callable[[str, Path], tuple[str, ...]]


def loden_run(store_url: str, subnet_file: Path) -> tuple[str, ...]:
    """The command line of the real agent."""
    return (
        *(sys.executable, "-m", "loden.cli.main", "run", "--store", store_url),
        *("--subnet-file", str(subnet_file), "--iface", UPLINK),
        "--iptables-forward-rules=false",  # nothing in a lab's namespaces forbids anything
    )


class Agents:
    """The agents of one lab, from their start until they are ready. Use as a context manager.

    Args:
        state: where each agent's log, subnet file and process are kept.
        launch: the command line of an agent.
        backend: of the network; agents in a cloud are told where its double answers.
    """

    def __init__(self, state: State, launch: Launch = loden_run, *, backend: str = "") -> None:
        self._state = state
        self._launch = launch
        self._environment = _environment(backend)
        self._selector = selectors.DefaultSelector()
        self._handles = contextlib.ExitStack()
        self._waiting: dict[str, str] = {}  # host → the last status it gave

    def __enter__(self) -> "Agents":
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        self._handles.close()

    def start(self, host: Host) -> None:
        """Start a host's agent, in a session of its own: Ctrl-C is for the lab, which then ends it.

        Raises:
            LabError: it cannot be started.
        """
        command = self._launch(self._state.store_url, self._state.subnet_file(host.name))
        pid = self._watch(
            host.name, host.namespace, lambda: self._spawn(host.name, command, self._environment)
        )
        if (agent := Process.of(pid)) is not None:
            self._state.save_agent(host.name, agent)

    def start_cloud(self, plan: Plan) -> None:
        """Start the cloud of a lab that has one, in the router's namespace; it ends as everything there does.

        Raises:
            LabError: it cannot be started.
        """
        command = (sys.executable, "-m", "loden.lab.clouds.serve", plan.spec.name)
        where = {**os.environ, "LODEN_LAB_DIR": str(self._state.path.parent)}
        self._watch(CLOUD, plan.switch, lambda: self._spawn(CLOUD, command, where))

    def _watch(self, name: str, namespace: str, spawn: Callable[[], tuple[socket.socket, int]]) -> int:
        """Start a process in a namespace and listen to what it says; its number."""
        notify, pid = namespaces.inside(namespace, spawn)
        self._handles.enter_context(notify)
        self._waiting[name] = ""
        self._selector.register(notify, selectors.EVENT_READ, (name, notify))
        end = os.pidfd_open(pid)
        self._handles.callback(os.close, end)
        self._selector.register(end, selectors.EVENT_READ, (name, None))
        return pid

    def _spawn(
        self, name: str, command: tuple[str, ...], variables: Mapping[str, str]
    ) -> tuple[socket.socket, int]:
        """Inside the namespace, to which the names of abstract sockets belong."""
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.bind("")  # the kernel chooses a free abstract name
        address = notify.getsockname().decode().replace("\0", "@", 1)
        log = str(self._log(name))
        mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        try:
            pid = os.posix_spawn(
                command[0],
                command,
                {**variables, "NOTIFY_SOCKET": address},
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, log, mode, 0o644),
                    (os.POSIX_SPAWN_DUP2, 1, 2),
                ],
                setsid=True,
            )
        except OSError as error:
            notify.close()
            raise LabError(f"start agent of {name} ({command[0]}): {error.strerror}") from error
        return notify, pid

    def _log(self, name: str) -> Path:
        return self._state.cloud_log if name == CLOUD else self._state.log(name)

    def wait_ready(self, *, timeout_s: float, on_ready: Callable[[str], None]) -> None:
        """Wait until every started agent is ready.

        Args:
            timeout_s: how long none of them may become ready, in seconds.
            on_ready: called with each host's name.

        Raises:
            LabError: an agent ended, or the time is up; with the end of its log.
        """
        deadline = time.monotonic() + timeout_s
        while self._waiting:
            events = self._selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                raise self._too_late(timeout_s)
            for key, _ in events:
                host, notify = key.data
                if notify is None:
                    raise self._failed(host, "it ended")
                if self._read(host, notify):
                    deadline = time.monotonic() + timeout_s
                    on_ready(host)

    def _read(self, host: str, notify: socket.socket) -> bool:
        """Take one message; whether it says that the agent is ready now."""
        values = dict(
            line.partition("=")[::2] for line in notify.recv(4096).decode(errors="replace").splitlines()
        )
        if host not in self._waiting:
            return False
        self._waiting[host] = values.get("STATUS", self._waiting[host])
        if values.get("READY") != "1":
            return False
        del self._waiting[host]
        return True

    def _too_late(self, timeout_s: float) -> LabError:
        host, status = next(iter(self._waiting.items()))
        others = f" and {len(self._waiting) - 1} more" if len(self._waiting) > 1 else ""
        said = f"; it last said {status!r}" if status else ""
        return self._failed(f"{host}{others}", f"not ready after {timeout_s:g} s{said}", log_of=host)

    def _failed(self, who: str, what: str, *, log_of: str = "") -> LabError:
        tail = self._state.read_lines(self._log(log_of or who))[-_TAIL:]
        log = "".join(f"\n  {line}" for line in tail) or " (empty)"
        return LabError(f"wait for agent of {who}: {what}; its log:{log}")


def _environment(backend: str) -> dict[str, str]:
    """Ours without what would set the agent's flags, or bring it to a cloud that is not the lab's."""
    ours = environment(backend) if backend in CLOUDS else os.environ
    return {name: value for name, value in ours.items() if not name.startswith(("LODEN_", "FLANNELD_"))}
