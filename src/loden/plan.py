# SPDX-License-Identifier: Apache-2.0
"""What an agent finds out before it takes a lease: the network, the interface, the backend.

Once it runs, the host may stop to fit one family of two: the interface's MTU falls below what IPv6 needs, or
it loses one of its addresses. Then each family is planned apart. The one that fits follows the host, and the
other keeps the plan that it had, with what is said to be wrong, until it fits again.
"""

import errno as errnos
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec

from loden.address import Family, Prefix, format_address, is_host
from loden.backend_options import decode_options
from loden.backends import find
from loden.backends.base import Backend, Host
from loden.errors import ConfigError, InterfaceError, LodenError, PeerUnreachable
from loden.interface import Hop, HostFacts, Selection, Underlay, leads_out, select, select_again
from loden.lease import Lease, Leg, public_port
from loden.network import Network, parse_network
from loden.stores.acquire import Claim, this_host
from loden.stores.base import Store
from loden.tables import netlink
from loden.tables.entries import Entry
from loden.tables.host import find_hops, read_host
from loden.tables.netlink import Netlink


class Plan(msgspec.Struct, frozen=True):
    """What the network's configuration and the host come to.

    Args:
        host: what the backend was made for; of families that were planned apart, what they come to together.
        backends: as the configuration names it, for each family; one and the same unless planned apart.
        notes: what the configuration's author should know.
        troubles: families that the host does not fit now, and that keep an earlier plan.
    """

    host: Host
    backends: Mapping[Family, Backend]
    notes: tuple[str, ...]
    troubles: Mapping[Family, LodenError] = {}

    @property
    def backend(self) -> Backend:
        """The first family's, and so all families' unless they were planned apart."""
        return next(iter(self.backends.values()))

    def optional_entries(self, lease: Lease) -> list[Entry]:
        """What it does without where it cannot be had (:meth:`Backend.optional_entries`)."""
        return [
            entry for leg in lease.legs for entry in self.backends[leg.subnet.family].optional_entries(leg)
        ]

    def own_entries(self, lease: Lease) -> list[Entry]:
        """What stands on this host, or in its cloud, for its own lease."""
        return [entry for leg in lease.legs for entry in self.backends[leg.subnet.family].own_entries(leg)]

    @property
    def lease_type(self) -> str:
        """``BackendType`` in leases, of peers that can be served too."""
        return self.backend.lease_type

    @property
    def needs_hops(self) -> bool:
        """Whether any backend asks where the kernel would send packets to a peer's address."""
        return any(backend.needs_hops for backend in self.backends.values())

    @property
    def mtu(self) -> int:
        """What a container may send whatever the family, bytes."""
        return min(backend.mtu for backend in self.backends.values())

    def claim(self, previous: Sequence[Prefix]) -> Claim:
        """What this host asks the store for.

        Args:
            previous: the subnets that it had, to have them again.
        """
        return Claim(
            ranges=self.host.network.ranges,
            public=self.host.underlay.public,
            previous=tuple(previous),
            holder=this_host(),
            make=self._lease,
            port=self._announced_port(),
        )

    def _announced_port(self) -> int:
        """The same for all families: hosts behind one address differ in it."""
        legs = (
            Leg(part.network, data=self.backends[part.family].data(part.family))
            for part in self.host.network.ranges
        )
        return next(map(public_port, legs), 0)

    def with_network(self, network: Network) -> "Plan":
        """The same for a network that differs from ours in what may differ (:func:`running_network`)."""
        return msgspec.structs.replace(self, host=msgspec.structs.replace(self.host, network=network))

    def _lease(self, subnets: dict[Family, Prefix]) -> Lease:
        legs = {
            family: Leg(subnet, self.host.underlay.public[family], self.backends[family].data(family))
            for family, subnet in subnets.items()
        }
        return Lease.make(legs, self.lease_type)


async def read_network(store: Store) -> Network:
    """The network's configuration.

    Raises:
        ConfigError: there is none, or it cannot be used.
        StoreError: the store's own failures.
    """
    text = await store.get_network()
    if text is None:
        raise ConfigError(
            "",
            "the store holds no network configuration yet",
            hint="write one: "
            """echo '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}' | loden config put -""",
        )
    return parse_network(text)


async def make_plan(
    selection: Selection, network: Network, requests: Netlink, *, current: Plan | None = None
) -> Plan:
    """Look at the host and decide. It can be called again when the host is not what it was.

    Args:
        selection: which interface was asked for.
        network: the cluster's configuration.
        requests: a socket for the questions.
        current: what is in use; its interface stays as long as it serves, and a family that does not fit any
            more keeps its part of it.

    Raises:
        ConfigError: the backend's options, or the host, do not fit.
        InterfaceError: no interface fits.
        KernelError: the host cannot be read.
    """
    facts = await read_host(requests)
    kind = find(network.backend_type)
    backend_options, notes = decode_options(network.backend, kind.Options)
    lacks = await kind.lacks(backend_options, network.families)

    def lookup(address: bytes) -> Hop | None:
        return find_hops(requests, [address])[address]

    def attempt(part: Network) -> Plan:
        before = current.host.underlay if current else None
        if before is None:
            underlay = select(selection, part.families, facts, lookup)
        else:
            underlay = select_again(before, selection, part.families, facts, lookup)
        require_apart(part, underlay, facts)
        host = Host(network=part, underlay=underlay, facts=facts, lacks=lacks)
        backend = kind(host, backend_options)
        return Plan(host, dict.fromkeys(part.families, backend), part.notes + notes)

    try:
        return attempt(network)
    except (ConfigError, InterfaceError) as error:
        plans, troubles = _attempt_apart(network, attempt) if current else ({}, {})
        if current is None or not plans:
            raise
        return _join(current, plans, troubles, error)


def _attempt_apart(
    network: Network, attempt: Callable[[Network], Plan]
) -> tuple[dict[Family, Plan], dict[Family, LodenError]]:
    """A plan for each family alone, or what is wrong with it."""
    plans: dict[Family, Plan] = {}
    troubles: dict[Family, LodenError] = {}
    for family in network.families:
        try:
            plans[family] = attempt(network.only(family))
        except (ConfigError, InterfaceError) as error:
            troubles[family] = error
    return plans, troubles


def _join(
    current: Plan, plans: Mapping[Family, Plan], troubles: Mapping[Family, LodenError], error: LodenError
) -> Plan:
    """One plan of those that were made apart; what is missing is as it was.

    Args:
        current: what is in use.
        plans: the families that fit; at least one.
        troubles: why the others do not.
        error: why not all of them together.
    """
    name = current.host.underlay.name
    first = next((plan for plan in plans.values() if plan.host.underlay.name == name), None)
    first = first or next(iter(plans.values()))
    # There is one interface: a family that fits another one alone has to wait.
    fitting = {
        family: plan for family, plan in plans.items() if plan.host.underlay.name == first.host.underlay.name
    }
    underlays = {family: plan.host.underlay for family, plan in fitting.items()}
    before = current.host.underlay
    underlay = msgspec.structs.replace(
        first.host.underlay,
        addresses={**before.addresses, **{one: it.addresses[one] for one, it in underlays.items()}},
        public={**before.public, **{one: it.public[one] for one, it in underlays.items()}},
    )
    return Plan(
        host=Host(
            network=current.host.network,
            underlay=underlay,
            facts=first.host.facts,
            lacks=first.host.lacks,
        ),
        backends={
            family: fitting[family].backends[family] if family in fitting else backend
            for family, backend in current.backends.items()
        },
        notes=current.notes,
        troubles={
            family: troubles.get(family, error) for family in current.backends if family not in fitting
        },
    )


def require_apart(network: Network, underlay: Underlay, facts: HostFacts) -> None:
    """Refuse a cluster whose containers would have the hosts' own addresses.

    Real interfaces and the chosen one count. Bridges and the like are the containers' own, inside the network
    by right.

    Raises:
        ConfigError: names both ranges. Routes to such subnets would cut the host off.
    """
    for there, name in host_networks(underlay, facts):
        for part in network.ranges:
            if part.network.overlaps(there):
                raise ConfigError(
                    "IPv6Network" if part.family is Family.IPV6 else "Network",
                    f"{part.network} overlaps {there}, the network of {name}",
                    hint="give the containers a range that no host is in",
                )


def host_networks(underlay: Underlay, facts: HostFacts) -> Iterator[tuple[Prefix, str]]:
    """The networks that the host itself is in, each with its interface."""
    names = {link.index: link.name for link in facts.links if leads_out(link)}
    names[underlay.index] = underlay.name
    for own in facts.addresses:
        if own.index in names:
            yield Prefix.of(own.address, own.length), names[own.index]


def require_harmless(leg: Leg, network: Network, near: Iterable[tuple[Prefix, str]]) -> None:
    """Refuse a peer whose subnet can be no container subnet, whatever the store says.

    It need not lie in the network: hosts that go by an earlier configuration keep theirs.

    Args:
        leg: of the peer's lease.
        network: the cluster's configuration.
        near: as :func:`host_networks` has them.

    Raises:
        PeerUnreachable: says what the route would take away.
    """
    subnet = leg.subnet
    own = network.range_of(subnet.family)
    first, last = (number.to_bytes(subnet.family.size, "big") for number in (subnet.first, subnet.last))
    if own is not None and subnet.length < own.network.length:
        raise PeerUnreachable(f"route {subnet}: it is wider than the whole network {own.network}")
    if not is_host(first) or not is_host(last):
        raise PeerUnreachable(f"route {subnet}: no host has such addresses")
    if leg.public is not None and subnet.holds(leg.public):
        raise PeerUnreachable(f"route {subnet}: the peer's own address {format_address(leg.public)} is in it")
    for there, name in near:
        if subnet.overlaps(there):
            raise PeerUnreachable(f"route {subnet}: it overlaps {there}, the network of {name}")


async def require_rights(requests: Netlink) -> None:
    """Find out by trying: the kernel looks at the rights before it sees that the request names no device.

    Raises:
        KernelError: EPERM. Without this, a lease would be taken that nobody can serve.
    """
    refused = await requests.request(netlink.message(netlink.RTM_DELLINK, 0, bytes(16)))
    if refused is not None and refused.errno in (errnos.EPERM, errnos.EACCES):
        raise refused.error("change", "the network of this namespace")
