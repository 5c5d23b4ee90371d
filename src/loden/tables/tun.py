# SPDX-License-Identifier: Apache-2.0
"""TUN devices: layer-3 devices whose other end is a program, and which stay when that program is gone.

::

    struct ifreq { char ifr_name[16]; short ifr_flags; ... };    40 bytes
"""

import errno as errnos
import fcntl
import os
import struct
from collections.abc import Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from loden.errors import KernelError
from loden.interface import Link
from loden.tables import netlink
from loden.tables.base import LOOK, Failures
from loden.tables.devices import ALIAS, Devices, encode_link, parse_link, refuse_router_advertisements
from loden.tables.entries import TunLink
from loden.tables.netlink import Message, Netlink

_PATH = "/dev/net/tun"
_SETIFF, _SETPERSIST, _SETOFFLOAD = 202, 203, 208
_IFF_TUN, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x1, 0x100, 0x1000, 0x4000
_FLAGS = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR | _IFF_MULTI_QUEUE
_TUN_F_CSUM, _TUN_F_TSO4, _TUN_F_TSO6, _TUN_F_USO4, _TUN_F_USO6 = 0x01, 0x02, 0x04, 0x20, 0x40
_IFREQ = struct.Struct("16sH22x")
#: Processors whose kernels write down the direction of an ioctl otherwise: as 1 of 3 bits, not 1 of 2.
_THREE_BITS = ("ppc", "mips", "sparc", "alpha")
#: The queue in front of the device's reader, packets. A second of it would be worse than a loss.
_QUEUE_LENGTH = 500

_HINTS = {
    errnos.ENOENT: "load the module tun (modprobe tun), or give this container the device /dev/net/tun",
    errnos.ENODEV: "load the module tun: modprobe tun",
    # Whether the kernel lets us make devices is another question (EPERM).
    errnos.EACCES: f"let everybody open it, as udev does (chmod 666 {_PATH}), or run as its own root",
    errnos.EBUSY: "another program has it; stop flanneld on this host",
    errnos.EINVAL: "another kind of TUN device has the name: stop flanneld on this host, or delete it",
}


def request(number: int, machine: str) -> int:
    """An ioctl of TUN devices as a kernel counts it: ``_IOW('T', number, int)``.

    Args:
        number: of the ioctl, 0 to 255.
        machine: what ``uname -m`` says.
    """
    direction = 4 << 29 if machine.startswith(_THREE_BITS) else 1 << 30
    return direction | struct.calcsize("i") << 16 | ord("T") << 8 | number


def open_queue(name: str) -> int:
    """A queue of a TUN device, which is made where there is none: packets behind a virtio header of 10 bytes.

    Super-packets come and go whole (``IFF_VNET_HDR``, ``TUNSETOFFLOAD``). The device stays when the queue is
    closed.

    Returns:
        a non-blocking file descriptor, the caller's to close.

    Raises:
        KernelError: there is no ``/dev/net/tun``, the name is another device's, or we may not.
    """
    try:
        queue = os.open(_PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _error("open", _PATH, error) from error
    machine = os.uname().machine
    try:
        fcntl.ioctl(queue, request(_SETIFF, machine), _IFREQ.pack(name.encode(), _FLAGS))
        fcntl.ioctl(queue, request(_SETPERSIST, machine), 1)
        _set_offloads(queue, request(_SETOFFLOAD, machine))
    except OSError as error:
        os.close(queue)
        raise _error("attach to", f"TUN device {name}", error) from error
    return queue


def _set_offloads(queue: int, code: int) -> None:
    """UDP segmentation where the kernel has it: Linux 6.2, 399e0827642f ("driver/net/tun: Added
    features")."""
    usual = _TUN_F_CSUM | _TUN_F_TSO4 | _TUN_F_TSO6
    try:
        fcntl.ioctl(queue, code, usual | _TUN_F_USO4 | _TUN_F_USO6)
    except OSError:
        fcntl.ioctl(queue, code, usual)


def _error(verb: str, subject: str, error: OSError) -> KernelError:
    number = error.errno or errnos.EIO
    return KernelError(verb, subject, number, hint=_HINTS.get(number, ""))


class TunTable:
    """The TUN devices that carry our alias.

    Args:
        requests: the socket.
        devices: which devices there are.
    """

    entry_type = TunLink

    def __init__(self, requests: Netlink, devices: Devices) -> None:
        self._requests = requests
        self._devices = devices

    async def read(self, wanted: Mapping[Hashable, TunLink]) -> dict[Hashable, TunLink]:
        """One that is down is reported as not there."""
        return {
            link.name: TunLink(link.name, link.mtu)
            for link in self._devices.ours
            if link.kind == "tun" and (link.is_up or link.name not in wanted)
        }

    async def put(self, entries: Sequence[TunLink]) -> Failures:
        failures: Failures = {}
        for entry in entries:
            try:
                await self._put(entry)
            except KernelError as error:
                failures[entry.slot] = error
        await self._devices.refresh()
        return failures

    async def drop(self, entries: Sequence[TunLink]) -> Failures:
        failures: Failures = {}
        for entry in entries:
            link = self._devices.link(entry.name)
            if link is None or link.alias != ALIAS or link.kind != "tun":
                continue
            refused = await self._requests.request(encode_link(netlink.RTM_DELLINK, link.index))
            if refused and refused.errno != errnos.ENODEV:
                failures[entry.slot] = refused.error("delete", entry)
        if entries:
            await self._devices.refresh()
        return failures

    def heard(self, message: Message, wanted: Mapping[Hashable, TunLink]) -> Hashable | None:
        """Everything else stands on the device: a change of it means to look at all of it."""
        if message.kind not in (netlink.RTM_NEWLINK, netlink.RTM_DELLINK):
            return None
        link, _ = parse_link(message)
        known = next((one for one in self._devices.ours if one.index == link.index), None)
        if link.name not in wanted and (known is None or known.name not in wanted):
            return None
        is_well = message.kind == netlink.RTM_NEWLINK and known is not None and _is_same(known, link)
        return None if is_well else LOOK

    async def _put(self, entry: TunLink) -> None:
        await self._devices.refresh()
        standing = self._devices.link(entry.name)
        if standing is not None and standing.kind != "tun":
            raise KernelError(
                "add",
                str(entry),
                errnos.EEXIST,
                detail=f"{entry.name} is a device of kind {standing.kind or 'physical'}",
                hint=f"remove or rename it: ip link delete {entry.name}",
            )
        if standing is None or standing.alias != ALIAS:
            os.close(open_queue(entry.name))
            await self._devices.refresh()
            standing = self._devices.link(entry.name)
        if standing is None:
            raise KernelError("add", str(entry), errnos.EAGAIN, detail="it vanished as soon as it was made")
        refuse_router_advertisements(entry.name)
        _accept_own_errors(entry.name)
        refused = await self._requests.request(
            encode_link(
                netlink.RTM_NEWLINK, standing.index, mtu=entry.mtu, alias=ALIAS, queue_length=_QUEUE_LENGTH
            )
        )
        if refused:
            raise refused.error("change", entry)


def _accept_own_errors(name: str) -> None:
    """The device's reader sends ICMP errors from this host's own address, which look like a stranger's
    lies."""
    with suppress(OSError):
        Path(f"/proc/sys/net/ipv4/conf/{name}/accept_local").write_text("1", encoding="ascii")


def _is_same(known: Link, link: Link) -> bool:
    return (known.name, known.is_up, known.mtu) == (link.name, link.is_up, link.mtu)
