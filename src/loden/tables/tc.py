# SPDX-License-Identifier: Apache-2.0
"""Our programs in tc: attach, find, replace and detach, and nobody else's are touched.

They are classifiers in direct-action mode at the hooks of a ``clsact`` qdisc (Linux 4.5). tcx, which is
newer, tells nobody when a program is detached; tc does (``RTNLGRP_TC``), and what is not heard is not
repaired.

Ours are known by their names. Replacing one is one step in the kernel (``cls_bpf_change``): each packet
meets the old one or the new one. A priority that somebody else's filter has is left to it. A qdisc that we
had to add goes with the last filter; one that was there stays, empty or not: our filters' handles tell
which it is.

::

    struct tcmsg { u8 family; u8 pad1; u16 pad2; int ifindex; u32 handle, parent, info; };
"""

import enum
import errno as errnos
import struct
from collections.abc import Sequence

import msgspec

from loden.tables import netlink
from loden.tables.netlink import (
    Message,
    Netlink,
    Refusal,
    attribute,
    attribute_u32,
    nested,
    number_in,
    parse_attributes,
)

#: Ours begin so.
PREFIX = "loden_"

_TCMSG = struct.Struct("=BxxxiIII")
_CLSACT = 0xFFFF_FFF1  # TC_H_CLSACT
_CLSACT_HANDLE = 0xFFFF_0000
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS, _TCA_BPF_ID = 6, 7, 8, 11
_ACT_DIRECT = 1
_ETH_P_ALL_BE = 0x0300
_ON_OUR_QDISC, _ON_ANOTHERS = 1, 2  # as the handle of a filter of ours
#: Where in the order of filters: an L, as our routes' protocol; the next free one where that is taken.
_FIRST_PRIORITY = 76


class Hook(enum.IntEnum):
    """Where on a device, as the parent of a filter (``TC_H_MIN_INGRESS``, ``TC_H_MIN_EGRESS``)."""

    INGRESS = 0xFFFF_FFF2
    EGRESS = 0xFFFF_FFF3


#: Which hooks a qdisc has, by its kind.
_HOOKS: dict[bytes, Sequence[Hook]] = {b"clsact": tuple(Hook), b"ingress": (Hook.INGRESS,)}


class Filter(msgspec.Struct, frozen=True):
    """A BPF filter as the kernel has it.

    Args:
        index: of the device.
        parent: the hook.
        priority, handle: its place.
        name: of the program, as whoever attached it said.
        program: the kernel's number of the program.
    """

    index: int
    parent: int
    priority: int
    handle: int
    name: str
    program: int

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(PREFIX)


def parse_filter(found: Message) -> Filter:
    """A filter message; the name is empty for filters that are no programs."""
    _family, index, handle, parent, info = _TCMSG.unpack_from(found.buffer, found.start)
    attributes = parse_attributes(found.buffer, found.start + _TCMSG.size, found.end)
    raw = attributes.get(_TCA_OPTIONS, b"")
    options = parse_attributes(raw, 0, len(raw))
    is_bpf = attributes.get(_TCA_KIND, b"").rstrip(b"\0") == b"bpf"
    name = options.get(_TCA_BPF_NAME, b"").rstrip(b"\0").decode(errors="replace") if is_bpf else ""
    return Filter(index, parent, info >> 16, handle, name, number_in(options, _TCA_BPF_ID))


def device_of(message: Message) -> int:
    """The device that a notification about a qdisc or a filter is about."""
    return int(_TCMSG.unpack_from(message.buffer, message.start)[1])


async def list_ours(requests: Netlink) -> list[Filter]:
    """All filters of ours in this network namespace.

    Raises:
        KernelError: they cannot be listed.
    """
    devices = await _devices(requests)
    return [
        one for index, hooks in devices.items() for one in await _list(requests, index, hooks) if one.is_ours
    ]


async def attach(requests: Netlink, index: int, hook: Hook, name: str, program_fd: int) -> Refusal | None:
    """Attach a program, or put it in the place of ours that has the name; the kernel's answer if it refused.

    Args:
        requests: the socket.
        index: of the device.
        hook: where on it.
        name: begins with :data:`PREFIX`.
        program_fd: of a loaded program of the type ``sched_cls``.
    """
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    body = _TCMSG.pack(0, index, _CLSACT_HANDLE, _CLSACT, 0) + attribute(_TCA_KIND, b"clsact\0")
    refused = await requests.request(netlink.message(netlink.RTM_NEWQDISC, flags, body))
    if refused and refused.errno != errnos.EEXIST:
        return refused
    hooks = (await _devices(requests)).get(index, ())
    if hook not in hooks:
        # What is meant for its egress would end up at its ingress.
        return Refusal(errnos.EEXIST, "the device has an ingress qdisc, and therefore no clsact")
    all_standing = await _list(requests, index, hooks)
    standing = [one for one in all_standing if one.parent == hook]
    ours = [one for one in standing if one.name == name]
    if ours:
        priority, handle, flags = ours[0].priority, ours[0].handle, netlink.NLM_F_CREATE
    else:
        is_our_qdisc = refused is None or any(
            one.is_ours and one.handle == _ON_OUR_QDISC for one in all_standing
        )
        priority, handle = _free_priority(standing), _ON_OUR_QDISC if is_our_qdisc else _ON_ANOTHERS
    options = nested(
        _TCA_OPTIONS,
        attribute_u32(_TCA_BPF_FD, program_fd),
        attribute(_TCA_BPF_NAME, name.encode() + b"\0"),
        attribute_u32(_TCA_BPF_FLAGS, _ACT_DIRECT),
    )
    body = _message(index, hook, priority, handle) + attribute(_TCA_KIND, b"bpf\0") + options
    refused = await requests.request(netlink.message(netlink.RTM_NEWTFILTER, flags, body))
    return refused or await detach(requests, ours[1:])


async def detach(requests: Netlink, filters: Sequence[Filter]) -> Refusal | None:
    """Detach filters, and remove a qdisc of ours where they were the last ones.

    What is gone already counts as detached.
    """
    for one in filters:
        body = _message(one.index, one.parent, one.priority, one.handle) + attribute(_TCA_KIND, b"bpf\0")
        refused = await requests.request(netlink.message(netlink.RTM_DELTFILTER, 0, body))
        if refused and refused.errno not in _GONE:
            return refused
    devices = await _devices(requests) if filters else {}
    for index in {one.index for one in filters if one.handle == _ON_OUR_QDISC}:
        hooks = devices.get(index, ())
        if len(hooks) == len(Hook) and not await _list(requests, index, hooks):
            body = _TCMSG.pack(0, index, _CLSACT_HANDLE, _CLSACT, 0) + attribute(_TCA_KIND, b"clsact\0")
            await requests.request(netlink.message(netlink.RTM_DELQDISC, 0, body))
    return None


#: No such device, filter, or qdisc.
_GONE = (errnos.ENODEV, errnos.ENOENT, errnos.EINVAL)


def _message(index: int, parent: int, priority: int, handle: int) -> bytes:
    return _TCMSG.pack(0, index, handle, parent, priority << 16 | _ETH_P_ALL_BE)


def _free_priority(standing: Sequence[Filter]) -> int:
    taken = {one.priority for one in standing}
    return next(priority for priority in range(_FIRST_PRIORITY, 0xFFFF) if priority not in taken)


async def _devices(requests: Netlink) -> dict[int, Sequence[Hook]]:
    """The devices that have hooks to attach to, and which.

    An ``ingress`` qdisc, clsact's predecessor, has one; asked for the filters of the other hook, it lists the
    same ones again.
    """
    found: dict[int, Sequence[Hook]] = {}
    for datagram in await requests.dump(netlink.RTM_GETQDISC, _TCMSG.pack(0, 0, 0, 0, 0)):
        for one in netlink.parse_messages(datagram):
            attributes = parse_attributes(one.buffer, one.start + _TCMSG.size, one.end)
            hooks = _HOOKS.get(attributes.get(_TCA_KIND, b"").rstrip(b"\0"))
            if hooks is not None:
                found[device_of(one)] = hooks
    return found


async def _list(requests: Netlink, index: int, hooks: Sequence[Hook]) -> list[Filter]:
    """Every filter at a device's hooks, in order."""
    found = []
    for hook in hooks:
        for datagram in await requests.dump(netlink.RTM_GETTFILTER, _TCMSG.pack(0, index, 0, hook, 0)):
            found += [
                parse_filter(one)
                for one in netlink.parse_messages(datagram)
                if one.kind == netlink.RTM_NEWTFILTER
            ]
    # A classifier comes first without a handle, and then once for each filter in it.
    return [one for one in found if one.handle]
