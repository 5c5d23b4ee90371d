# SPDX-License-Identifier: Apache-2.0
"""Network namespaces: make, wire, enter and remove them.

The calling process never changes its own namespace. What must happen inside another one (a socket opened,
a sysctl written, a process started) happens in a short-lived thread that enters it and is thrown away: the
kernel keeps the namespace a thread, a socket keeps the one it was opened in, a child process takes over its
parent thread's. The machine's own interfaces are never touched: each wire is made between two namespaces
of the lab.
"""

import concurrent.futures
import ctypes
import functools
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from loden.errors import LabError
from loden.lab.processes import Identity, identity_of
from loden.lab.wiring import Wiring

NETNS = Path("/run/netns")  # where iproute2 mounts them
_CLONE_NEWNET = 0x40000000  # <linux/sched.h>
_IFA_F_TENTATIVE = 0x40  # <linux/if_addr.h>
_USABLE_S = 5.0
_libc = ctypes.CDLL(None, use_errno=True)  # os.setns comes with Python 3.12

T = TypeVar("T")


def exists(name: str) -> bool:
    """Whether a namespace of that name is known to iproute2."""
    return (NETNS / name).exists()


def identity(name: str) -> Identity | None:
    """What tells the namespace from all others; None where there is none."""
    try:
        return identity_of(NETNS / name)
    except FileNotFoundError:
        return None


def inside(name: str, act: Callable[[], T]) -> T:
    """Call a function inside a namespace, in a thread of its own, and return what it returns.

    Args:
        name: of the namespace.
        act: must not leave a thread behind; blocks the caller.

    Raises:
        LabError: the namespace cannot be entered. What *act* raises passes through.
    """

    def enter_and_act() -> T:
        _enter(name)
        return act()

    return _apart(enter_and_act)


def _apart(act: Callable[[], T]) -> T:
    """Call a function in a thread of its own, where no signal's exception can cut it short.

    When one ends the waiting here, *act* still comes to its end first, unless it has not begun: nothing may
    be made behind the back of the clean-up that follows. (``Thread.join`` cannot promise that: the exception
    may come while ``Thread.start`` waits.)
    """
    result: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        if not result.set_running_or_notify_cancel():
            return
        try:
            result.set_result(act())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
            result.set_exception(error)

    try:
        threading.Thread(target=work, name="apart").start()
        return result.result()
    finally:
        if not result.cancel():
            concurrent.futures.wait([result])


def _enter(name: str) -> None:
    try:
        handle = os.open(NETNS / name, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LabError(
            f"enter namespace {name}: {error.strerror}", hint="is the lab up? see `loden lab status`"
        ) from error
    try:
        if _libc.setns(handle, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise LabError(f"enter namespace {name}: {os.strerror(number)}")
    finally:
        os.close(handle)


def create(names: Iterable[str], settings: Mapping[str, str], *, lock: int) -> None:
    """Make namespaces.

    Args:
        names: none of which exists.
        settings: as in :attr:`Wiring.settings`, for each of them.
        lock: a descriptor that the child process holds too, so that whoever takes the lock after a crash
            knows that nothing is being made any more.

    Raises:
        LabError: with what iproute2 or the kernel said.
    """
    made = list(names)
    _apart(lambda: _ip([f"netns add {name}" for name in made], lock=lock))
    for name in made:
        inside(name, functools.partial(_set, settings))


def _set(settings: Mapping[str, str]) -> None:
    for name, value in settings.items():
        path = Path("/proc/sys/net", name)
        try:
            path.write_text(value)
        except OSError as error:
            is_missing = name.startswith("ipv6/") and not path.exists()
            hint = "this kernel has no IPv6: boot it without ipv6.disable=1, or --family ipv4"
            raise LabError(f"write {path}: {error.strerror}", hint=hint if is_missing else "") from error


def remove(names: Iterable[str], *, lock: int) -> None:
    """Remove those namespaces that exist, with all that is in them but processes.

    Raises:
        LabError: with what iproute2 said.
    """
    _apart(lambda: _ip([f"netns del {name}" for name in names if exists(name)], lock=lock))


def wire(wirings: Iterable[Wiring], *, lock: int) -> None:
    """Make what is described, one namespace after the other.

    Raises:
        LabError: with what iproute2 said.
    """
    for wiring in wirings:
        inside(wiring.namespace, functools.partial(_wire_here, wiring, lock))


def _wire_here(wiring: Wiring, lock: int) -> None:
    _set(wiring.settings)
    _ip(wiring.commands, lock=lock)
    _wait_until_usable(wiring)


def _wait_until_usable(wiring: Wiring) -> None:
    """An IPv6 address can be used when the kernel has looked for others with it, or has seen, a moment after
    the address was added, that it need not."""
    added = {one.address.hex() for one in wiring.addresses}
    deadline = time.monotonic() + _USABLE_S
    while added & _tentative_addresses():
        if time.monotonic() > deadline:
            raise LabError(f"add addresses in {wiring.namespace}: not usable after {_USABLE_S:g} s")
        time.sleep(0.001)


def _tentative_addresses() -> set[str]:
    """In hexadecimal; a line has address, interface index, prefix length, scope, flags and interface."""
    try:
        lines = Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
    except FileNotFoundError:  # a kernel without IPv6
        return set()
    rows = (line.split() for line in lines)
    return {row[0] for row in rows if int(row[4], 16) & _IFA_F_TENTATIVE}


def _ip(commands: Iterable[str], *, lock: int) -> None:
    """One iproute2 process for many commands; it stops at the first that fails."""
    text = "".join(f"{line}\n" for line in commands)
    if not text:
        return
    try:
        done = subprocess.run(
            ["ip", "-batch", "-"], input=text, text=True, capture_output=True, check=False, pass_fds=(lock,)
        )
    except FileNotFoundError as error:
        raise LabError("run ip: not found", hint="apt install iproute2") from error
    if done.returncode != 0:
        raise LabError(f"run ip: {_first_error(done.stderr, text)}")


def _first_error(stderr: str, script: str) -> str:
    """What iproute2 said, with the command it was about: it names only the number of the line."""
    said = [line for line in stderr.splitlines() if line.strip()]
    number = next((line.rpartition(":")[2] for line in said if line.startswith("Command failed")), "")
    lines = script.splitlines()
    command = lines[int(number) - 1] if number.isdigit() and int(number) <= len(lines) else ""
    return f"{command!r}: {said[0] if said else 'no reason given'}"
