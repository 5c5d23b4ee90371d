# SPDX-License-Identifier: Apache-2.0
"""What a lab left on the machine, in a directory of its own, written before anything is made.

::

    NAME/lab.json         the plan: every namespace's name
    NAME/store.db         the agents' store
    NAME/cloud.log        what the cloud logs, where the lab has one
    NAME/cloud.calls      every call of the cloud's API
    NAME/h1/agent.json    the agent's process
    NAME/h1/agent.log     what it wrote to stderr
    NAME/h1/subnet.env    what it wrote for others

Whoever changes a lab holds the lock on its directory. The kernel drops it when its last holder is gone, the
processes that were making things included; what then lies in the directory is all there can be.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from loden.errors import LabError
from loden.lab.processes import Process
from loden.lab.topology import Plan, check_name

_BUSY_S = 5.0


def base_directory() -> Path:
    """Where labs are kept: ``LODEN_LAB_DIR``, else ``/run/loden/labs``; without root ``/tmp/loden-UID``."""
    own = "/run/loden/labs" if os.geteuid() == 0 else f"{tempfile.gettempdir()}/loden-{os.geteuid()}"
    return Path(os.environ.get("LODEN_LAB_DIR") or own).absolute()


def names() -> tuple[str, ...]:
    """Every lab there is, half-made ones included."""
    try:
        return tuple(sorted(entry.name for entry in base_directory().iterdir() if entry.is_dir()))
    except FileNotFoundError:
        return ()


class State:
    """One lab's directory.

    Args:
        name: of the lab.

    Raises:
        LabError: no usable name.
    """

    def __init__(self, name: str) -> None:
        check_name(name)
        self.name = name
        self.path = base_directory() / name

    @property
    def store_url(self) -> str:
        return f"sqlite:///{self.path}/store.db"

    def subnet_file(self, host: str) -> Path:
        return self.path / host / "subnet.env"

    def log(self, host: str) -> Path:
        return self.path / host / "agent.log"

    def log_lines(self, host: str) -> list[str]:
        """What the host's agent has logged so far; nothing where there is no log."""
        return self.read_lines(self.log(host))

    @staticmethod
    def read_lines(log: Path) -> list[str]:
        """What a log holds so far; nothing where there is none."""
        try:
            return log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []

    @property
    def cloud_log(self) -> Path:
        """What the cloud of the lab logs, where it has one."""
        return self.path / "cloud.log"

    @property
    def cloud_calls(self) -> Path:
        """Every call of its API, a line of JSON each."""
        return self.path / "cloud.calls"

    def save_agent(self, host: str, agent: Process) -> None:
        _write(self.path / host / "agent.json", msgspec.json.encode(agent))

    def agent(self, host: str) -> Process | None:
        """The host's agent, alive or not; None where none was started."""
        try:
            return msgspec.json.decode((self.path / host / "agent.json").read_bytes(), type=Process)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def load(self) -> Plan:
        """The plan of a lab that exists.

        Raises:
            LabError: there is none.
        """
        found = self.find()
        if found is None:
            raise LabError(f"use lab {self.name}: no such lab", hint=f"`loden lab up --name {self.name}`")
        return found

    def find(self) -> Plan | None:
        """The plan; None where there is no lab, or where it was killed before it made anything."""
        try:
            return msgspec.json.decode((self.path / "lab.json").read_bytes(), type=Plan)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise LabError(
                f"read {self.path}/lab.json: {error}",
                hint="written by another release? use that, or delete the namespaces and the directory",
            ) from error

    def save(self, plan: Plan) -> None:
        """Write the plan; from here on, :meth:`find` names all that may come to exist.

        Raises:
            LabError: the directory cannot be written.
        """
        try:
            for host in plan.hosts:
                (self.path / host.name).mkdir(exist_ok=True)
            _write(self.path / "lab.json", msgspec.json.encode(plan))
        except OSError as error:
            raise LabError(f"write {self.path}: {error.strerror}") from error

    @contextlib.contextmanager
    def locked_new(self) -> Iterator[int]:
        """Make the directory and hold its lock; yields the lock's descriptor.

        Raises:
            LabError: the lab exists, is just being made, or the directory cannot be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir()
        except OSError as error:
            if self.path.is_dir():
                hint = f"`loden lab down --name {self.name}`"
                raise LabError(f"make lab {self.name}: it exists", hint=hint) from error
            raise LabError(
                f"make {error.filename}: {error.strerror}", hint="LODEN_LAB_DIR names another place"
            ) from error
        with self.locked() as lock:
            if lock is None:
                raise LabError(f"make lab {self.name}: another process removed it at the same time")
            yield lock

    @contextlib.contextmanager
    def locked(self) -> Iterator[int | None]:
        """Hold the lock of a lab that exists, however incomplete; yields None where there is none.

        Raises:
            LabError: another process keeps the lock.
        """
        lock = self._open()
        if lock is None:
            yield None
            return
        try:
            self._take(lock)
            # Who held it before us may have removed the directory.
            yield lock if self._is_current(lock) else None
        finally:
            os.close(lock)

    def _open(self) -> int | None:
        try:
            return os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise LabError(f"open {self.path}: {error.strerror}") from error

    def _take(self, lock: int) -> None:
        """Wait a little: what a killed command had started may still be ending."""
        deadline = time.monotonic() + _BUSY_S
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if time.monotonic() > deadline:
                raise LabError(
                    f"change lab {self.name}: another command works on it",
                    hint="wait for `loden lab run` or `up` to end, or end it with Ctrl-C",
                )
            time.sleep(0.05)

    def _is_current(self, lock: int) -> bool:
        try:
            return os.path.samestat(os.fstat(lock), self.path.stat())
        except FileNotFoundError:
            return False

    def remove(self) -> None:
        """Delete the directory, under its lock; the plan last, so that a crash leaves it readable."""
        for entry in self.path.iterdir():
            if entry.name != "lab.json":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        shutil.rmtree(self.path)


def _write(path: Path, data: bytes) -> None:
    """All or nothing: a reader never sees half of it."""
    draft = path.with_name(f".{path.name}")
    draft.write_bytes(data)
    draft.rename(path)
