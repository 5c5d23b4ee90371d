# SPDX-License-Identifier: Apache-2.0
"""What a lab consists of: pure values, computed before anything is made.

::

    NAME-net                the switch; a router too, where there is more than one segment
      s0  bridge ──┬── h1 ═══ eth0  NAME-h1    the agent, bridge cni0 ── c1 ═══ eth0  NAME-h1-c1
                   └── h2 ═══ eth0  NAME-h2    the agent, bridge cni0 ── c1 ═══ eth0  NAME-h2-c1

Every interface lies in a namespace of the lab; names therefore repeat from host to host.
"""

import enum
import re
from collections.abc import Iterator, Mapping

import msgspec

from loden.address import Family, Prefix
from loden.errors import LabError
from loden.lab.clouds.catalogue import CLOUDS

#: Underlay addresses: the range for benchmarks of network devices (RFC 2544, RFC 6890), and the one for
#: documentation (RFC 3849); no cluster uses them.
UNDERLAY = {Family.IPV4: Prefix.parse("198.18.0.0/15"), Family.IPV6: Prefix.parse("2001:db8::/32")}
#: The length of a segment's prefix.
_SEGMENT_LENGTH = {Family.IPV4: 24, Family.IPV6: 64}

MOST_HOSTS = 250
_STORE_PLACE = 253  # in a segment; the router is behind it
MOST_CONTAINERS = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)


class Topology(enum.StrEnum):
    """How the hosts see each other."""

    SWITCHED = "switched"  # all in one segment
    ROUTED = "routed"  # each in a segment of its own, behind a router
    MIXED = "mixed"  # two in each segment: some peers near, some far

    def hosts_per_segment(self, hosts: int) -> int:
        return {Topology.SWITCHED: hosts, Topology.ROUTED: 1, Topology.MIXED: 2}[self]


class Stack(enum.StrEnum):
    """Which address families the containers have."""

    IPV4 = "ipv4"
    DUAL = "dual"
    IPV6 = "ipv6"

    @property
    def families(self) -> tuple[Family, ...]:
        """IPv4 first."""
        return tuple(family for family in Family if self in (Stack.DUAL, family_name(family)))


class StoreKind(enum.StrEnum):
    """Where the lab's agents have their leases."""

    SQLITE = "sqlite"
    ETCD = "etcd"


def family_name(family: Family) -> str:
    """As command line and JSON have it: ``ipv4`` or ``ipv6``."""
    return str(family).lower()


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for.

    Args:
        name: of the lab; every namespace's name begins with it.
        hosts: how many.
        containers: how many on each host.
        backend: the backend's type.
        backend_config: the backend's other members, as a JSON object in text.
        family: of the containers' addresses, and of the hosts': a lease names a public address for each.
        underlay: the family that ``--throughput`` measures; None for the first of those there are.
        network, network6: all container addresses of a family.
        topology: of the underlay.
        store: SQLite, in the lab's directory; or an etcd of the lab's own.
    """

    name: str = "lab"
    hosts: int = 3
    containers: int = 1
    backend: str = "vxlan"
    backend_config: str = "{}"
    family: Stack = Stack.IPV4
    underlay: str | None = None
    network: str = "10.5.0.0/16"
    network6: str = "fd00:5::/48"
    topology: Topology = Topology.SWITCHED
    store: StoreKind = StoreKind.SQLITE


class Segment(msgspec.Struct, frozen=True):
    """One link-layer segment of the underlay: a bridge in the switch's namespace.

    Args:
        bridge: its name.
        prefixes: its addresses, by family.
        routers: the router's address in it (packed), by family; empty where there is no router.
    """

    bridge: str
    prefixes: Mapping[Family, Prefix]
    routers: Mapping[Family, bytes]


class Container(msgspec.Struct, frozen=True):
    """One container: ``h1-c1``, in the namespace ``NAME-h1-c1``."""

    name: str
    namespace: str


class Host(msgspec.Struct, frozen=True):
    """One host: ``h1``, in the namespace ``NAME-h1``.

    Args:
        mac: of its underlay interface.
        addresses: the underlay address (packed), by family.
    """

    name: str
    namespace: str
    mac: bytes
    addresses: Mapping[Family, bytes]
    segment: Segment
    containers: tuple[Container, ...]


class Plan(msgspec.Struct, frozen=True):
    """The whole lab.

    Args:
        spec: what it was made from.
        switch: the namespace with the segments' bridges.
    """

    spec: Spec
    switch: str
    segments: tuple[Segment, ...]
    hosts: tuple[Host, ...]

    @property
    def families(self) -> tuple[Family, ...]:
        """Of hosts and containers, IPv4 first."""
        return self.spec.family.families

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Every namespace's name, the switch first."""
        return (self.switch, *self._of_nodes())

    def _of_nodes(self) -> Iterator[str]:
        for host in self.hosts:
            yield host.namespace
            for container in host.containers:
                yield container.namespace

    def namespace_of(self, node: str) -> str:
        """The namespace of a host or a container, by its short or its full name.

        Raises:
            LabError: no such node.
        """
        for namespace in self.namespaces:
            if node in (namespace, namespace.removeprefix(f"{self.spec.name}-")):
                return namespace
        raise LabError(
            f"find {node!r} in lab {self.spec.name}: no such host or container",
            hint=f"hosts are h1 to h{len(self.hosts)}, containers h1-c1 and so on",
        )


def check_name(name: str) -> None:
    """Refuse a name that cannot begin the name of a namespace, which is a file's name.

    Raises:
        LabError: with what is allowed.
    """
    if not _NAME.fullmatch(name):
        raise LabError(
            f"name lab {name!r}: not a usable name",
            hint="letters, digits, '-' and '_', a letter or a digit first, at most 64",
        )


def plan(spec: Spec) -> Plan:
    """Lay a lab out.

    Raises:
        LabError: a name or a number out of range.
    """
    check_name(spec.name)
    _require_range("hosts", spec.hosts, MOST_HOSTS)
    _require_range("containers", spec.containers, MOST_CONTAINERS)
    if spec.backend in CLOUDS:
        spec = _in_cloud(spec)
    measured_family(spec)
    share = spec.topology.hosts_per_segment(spec.hosts)
    count = -(-spec.hosts // share)
    has_router = count > 1 or spec.backend in CLOUDS
    segments = tuple(_segment(index, spec.family.families, has_router=has_router) for index in range(count))
    hosts = tuple(
        _host(spec, number=number, segment=segments[(number - 1) // share], place=(number - 1) % share)
        for number in range(1, spec.hosts + 1)
    )
    return Plan(spec, f"{spec.name}-net", segments, hosts)


def _in_cloud(spec: Spec) -> Spec:
    """The same lab with the topology of a cloud: every host is alone with the router of the VPC.

    Raises:
        LabError: the doubles have no IPv6, or another topology was asked for.
    """
    if spec.family is not Stack.IPV4:
        raise LabError(
            f"make lab {spec.name}: the clouds of the lab have no --family {spec.family}",
            hint="--family ipv4",
        )
    if spec.topology is Topology.MIXED:
        raise LabError(
            f"make lab {spec.name}: in a cloud no two hosts share a segment", hint="leave --topology out"
        )
    return msgspec.structs.replace(spec, topology=Topology.ROUTED)


def _require_range(what: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise LabError(f"make lab with {value} {what}: out of range", hint=f"1 to {most} {what}")


def measured_family(spec: Spec) -> Family:
    """The family whose underlay, fabric and containers ``--throughput`` compares.

    Raises:
        LabError: the lab has no such underlay. Containers of one family never go over hosts' addresses of the
            other: peers find an IPv4 subnet's host by ``PublicIP``, an IPv6 subnet's by ``PublicIPv6``.
    """
    families = spec.family.families
    if spec.underlay is None:
        return families[0]
    for family in families:
        if family_name(family) == spec.underlay:
            return family
    raise LabError(
        f"use --underlay {spec.underlay} in lab {spec.name}: it carries no --family {spec.family}, as "
        "a lease names an IPv4 address of its host for the IPv4 subnet and an IPv6 one for the IPv6 subnet",
        hint="--family ipv4 goes over ipv4, --family ipv6 over ipv6, and --family dual has both",
    )


def _segment(index: int, families: tuple[Family, ...], *, has_router: bool) -> Segment:
    prefixes = {}
    for family in families:
        length = _SEGMENT_LENGTH[family]
        first = UNDERLAY[family].first + (index << (family.bits - length))
        prefixes[family] = Prefix.from_int(family, first, length)
    routers = {family: nth(prefix, 254) for family, prefix in prefixes.items() if has_router}
    return Segment(f"s{index}", prefixes, routers)


def _host(spec: Spec, *, number: int, segment: Segment, place: int) -> Host:
    name = f"h{number}"
    return Host(
        name=name,
        namespace=f"{spec.name}-{name}",
        mac=b"\x02\x00" + number.to_bytes(4, "big"),  # locally administered
        addresses={family: nth(prefix, place + 1) for family, prefix in segment.prefixes.items()},
        segment=segment,
        containers=tuple(
            Container(f"{name}-c{index}", f"{spec.name}-{name}-c{index}")
            for index in range(1, spec.containers + 1)
        ),
    )


def store_address(plan: Plan, family: Family | None = None) -> bytes:
    """Where hosts find the lab's etcd, packed: in the first segment, behind the last host.

    Args:
        plan: of the lab.
        family: None for the lab's first.
    """
    return nth(plan.segments[0].prefixes[family or plan.families[0]], _STORE_PLACE)


def nth(prefix: Prefix, number: int) -> bytes:
    """An address of a range (packed), by its distance from the first."""
    return (prefix.first + number).to_bytes(len(prefix.address), "big")
