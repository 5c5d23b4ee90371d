# SPDX-License-Identifier: Apache-2.0
"""An etcd of a lab's own: one member in the switch's namespace, which every host reaches over the underlay.

It ends with the lab, as everything in its namespaces does, and its data lie in the lab's directory.
"""

import contextlib
import os
import select
import shutil
import socket
from pathlib import Path

from loden.address import format_address
from loden.errors import LabError
from loden.lab import namespaces
from loden.lab.processes import Process
from loden.lab.topology import Plan, store_address

PORT = 2379
_READY_S = 30.0
_TAIL = 15


def url(plan: Plan) -> str:
    """The store's URL, for whoever is in one of the lab's hosts."""
    found = store_address(plan)
    text = format_address(found)
    return f"etcd://{f'[{text}]' if len(found) > 4 else text}:{PORT}/coreos.com/network"


def start(namespace: str, client: bytes, directory: Path) -> Process:
    """Start etcd in a namespace, and return when it serves.

    Args:
        namespace: where; it must have the address.
        client: the address (packed) that clients come to.
        directory: for its data and its log.

    Raises:
        LabError: it is not installed, or does not start; with the end of its log.
    """
    program = shutil.which("etcd")
    if program is None:
        raise LabError("start etcd: it is not installed", hint="apt-get install etcd-server")
    directory.mkdir(exist_ok=True)
    log = directory / "etcd.log"
    notify, pid = namespaces.inside(namespace, lambda: _spawn(program, client, directory, log))
    with notify, contextlib.ExitStack() as stack:
        end = os.pidfd_open(pid)
        stack.callback(os.close, end)
        _wait_ready(notify, end, log)
    process = Process.of(pid)
    if process is None:
        raise _failed("it ended", log)
    return process


def _spawn(program: str, client: bytes, directory: Path, log: Path) -> tuple[socket.socket, int]:
    """Inside the namespace, to which the names of abstract sockets belong."""
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind("")  # the kernel chooses a free abstract name
    name = notify.getsockname().decode().replace("\0", "@", 1)
    text = format_address(client)
    serve = f"http://{f'[{text}]' if len(client) > 4 else text}:{PORT}"
    peer = "http://127.0.0.1:2380"
    command = (
        *(program, "--name", "lab", "--data-dir", str(directory / "data")),
        *("--listen-client-urls", serve, "--advertise-client-urls", serve),
        *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
        *("--initial-cluster", f"lab={peer}", "--logger", "zap", "--log-outputs", "stderr"),
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ETCD")}
    try:
        pid = os.posix_spawn(
            program,
            command,
            {**environment, "NOTIFY_SOCKET": name},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
                (os.POSIX_SPAWN_DUP2, 1, 2),
            ],
            setsid=True,
        )
    except OSError as error:
        notify.close()
        raise LabError(f"start {program}: {error.strerror}") from error
    return notify, pid


def _wait_ready(notify: socket.socket, end: int, log: Path) -> None:
    while True:
        ready, _, _ = select.select([notify.fileno(), end], [], [], _READY_S)
        if notify.fileno() in ready:
            if b"READY=1" in notify.recv(4096):
                return
        elif end in ready:
            raise _failed("it ended", log)
        else:
            raise _failed(f"not ready after {_READY_S:g} s", log)


def _failed(what: str, log: Path) -> LabError:
    lines = log.read_text(errors="replace").splitlines()[-_TAIL:] if log.exists() else []
    return LabError(f"start etcd: {what}; its log:" + "".join(f"\n  {line}" for line in lines))
