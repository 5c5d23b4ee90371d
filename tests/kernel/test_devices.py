# SPDX-License-Identifier: Apache-2.0
"""VXLAN devices as a flannel node at the other end needs them (COMPAT §7.3)."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loden.errors import LodenError
from loden.tables.entries import VxlanLink
from tests.kernel.kernel import BOTH, Kernel, Names, bridge, ip, link_json, run

IPV4 = BOTH[0]


def put(kernel: Kernel, entry: VxlanLink) -> LodenError | None:
    """Put one device; why it failed, if it did."""
    return run(kernel.devices.put([entry])).get(entry.slot)


def info(name: str) -> dict[str, Any]:
    data = link_json(name)["linkinfo"]["info_data"]
    assert isinstance(data, dict)
    return data


def test_device_is_what_flannel_makes(kernel: Kernel, names: Names) -> None:
    assert put(kernel, names.link()) is None
    found, data = link_json(names.device), info(names.device)
    assert found["linkinfo"]["info_kind"] == "vxlan"
    assert (found["mtu"], found["address"]) == (names.mtu, "02:00:00:00:00:01")
    assert (data["id"], data["port"], data["link"], data["learning"]) == (1, 8472, "eth0", False)
    assert data.get("local", data.get("local6")) == ("192.0.2.1" if names is IPV4 else "2001:db8::1")
    assert "gbp" not in data
    assert "UP" in found["flags"]
    assert found["qdisc"] == "noqueue"
    assert found.get("txqlen", 0) == 0
    assert found["ifalias"] == "loden"
    assert Path(f"/proc/sys/net/ipv6/conf/{names.device}/accept_ra").read_text() == "0\n"


def test_device_in_the_words_of_ip(kernel: Kernel) -> None:
    put(kernel, IPV4.link())
    text = ip("-details link show flannel.1")
    assert re.search(r"vxlan id 1 local 192\.0\.2\.1 dev eth0 .*dstport 8472 nolearning ttl auto ", text)
    assert "ageing 300 udpcsum" in text


def test_mac_counts_as_set_so_that_udev_leaves_it_alone(kernel: Kernel) -> None:
    """``systemd-udevd`` rewrites the addresses that the kernel took at random (users' pain 5)."""
    put(kernel, IPV4.link())
    script = "mount -t sysfs sysfs /sys && cat /sys/class/net/flannel.1/addr_assign_type"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "3\n"  # NET_ADDR_SET


def test_port_group_policy_and_learning(kernel: Kernel) -> None:
    assert put(kernel, IPV4.link(port=4789, gbp=True, learning=True)) is None
    data = info("flannel.1")
    assert (data["port"], data["gbp"], data["learning"]) == (4789, True, True)


def test_what_was_put_is_read_back_and_putting_again_changes_nothing(kernel: Kernel, names: Names) -> None:
    entry = names.link()
    put(kernel, entry)
    before = link_json(names.device)
    assert put(kernel, entry) is None
    assert link_json(names.device) == before
    assert run(kernel.devices.read({entry.slot: entry})) == {entry.slot: entry}


def test_putting_a_device_that_stands_keeps_its_neighbours(kernel: Kernel) -> None:
    """Setting the address a device has already makes the kernel flush all neighbours on it."""
    put(kernel, IPV4.link())
    ip("neighbour add 10.5.9.0 lladdr 02:00:00:00:00:09 nud permanent dev flannel.1")
    put(kernel, IPV4.link())
    assert "PERMANENT" in ip("neighbour show dev flannel.1")


@pytest.mark.parametrize(
    "changed",
    [{"mtu": 1300}, {"local": bytes((192, 0, 2, 77))}, {"underlay": "eth1"}, {"learning": True}],
    ids=lambda changed: next(iter(changed)),
)
def test_change_in_place_keeps_the_device(kernel: Kernel, changed: dict[str, Any]) -> None:
    ip("link add eth1 type veth peer name wire1")
    ip("link set eth1 up")
    put(kernel, IPV4.link())
    before = link_json("flannel.1")["ifindex"]
    assert put(kernel, IPV4.link(**changed)) is None
    assert link_json("flannel.1")["ifindex"] == before
    assert run(kernel.devices.read({"flannel.1": IPV4.link()})) == {"flannel.1": IPV4.link(**changed)}


@pytest.mark.parametrize(
    "changed",
    [{"vni": 2}, {"port": 4789}, {"gbp": True}, {"local": BOTH[1].local, "mtu": 1430}],
    ids=["vni", "port", "gbp", "family"],
)
def test_what_cannot_change_in_place_makes_the_device_anew(kernel: Kernel, changed: dict[str, Any]) -> None:
    put(kernel, IPV4.link())
    before = link_json("flannel.1")["ifindex"]
    assert put(kernel, IPV4.link(**changed)) is None
    assert link_json("flannel.1")["ifindex"] != before
    assert run(kernel.devices.read({"flannel.1": IPV4.link()})) == {"flannel.1": IPV4.link(**changed)}


def test_mac_is_changed_where_it_differs(kernel: Kernel) -> None:
    put(kernel, IPV4.link())
    assert put(kernel, IPV4.link(mac=IPV4.mac(7))) is None
    assert link_json("flannel.1")["address"] == "02:00:00:00:00:07"


def test_a_device_of_flannel_is_taken_over_in_place(kernel: Kernel) -> None:
    """Neither its index nor its address changes, so peers notice nothing (COMPAT §13.13)."""
    ip(
        "link add flannel.1 address 02:aa:bb:cc:dd:ee mtu 1450 txqueuelen 0"
        " type vxlan id 1 local 192.0.2.1 dev eth0 dstport 8472 nolearning"
    )
    ip("link set flannel.1 up")
    before = link_json("flannel.1")
    assert put(kernel, IPV4.link(mac=bytes.fromhex("02aabbccddee"))) is None
    after = link_json("flannel.1")
    assert after.pop("ifalias") == "loden"
    assert after == before


def test_a_device_that_was_made_without_local_address_is_given_one(kernel: Kernel) -> None:
    ip("link add flannel.1 type vxlan id 1 dev eth0 dstport 8472")
    assert put(kernel, IPV4.link()) is None
    assert info("flannel.1")["local"] == "192.0.2.1"


def test_device_of_another_kind_under_the_name_is_refused_and_left_alone(kernel: Kernel) -> None:
    ip("link add flannel.1 type bridge")
    error = put(kernel, IPV4.link())
    assert error is not None
    assert "flannel.1 is a device of kind bridge" in error.message
    assert "ip link delete flannel.1" in error.hint
    assert link_json("flannel.1")["linkinfo"]["info_kind"] == "bridge"


def test_another_device_with_the_same_vni_is_named(kernel: Kernel) -> None:
    ip("link add theirs type vxlan id 1 local 192.0.2.1 dev eth0 dstport 8472")
    error = put(kernel, IPV4.link())
    assert error is not None
    assert "add link flannel.1 type vxlan id 1" in error.message
    assert "device theirs uses VNI 1" in error.hint
    assert "Backend.VNI" in error.hint


def test_missing_underlay_is_named(kernel: Kernel) -> None:
    error = put(kernel, IPV4.link(underlay="eth7"))
    assert error is not None
    assert "there is no interface eth7" in error.hint


def test_mtu_that_the_underlay_cannot_carry_is_explained(kernel: Kernel) -> None:
    error = put(kernel, IPV4.link(mtu=9000))
    assert error is not None
    assert "more than eth0 carries" in error.hint
    assert "Backend.MTU" in error.hint


def test_one_bad_device_does_not_keep_the_other_away(kernel: Kernel) -> None:
    bad, good = IPV4.link(underlay="eth7"), BOTH[1].link()
    assert list(run(kernel.devices.put([bad, good]))) == [bad.slot]
    assert link_json(BOTH[1].device)


def test_only_devices_with_our_alias_are_read_and_dropped(kernel: Kernel) -> None:
    ip("link add flannel.9 type vxlan id 9 dev eth0 dstport 8472")
    ip("link add flannel.2 type vxlan id 2 dev eth0 dstport 8472")
    ip("link set flannel.2 alias loden")
    found = run(kernel.devices.read({}))
    assert list(found) == ["flannel.2"]
    foreign = IPV4.link(name="flannel.9", vni=9)
    assert run(kernel.devices.drop([*found.values(), foreign])) == {}
    assert "flannel.9" in ip("link show type vxlan")
    assert "flannel.2" not in ip("link show type vxlan")


def test_wanted_device_that_is_down_counts_as_missing(kernel: Kernel) -> None:
    put(kernel, IPV4.link())
    ip("link set flannel.1 down")
    assert run(kernel.devices.read({"flannel.1": IPV4.link()})) == {}
    put(kernel, IPV4.link())
    assert "UP" in link_json("flannel.1")["flags"]


def test_device_keeps_the_all_zero_entry_of_others(kernel: Kernel) -> None:
    put(kernel, IPV4.link())
    bridge("fdb append 00:00:00:00:00:00 dev flannel.1 dst 192.0.2.250 self permanent")
    put(kernel, IPV4.link())
    assert "00:00:00:00:00:00 dst 192.0.2.250 self permanent" in bridge("fdb show dev flannel.1")
