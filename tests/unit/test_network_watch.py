# SPDX-License-Identifier: Apache-2.0
"""The network configuration as it changes under a running agent."""

import asyncio
import logging
from collections.abc import AsyncGenerator

import msgspec
import pytest

from loden.errors import StoreUnavailable
from loden.network import Network, parse_network
from loden.network_watch import follow_network, running_network
from loden.stores.memory import MemoryStore
from tests.unit.virtual_time import run

WAS = b'{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}'


def network(**members: object) -> Network:
    return parse_network(msgspec.json.encode({**msgspec.json.decode(WAS), **members}))


def test_ends_of_the_range_count_for_new_leases() -> None:
    put = network(SubnetMin="10.5.40.0", SubnetMax="10.5.49.0")
    assert running_network(network(), put) == (put, ())


def test_excluded_destinations_count_at_once() -> None:
    put = network(IPMasqExclude=["192.0.2.0/24"])
    assert running_network(network(), put) == (put, ())


@pytest.mark.parametrize(
    ("members", "stays"),
    [
        ({"Network": "10.6.0.0/16"}, "Network stays 10.5.0.0/16, not 10.6.0.0/16"),
        ({"SubnetLen": 26}, "SubnetLen stays 24, not 26"),
        ({"Backend": {"Type": "host-gw"}}, "Backend stays vxlan, not host-gw"),
        ({"Backend": {"Type": "vxlan", "VNI": 7}}, "Backend stays vxlan, with its options"),
        ({"EnableNFTables": True}, "EnableNFTables stays false"),
        ({"EnableIPv6": True, "IPv6Network": "fd00:5::/48"}, "EnableIPv6 stays false"),
        ({"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fd00:5::/48"}, "EnableIPv4 stays true"),
    ],
)
def test_what_cannot_change_is_named(members: dict[str, object], stays: str) -> None:
    taken, said = running_network(network(), network(**members))
    assert msgspec.structs.replace(taken, notes=()) == network()
    assert any(sentence.startswith(stays) for sentence in said)


def test_keys_among_a_backends_options_are_not_said() -> None:
    before, after = (
        network(Backend={"Type": "ali-vpc", "AccessKeyID": name, "AccessKeySecret": f"{name} secret"})
        for name in ("LTAIold", "LTAInew")
    )
    _, (said,) = running_network(before, after)
    assert said == "Backend stays ali-vpc, with its options"


def test_of_two_changes_each_goes_its_way() -> None:
    taken, said = running_network(network(), network(SubnetMin="10.5.40.0", EnableNFTables=True))
    assert taken.ranges == network(SubnetMin="10.5.40.0").ranges
    assert not taken.enable_nftables
    assert len(said) == 1


class Store(MemoryStore):
    """Brings some texts, with a failure between each two."""

    def __init__(self, *texts: bytes | None) -> None:
        super().__init__("network-watch", ttl_s=100)
        self._texts = list(texts)
        self.is_read = asyncio.Event()

    async def watch_network(self) -> AsyncGenerator[bytes | None, None]:
        if not self._texts:
            self.is_read.set()
            await asyncio.Event().wait()
        yield self._texts.pop(0)
        raise StoreUnavailable("watch the network: it is away")


def test_every_text_is_taken_and_what_is_wrong_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    good = msgspec.json.encode({**msgspec.json.decode(WAS), "SubnetMin": "10.5.40.0"})
    bad = b'{"Networks": ["10.5.0.0/16"]}'
    used: list[Network] = []

    async def work() -> None:
        store = Store(WAS, b"{", bad, bad, None, good, good)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(follow_network(store, network(), used.append))
            await store.is_read.wait()
            task.cancel()

    caplog.set_level(logging.INFO)
    run(work())
    assert used == [network(SubnetMin="10.5.40.0")]
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in said if line.startswith("network configuration")] == [
        "network configuration unusable, the one before it counts",
        "network configuration unusable, the one before it counts",
        "network configuration removed",
        "network configuration changed",
    ]
    assert "Network: missing" in caplog.text
    assert "new leases are from 10.5.40.0/24 to 10.5.255.0/24" in caplog.text
