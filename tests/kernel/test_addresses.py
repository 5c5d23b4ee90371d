# SPDX-License-Identifier: Apache-2.0
"""The addresses on our devices (COMPAT §7.3)."""

import json

import pytest

from loden.address import format_address
from loden.tables.addresses import read_addresses
from loden.tables.entries import LinkAddress
from tests.kernel.kernel import Kernel, Names, ip, run


@pytest.fixture
def standing(kernel: Kernel, names: Names) -> Kernel:
    assert run(kernel.devices.put([names.link()])) == {}
    return kernel


def shown(names: Names) -> list[str]:
    (link,) = json.loads(ip(f"-json {names.flag} address show dev {names.device}"))
    return sorted(f"{one['local']}/{one['prefixlen']}" for one in link["addr_info"] if one["scope"] != "link")


def test_address_is_the_base_of_the_subnet_alone(standing: Kernel, names: Names) -> None:
    own = LinkAddress(names.device, names.subnet(1).address, names.family.bits)
    assert run(standing.addresses.put([own])) == {}
    assert shown(names) == [f"{format_address(own.address)}/{own.length}"]
    assert "tentative" not in ip(f"address show dev {names.device} scope global")


def test_addresses_outside_the_network_are_let_alone(standing: Kernel, names: Names) -> None:
    ip(f"address add {names.outside} dev {names.device}")
    stale = LinkAddress(names.device, names.subnet(8).address, names.family.bits)
    ip(f"address add {format_address(stale.address)}/{stale.length} dev {names.device}")
    assert run(standing.addresses.read({})) == {stale.slot: stale}
    assert run(standing.addresses.drop([stale])) == {}
    assert shown(names) == [names.outside]


def test_addresses_on_other_devices_are_let_alone(standing: Kernel, names: Names) -> None:
    ip(f"address add {format_address(names.subnet(8).address)}/{names.family.bits} dev eth0")
    assert run(standing.addresses.read({})) == {}


def test_every_address_of_the_host_is_listed_with_its_properties(standing: Kernel) -> None:
    eth0 = standing.devices.index("eth0")
    assert eth0 is not None
    found = {format_address(one.address): one for one in run(read_addresses(standing.requests, eth0))}
    assert {"192.0.2.1", "2001:db8::1"} <= found.keys()
    assert all(one.index == eth0 for one in found.values())
    assert found["2001:db8::1"].is_permanent
    assert not found["2001:db8::1"].is_deprecated
