# SPDX-License-Identifier: Apache-2.0
"""One agent in one network namespace."""

import asyncio
import errno as errnos
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from loden.errors import AlreadyRunning

# Abstract, so it belongs to the network namespace and goes with the process, however that ends.
_ADDRESS = b"\0loden/agent"
_UCRED = struct.Struct("=iII")
_KIND = socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK


@asynccontextmanager
async def one_agent(*, patience_s: float = 5.0) -> AsyncIterator[None]:
    """Be the only agent here while the context lasts.

    What is marked as ours in the kernel belongs to one agent: two would undo each other's work.

    Args:
        patience_s: how long one that is just ending may take.

    Raises:
        AlreadyRunning: another one stays; names its process id.
    """
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, _KIND) as held:
        await _bind(held, patience_s)
        held.listen()
        loop.add_reader(held, _dismiss, held)
        try:
            yield
        finally:
            loop.remove_reader(held)


async def _bind(held: socket.socket, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            held.bind(_ADDRESS)
        except OSError as error:
            if error.errno != errnos.EADDRINUSE:
                raise
            if time.monotonic() >= deadline:
                raise AlreadyRunning(
                    f"start the agent: {_holder()} works in this network namespace already",
                    hint="stop it first; one agent serves the whole host",
                ) from error
        else:
            return
        await asyncio.sleep(0.05)


def _dismiss(held: socket.socket) -> None:
    """Who connects only wants to know who we are; the kernel has told it by now."""
    with suppress(OSError):
        held.accept()[0].close()


def _holder() -> str:
    with socket.socket(socket.AF_UNIX, _KIND) as asking:
        try:
            asking.connect(_ADDRESS)
            pid, _uid, _gid = _UCRED.unpack(
                asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            )
        except OSError:  # it has just ended, or too many ask
            return "another agent"
    return f"another agent (pid {pid})"
