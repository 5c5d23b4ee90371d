# SPDX-License-Identifier: Apache-2.0
"""Whether the fast path of ``udp`` carries packets on this kernel: found out by sending one.

A network namespace of its own, with a TUN device and a wire, is made for that in a thread that is thrown
away. A packet leaves the TUN device, goes encapsulated over the wire, and has to come back in as it left,
two hops older::

    TUN ──▶ egress: encapsulate ──▶ near ══════ far ──▶ ingress: decapsulate ──▶ TUN ──▶ here it is seen again

So has a super-packet, whole and by the detour (:mod:`loden.tables.udp_detour`).
"""

import asyncio
import ctypes
import errno as errnos
import functools
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

from loden.address import Family, Prefix, parse_address
from loden.errors import KernelError, NotSupported
from loden.tables import netlink, tc
from loden.tables.addresses import AddressTable
from loden.tables.devices import Devices, encode_link
from loden.tables.entries import LinkAddress, Neighbour, UdpPeer
from loden.tables.neighbours import NeighbourTable
from loden.tables.netlink import Netlink, attribute, nested
from loden.tables.tun import open_queue
from loden.tables.udp_bpf import DECAPSULATE, DETOUR, ENCAPSULATE, FastPath, Settings
from loden.tables.udp_detour import detour_link

_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_ADDRESS = 3, 18, 1
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFINFO = struct.Struct("=BxHiII")
_TUN, _NEAR, _FAR = "probe", "near", "far"
_FAR_MAC = bytes.fromhex("02004c000002")
_PORT = 8285
_TTL = 9
_EXPERIMENT = 253  # RFC 3692
_DATA = b"does this kernel carry packets?"
#: struct virtio_net_hdr { u8 flags, gso_type; u16 hdr_len, gso_size, csum_start, csum_offset; }
_VIRTIO = struct.Struct("=BBHHHH")
_NEEDS_CSUM, _GSO_TCP4, _GSO_TCP6 = 1, 1, 4
_SOL_PACKET, _PACKET_VNET_HDR = 263, 15
_SEGMENT_BYTES, _TCP_CHECKSUM = 1000, 16
_PATIENCE_S = 2.0

# The near and the far end of the wire, and who the inner packets are from and for: nobody here.
_ENDS = {
    Family.IPV4: ("192.0.2.1", "192.0.2.2", "198.51.100.1", "198.51.100.2"),
    Family.IPV6: ("2001:db8::1", "2001:db8::2", "2001:db8:1::1", "2001:db8:2::1"),
}


@functools.cache
def find_lacks(family: Family) -> Mapping[str, str]:
    """Why a packet of this family does not come through (``ebpf``), or just not by the detour (``detour``).

    It blocks for some hundredths of a second the first time, where all is well, and for seconds where a
    packet is lost. One failure may be a busy host's, two are not.

    Returns:
        the reason; nothing where both come through.
    """
    first = _try(family)
    if not first:
        return first
    return {what: reason for what, reason in _try(family).items() if what in first}


def _try(family: Family) -> Mapping[str, str]:
    found: list[Mapping[str, str]] = []
    thread = threading.Thread(target=lambda: found.append(_try_apart(family)), name="udp probe")
    thread.start()
    thread.join()
    return found[0] if found else {"ebpf": "the test of eBPF programs failed"}


def _try_apart(family: Family) -> Mapping[str, str]:
    """The same, in a new network namespace that this thread ends in."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.unshare(_CLONE_NEWNET):
            subject = "a network namespace to test eBPF programs in"
            raise KernelError("make", subject, ctypes.get_errno(), hint="give the process CAP_SYS_ADMIN")
        if family is Family.IPV6:  # containers may have /proc/sys read-only, and kernels no IPv6
            Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0", encoding="ascii")
        with closing(Netlink()) as requests:
            no_detour = asyncio.run(_send(requests, family))
    except (KernelError, OSError) as error:
        return {"ebpf": str(error)}
    return {"detour": no_detour} if no_detour else {}


async def _send(requests: Netlink, family: Family) -> str:
    """Send both; why the second does not come through, empty where it does.

    Raises:
        KernelError, OSError: the first does not.
    """
    here, there, source, target = map(parse_address, _ENDS[family])
    with ExitStack() as stack:
        stack.callback(os.close, open_queue(_TUN))
        devices = await _wire(requests)
        link = detour_link(_TUN, _FAR, there)
        no_detour = "".join(str(error) for error in (await devices.put([link])).values())
        tun, near, far, detour = (devices.index(name) or 0 for name in (_TUN, _NEAR, _FAR, link.name))
        # What the far end takes in is for its own address: each end has programs of its own.
        sender = FastPath(Settings(here, _PORT, tun, source))
        receiver = FastPath(Settings(there, _PORT, tun, here, detour_port=link.port, detour_vni=link.vni))
        stack.callback(sender.close)
        stack.callback(receiver.close)
        sender.put(UdpPeer(_TUN, Prefix(target, family.bits), there, _PORT, _NEAR, is_near=True), near)
        receiver.put(UdpPeer(_TUN, Prefix(source, family.bits), here, _PORT, _FAR, is_near=True), far)
        programs = [
            (tun, tc.Hook.EGRESS, ENCAPSULATE, sender.encapsulate),
            (far, tc.Hook.INGRESS, DECAPSULATE, receiver.decapsulate),
        ]
        if not no_detour:
            programs.append((detour, tc.Hook.INGRESS, DETOUR, receiver.detour))
        for index, hook, name, program in programs:
            refused = await tc.attach(requests, index, hook, name, program.fd)
            if refused:
                raise refused.error("attach", f"eBPF program {name}")
        _require_passage(family, source, target)
        # What is in the maps is read with each look, in batches: of a trie no kernel before 5.13 gives those.
        if not any(sender.peers()):
            raise _failure("the maps do not hold what was put into them")
        if no_detour:
            return no_detour
        try:
            _require_whole_passage(family, source, target)
        except (NotSupported, OSError) as error:
            return str(error)
        return "" if receiver.counters()["detoured"] else f"the socket of {link.name} is not found"


async def _wire(requests: Netlink) -> Devices:
    """The wire, up, with addresses and without the need to ask for neighbours."""
    peer = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, _FAR.encode() + b"\0")
    peer += attribute(_IFLA_ADDRESS, _FAR_MAC)
    veth = nested(
        _IFLA_LINKINFO,
        attribute(_IFLA_INFO_KIND, b"veth\0"),
        nested(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, peer)),
    )
    body = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(_IFLA_IFNAME, _NEAR.encode() + b"\0") + veth
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    refused = await requests.request(netlink.message(netlink.RTM_NEWLINK, flags, body))
    if refused:
        raise refused.error("add", "a veth pair to test eBPF programs with")
    devices = Devices(requests)
    await devices.refresh()
    for name in (_TUN, _NEAR, _FAR):
        await requests.request(encode_link(netlink.RTM_NEWLINK, devices.index(name) or 0))
    addresses = AddressTable(requests, devices, [])
    neighbours = NeighbourTable(requests, devices)
    for family, (_, there, _, _) in _ENDS.items():
        length = 24 if family is Family.IPV4 else 64
        await addresses.put([LinkAddress(_FAR, parse_address(there), length)])
        await neighbours.put([Neighbour(_NEAR, parse_address(there), _FAR_MAC)])
    return devices


def _require_passage(family: Family, source: bytes, target: bytes) -> None:
    """Send a packet into the TUN device, and see it come out of it.

    Raises:
        NotSupported: it does not, or not as it should.
    """
    sent, expected = (inner_packet(source, target, ttl) for ttl in (_TTL, _TTL - 2))
    came = _through(family, sent, source + target)
    if came != expected:
        raise _failure(f"an {family} packet comes through as {came.hex()} instead of {expected.hex()}")


def _require_whole_passage(family: Family, source: bytes, target: bytes) -> None:
    """The same for a super-packet of TCP, which has to stay one.

    Raises:
        NotSupported: it does not come out, or not as it should.
    """
    kind, start = (_GSO_TCP4, 20) if family is Family.IPV4 else (_GSO_TCP6, 40)
    header = struct.pack("!2H2I2B3H", 1, 2, 3, 4, 5 << 4, 0x10, 65535, 0, 0)
    whole = header + bytes(3 * _SEGMENT_BYTES)
    sent, expected = (
        inner_packet(source, target, ttl, socket.IPPROTO_TCP, whole) for ttl in (_TTL, _TTL - 2)
    )
    offload = _VIRTIO.pack(_NEEDS_CSUM, kind, start + len(header), _SEGMENT_BYTES, start, _TCP_CHECKSUM)
    came = _through(family, offload + sent, source + target, has_offload=True)
    flags, came_as, _length, size, *_place = _VIRTIO.unpack_from(came)
    if (flags, came_as, size) != (_NEEDS_CSUM, kind, _SEGMENT_BYTES) or came[_VIRTIO.size :] != expected:
        raise _failure(f"an {family} super-packet comes through as {len(came)} bytes {came[:90].hex()}...")


def _through(family: Family, packet: bytes, addresses: bytes, *, has_offload: bool = False) -> bytes:
    """Send one packet into the TUN device, and receive what comes out of it.

    Args:
        family: of the packet.
        packet: it, and with *has_offload* a ``struct virtio_net_hdr`` before it, as before what comes.
        addresses: its source and target, as they stand in it.

    Raises:
        NotSupported: nothing does.
    """
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        wire.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, has_offload)
        wire.bind((_TUN, _ETH_P_ALL))
        wire.sendto(packet, (_TUN, 0x0800 if family is Family.IPV4 else 0x86DD))
        poll = select.poll()
        poll.register(wire, select.POLLIN)
        deadline = time.monotonic() + _PATIENCE_S
        while poll.poll(max(0, deadline - time.monotonic()) * 1000):
            came: bytes = wire.recv(65536)
            if addresses in came:  # and not what the kernel itself says there
                return came
        raise _failure(f"an {family} {'super-' if has_offload else ''}packet does not come through")


def inner_packet(
    source: bytes, target: bytes, ttl: int, protocol: int = _EXPERIMENT, data: bytes = _DATA
) -> bytes:
    """An IP packet without options."""
    if Family.of(source) is Family.IPV6:
        return struct.pack("!IHBB", 6 << 28, len(data), protocol, ttl) + source + target + data
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 1, 0, ttl, protocol, 0) + source + target
    total: int = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + check.to_bytes(2, "big") + header[12:] + data


def _failure(detail: str) -> NotSupported:
    return NotSupported("use", "eBPF programs", errnos.EOPNOTSUPP, detail=detail)
