# SPDX-License-Identifier: Apache-2.0
"""From where to where in a lab of two hosts."""

from loden.address import Family
from loden.lab.lab import Lab
from loden.lab.probe import End
from loden.lab.throughput import Path


def fabric(lab: Lab) -> Path:
    """Between the first two hosts' gateway addresses: the fabric's cost alone."""
    return Path(
        *(
            End(f"{host.name}'s gateway", host.namespace, lab.found[host.name].subnets[Family.IPV4].gateway)
            for host in lab.plan.hosts[:2]
        )
    )


def underlay(lab: Lab) -> Path:
    """Between their own addresses."""
    return Path(*(End(host.name, host.namespace, host.addresses[Family.IPV4]) for host in lab.plan.hosts[:2]))


def containers(lab: Lab) -> Path:
    """From the first host's first container to the second's."""
    return Path(*(lab.containers(host, Family.IPV4)[0] for host in lab.plan.hosts[:2]))


def back(path: Path) -> Path:
    """The same in the other direction."""
    return Path(path.target, path.source)
