# SPDX-License-Identifier: Apache-2.0
"""Connections under traffic: do they live through what happens meanwhile?"""

import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager

from loden.address import format_address
from loden.lab import namespaces
from loden.lab.probe import End
from tests.end_to_end.hosts import BOUND_S, wait_until

#: The two ends of a connection.
Ends = AbstractContextManager[tuple[socket.socket, socket.socket]]


class Talk:
    """Two ends of a connection that ask and answer all the time, in a thread of their own."""

    def __init__(self, name: str, near: socket.socket, far: socket.socket) -> None:
        self._name = name
        self._near, self._far = near, far
        self.count = 0
        self._is_over = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._work, name="talk")

    def __enter__(self) -> "Talk":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def require_alive(self, after: str) -> None:
        """Wait until it has gone on, over the connection that it began with."""
        before = self.count

        def goes_on() -> bool:
            if self._error is not None:
                raise AssertionError(f"{self._name} ended after {after}: {self._error}")
            return self.count > before + 1

        wait_until(f"{self._name} goes on after {after}", goes_on, most_s=2 * BOUND_S)

    def _work(self) -> None:
        try:
            while not self._is_over.is_set():
                for one, other in ((self._near, self._far), (self._far, self._near)):
                    one.sendall(b"x" * 512)
                    received = 0
                    while received < 512:
                        received += len(other.recv(512 - received))
                self.count += 1
        except OSError as error:
            self._error = error


@contextmanager
def connection(source: End, target: End, seen: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection whose target sees it come from an address."""
    address = format_address(target.address)
    with namespaces.inside(target.namespace, lambda: socket.create_server((address, 0))) as listener:
        port = listener.getsockname()[1]

        def connect() -> socket.socket:
            return socket.create_connection((address, port), timeout=2 * BOUND_S)

        near = namespaces.inside(source.namespace, connect)
        far, came_from = listener.accept()
    far.settimeout(2 * BOUND_S)
    with closing(near), closing(far):
        assert came_from[0] == seen
        yield near, far
