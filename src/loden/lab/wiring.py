# SPDX-License-Identifier: Apache-2.0
"""What is to be made inside each namespace, as values, and as the commands that make it; pure."""

from collections.abc import Mapping, Sequence

import msgspec

from loden.address import Family, Prefix, format_address, parse_address
from loden.errors import LabError
from loden.lab.clouds.catalogue import CLOUDS, addresses
from loden.lab.topology import Host, Plan, StoreKind, nth, store_address

UPLINK = "eth0"
BRIDGE = "cni0"
UNDERLAY_MTU = 1500


class Veth(msgspec.Struct, frozen=True):
    """A wire: an interface on a bridge here, its peer in another namespace.

    Args:
        mtu: of both ends, in bytes.
        peer_mac: six bytes; empty where any will do.
    """

    name: str
    bridge: str
    peer_namespace: str
    peer_name: str
    mtu: int
    peer_mac: bytes = b""


class Address(msgspec.Struct, frozen=True):
    """An address (packed) on an interface, with the length of its on-link prefix."""

    link: str
    address: bytes
    length: int


class Neighbour(msgspec.Struct, frozen=True):
    """A permanent neighbour: who has an address (packed) on a link."""

    link: str
    address: bytes
    mac: bytes


class Wiring(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be made inside one namespace.

    Args:
        namespace: where.
        bridges: names of bridges, each of *mtu*.
        veths: wires that begin here; the far namespace's own wiring comes after this one.
        addresses: on interfaces that exist by then.
        neighbours: on the same.
        default_routes: the next router (packed) of each family.
        forwards: the families whose packets it forwards.
    """

    namespace: str
    mtu: int = UNDERLAY_MTU
    bridges: tuple[str, ...] = ()
    veths: tuple[Veth, ...] = ()
    addresses: tuple[Address, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    default_routes: tuple[bytes, ...] = ()
    forwards: tuple[Family, ...] = ()

    @property
    def commands(self) -> tuple[str, ...]:
        """The lines of ``ip -batch``, in order."""
        lines = ["link set lo up"]
        lines += [f"link add {name} mtu {self.mtu} type bridge" for name in self.bridges]
        lines += [
            f"link add {veth.name} mtu {veth.mtu} type veth "
            f"peer name {veth.peer_name} mtu {veth.mtu} netns {veth.peer_namespace}"
            + (f" address {veth.peer_mac.hex(':')}" if veth.peer_mac else "")
            for veth in self.veths
        ]
        lines += [f"link set {veth.name} master {veth.bridge} up" for veth in self.veths]
        lines += [
            f"addr add {format_address(one.address)}/{one.length} dev {one.link}" for one in self.addresses
        ]
        up = dict.fromkeys((*self.bridges, *(one.link for one in self.addresses)))
        lines += [f"link set {name} up" for name in up]
        lines += [
            f"neigh add {format_address(one.address)} lladdr {one.mac.hex(':')} dev {one.link} nud permanent"
            for one in self.neighbours
        ]
        lines += [f"route add default via {format_address(router)}" for router in self.default_routes]
        return tuple(lines)

    @property
    def settings(self) -> Mapping[str, str]:
        """Files below ``/proc/sys/net`` and their values."""
        return {_FORWARDING[family]: "1" for family in self.forwards}


_FORWARDING = {Family.IPV4: "ipv4/ip_forward", Family.IPV6: "ipv6/conf/all/forwarding"}


def first_settings(families: Sequence[Family]) -> Mapping[str, str]:
    """What holds in every namespace before any interface is there to copy it; as :attr:`Wiring.settings`.

    A new namespace may take over the machine's filter of IPv4 paths, and its refusal of IPv6. Nobody else
    lives in a lab that could have an address already: the second that IPv6 waits to find out is saved.
    """
    found = {f"ipv4/conf/{scope}/rp_filter": "0" for scope in ("all", "default")}
    if Family.IPV6 in families:
        found |= {f"ipv6/conf/{scope}/disable_ipv6": "0" for scope in ("all", "default")}
        found["ipv6/conf/default/accept_dad"] = "0"
    return found


def switch_wiring(plan: Plan) -> Wiring:
    """The segments' bridges, a wire to every host, and the addresses of the router and of its cloud."""
    cloud = [Address("lo", parse_address(text), 32) for text in addresses(plan.spec.backend)]
    return Wiring(
        namespace=plan.switch,
        bridges=tuple(segment.bridge for segment in plan.segments),
        veths=tuple(
            Veth(host.name, host.segment.bridge, host.namespace, UPLINK, UNDERLAY_MTU, host.mac)
            for host in plan.hosts
        ),
        addresses=(
            *cloud,
            *(
                Address(segment.bridge, router, segment.prefixes[family].length)
                for segment in plan.segments
                for family, router in segment.routers.items()
            ),
            *(
                Address(plan.segments[0].bridge, store_address(plan, family), prefix.length)
                for family, prefix in plan.segments[0].prefixes.items()
                if plan.spec.store is StoreKind.ETCD
            ),
        ),
        forwards=plan.families if len(plan.segments) > 1 or plan.spec.backend in CLOUDS else (),
    )


def underlay_wiring(plan: Plan, host: Host) -> Wiring:
    """The host's own end of its wire, before the agent starts.

    The other hosts of its segment are permanent neighbours: the kernel allows 1,024 that are not, in all
    namespaces together, so that 50 hosts would use up what the machine itself needs.
    """
    return Wiring(
        namespace=host.namespace,
        addresses=tuple(
            Address(UPLINK, address, host.segment.prefixes[family].length)
            for family, address in host.addresses.items()
        ),
        neighbours=tuple(
            Neighbour(UPLINK, address, peer.mac)
            for peer in plan.hosts
            if peer.segment == host.segment and peer != host
            for address in peer.addresses.values()
        ),
        default_routes=tuple(host.segment.routers.values()),
        forwards=plan.families,
    )


class HostSubnets(msgspec.Struct, frozen=True):
    """What the agent wrote into ``subnet.env`` (COMPAT §6).

    Args:
        subnets: the host's container subnets, by family.
        mtu: for everything behind the bridge, in bytes.
    """

    subnets: Mapping[Family, Prefix]
    mtu: int


_SUBNET_KEYS = {Family.IPV4: "FLANNEL_SUBNET", Family.IPV6: "FLANNEL_IPV6_SUBNET"}


def read_subnet_env(text: str, families: Sequence[Family]) -> HostSubnets:
    """The values of a ``subnet.env``.

    Raises:
        LabError: a line that the lab needs is missing or malformed.
    """
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    try:
        subnets = {family: Prefix.parse(values[_SUBNET_KEYS[family]]) for family in families}
        return HostSubnets(subnets, int(values["FLANNEL_MTU"]))
    except (KeyError, ValueError) as error:
        raise LabError(f"read subnet.env {text!r}: {error}") from error


def container_address(subnet: Prefix, index: int) -> bytes:
    """The address of a host's container; the gateway has the first one, containers (from 0) follow."""
    return nth(subnet, 2 + index)


def bridge_wiring(host: Host, found: HostSubnets) -> Wiring:
    """The host's bridge with each subnet's first address, and a wire to each container."""
    return Wiring(
        namespace=host.namespace,
        mtu=found.mtu,
        bridges=(BRIDGE,),
        veths=tuple(
            Veth(f"c{index + 1}", BRIDGE, container.namespace, UPLINK, found.mtu)
            for index, container in enumerate(host.containers)
        ),
        addresses=tuple(Address(BRIDGE, subnet.gateway, subnet.length) for subnet in found.subnets.values()),
    )


def container_wirings(host: Host, found: HostSubnets) -> tuple[Wiring, ...]:
    """The containers' own ends."""
    return tuple(
        Wiring(
            namespace=container.namespace,
            addresses=tuple(
                Address(UPLINK, container_address(subnet, index), subnet.length)
                for subnet in found.subnets.values()
            ),
            default_routes=tuple(subnet.gateway for subnet in found.subnets.values()),
        )
        for index, container in enumerate(host.containers)
    )
