# SPDX-License-Identifier: Apache-2.0
"""Processes of a lab: told apart for certain, found, and ended.

A number alone does not name a process, because the kernel gives it out again. A number and a start time do.
"""

import contextlib
import os
import select
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

_GRACE_S = 3.0

#: A namespace among all others: device and inode number of its file in nsfs (namespaces(7)).
Identity = tuple[int, int]


class Process(msgspec.Struct, frozen=True):
    """One process, for as long as it lives.

    Args:
        pid: its number.
        start: when it was started, in clock ticks since boot (``/proc/PID/stat``, field 22).
    """

    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        """The process that has this number now; None where none has, or one that has ended already."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return None
        # The name, in parentheses, may hold anything, parentheses too; fields 3 and on follow the last.
        fields = stat[stat.rindex(b")") + 2 :].split()
        return None if fields[0] in (b"Z", b"X") else cls(pid, int(fields[19]))

    @property
    def is_alive(self) -> bool:
        return Process.of(self.pid) == self


def identity_of(namespace: Path) -> Identity:
    """The identity of the namespace that a file stands for, such as ``/proc/PID/ns/net``.

    Raises:
        OSError: there is no such file, or it is not ours to look at.
    """
    found = namespace.stat()
    return found.st_dev, found.st_ino


def inside(namespaces: Iterable[Identity]) -> tuple[Process, ...]:
    """Every process in one of the namespaces, this one excepted.

    Args:
        namespaces: which still have a name: the kernel gives the identity of one that is gone to another.
    """
    wanted = frozenset(namespaces)
    return tuple(_inside(wanted)) if wanted else ()


def _inside(wanted: frozenset[Identity]) -> Iterator[Process]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        # Gone meanwhile, or another user's.
        with contextlib.suppress(OSError):
            if identity_of(entry / "ns/net") in wanted and (found := Process.of(int(entry.name))):
                yield found


def end(processes: Iterable[Process], *, grace_s: float = _GRACE_S) -> None:
    """Ask processes to end, and kill those that have not after a while; returns when all are gone.

    Args:
        processes: those that ended already are passed over.
        grace_s: how long to wait between the request and the kill, in seconds.
    """
    with contextlib.ExitStack() as stack:
        handles = {}
        for process in processes:
            if (handle := _open(process)) is not None:
                stack.callback(os.close, handle)
                handles[handle] = process
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, None)):
            for handle in handles:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(handle, number)
            for handle in _wait(handles, patience_s):
                _reap(handles.pop(handle).pid)


def _open(process: Process) -> int | None:
    """A handle on exactly this process: the number may have gone to another between two looks."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if process.is_alive:
        return handle
    os.close(handle)
    return None


def _wait(handles: Iterable[int], patience_s: float | None) -> list[int]:
    """The handles whose process ended, once all have or time is up (never, for None)."""
    poll = select.poll()
    left = set(handles)
    for handle in left:
        poll.register(handle, select.POLLIN)
    deadline = None if patience_s is None else time.monotonic() + patience_s
    ended: list[int] = []
    while left:
        wait_ms = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        ready = [handle for handle, _ in poll.poll(wait_ms)]
        if not ready:
            break
        for handle in ready:
            poll.unregister(handle)
            left.discard(handle)
        ended += ready
    return ended


def _reap(pid: int) -> None:
    """Take the status of our own child; somebody else's children are not ours to wait for."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
