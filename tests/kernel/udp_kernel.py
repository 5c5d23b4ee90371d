# SPDX-License-Identifier: Apache-2.0
"""The tables of a host with ``udp``, wired as the agent wires them, and entries for them."""

from contextlib import AsyncExitStack
from typing import Any

import msgspec

from loden.address import Family, Prefix
from loden.backends import base, open_tables
from loden.reconcile import Reconciler
from loden.tables.entries import Entry, TunLink, UdpPeer, UdpTunnel, VxlanLink
from loden.tables.netlink import Monitor
from loden.tables.tun import TunTable
from loden.tables.udp import TunnelTable, UdpPeerTable
from loden.tables.udp_carrier import Carrier
from loden.tables.udp_detour import detour_link
from tests.kernel.kernel import GROUPS, Kernel, Names, require_bpf, require_tun, run

_RTNLGRP_TC = 4
PORT = 8285


class UdpKernel(Kernel):
    """The tables of a backend, those of ``udp`` among them as with every backend."""

    def __init__(self, backend: str = "udp") -> None:
        require_tun()
        super().__init__()
        self.monitor.close()
        self.monitor = Monitor((*GROUPS, _RTNLGRP_TC), ignore_port=self.requests.port)
        self.stack = AsyncExitStack()
        self.host_changes = 0
        wiring = base.Kernel(
            self.requests,
            self.devices,
            lambda: self.reconciler.look_soon(),  # noqa: PLW0108  # it is made from the tables
            self._host_changed,
            closing=self.stack,
        )
        tables = open_tables(backend, wiring)
        self.tuns = next(one for one in tables if isinstance(one, TunTable))
        self.tunnels = next(one for one in tables if isinstance(one, TunnelTable))
        self.peers = next(one for one in tables if isinstance(one, UdpPeerTable))
        rest = (self.addresses, self.neighbours, self.fdb, self.routes)
        self.reconciler = Reconciler([self.devices, *tables, *rest])

    def close(self) -> None:
        run(self.stack.aclose())
        super().close()

    def _host_changed(self) -> None:
        self.host_changes += 1

    def carrier(self, device: str) -> Carrier:
        found = self.tunnels.carrier(device)
        assert found is not None
        return found


class UdpNames:
    """What one family's test with one way of carrying calls things."""

    def __init__(self, names: Names, acceleration: str) -> None:
        self.names = names
        self.acceleration = acceleration
        self.device = "flannel0" if names.family is Family.IPV4 else "flannel-v6"

    def __repr__(self) -> str:
        return f"{self.names.family}-{self.acceleration}"

    def require(self) -> None:
        if self.acceleration == "ebpf":
            require_bpf()

    def link(self, **changed: Any) -> TunLink:
        return msgspec.structs.replace(TunLink(self.device, 1400), **changed)

    def tunnel(self, **changed: Any) -> UdpTunnel:
        usual = UdpTunnel(
            device=self.device,
            underlay="eth0",
            local=self.names.local,
            source=self.names.subnet(1).address,
            port=PORT,
            acceleration=self.acceleration,
            detour=self.detour().name if self.acceleration == "ebpf" else "",
        )
        return msgspec.structs.replace(usual, **changed)

    def detour(self) -> VxlanLink:
        return detour_link(self.device, "eth0", self.names.local)

    def peer(self, number: int, **changed: Any) -> UdpPeer:
        usual = UdpPeer(
            tunnel=self.device,
            subnet=self.names.subnet(number),
            remote=self.names.remote(number),
            port=PORT,
            device="eth0",
            is_fast=True,
        )
        return msgspec.structs.replace(usual, **changed)

    def own(self) -> tuple[Entry, ...]:
        detours = (self.detour(),) if self.acceleration == "ebpf" else ()
        return self.link(), *detours, self.tunnel()


def many_subnets(count: int) -> list[Prefix]:
    """As many /24 as one likes, up to 65,536."""
    return [Prefix(bytes((10, number >> 8, number & 255, 0)), 24) for number in range(count)]
