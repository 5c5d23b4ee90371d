# SPDX-License-Identifier: Apache-2.0
"""What an agent finds out before it takes a lease: the network, the interface, the backend."""

import errno as errnos
from collections.abc import Sequence

import msgspec

from loden.address import Family, Prefix
from loden.backend_options import decode_options
from loden.backends import find
from loden.backends.base import Backend, Host
from loden.errors import ConfigError
from loden.interface import Hop, HostFacts, Selection, Underlay, select, select_again
from loden.lease import Lease, Leg
from loden.network import Network, parse_network
from loden.stores.acquire import Claim, this_host
from loden.stores.base import Store
from loden.tables import netlink
from loden.tables.host import find_hops, read_host
from loden.tables.netlink import Netlink

#: Kinds of interface (``IFLA_INFO_KIND``) that lead out of the host; a network card has none.
_REAL = frozenset(("", "bond", "team", "vlan"))


class Plan(msgspec.Struct, frozen=True):
    """What the network's configuration and the host come to.

    Args:
        host: what the backend was made for.
        backend: as the configuration names it.
        notes: what the configuration's author should know.
    """

    host: Host
    backend: Backend
    notes: tuple[str, ...]

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
        )

    def _lease(self, subnets: dict[Family, Prefix]) -> Lease:
        legs = {
            family: Leg(subnet, self.host.underlay.public[family], self.backend.data(family))
            for family, subnet in subnets.items()
        }
        return Lease.make(legs, self.backend.lease_type)


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
    selection: Selection, network: Network, requests: Netlink, *, current: Underlay | None = None
) -> Plan:
    """Look at the host and decide. It can be called again when the host is not what it was.

    Args:
        selection: which interface was asked for.
        network: the cluster's configuration.
        requests: a socket for the questions.
        current: the interface that is in use; it stays as long as it serves.

    Raises:
        ConfigError: the backend's options, or the host, do not fit.
        InterfaceError: no interface fits.
        KernelError: the host cannot be read.
    """
    facts = await read_host(requests)

    def lookup(address: bytes) -> Hop | None:
        return find_hops(requests, [address])[address]

    if current is None:
        underlay = select(selection, network.families, facts, lookup)
    else:
        underlay = select_again(current, selection, network.families, facts, lookup)
    require_apart(network, underlay, facts)
    host = Host(network=network, underlay=underlay, facts=facts)
    kind = find(network.backend_type)
    backend_options, notes = decode_options(network.backend, kind.Options)
    return Plan(host, kind(host, backend_options), network.notes + notes)


def require_apart(network: Network, underlay: Underlay, facts: HostFacts) -> None:
    """Refuse a cluster whose containers would have the hosts' own addresses.

    Real interfaces and the chosen one count. Bridges and the like are the containers' own, inside the network
    by right.

    Raises:
        ConfigError: names both ranges. Routes to such subnets would cut the host off.
    """
    names = {link.index: link.name for link in facts.links if link.kind in _REAL}
    names[underlay.index] = underlay.name
    for own in facts.addresses:
        if own.index not in names:
            continue
        there = Prefix.of(own.address, own.length)
        for part in network.ranges:
            if part.network.overlaps(there):
                raise ConfigError(
                    "IPv6Network" if part.family is Family.IPV6 else "Network",
                    f"{part.network} overlaps {there}, the network of {names[own.index]}",
                    hint="give the containers a range that no host is in",
                )


async def require_rights(requests: Netlink) -> None:
    """Find out by trying: the kernel looks at the rights before it sees that the request names no device.

    Raises:
        KernelError: EPERM. Without this, a lease would be taken that nobody can serve.
    """
    refused = await requests.request(netlink.message(netlink.RTM_DELLINK, 0, bytes(16)))
    if refused is not None and refused.errno in (errnos.EPERM, errnos.EACCES):
        raise refused.error("change", "the network of this namespace")
