# SPDX-License-Identifier: Apache-2.0
"""The kernel's tables keep the contract of tables, each in both address families."""

from typing import Any

import msgspec
import pytest

from loden.tables.base import Table
from loden.tables.entries import Entry, LinkAddress
from tests.contract.table import Place, TableContract, run
from tests.kernel.kernel import Kernel, Names


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
