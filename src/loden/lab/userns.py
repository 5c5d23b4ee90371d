# SPDX-License-Identifier: Apache-2.0
"""The lab without root: the same commands, inside a user namespace where the caller is root.

::

    loden lab up ──starts──▶ keeper: unshare --user --net --mount, its own /run, sleeps
    loden lab …  ──nsenter──▶ the same command again, inside the keeper's namespaces

A user has one keeper for all labs. It lives from the first command that needs it to the one that leaves no
lab behind, and with it everything inside: mounts, namespaces, links.
"""

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from loden.errors import LabError
from loden.lab import state
from loden.lab.processes import Process, end

_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
_NEEDED = 1 << _CAP_NET_ADMIN | 1 << _CAP_SYS_ADMIN

# iproute2 keeps namespaces in /run/netns, which is not the user's to write to.
_KEEP = "mount -t tmpfs tmpfs /run && echo ready && exec sleep infinity >/dev/null 2>&1"

#: What can forbid user namespaces, and the value that allows them.
_SWITCHES = (
    ("/proc/sys/kernel/unprivileged_userns_clone", "kernel.unprivileged_userns_clone=1", "0"),
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "kernel.apparmor_restrict_unprivileged_userns=0",
        "1",
    ),
    ("/proc/sys/user/max_user_namespaces", "user.max_user_namespaces=10000", "0"),
)


def is_privileged() -> bool:
    """Whether this process may make network namespaces: root, here or in a user namespace."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return int(effective, 16) & _NEEDED == _NEEDED


def run_again(command: Sequence[str]) -> int:
    """Run a command inside the user's keeper, which is started first where it must be.

    Args:
        command: usually this process's own.

    Returns:
        the command's exit status, 128 and the signal's number where a signal ended it.

    Raises:
        LabError: the kernel does not let this user make namespaces.
    """
    base = _base()
    with _Keeper(base).held() as keeper:
        enter = ("nsenter", "--target", str(keeper.pid), "--user", "--net", "--mount")
        there = ("--preserve-credentials", "--", "env", f"--chdir={Path.cwd()}", *command)
        with (
            subprocess.Popen((*enter, *there), env={**os.environ, "LODEN_LAB_DIR": str(base)}) as child,
            _forwarded_to(child),
        ):
            status = child.wait()
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _forwarded_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals are the command's business: it has a lab to take down."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda number, _: child.send_signal(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _base() -> Path:
    """A directory of this user's own; everybody may write to /tmp, so it is looked at before it is used."""
    base = state.base_directory()
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = base.lstat()
    except OSError as error:
        raise LabError(f"make {base}: {error.strerror}", hint="LODEN_LAB_DIR names another place") from error
    if found.st_uid != os.getuid() or base.is_symlink():
        raise LabError(f"use {base}: it belongs to another user", hint="LODEN_LAB_DIR names another place")
    if base.resolve().is_relative_to("/run"):
        raise LabError(
            f"use {base}: the lab has a /run of its own and would not see it",
            hint="set LODEN_LAB_DIR to a place outside /run",
        )
    return base


class _Keeper:
    """The process that holds the namespaces, and the file that names it.

    Every command holds a shared lock while it runs; who gets it alone may start or end the keeper.
    """

    def __init__(self, base: Path) -> None:
        self._file = base / "keeper.json"
        self._base = base

    @contextlib.contextmanager
    def held(self) -> Iterator[Process]:
        """A keeper that lives at least as long as the block."""
        lock = os.open(self._base, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield self._hold(lock)
        finally:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._end_if_unused()
            os.close(lock)

    def _hold(self, lock: int) -> Process:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if (found := self._find()) is not None:
                return found
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._find() is None:
                self._start()
            # Between the two locks another command may end it again: look once more.

    def _find(self) -> Process | None:
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=Process)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return found if found.is_alive else None

    def _start(self) -> None:
        try:
            keeper = subprocess.Popen(
                (
                    *("unshare", "--user", "--map-root-user", "--net", "--mount", "--"),
                    *("sh", "-c", _KEEP),
                ),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise LabError("run unshare: not found", hint="apt install util-linux") from error
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        with keeper.stdout, keeper.stderr:
            process = Process.of(keeper.pid)
            if keeper.stdout.readline() != b"ready\n" or process is None:
                said = keeper.stderr.read().decode(errors="replace").strip()
                keeper.wait()
                raise LabError(f"make a lab without root: {said or 'no reason given'}", hint=_remedy())
        keeper.returncode = 0  # it is ended by its number and start time, perhaps by another command
        self._file.write_bytes(msgspec.json.encode(process))

    def _end_if_unused(self) -> None:
        if state.names():
            return
        if (found := self._find()) is not None:
            end([found], grace_s=0.1)
        self._file.unlink(missing_ok=True)


def _remedy() -> str:
    """What to enable, as far as the kernel says what is off."""
    wanted = [setting for path, setting, off in _SWITCHES if _reads(path) == off]
    if not wanted:
        return "run as root, or allow user namespaces (in a container, its runtime forbids them)"
    return f"run as root, or allow user namespaces: sysctl -w {' '.join(wanted)}"


def _reads(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
