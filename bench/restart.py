# SPDX-License-Identifier: Apache-2.0
"""Packets lost between two containers while every agent is killed and started again.

A ping each millisecond from a container of one host to one of the other, while the store also holds leases of
many more hosts (vxlan). Beside the figure stands the same ping for as long with the agents left alone.
"""

import argparse
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

from bench._common import Arguments, Figure, figure, run
from bench._site import NETWORK, add_leases
from loden.address import Family, format_address
from loden.errors import LabError
from loden.lab import namespaces
from loden.lab.agents import READY_S, Agents
from loden.lab.lab import Lab, running
from loden.lab.probe import echo_request
from loden.lab.topology import Spec
from loden.lab.wiring import container_address

_INTERVAL_S = 0.001
_BEFORE_S, _AFTER_S = 0.3, 2.0  # the second holds the first look of the agents that start
_PATIENCE_S = 1.0
_SETTLE_S = 5.0
_BACKENDS = ("vxlan", "host-gw")


def measure(arguments: Arguments) -> Iterator[Figure]:
    with ExitStack() as stack:
        labs = {
            backend: stack.enter_context(
                running(Spec(name=f"bench-{backend}", hosts=2, backend=backend, network=str(NETWORK)))
            )
            for backend in _BACKENDS
        }
        if arguments.leases:
            # host-gw would refuse peers that are not in the lab's small underlay
            add_leases(labs["vxlan"].state.path / "store.db", arguments.leases)
            time.sleep(_SETTLE_S)
        pings = {backend: _Ping(labs[backend]) for backend in _BACKENDS}
        alone = {backend: _Ping(labs[backend]) for backend in _BACKENDS}
        took: dict[str, list[float]] = {backend: [] for backend in _BACKENDS}
        for _ in range(arguments.rounds):
            for backend, lab in labs.items():
                with pings[backend].running():
                    time.sleep(_BEFORE_S)
                    started = time.monotonic()
                    _restart(lab)
                    took[backend].append(time.monotonic() - started)
                    time.sleep(_AFTER_S)
                with alone[backend].running():
                    time.sleep(_BEFORE_S + took[backend][-1] + _AFTER_S)
        for backend in _BACKENDS:
            ping, beside = pings[backend], alone[backend]
            yield figure(
                f"{backend}, pings sent while agents restart", ping.sent, "", anchor=("alone", beside.sent)
            )
            yield figure(f"{backend}, pings lost", ping.lost, "", "0", anchor=("alone", beside.lost))
            yield figure(
                f"{backend}, longest answer",
                1000 * ping.longest_s,
                "ms",
                anchor=("alone", 1000 * beside.longest_s),
            )
            yield figure(f"{backend}, longest time without agents", max(took[backend]), "s")


def _restart(lab: Lab) -> None:
    """SIGKILL to every agent, and new ones."""
    for host in lab.plan.hosts:
        agent = lab.state.agent(host.name)
        if agent is None or not agent.is_alive:
            raise LabError(f"kill agent of {host.name}: it does not run")
        os.kill(agent.pid, signal.SIGKILL)
        os.waitpid(agent.pid, 0)
    with Agents(lab.state) as agents:
        for host in lab.plan.hosts:
            agents.start(host)
        agents.wait_ready(timeout_s=READY_S, on_ready=lambda _: None)


class _Ping:
    """Echo requests from the first host's container to the second's, at a steady pace, in a thread."""

    def __init__(self, lab: Lab) -> None:
        first, second = lab.plan.hosts
        self._source = first.containers[0].namespace
        self._target = format_address(container_address(lab.found[second.name].subnets[Family.IPV4], 0))
        self.sent = 0
        self.lost = 0
        self.longest_s = 0.0

    def running(self) -> "_Burst":
        return _Burst(self, namespaces.inside(self._source, _raw_socket), self._target)


class _Burst:
    """One uninterrupted row of requests; adds to its ping's counts at the end."""

    def __init__(self, ping: _Ping, raw: socket.socket, target: str) -> None:
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


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="how often [5]")
    parser.add_argument("--leases", type=int, default=5_000, help="of other hosts, in the vxlan lab [5000]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
