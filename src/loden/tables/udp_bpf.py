# SPDX-License-Identifier: Apache-2.0
"""The fast path of ``udp``: the eBPF programs of ``native/bpf`` with their settings, maps and counters.

::

    struct settings { u8 own4[4], own6[16]; be16 port; u8 allow_unknown, pad; u32 tun;
                      u8 inside4[4], inside6[16], detour_vni[4]; be16 detour_port;
                      u8 detour_source[6]; };
    struct subnet4  { u32 length; u8 address[4]; };
    struct peer4    { u8 remote[4]; be16 port; u16 mtu; u32 device; u8 length, is_near, pad[50];
                      u64 tx_packets, tx_bytes; u8 pad2[48]; u64 rx_packets, rx_bytes;
                      struct passage passage; };
    struct subnet6  { u32 length; u8 address[16]; };
    struct peer6    { u8 remote[16]; be16 port; u16 mtu; u32 device; u8 length, is_near, pad[38];
                      u64 tx_packets, tx_bytes; u8 pad2[48]; u64 rx_packets, rx_bytes;
                      struct passage passage; };
    struct passage  { u32 missed, wait; u64 since, next; };
    struct remote   { u8 address[16]; be16 port; u16 pad; };
"""

import secrets
import struct
import time
from collections.abc import Iterable
from pathlib import Path

import msgspec

from loden.address import Family, Prefix
from loden.errors import KernelError
from loden.tables import tc
from loden.tables.bpf import Map, Object, Program
from loden.tables.entries import UdpPeer

_IMAGE = Path(__file__).with_name("udp.bpf.o")

ENCAPSULATE, DECAPSULATE, DETOUR = f"{tc.PREFIX}encap", f"{tc.PREFIX}decap", f"{tc.PREFIX}detour"

#: ``enum counter`` in native/bpf/maps.h, in its order; the reasons for drops have the engine's names.
DROPS = ("ttl", "unknown_peer", "spoofed", "truncated", "version", "length", "checksum", "failed")
COUNTERS = (
    *("tx_packets", "tx_bytes", "rx_packets", "rx_bytes"),
    *("to_engine", "from_engine", "detoured", "undetoured"),
    *DROPS,
)

_SETTINGS = struct.Struct("=4s16s2sBxI4s16s4s2s6s")
_SUBNET = {Family.IPV4: struct.Struct("=I4s"), Family.IPV6: struct.Struct("=I16s")}
_PEER = {
    Family.IPV4: struct.Struct("=4s2sHI2B50x2Q48x2Q2I2Q"),
    Family.IPV6: struct.Struct("=16s2sHI2B38x2Q48x2Q2I2Q"),
}
#: The limits of native/bpf/passage.h.
_MOST_MISSED, _PATIENCE_NS = 3, 100_000_000
#: How long after a try was due nothing is said for want of one.
_LATELY_NS = 5_000_000_000
_REMOTE = struct.Struct("=16s2s2x")
_COUNT = struct.Struct("=I")
#: How an Ethernet address begins that is one device's, as the kernel demands of a source since Linux 6.9
#: (f58f45c1e5b9), and that no manufacturer has given.
_LOCAL = b"\x02"


class Settings(msgspec.Struct, frozen=True):
    """What the programs are told before they are loaded.

    Args:
        local: the outer address of this host, packed.
        port: its UDP port.
        tun: index of the TUN device.
        inside: this host's address in the container network, packed; the one behind it is taken for that of
            the containers' bridge.
        allow_unknown: take in datagrams of whoever sends them.
        detour_port, detour_vni: of the VXLAN device of detour.h; port 0: there is none.
        detour_source: the Ethernet source of what goes there, new for each: GRO merges frames of one source
            in front of the program that asks each where it comes from, so nobody else may know it.
    """

    local: bytes
    port: int
    tun: int
    inside: bytes
    allow_unknown: bool = False
    detour_port: int = 0
    detour_vni: int = 0
    detour_source: bytes = msgspec.field(default_factory=lambda: _LOCAL + secrets.token_bytes(5))

    def pack(self) -> bytes:
        is_ipv4 = Family.of(self.local) is Family.IPV4
        return _SETTINGS.pack(
            self.local if is_ipv4 else b"",
            b"" if is_ipv4 else self.local,
            self.port.to_bytes(2, "big"),
            self.allow_unknown,
            self.tun,
            self.inside if is_ipv4 else b"",
            b"" if is_ipv4 else self.inside,
            (self.detour_vni << 8).to_bytes(4, "big"),
            self.detour_port.to_bytes(2, "big"),
            self.detour_source,
        )


class Traffic(msgspec.Struct, frozen=True):
    """What went to a peer and came from it, counted in inner packets; of super-packets each is one."""

    tx_packets: int
    tx_bytes: int
    rx_packets: int
    rx_bytes: int


class Passage(msgspec.Struct, frozen=True):
    """Whether what a peer sends comes out of the detour: ``struct passage`` of native/bpf/passage.h."""

    missed: int = _MOST_MISSED
    wait_s: int = 0
    since_ns: int = 0
    next_ns: int = 0

    @property
    def is_shut(self) -> bool:
        """Whether nothing comes out, tried more than once and lately: who sends nothing tries nothing."""
        now = time.monotonic_ns()
        is_shut = self.missed > _MOST_MISSED + 1 and now - self.since_ns > _PATIENCE_NS
        return is_shut and now < self.next_ns + _LATELY_NS


class Standing(msgspec.Struct, frozen=True):
    """A peer as the map has it: *index* is of the outgoing interface."""

    subnet: Prefix
    remote: bytes
    port: int
    index: int
    mtu: int
    is_near: bool
    traffic: Traffic
    passage: Passage


class FastPath:
    """The programs, loaded and attached nowhere yet.

    Args:
        settings: of this host.

    Raises:
        NotSupported: there is no libbpf.
        KernelError: the kernel refused the programs.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._object = Object(_IMAGE.read_bytes(), settings.pack())

    @property
    def encapsulate(self) -> Program:
        return self._object.programs[ENCAPSULATE]

    @property
    def decapsulate(self) -> Program:
        return self._object.programs[DECAPSULATE]

    @property
    def detour(self) -> Program:
        return self._object.programs[DETOUR]

    def close(self) -> None:
        """Let go; idempotent. What is attached stays."""
        self._object.close()

    def put(self, peer: UdpPeer, index: int) -> None:
        """Write a peer, new or changed.

        Args:
            peer: it.
            index: of the outgoing interface; 0 leaves it to the engine to find a way.

        Raises:
            KernelError: the map is full, or the kernel refused.
        """
        family, port = peer.subnet.family, peer.port.to_bytes(2, "big")
        before = self._standing(peer.subnet)
        is_moved = before is None or (before.remote, before.port) != (peer.remote, peer.port)
        if is_moved:
            self._count_remote(peer.remote, peer.port, 1)
        traffic = Traffic(0, 0, 0, 0) if before is None else before.traffic
        passage = Passage() if before is None or is_moved else before.passage
        kept = (*msgspec.structs.astuple(traffic), *msgspec.structs.astuple(passage))
        value = _PEER[family].pack(
            peer.remote, port, peer.mtu, index, peer.subnet.length, peer.is_near, *kept
        )
        try:
            self._peers(family).put(_key(peer.subnet), value)
        except KernelError:
            if is_moved:  # or each try would count one more
                self._count_remote(peer.remote, peer.port, -1)
            raise
        if is_moved and before is not None:
            self._count_remote(before.remote, before.port, -1)

    def drop(self, subnet: Prefix) -> None:
        """Remove a peer; one that is not there counts as removed.

        Raises:
            KernelError: the kernel refused.
        """
        standing = self._standing(subnet)
        if standing is not None:
            self._peers(subnet.family).delete(_key(subnet))
            self._count_remote(standing.remote, standing.port, -1)

    def peers(self) -> Iterable[Standing]:
        """Every peer that the maps hold.

        Raises:
            KernelError: they cannot be read.
        """
        for family in Family:
            for key, value in self._peers(family).items():
                _length, address = _SUBNET[family].unpack(key)
                yield _parse(address, value)

    def counters(self) -> dict[str, int]:
        """What happened to packets since the programs were loaded, by name, of all CPUs.

        Raises:
            KernelError: they cannot be read.
        """
        found = {}
        for place, name in enumerate(COUNTERS):
            value = self._object.maps["counters"].get(struct.pack("=I", place)) or b""
            found[name] = sum(number for (number,) in struct.iter_unpack("=Q", value))
        return found

    def _peers(self, family: Family) -> Map:
        return self._object.maps["peers4" if family is Family.IPV4 else "peers6"]

    def _standing(self, subnet: Prefix) -> Standing | None:
        """The peer of a subnet, and not that of a wider one, which a look-up finds where there is none."""
        value = self._peers(subnet.family).get(_key(subnet))
        found = _parse(subnet.address, value) if value is not None else None
        return found if found is not None and found.subnet == subnet else None

    def _count_remote(self, address: bytes, port: int, by: int) -> None:
        """One subnet more, or less, is behind a remote; the map itself keeps the count."""
        remotes, key = self._object.maps["remotes"], _REMOTE.pack(address, port.to_bytes(2, "big"))
        count = _COUNT.unpack(remotes.get(key) or bytes(_COUNT.size))[0] + by
        if count > 0:
            remotes.put(key, _COUNT.pack(count))
        else:
            remotes.delete(key)


def _key(subnet: Prefix) -> bytes:
    return _SUBNET[subnet.family].pack(subnet.length, subnet.address)


def _parse(address: bytes, value: bytes) -> Standing:
    """A peer as its value and the first address of its subnet tell it."""
    remote, port, mtu, index, length, is_near, *rest = _PEER[Family.of(address)].unpack(value)
    return Standing(
        Prefix.of(address, length),
        remote,
        int.from_bytes(port, "big"),
        index,
        mtu,
        bool(is_near),
        Traffic(*rest[:4]),
        Passage(*rest[4:]),
    )
