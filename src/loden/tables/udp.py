# SPDX-License-Identifier: Apache-2.0
"""The tables of ``udp``: tunnels between a TUN device and a UDP port, one a family, and their peers.

A new agent loads its own programs and fills their maps while those of its predecessor carry the packets; they
are replaced when the first look has put every peer in. So no packet is lost, whatever has changed between two
releases.
"""

import asyncio
import errno as errnos
import os
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any

from loden.address import Family
from loden.errors import KernelError
from loden.tables import netlink, tc
from loden.tables.base import LOOK, Failures
from loden.tables.devices import Devices
from loden.tables.entries import UdpPeer, UdpTunnel
from loden.tables.netlink import Message, Netlink
from loden.tables.path_mtu import PathMtuWatch
from loden.tables.udp_carrier import Carrier, open_carrier

if TYPE_CHECKING:
    from loden.tables.engine import Engine

#: Peers that are put in one go: a few milliseconds.
_BATCH = 512


class TunnelTable:
    """The tunnels of this host.

    Args:
        requests: the socket.
        devices: which devices there are.
        look_soon: called when everything has to be looked at again.
        paths_changed: called when the way to a peer may let less through, or more, than before.
    """

    entry_type = UdpTunnel

    def __init__(
        self,
        requests: Netlink,
        devices: Devices,
        *,
        look_soon: Callable[[], None],
        paths_changed: Callable[[], None],
    ) -> None:
        self._requests = requests
        self._devices = devices
        self._look_soon = look_soon
        self._paths_changed = paths_changed
        self._path_mtu = PathMtuWatch(paths_changed)
        self._carriers: dict[str, Carrier] = {}
        self._has_peers = False

    def close(self) -> None:
        """Let go of what is this process's; devices and programs stay."""
        for name in tuple(self._carriers):
            self._stop(name)
        self._path_mtu.close()

    def carrier(self, tunnel: str) -> Carrier | None:
        """What carries the packets of a tunnel now."""
        return self._carriers.get(tunnel)

    @property
    def carriers(self) -> Iterable[Carrier]:
        """What carries the packets of any tunnel now."""
        return self._carriers.values()

    def report(self) -> Mapping[str, Any]:
        """What a status page shows of the tunnels."""
        return {name: carrier.report() for name, carrier in self._carriers.items()}

    async def read(self, wanted: Mapping[Hashable, UdpTunnel]) -> dict[Hashable, UdpTunnel]:
        """The tunnels of which everything stands, and those of which an agent that is gone left programs."""
        filters = await tc.list_ours(self._requests)
        if any(peer.mtu for carrier in self.carriers for peer in carrier.peers.values()):
            self._paths_changed()  # the kernel forgets after ten minutes that a path was narrow
        found: dict[Hashable, UdpTunnel] = {
            carrier.entry.slot: carrier.entry
            for carrier in self.carriers
            if carrier.is_sound and (self._are_attached(carrier, filters) or not self._may_attach(filters))
        }
        for one in filters:
            tunnel = _tunnel(one)
            if tunnel not in wanted and tunnel not in found:
                nowhere = bytes(4)  # the programs know where; who removes them need not
                found[tunnel] = UdpTunnel(tunnel, self._devices.name(one.index) or "", nowhere, nowhere, 0)
        return found

    async def put(self, entries: Sequence[UdpTunnel]) -> Failures:
        failures: Failures = {}
        for entry in entries:
            try:
                carrier = self._carriers.get(entry.device)
                if carrier is None or carrier.entry != entry or not carrier.is_sound:
                    self._make(entry)
                await self._attach()
            except KernelError as error:
                failures[entry.slot] = error
        return failures

    async def drop(self, entries: Sequence[UdpTunnel]) -> Failures:
        failures: Failures = {}
        for entry in entries:
            self._stop(entry.device)
            filters = [one for one in await tc.list_ours(self._requests) if _tunnel(one) == entry.device]
            refused = await tc.detach(self._requests, filters)
            if refused:
                failures[entry.slot] = refused.error("detach", f"the eBPF programs of {entry}")
        return failures

    def heard(self, message: Message, wanted: Mapping[Hashable, UdpTunnel]) -> Hashable | None:
        """Somebody changed filters where ours are.

        Whoever deletes all of a priority, or of a hook, or a qdisc, has the kernel say no more than that.
        """
        if message.kind not in (netlink.RTM_NEWTFILTER, netlink.RTM_DELTFILTER, netlink.RTM_DELQDISC):
            return None
        index = tc.device_of(message)
        if not any(index == place[0] for carrier in self.carriers for place in carrier.programs):
            return None
        if message.kind == netlink.RTM_DELQDISC:
            return LOOK
        changed = tc.parse_filter(message)
        if not changed.handle:
            return LOOK if message.kind == netlink.RTM_DELTFILTER else None
        return _tunnel(changed) if changed.is_ours and _tunnel(changed) in wanted else None

    async def peers_are_in(self) -> None:
        """Every peer is known: from now on our programs may take the place of a predecessor's."""
        if self._has_peers or not self._carriers:
            return
        self._has_peers = True
        try:
            await self._attach()
        except KernelError:
            self._look_soon()  # which finds that they do not stand, and says why

    def _make(self, entry: UdpTunnel) -> None:
        """A new carrier with the peers of the old one, which goes when the new one stands."""
        carrier = open_carrier(entry, self._devices, self._carriers.get(entry.device))
        self._stop(entry.device)
        self._carriers[entry.device] = carrier
        self._path_mtu.use(Family.of(entry.local), entry.port)
        if carrier.engine is not None:
            loop = asyncio.get_running_loop()
            loop.add_reader(carrier.engine.fileno(), self._engine_spoke, carrier.engine)

    def _engine_spoke(self, engine: "Engine") -> None:
        """It stopped by itself, or met a packet too big for its path."""
        with suppress(BlockingIOError):
            os.read(engine.fileno(), 8)
        if engine.failure() is None:
            self._paths_changed()
            return
        asyncio.get_running_loop().remove_reader(engine.fileno())
        self._look_soon()

    def _may_attach(self, filters: Sequence[tc.Filter]) -> bool:
        """Not before the peers are in, where a predecessor's programs carry the packets."""
        own = {program.number for carrier in self.carriers for _, program in carrier.programs.values()}
        return self._has_peers or all(one.program in own for one in filters)

    def _are_attached(self, carrier: Carrier, filters: Sequence[tc.Filter]) -> bool:
        found = {(one.index, one.parent, one.program) for one in filters}
        return found.issuperset((*place, program.number) for place, (_, program) in carrier.programs.items())

    async def _attach(self) -> None:
        """Have the programs of all carriers at their hooks, and no others of ours anywhere.

        Raises:
            KernelError: one cannot be attached, or detached.
        """
        filters = await tc.list_ours(self._requests)
        if not self._may_attach(filters):
            return
        wanted = [one for carrier in self.carriers for one in carrier.programs.items()]
        for (index, hook), (name, program) in wanted:
            if any((it.index, it.parent, it.program) == (index, hook, program.number) for it in filters):
                continue
            refused = await tc.attach(self._requests, index, tc.Hook(hook), name, program.fd)
            if refused:
                raise refused.error("attach", f"eBPF program {name} to {self._devices.name(index)}")
        meant = {(*place, name) for place, (name, _) in wanted}
        stray = [one for one in filters if (one.index, one.parent, one.name) not in meant]
        refused = await tc.detach(self._requests, stray)
        if refused:
            raise refused.error("detach", f"{len(stray)} eBPF programs that no tunnel needs any more")

    def _stop(self, name: str) -> None:
        carrier = self._carriers.pop(name, None)
        if carrier is None:
            return
        if carrier.engine is not None:
            with suppress(RuntimeError):  # no loop runs any more
                asyncio.get_running_loop().remove_reader(carrier.engine.fileno())
        carrier.close()


def _tunnel(one: tc.Filter) -> str:
    """The tunnel that a program of ours is for."""
    return one.name.partition("/")[2]


class UdpPeerTable:
    """The peers of all tunnels.

    Args:
        tunnels: has them.
    """

    entry_type = UdpPeer

    def __init__(self, tunnels: TunnelTable) -> None:
        self._tunnels = tunnels

    async def read(self, wanted: Mapping[Hashable, UdpPeer]) -> dict[Hashable, UdpPeer]:
        found = (item for carrier in self._tunnels.carriers for item in carrier.standing().items())
        # The wanted object where it is equal: a hundred thousand of them are not held twice.
        return {subnet: wanted[subnet] if wanted.get(subnet) == peer else peer for subnet, peer in found}

    async def put(self, entries: Sequence[UdpPeer]) -> Failures:
        return await self._each(entries, Carrier.put, is_missing_a_failure=True)

    async def drop(self, entries: Sequence[UdpPeer]) -> Failures:
        """What each look ends with, for this table, also where there is nothing to drop."""
        failures = await self._each(entries, Carrier.drop, is_missing_a_failure=False)
        await self._tunnels.peers_are_in()
        return failures

    def heard(self, message: Message, wanted: Mapping[Hashable, UdpPeer]) -> Hashable | None:
        del message, wanted
        return None

    async def _each(
        self,
        entries: Sequence[UdpPeer],
        change: Callable[[Carrier, Iterable[UdpPeer]], Failures],
        *,
        is_missing_a_failure: bool,
    ) -> Failures:
        failures: Failures = {}
        for name in dict.fromkeys(entry.tunnel for entry in entries):
            these = iter([entry for entry in entries if entry.tunnel == name])
            missing = KernelError("use", f"tunnel {name}", errnos.ENODEV, detail="it does not stand")
            while part := list(islice(these, _BATCH)):
                carrier = self._tunnels.carrier(name)
                if carrier is not None:
                    failures |= change(carrier, part)
                elif is_missing_a_failure:
                    failures |= {entry.slot: missing for entry in part}
                await asyncio.sleep(0)
        return failures
