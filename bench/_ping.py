# SPDX-License-Identifier: Apache-2.0
"""A ping each millisecond, and how many got no answer."""

import select
import socket
import threading
import time

from loden.lab import namespaces
from loden.lab.probe import echo_request

_INTERVAL_S = 0.001
_PATIENCE_S = 1.0


class Ping:
    """Echo requests at a steady pace, in a thread.

    Args:
        source: the namespace that asks.
        target: the IPv4 address that answers.
    """

    def __init__(self, source: str, target: str) -> None:
        self._source = source
        self._target = target
        self.sent = 0
        self.lost = 0
        self.longest_s = 0.0

    def running(self) -> "_Burst":
        return _Burst(self, namespaces.inside(self._source, _raw_socket), self._target)


class _Burst:
    """One uninterrupted row of requests; adds to its ping's counts at the end."""

    def __init__(self, ping: Ping, raw: socket.socket, target: str) -> None:
        self._ping = ping
        self._socket = raw
        self._target = target
        self._sent: dict[tuple[int, int], float] = {}  # those without an answer yet
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ping")

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._socket.close()
        self._ping.lost += len(self._sent)

    def _work(self) -> None:
        due = time.monotonic()
        number = 0
        while not self._stop.is_set():
            self._take(max(0.0, due - time.monotonic()))
            if time.monotonic() >= due:
                self._ask(divmod(number, 1 << 16))
                number += 1
                due += _INTERVAL_S
        deadline = time.monotonic() + _PATIENCE_S
        while self._sent and time.monotonic() < deadline:
            self._take(0.01)
        self._ping.sent += number

    def _ask(self, name: tuple[int, int]) -> None:
        self._sent[name] = time.monotonic()
        try:
            self._socket.sendto(echo_request(8, *name), (self._target, 0))
        except OSError:
            return  # refused is lost: it stays among those without an answer

    def _take(self, timeout_s: float) -> None:
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return
        packet = self._socket.recv(256)
        start = (packet[0] & 0x0F) * 4  # behind the IP header
        if packet[start] == 0:  # an echo reply
            name = (
                int.from_bytes(packet[start + 4 : start + 6], "big"),
                int.from_bytes(packet[start + 6 : start + 8], "big"),
            )
            sent = self._sent.pop(name, None)
            if sent is not None:
                self._ping.longest_s = max(self._ping.longest_s, time.monotonic() - sent)


def _raw_socket() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
