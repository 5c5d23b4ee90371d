# SPDX-License-Identifier: Apache-2.0
"""What a backend is: it turns leases into entries, and does nothing else."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, ClassVar, Protocol

import msgspec

from loden.address import Family
from loden.interface import Hop, HostFacts, Underlay
from loden.lease import Leg
from loden.network import Network
from loden.tables.base import Table
from loden.tables.devices import Devices
from loden.tables.entries import Entry
from loden.tables.netlink import Netlink

#: Why something is missing, in words, by family and by what the backend calls it.
Lacks = Mapping[Family, Mapping[str, str]]


class Host(msgspec.Struct, frozen=True):
    """What a backend may know of the host it works on.

    Args:
        network: the cluster's configuration.
        underlay: the chosen interface and addresses.
        facts: what the host had when it was planned for.
        lacks: what the backend has to do without, as :meth:`Backend.lacks` found out.
    """

    network: Network
    underlay: Underlay
    facts: HostFacts
    lacks: Lacks = {}


class Kernel(msgspec.Struct, frozen=True):
    """What a backend's own tables have to work with.

    Args:
        requests: the socket that all kernel tables share.
        devices: which devices there are.
        look_soon: asks for everything to be read again. Does not block.
        host_changed: asks for the host, and the way to each peer, to be looked at again. Does not block.
        closing: closes at the agent's end what a table opens.
    """

    requests: Netlink
    devices: Devices
    look_soon: Callable[[], None]
    host_changed: Callable[[], None]
    closing: AsyncExitStack


class Backend(Protocol):
    """How packets get from host to host.

    Made for a host, from values alone; its methods are pure and called for one address family at a time.
    Where the host stops to fit all families of the network, one is made for each that fits, of it alone.
    Options are the members of ``Backend`` in the network configuration, decoded into :attr:`Options`.

    Raises (when made):
        ConfigError: the options or the host do not fit.
    """

    #: The backend's own configuration: a frozen struct whose encoded names are flannel's.
    Options: ClassVar[type[msgspec.Struct]]

    #: ``BackendType`` in leases; a peer whose lease says otherwise gets no entries (COMPAT §2.3).
    lease_type: ClassVar[str]

    def __init__(self, host: Host, options: msgspec.Struct) -> None: ...

    @classmethod
    async def lacks(cls, options: msgspec.Struct, families: Sequence[Family]) -> Lacks:
        """What this host has not got, of what the backend can do without.

        Asked before the backend is made, and again with each plan. It may block the first time.
        """
        ...

    @classmethod
    def tables(cls, kernel: Kernel) -> Sequence[Table[Any]]:
        """Tables for entries of the backend's own, in the order in which those depend on each other.

        They come behind the table of VXLAN devices and before addresses, neighbours and routes, and outlive
        the backend when the host is planned anew. Most backends need none.
        """
        ...

    @property
    def needs_hops(self) -> bool:
        """Whether :meth:`entries` has to know where the kernel would send packets to a peer's address."""
        ...

    @property
    def mtu(self) -> int:
        """What a container may send, bytes (COMPAT §5)."""
        ...

    def data(self, family: Family) -> bytes | None:
        """What peers must know besides the public address: ``BackendData`` as compact JSON."""
        ...

    def own_entries(self, leg: Leg) -> Sequence[Entry]:
        """What stands on this host for its own lease: devices and their addresses."""
        ...

    def optional_entries(self, leg: Leg) -> Sequence[Entry]:
        """What is better to have besides, and must not hold the host up where it cannot be had."""
        ...

    def entries(self, leg: Leg, hop: Hop | None) -> Sequence[Entry]:
        """What carries packets to a peer.

        Args:
            leg: of the peer's lease.
            hop: where the kernel would send packets for the peer's public address; None where it has no
                route, where the address is our own, or where :attr:`needs_hops` is false.

        Raises:
            PeerUnreachable: there is no way, and this is why.
            MalformedLease: the peer's data are not this backend's.
        """
        ...


class Plain:
    """What most backends have in common: no tables of their own, and nothing that they can do without."""

    @classmethod
    async def lacks(cls, options: msgspec.Struct, families: Sequence[Family]) -> Lacks:
        """Nothing."""
        del options, families
        return {}

    @classmethod
    def tables(cls, kernel: Kernel) -> Sequence[Table[Any]]:
        """None."""
        del kernel
        return ()

    def optional_entries(self, leg: Leg) -> Sequence[Entry]:
        """None."""
        del leg
        return ()
