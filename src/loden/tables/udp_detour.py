# SPDX-License-Identifier: Apache-2.0
"""The VXLAN device that TCP and super-packets of ``udp`` go through inside a host (``native/bpf/detour.h``).

Behind a tunnel of its own the kernel merges TCP's segments again, and of what was never cut, because it came
over a virtual wire, it clears a tunnel's marks; of what a program redirects it does neither. No packet leaves
this device, and whatever else finds its port is dropped behind it.
"""

import msgspec

from loden.address import Family
from loden.tables.devices import Devices
from loden.tables.entries import VxlanLink

#: Letters, LOD: whatever shares the port with our device has another one.
_VNI = 0x4C4F44
#: The least that a device can have. With less than 1280 it has no IPv6, and sends nothing by itself.
_MTU = 68
#: Nobody's in IANA's list, and one that root alone binds: nobody else gets packets while the device is down.
_PORT = 285


class Detour(msgspec.Struct, frozen=True):
    """The device as it stands, and as the programs have to know it: its index, UDP port and VNI."""

    index: int
    port: int
    vni: int


def detour_link(device: str, underlay: str, local: bytes) -> VxlanLink:
    """The device for a tunnel.

    Args:
        device: the TUN device's name.
        underlay: the interface that datagrams come in on.
        local: this host's outer address, packed.
    """
    return VxlanLink(
        name=f"{device}.in",
        vni=_VNI,
        local=local,
        underlay=underlay,
        mtu=_MTU,
        mac=b"",  # a random one: where our program is missing, the stack takes in nothing without it
        port=_PORT,
        zero_checksum=Family.of(local) is Family.IPV6,
    )


def find_detour(devices: Devices, name: str) -> Detour | None:
    """A device as it stands; None unless it is ours and up: else its port may be somebody else's."""
    state = devices.vxlan(name)
    if state is None or not state.link.is_up or not devices.is_ours(state.link.index):
        return None
    return Detour(state.link.index, state.port, state.vni)
