# SPDX-License-Identifier: Apache-2.0
"""The kernel's tables keep the contract of tables, each in both address families."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from loden.tables.base import Table
from loden.tables.entries import Entry, LinkAddress, TunLink
from tests.contract.table import Place, TableContract, run
from tests.kernel.kernel import BOTH, Kernel, Names
from tests.kernel.udp_kernel import PORT, UdpKernel, UdpNames


class KernelPlace(msgspec.Struct):
    """One table of a namespace that has the own device."""

    table: Table[Any]
    names: Names
    of_peer: int  # the place of the table's entry among a peer's

    def entry(self, number: int) -> Entry:
        return self.names.peer(number + 10)[self.of_peer]

    def changed(self, number: int) -> Entry:
        entry = self.entry(number)
        other = self.names.peer(number + 100)[self.of_peer]
        differs = ("mac", "remote", "via")[self.of_peer]
        return msgspec.structs.replace(entry, **{differs: getattr(other, differs)})

    def bad(self) -> Entry:
        return msgspec.structs.replace(self.names.peer(99)[self.of_peer], device="flannel.99")


class AddressPlace(KernelPlace):
    def entry(self, number: int) -> Entry:
        names = self.names
        return LinkAddress(names.device, names.subnet(number + 10).address, names.family.bits)

    def changed(self, number: int) -> Entry:
        return self.entry(number)

    def bad(self) -> Entry:
        return msgspec.structs.replace(self.entry(99), device="flannel.99")


class DevicePlace(KernelPlace):
    def entry(self, number: int) -> Entry:
        return self.names.link(name=f"flannel.{number + 10}", vni=number + 10, port=8472)

    def changed(self, number: int) -> Entry:
        return msgspec.structs.replace(self.entry(number), mtu=1280, learning=True)

    def bad(self) -> Entry:
        return self.names.link(name="flannel.99", vni=99, underlay="eth9")


def with_device(kernel: Kernel, names: Names) -> Kernel:
    assert run(kernel.devices.put([names.link()])) == {}
    return kernel


class TestNeighbours(TableContract):
    @pytest.fixture
    def place(self, kernel: Kernel, names: Names) -> Place:
        return KernelPlace(with_device(kernel, names).neighbours, names, 0)


class TestForwardingEntries(TableContract):
    @pytest.fixture
    def place(self, kernel: Kernel, names: Names) -> Place:
        return KernelPlace(with_device(kernel, names).fdb, names, 1)


class TestRoutes(TableContract):
    @pytest.fixture
    def place(self, either: Kernel, names: Names) -> Place:
        run(with_device(either, names).routes.read({}))
        return KernelPlace(either.routes, names, 2)


class TestAddresses(TableContract):
    @pytest.fixture
    def place(self, kernel: Kernel, names: Names) -> Place:
        return AddressPlace(with_device(kernel, names).addresses, names, 0)


class TestDevices(TableContract):
    @pytest.fixture
    def place(self, kernel: Kernel, names: Names) -> Place:
        run(kernel.devices.refresh())
        return DevicePlace(kernel.devices, names, 0)


class TunPlace(msgspec.Struct):
    table: Table[Any]

    def entry(self, number: int) -> Entry:
        return TunLink(f"flannel{number}", 1400)

    def changed(self, number: int) -> Entry:
        return TunLink(f"flannel{number}", 1300)

    def bad(self) -> Entry:
        return TunLink("eth0", 1400)


class TunnelPlace(msgspec.Struct):
    """Tunnels that differ in device and port."""

    table: Table[Any]
    names: UdpNames

    def entry(self, number: int) -> Entry:
        return self.names.tunnel(device=f"flannel{number}", port=PORT + number)

    def changed(self, number: int) -> Entry:
        return self.names.tunnel(device=f"flannel{number}", port=PORT + number, allow_unknown=True)

    def bad(self) -> Entry:
        return self.names.tunnel(device="flannel99", port=PORT + 99)


class PeerPlace(msgspec.Struct):
    table: Table[Any]
    names: UdpNames

    def entry(self, number: int) -> Entry:
        return self.names.peer(number + 10)

    def changed(self, number: int) -> Entry:
        return self.names.peer(number + 10, remote=self.names.names.remote(number + 100), mtu=1280)

    def bad(self) -> Entry:
        return self.names.peer(99, tunnel="flannel99")


@pytest.fixture
def udp_kernel(underlay: None) -> Iterator[UdpKernel]:
    del underlay
    tables = UdpKernel()
    yield tables
    tables.close()


@pytest.fixture(params=[UdpNames(names, way) for names in BOTH for way in ("ebpf", "engine")], ids=str)
def udp_names(request: pytest.FixtureRequest) -> UdpNames:
    found = request.param
    assert isinstance(found, UdpNames)
    found.require()
    return found


class TestTuns(TableContract):
    @pytest.fixture
    def place(self, udp_kernel: UdpKernel) -> Place:
        run(udp_kernel.devices.refresh())
        return TunPlace(udp_kernel.tuns)


class TestTunnels(TableContract):
    @pytest.fixture
    def place(self, udp_kernel: UdpKernel, udp_names: UdpNames) -> Place:
        links = [TunLink(f"flannel{number}", 1400) for number in range(3)]
        assert run(udp_kernel.tuns.put(links)) == {}
        return TunnelPlace(udp_kernel.tunnels, udp_names)


class TestUdpPeers(TableContract):
    @pytest.fixture
    def place(self, udp_kernel: UdpKernel, udp_names: UdpNames) -> Place:
        assert run(udp_kernel.tuns.put([udp_names.link()])) == {}
        assert run(udp_kernel.tunnels.put([udp_names.tunnel()])) == {}
        return PeerPlace(udp_kernel.peers, udp_names)
