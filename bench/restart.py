# SPDX-License-Identifier: Apache-2.0
"""Packets lost between two containers while every agent is killed and started again.

A ping each millisecond from a container of one host to one of the other, while the store also holds leases of
many more hosts (vxlan). Beside the figure stands the same ping for as long with the agents left alone.
"""

import argparse
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

from bench._common import Arguments, Figure, figure, run
from bench._ping import Ping
from bench._site import NETWORK, add_leases
from loden.address import Family, format_address
from loden.errors import LabError
from loden.lab.agents import READY_S, Agents, Launch, loden_run
from loden.lab.lab import Lab, running
from loden.lab.topology import Spec
from loden.lab.wiring import container_address

BEFORE_S, AFTER_S = 0.3, 2.0  # the second holds the first look of the agents that start
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
        pings = {backend: ping_between(labs[backend]) for backend in _BACKENDS}
        alone = {backend: ping_between(labs[backend]) for backend in _BACKENDS}
        took: dict[str, list[float]] = {backend: [] for backend in _BACKENDS}
        for _ in range(arguments.rounds):
            for backend, lab in labs.items():
                with pings[backend].running():
                    time.sleep(BEFORE_S)
                    started = time.monotonic()
                    restart(lab)
                    took[backend].append(time.monotonic() - started)
                    time.sleep(AFTER_S)
                with alone[backend].running():
                    time.sleep(BEFORE_S + took[backend][-1] + AFTER_S)
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


def ping_between(lab: Lab) -> Ping:
    """From the first host's container to the second's."""
    first, second = lab.plan.hosts
    target = container_address(lab.found[second.name].subnets[Family.IPV4], 0)
    return Ping(first.containers[0].namespace, format_address(target))


def restart(lab: Lab, launch: Launch = loden_run) -> None:
    """SIGKILL to every agent, and new ones."""
    for host in lab.plan.hosts:
        agent = lab.state.agent(host.name)
        if agent is None or not agent.is_alive:
            raise LabError(f"kill agent of {host.name}: it does not run")
        os.kill(agent.pid, signal.SIGKILL)
        os.waitpid(agent.pid, 0)
    with Agents(lab.state, launch) as agents:
        for host in lab.plan.hosts:
            agents.start(host)
        agents.wait_ready(timeout_s=READY_S, on_ready=lambda _: None)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="how often [5]")
    parser.add_argument("--leases", type=int, default=5_000, help="of other hosts, in the vxlan lab [5000]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
