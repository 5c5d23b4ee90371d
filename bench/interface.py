# SPDX-License-Identifier: Apache-2.0
"""How soon an interface is followed when its address or its MTU changes: by its host, and by the peers."""

import argparse
import subprocess
import time
from collections.abc import Callable, Iterator

from bench._common import Arguments, Figure, figure, run
from bench._ping import Ping
from loden.address import Family, format_address
from loden.errors import LabError
from loden.lab.lab import Lab, running
from loden.lab.topology import Host, Spec
from loden.lab.wiring import UPLINK, container_address

_MOST_S = 10.0
_LENGTH = 24
_MTUS = (1400, 1500)
_OVERHEAD = 50


def measure(arguments: Arguments) -> Iterator[Figure]:
    with running(Spec(name="bench-interface", hosts=2)) as lab:
        first, second = lab.plan.hosts
        target = container_address(lab.found[second.name].subnets[Family.IPV4], 0)
        ping = Ping(first.containers[0].namespace, format_address(target))
        with ping.running():
            moves = [
                _readdress(first, second, f"198.18.0.{100 + number}") for number in range(arguments.rounds)
            ]
        with ping.running():
            resizes = [_resize(lab, second, _MTUS[number % 2]) for number in range(arguments.rounds)]
    yield figure("another address, until the peer sends to it, most", 1000 * max(moves), "ms", "<= 1000")
    yield figure("another MTU, until it is in subnet.env, most", 1000 * max(resizes), "ms", "<= 1000")
    yield figure("pings between containers lost", ping.lost, "", anchor=("sent", ping.sent))


def _readdress(watcher: Host, host: Host, text: str) -> float:
    """Give a host another address; how long until its peer knows."""
    old = [line.split()[3] for line in _ip(host, "-o", "-4", "address", "show", "dev", UPLINK).splitlines()]
    started = time.monotonic()
    _ip(host, "address", "delete", old[0], "dev", UPLINK)
    _ip(host, "address", "add", f"{text}/{_LENGTH}", "dev", UPLINK)
    return _wait(started, lambda: f"dst {text} " in _fdb(watcher))


def _resize(lab: Lab, host: Host, mtu: int) -> float:
    """Give a host's interface another MTU; how long until containers are told."""
    started = time.monotonic()
    _ip(host, "link", "set", UPLINK, "mtu", str(mtu))
    line = f"FLANNEL_MTU={mtu - _OVERHEAD}\n"
    return _wait(started, lambda: line in lab.state.subnet_file(host.name).read_text())


def _wait(started: float, is_so: Callable[[], bool]) -> float:
    while not is_so():
        if time.monotonic() - started > _MOST_S:
            raise LabError(f"follow the interface: not within {_MOST_S:g} s")
    return time.monotonic() - started


def _fdb(host: Host) -> str:
    return _run("bridge", "-n", host.namespace, "fdb", "show", "dev", "flannel.1")


def _ip(host: Host, *words: str) -> str:
    return _run("ip", "-n", host.namespace, *words)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=6, help="how often [6]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
