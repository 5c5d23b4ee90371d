# SPDX-License-Identifier: Apache-2.0
"""What a lab found out: the object that ``--json`` prints, and why a pair was not reached."""

from collections.abc import Iterable, Sequence

import msgspec

from loden.lab.throughput import Throughput
from loden.lab.topology import Topology


class HostReport(msgspec.Struct, frozen=True):
    """One host: its underlay address and its container subnet, as text.

    In dual stack these are IPv4's, and the others, else left out, are IPv6's.
    """

    name: str
    public_ip: str
    subnet: str
    public_ipv6: str | msgspec.UnsetType = msgspec.UNSET
    ipv6_subnet: str | msgspec.UnsetType = msgspec.UNSET


class Pair(msgspec.Struct, frozen=True):
    """One ordered pair of containers.

    Args:
        source, target: their names.
        ok: whether the target answered.
        rtt_ms: how long it took, in milliseconds; None where no answer came.
        family: in which they were asked, where the lab is not of IPv4 alone.
    """

    source: str = msgspec.field(name="from")
    target: str = msgspec.field(name="to")
    ok: bool = False
    rtt_ms: float | None = None
    family: str | msgspec.UnsetType = msgspec.UNSET


class Report(msgspec.Struct, frozen=True, omit_defaults=True):
    """The whole; *throughput* is left out where it was not measured."""

    backend: str
    hosts: tuple[HostReport, ...]
    pairs: tuple[Pair, ...]
    reachable: bool
    throughput: Throughput | None = None


class HostStatus(HostReport, frozen=True):
    """A host and its agent's process; None where that has ended."""

    agent_pid: int | None = None


class Status(msgspec.Struct, frozen=True):
    """A lab that is up: what ``loden lab status --json`` prints; of the networks as of a host's subnets."""

    name: str
    backend: str
    topology: Topology
    network: str
    hosts: tuple[HostStatus, ...]
    ipv6_network: str | msgspec.UnsetType = msgspec.UNSET


def complaints(log: Iterable[str], subnets: Sequence[str], *, most: int = 2) -> tuple[str, ...]:
    """The newest warnings and errors of an agent's log that name one of a peer's subnets, in its order."""
    bad = (line for line in log if "WARNING" in line or "ERROR" in line)
    found = [line for line in bad if any(subnet in line for subnet in subnets)]
    return tuple(found[-most:])
