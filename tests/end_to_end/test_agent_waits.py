# SPDX-License-Identifier: Apache-2.0
"""What a starting agent waits for: it says once what is wrong and what to change, and goes on when mended."""

import pytest

from loden.stores.base import Store
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import VXLAN, wait_until

#: One subnet for each of three hosts: of the four /26 the first is never given out.
NARROW = '{"Network": "10.5.0.0/24", "SubnetLen": 26}'


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ("no network configuration yet", "loden config put")),
        ('{"Network": 5}', ("Network: 5 is not an IPv4 range", "such as 10.5.0.0/16")),
        ('{"Network": "10.5.0.0/16"', ("not JSON: line 1", "one JSON object")),
        (
            '{"Network": "10.5.0.0/16", "Backend": {"Type": "carrier-pigeon"}}',
            (
                "Backend.Type: unknown backend 'carrier-pigeon'",
                "one of: ali-vpc, alloc, aws-vpc, gce, host-gw, udp, vxlan",
            ),
        ),
        (
            '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "VNI": "one"}}',
            ("Backend.VNI", "one"),
        ),
    ],
)
def test_configuration_is_waited_for_and_said_once(
    make_hosts: MakeHosts, text: str | None, parts: tuple[str, ...]
) -> None:
    hosts = make_hosts(count=1)
    if text is not None:
        hosts.put_network(text)
    agent = hosts[0].start()
    agent.wait_line("ERROR", "starting fails, trying again", *parts)
    wait_until("a second try", lambda: agent.told.count("STATUS=waiting") > 2)
    assert len(agent.lines("ERROR")) == 1
    assert not hosts[0].subnet_file.exists()
    hosts.put_network(VXLAN)
    agent.wait_ready()
    assert agent.lines("starting works again")
    assert hosts[0].subnet_file.exists()


def test_exhausted_range_is_waited_for(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=4)
    hosts.put_network(NARROW)
    for host in hosts.hosts[:3]:
        host.start().wait_ready()
    late = hosts[3].start()
    late.wait_line("ERROR", "10.5.0.0/24", "SubnetMax")
    wait_until("a second try", lambda: late.told.count("STATUS=waiting") > 2)
    assert len(late.lines("ERROR")) == 1
    freed = hosts[0].subnet
    hosts[0].agents[0].stop()

    async def release(store: Store) -> None:
        records = (await store.snapshot()).records
        (record,) = (one for one in records.values() if str(one.lease) == freed)
        await store.delete(record)

    hosts.with_store(release)
    late.wait_ready()
    assert hosts[3].subnet == freed


def test_range_that_is_widened_is_seen(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=4)
    hosts.put_network(NARROW)
    for host in hosts.hosts[:3]:
        host.start().wait_ready()
    late = hosts[3].start()
    late.wait_line("ERROR", "10.5.0.0/24")
    hosts.put_network('{"Network": "10.5.0.0/22", "SubnetLen": 26}')
    late.wait_ready()


def test_interface_is_waited_for(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    agent = host.start("--iface", "uplink7")
    said = agent.wait_line("ERROR", "choose an interface", "--iface uplink7: no interface has this name")
    assert f"eth0 ({host.address}" in said
    wait_until("a second try", lambda: agent.told.count("STATUS=waiting") > 2)
    assert len(agent.lines("ERROR")) == 1
    host.ip("link add uplink7 type bridge")
    agent.wait_line("ERROR", "uplink7: it has no usable IPv4 address")
    assert len(agent.lines("ERROR")) == 2
    host.ip("addr add 192.0.2.7/24 dev uplink7")
    host.ip("link set uplink7 up")
    agent.wait_ready()
    assert "local 192.0.2.7 dev uplink7" in host.ip("-d link show flannel.1")


def test_device_name_that_is_taken_is_waited_for(make_hosts: MakeHosts) -> None:
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    host.ip("link add flannel.1 type bridge")
    agent = host.start()
    said = agent.wait_line("ERROR", "setting up this host fails")
    assert "flannel.1 is a device of kind bridge" in said
    assert "ip link delete flannel.1" in said
    assert "READY" not in agent.told
    host.ip("link delete flannel.1")
    agent.wait_ready()
    assert len(agent.lines("setting up this host fails")) == 1
    assert "vxlan id 1" in host.ip("-d link show flannel.1")


_WITHOUT_VXLAN = """
import errno, os, sys
from loden.cli.main import main
from loden.tables import netlink

real = netlink.Netlink.request

async def request(self, one):
    is_new_link = one[4:6] == netlink.RTM_NEWLINK.to_bytes(2, sys.byteorder)
    if is_new_link and not os.path.exists({mended!r}):
        return netlink.Refusal(errno.EOPNOTSUPP, "Unknown device type")
    return await real(self, one)

netlink.Netlink.request = request
sys.exit(main())
"""


def test_missing_kernel_feature_is_waited_for(make_hosts: MakeHosts) -> None:
    """The kernel answers as one without the module vxlan does, until somebody loads it."""
    (host,) = hosts = make_hosts(count=1)
    hosts.put_network(VXLAN)
    mended = hosts.directory / "mended"
    agent = host.start(program=("-c", _WITHOUT_VXLAN.format(mended=str(mended))))
    said = agent.wait_line("ERROR", "setting up this host fails, trying again", "Unknown device type")
    assert "load or build in the module vxlan" in said
    assert "READY" not in agent.told
    mended.touch()
    agent.wait_ready()
    assert len(agent.lines("setting up this host fails")) == 1
    assert len(agent.lines("refused count=")) <= 3  # the device, its setting, its address


def test_two_hosts_with_one_address_name_each_other(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=3)
    hosts.put_network(VXLAN)
    first, second, third = hosts
    agents = [host.start().wait_ready() for host in (first, second)]
    for host in (first, second):
        host.add_containers()
    before = first.subnet
    late = third.start("--iface", "eth0", "--public-ip", first.address)
    said = late.wait_line("ERROR", "starting fails", f"host {first.name!r} lives", first.address)
    assert f"this host is {third.name!r}" in said
    assert "--public-ip" in said
    agents[0].wait_line("lease contended", f"contender={third.name!r}", "--public-ip")
    wait_until("a second try", lambda: late.told.count("STATUS=waiting") > 2)
    assert len(late.lines("ERROR")) == 1
    assert len(agents[0].lines("lease contended")) == 1
    assert first.subnet == before
    hosts.require_all_reached(first, second)
    assert late.stop() == 0
    third.start().wait_ready()
    third.add_containers()
    hosts.require_all_reached()


def test_second_host_gets_another_address_without_restart(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=2)
    hosts.put_network(VXLAN)
    first, second = hosts
    keeper = first.start().wait_ready()

    second.ip("link add twin type bridge")
    second.ip(f"addr add {first.address}/32 dev twin")
    second.ip("link set twin up")
    agent = second.start("--iface", "twin")
    agent.wait_line("ERROR", f"host {first.name!r} lives")
    second.ip("link delete twin")
    second.ip("link add twin type bridge")
    second.ip("addr add 192.0.2.7/32 dev twin")
    second.ip("link set twin up")
    agent.wait_ready()
    assert second.subnet != first.subnet
    assert not keeper.lines("lease lost")
