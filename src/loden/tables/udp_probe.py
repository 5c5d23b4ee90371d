# SPDX-License-Identifier: Apache-2.0
"""Whether the fast path of ``udp`` carries packets on this kernel: found out by sending one.

A network namespace of its own, with a TUN device and a wire, is made for that in a thread that is thrown
away. A packet leaves the TUN device, goes encapsulated over the wire, and has to come back in as it left,
two hops older::

    TUN ──▶ egress: encapsulate ──▶ near ══════ far ──▶ ingress: decapsulate ──▶ TUN ──▶ here it is seen again
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
from loden.tables.udp_bpf import DECAPSULATE, ENCAPSULATE, FastPath, Settings

_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
_IFLA_IFNAME, _IFLA_LINKINFO, _IFLA_ADDRESS = 3, 18, 1
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _VETH_INFO_PEER = 1, 2, 1
_IFINFO = struct.Struct("=BxHiII")
_TUN, _NEAR, _FAR = "probe", "near", "far"
_FAR_MAC = bytes.fromhex("02004c000002")
_PORT = 8285
_TTL = 9
_PATIENCE_S = 2.0

# The near and the far end of the wire, and who the inner packet is from and for.
_ENDS = {
    Family.IPV4: ("192.0.2.1", "192.0.2.2", "198.51.100.1", "198.51.100.2"),
    Family.IPV6: ("2001:db8::1", "2001:db8::2", "2001:db8:1::1", "2001:db8:2::1"),
}


@functools.cache
def why_not(family: Family) -> str:
    """Why a packet of this family does not come through; empty where it does.

    It blocks for some hundredths of a second, the first time. One failure may be a busy host's, two are not.
    """
    return _try(family) and _try(family)


def _try(family: Family) -> str:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(_try_apart(family)), name="udp probe")
    thread.start()
    thread.join()
    return found[0] if found else "the test of eBPF programs failed"


def _try_apart(family: Family) -> str:
    """The same, in a new network namespace that this thread ends in."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if libc.unshare(_CLONE_NEWNET):
            subject = "a network namespace to test eBPF programs in"
            raise KernelError("make", subject, ctypes.get_errno(), hint="give the process CAP_SYS_ADMIN")
        Path("/proc/sys/net/ipv6/conf/default/accept_dad").write_text("0", encoding="ascii")
        with closing(Netlink()) as requests:
            asyncio.run(_send_one(requests, family))
    except (KernelError, OSError) as error:
        return str(error)
    return ""


async def _send_one(requests: Netlink, family: Family) -> None:
    here, there, source, target = map(parse_address, _ENDS[family])
    with ExitStack() as stack:
        stack.callback(os.close, open_queue(_TUN))
        devices = await _wire(requests)
        tun, near, far = (devices.index(name) or 0 for name in (_TUN, _NEAR, _FAR))
        # What the far end takes in is for its own address: each end has programs of its own.
        sender = FastPath(Settings(here, _PORT, tun, source))
        receiver = FastPath(Settings(there, _PORT, tun, target))
        stack.callback(sender.close)
        stack.callback(receiver.close)
        sender.put(UdpPeer(_TUN, Prefix(target, family.bits), there, _PORT, _NEAR), near)
        receiver.put(UdpPeer(_TUN, Prefix(source, family.bits), here, _PORT, _FAR), far)
        for index, hook, name, program in (
            (tun, tc.Hook.EGRESS, ENCAPSULATE, sender.encapsulate),
            (far, tc.Hook.INGRESS, DECAPSULATE, receiver.decapsulate),
        ):
            refused = await tc.attach(requests, index, hook, name, program.fd)
            if refused:
                raise refused.error("attach", f"eBPF program {name}")
        _require_passage(family, source, target)
        # What is in the maps is read with each look, in batches: of a trie no kernel before 5.13 gives those.
        if not any(sender.peers()):
            raise _failure("the maps do not hold what was put into them")


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
    for family, (here, there, _, _) in _ENDS.items():
        length = 24 if family is Family.IPV4 else 64
        await addresses.put([LinkAddress(_NEAR, parse_address(here), length)])
        await neighbours.put([Neighbour(_NEAR, parse_address(there), _FAR_MAC)])
    return devices


def _require_passage(family: Family, source: bytes, target: bytes) -> None:
    """Send a packet into the TUN device, and see it come out of it.

    Raises:
        NotSupported: it does not, or not as it should.
    """
    packet = inner_packet(family, source, target, _TTL)
    expected = inner_packet(family, source, target, _TTL - 2)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as wire:
        wire.bind((_TUN, _ETH_P_ALL))
        protocol = 0x0800 if family is Family.IPV4 else 0x86DD
        wire.sendto(packet, (_TUN, protocol))
        poll = select.poll()
        poll.register(wire, select.POLLIN)
        if not poll.poll(_PATIENCE_S * 1000):
            raise _failure(f"an {family} packet does not come through")
        came: bytes = wire.recv(4096)
        if came != expected:
            raise _failure(f"an {family} packet comes through as {came.hex()} instead of {expected.hex()}")


def inner_packet(family: Family, source: bytes, target: bytes, ttl: int) -> bytes:
    """A packet of the protocol for experiments (RFC 3692) with a few bytes in it."""
    data = b"does this kernel carry packets?"
    if family is Family.IPV6:
        return struct.pack("!IHBB", 6 << 28, len(data), 253, ttl) + source + target + data
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 1, 0, ttl, 253, 0) + source + target
    total: int = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    check = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    return header[:10] + check.to_bytes(2, "big") + header[12:] + data


def _failure(detail: str) -> NotSupported:
    return NotSupported("use", "eBPF programs", errnos.EOPNOTSUPP, detail=detail)
