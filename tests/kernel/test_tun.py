# SPDX-License-Identifier: Apache-2.0
"""TUN devices as ``udp`` needs them (COMPAT §7.5), and names that are somebody else's."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loden.errors import LodenError
from loden.tables.base import LOOK
from loden.tables.entries import TunLink
from loden.tables.tun import _IFF_NO_PI, _IFF_TUN, _IFREQ, _PATH, _SETIFF, open_queue, request
from tests.kernel.kernel import ip, link_json, run
from tests.kernel.udp_kernel import UdpKernel

ENTRY = TunLink("flannel0", 1400)


@pytest.fixture
def kernel(underlay: None) -> Iterator[UdpKernel]:
    del underlay
    tables = UdpKernel()
    run(tables.devices.refresh())
    yield tables
    tables.close()


def put(kernel: UdpKernel, entry: TunLink = ENTRY) -> LodenError | None:
    """Why it failed, if it did."""
    return run(kernel.tuns.put([entry])).get(entry.slot)


def read(kernel: UdpKernel) -> dict[object, TunLink]:
    """What stands, as a look finds it."""
    run(kernel.devices.refresh())
    return run(kernel.tuns.read({ENTRY.slot: ENTRY}))


def hears_look(kernel: UdpKernel) -> bool:
    """Whether something that was heard since the last time asks for a look."""
    wanted = {ENTRY.slot: ENTRY}
    messages = iter(kernel.monitor.receive, [])
    return any(
        kernel.tuns.heard(message, wanted) is LOOK for several in messages for message in several or ()
    )


def test_device_is_as_flannels_and_stays_without_a_program(kernel: UdpKernel) -> None:
    assert put(kernel) is None
    found = link_json("flannel0")
    info = found["linkinfo"]
    assert (info["info_kind"], info["info_data"]["type"]) == ("tun", "tun")
    assert (info["info_data"]["persist"], info["info_data"]["pi"]) == (True, False)
    assert (found["mtu"], found["ifalias"], found["txqlen"]) == (1400, "loden", 500)
    assert "UP" in found["flags"]
    conf = Path("/proc/sys/net")
    assert (conf / "ipv6/conf/flannel0/accept_ra").read_text() == "0\n"
    assert (conf / "ipv4/conf/flannel0/accept_local").read_text() == "1\n"


def test_putting_again_and_other_mtu_keep_the_device(kernel: UdpKernel) -> None:
    put(kernel)
    before = link_json("flannel0")["ifindex"]
    assert put(kernel, TunLink("flannel0", 1300)) is None
    assert (link_json("flannel0")["ifindex"], link_json("flannel0")["mtu"]) == (before, 1300)


def test_device_of_another_kind_under_the_name_is_refused_and_left_alone(kernel: UdpKernel) -> None:
    ip("link add flannel0 type bridge")
    error = put(kernel)
    assert error is not None
    assert "flannel0 is a device of kind bridge" in error.message
    assert "ip link delete flannel0" in error.hint
    assert link_json("flannel0")["linkinfo"]["info_kind"] == "bridge"


@pytest.mark.parametrize("mode", ["tap", "tun"])
def test_persistent_device_of_another_make_is_refused_and_left_alone(kernel: UdpKernel, mode: str) -> None:
    ip(f"tuntap add name flannel0 mode {mode}")
    error = put(kernel)
    assert error is not None
    assert "TUN device flannel0" in error.message
    assert "another kind of TUN device has the name" in error.hint
    assert "ifalias" not in link_json("flannel0")


def test_device_that_flanneld_holds_is_refused_and_left_alone(kernel: UdpKernel) -> None:
    """It opens one without several queues and without virtio headers."""
    held = os.open(_PATH, os.O_RDWR)
    try:
        fcntl.ioctl(
            held, request(_SETIFF, os.uname().machine), _IFREQ.pack(b"flannel0", _IFF_TUN | _IFF_NO_PI)
        )
        error = put(kernel)
        assert error is not None
        assert "stop flanneld" in error.hint
        assert "ifalias" not in link_json("flannel0")
    finally:
        os.close(held)


def test_device_that_another_agent_still_holds_is_shared(kernel: UdpKernel) -> None:
    """The one that is about to end, while the next one starts."""
    held = open_queue("flannel0")
    assert put(kernel) is None
    os.close(held)
    assert read(kernel) == {"flannel0": ENTRY}


class TestDrift:
    @pytest.fixture(autouse=True)
    def standing(self, kernel: UdpKernel) -> None:
        put(kernel)
        hears_look(kernel)

    @pytest.mark.parametrize(
        "change", ["set flannel0 down", "set flannel0 mtu 1280", "delete flannel0", "set flannel0 name other"]
    )
    def test_change_is_heard_and_mended(self, kernel: UdpKernel, change: str) -> None:
        if "name" in change:
            ip("link set flannel0 down")
        ip(f"link {change}")
        assert hears_look(kernel)
        assert read(kernel).get("flannel0") != ENTRY
        assert put(kernel) is None
        assert read(kernel)["flannel0"] == ENTRY
        assert "UP" in link_json("flannel0")["flags"]

    def test_what_others_do_is_not_our_business(self, kernel: UdpKernel) -> None:
        ip("link add other type bridge")
        ip("tuntap add name tun7 mode tun")
        ip("link set wire mtu 1400")
        assert not hears_look(kernel)

    def test_own_change_is_not_drift(self, kernel: UdpKernel) -> None:
        put(kernel, TunLink("flannel0", 1300))
        assert not hears_look(kernel)


def test_only_devices_with_our_alias_are_read_and_dropped(kernel: UdpKernel) -> None:
    ip("tuntap add name flannel7 mode tun")
    put(kernel)
    assert read(kernel) == {"flannel0": ENTRY}
    assert run(kernel.tuns.drop([ENTRY, TunLink("flannel7", 1500), TunLink("eth0", 1500)])) == {}
    assert read(kernel) == {}
    assert link_json("flannel7")
    assert link_json("eth0")


def test_without_the_device_file_it_says_what_to_do(underlay: None) -> None:
    del underlay
    script = (
        "from loden.tables.tun import open_queue\n"
        "from loden.errors import KernelError\n"
        "try:\n    open_queue('flannel0')\n"
        "except KernelError as error:\n    print(error.message, error.hint, sep='\\n')"
    )
    line = f'mount -t tmpfs tmpfs /dev/net && exec "$0" -c "import sys\n{script}"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", line, sys.executable], capture_output=True, text=True, check=False
    )
    assert "open /dev/net/tun: No such file or directory" in done.stdout, done.stderr
    assert "modprobe tun" in done.stdout
