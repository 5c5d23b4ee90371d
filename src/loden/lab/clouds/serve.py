# SPDX-License-Identifier: Apache-2.0
"""The process that is a cloud: API, metadata service and router, in the lab's own namespace.

``python -m loden.lab.clouds.serve NAME`` is started by the lab inside that namespace, which has the addresses
already, and ends with it. What was called goes to ``cloud.calls`` in the lab's directory.
"""

import logging
import socket
import sys
import threading
from collections.abc import Callable, Sequence

from loden.address import Family
from loden.errors import LabError
from loden.lab.clouds.catalogue import API, CLOUDS
from loden.lab.clouds.http import Server
from loden.lab.clouds.journal import Journal
from loden.lab.clouds.machines import Double, Machine
from loden.lab.clouds.router import Router, Wire
from loden.lab.state import State
from loden.lab.topology import Plan
from loden.status.systemd import notify

log = logging.getLogger(__name__)

_PORT = 80


def machines(plan: Plan) -> list[Machine]:
    """The lab's hosts as machines of its cloud."""
    family = Family.IPV4
    return [
        Machine(host.name, number, host.addresses[family], host.mac, host.segment.prefixes[family])
        for number, host in enumerate(plan.hosts, start=1)
    ]


def wires(plan: Plan) -> list[Wire]:
    """On which interface of the router each of them is."""
    return [Wire(host.segment.bridge, host.addresses[Family.IPV4]) for host in plan.hosts]


def serve(name: str) -> None:
    """Be the cloud of a lab, for ever.

    Args:
        name: of the lab.

    Raises:
        LabError: an address cannot be listened on, or a tool failed.
    """
    state = State(name)
    plan = state.load()
    entry = CLOUDS[plan.spec.backend]
    changed = threading.Event()
    make: Callable[..., Double] = entry.load()
    double = make(machines(plan), journal=Journal(state.cloud_calls), changed=changed.set)
    router = Router(wires(plan))
    router.follow(double.view())
    servers = [Server(double.answer, _listen(API)), Server(double.metadata, _listen(entry.metadata))]
    notify(READY=1)
    log.info("cloud backend=%s api=%s metadata=%s", plan.spec.backend, servers[0].url, servers[1].url)
    while True:
        changed.wait()
        changed.clear()
        router.follow(double.view())


def _listen(address: str) -> socket.socket:
    try:
        return socket.create_server((address, _PORT), backlog=512)
    except OSError as error:
        raise LabError(f"listen {address} port {_PORT}: {error.strerror}") from error


def main(arguments: Sequence[str]) -> None:
    """The command line: one lab's name."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    serve(arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:])
