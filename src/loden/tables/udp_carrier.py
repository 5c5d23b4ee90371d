# SPDX-License-Identifier: Apache-2.0
"""What carries packets between a TUN device and a UDP port: eBPF programs, the engine, or both.

The *fast path* is eBPF programs (:mod:`loden.tables.udp_bpf`). They stay when the agent is gone, and so
do packets in flight. The *engine* (:mod:`loden.tables.engine`) reads and writes the device and the sockets
in threads of its own; it serves what the programs pass on, or everything where there are none. Both know the
same peers.
"""

import errno as errnos
import logging
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loden.address import Family, Prefix, format_address
from loden.errors import KernelError, NotSupported
from loden.interface import leads_out
from loden.priority import go_first
from loden.tables import tc
from loden.tables.base import Failures
from loden.tables.devices import Devices
from loden.tables.entries import UdpPeer, UdpTunnel
from loden.tables.tun import open_queue
from loden.tables.udp_detour import Detour, find_detour
from loden.tables.udp_sockets import merge, open_bound

if TYPE_CHECKING:
    from loden.tables.bpf import Program
    from loden.tables.engine import Engine, Peer
    from loden.tables.udp_bpf import FastPath

log = logging.getLogger(__name__)

_ETHERNET_BYTES = 6
#: The most peers whose traffic a status page shows.
_MOST_SHOWN = 1000
_NEITHER = "either is enough: run the agent as root of the host itself, or install Loden where gcc is"

#: A place for a program: the device's index, and where on it.
Place = tuple[int, int]


class Carrier:
    """Everything that one tunnel needs while this process lives. Made by :func:`open_carrier`.

    Args:
        entry: the tunnel.
        devices: which devices there are.
        before: what serves the tunnel until now: its socket is shared where it is the same.

    Raises:
        KernelError: a device is missing or not to be had, or the port is taken.
    """

    def __init__(self, entry: UdpTunnel, devices: Devices, before: "Carrier | None") -> None:
        self.entry = entry
        self.tun_index = _require(devices, entry.device)
        self.underlay_index = _require(devices, entry.underlay)
        self._devices = devices
        self.detour = find_detour(devices, entry.detour)
        self._peers: dict[Prefix, UdpPeer] = {}
        self.socket: socket.socket
        is_same = before is not None and (before.entry.local, before.entry.port) == (entry.local, entry.port)
        if before is not None and is_same:
            self.socket = before.socket.dup()
        else:
            self.socket = open_bound(entry.local, entry.port)
        try:
            self.queue = open_queue(entry.device)
        except BaseException:
            self.socket.close()
            raise
        self.engine: Engine | None = None
        self.fast: FastPath | None = None
        self.reason = ""  # why there is no fast path; empty where there is one
        self._shut: Sequence[Prefix] = ()  # peers of whom nothing comes out of the detour

    def close(self) -> None:
        """Let go; programs that are attached stay."""
        if self.engine is not None:
            self.engine.stop()
        if self.fast is not None:
            self.fast.close()
        os.close(self.queue)
        self.socket.close()

    @property
    def is_sound(self) -> bool:
        """Whether the devices are those that it was made for, and the engine has not stopped by itself."""
        indexes = (self._devices.index(self.entry.device), self._devices.index(self.entry.underlay))
        are_same = indexes == (self.tun_index, self.underlay_index)
        is_running = self.engine is None or self.engine.failure() is None
        return is_running and are_same and find_detour(self._devices, self.entry.detour) == self.detour

    @property
    def programs(self) -> "Mapping[Place, tuple[str, Program]]":
        """Which programs belong where, by name."""
        if self.fast is None:
            return {}
        from loden.tables.udp_bpf import DECAPSULATE, DETOUR, ENCAPSULATE  # noqa: PLC0415

        found: dict[Place, tuple[str, Program]] = {}
        if self.detour is not None:  # the first: it has to stand when the others send packets there
            found[self.detour.index, tc.Hook.INGRESS] = (self._name(DETOUR), self.fast.detour)
        found[self.tun_index, tc.Hook.EGRESS] = (self._name(ENCAPSULATE), self.fast.encapsulate)
        found[self.underlay_index, tc.Hook.INGRESS] = (self._name(DECAPSULATE), self.fast.decapsulate)
        return found

    @property
    def peers(self) -> Mapping[Prefix, UdpPeer]:
        """What was put in and not dropped."""
        return self._peers

    def put(self, peers: Iterable[UdpPeer]) -> Failures:
        """Know these peers, new or changed."""
        failures: Failures = {}
        sound: list[UdpPeer] = []
        for peer in peers:
            try:
                if self.fast is not None:
                    self.fast.put(peer, self._index(peer))
                sound.append(peer)
            except KernelError as error:
                failures[peer.slot] = error
        if self.engine is not None:
            self.engine.change([_for_engine(peer) for peer in sound], [])
        self._peers.update((peer.subnet, peer) for peer in sound)
        return failures

    def drop(self, peers: Iterable[UdpPeer]) -> Failures:
        """Know these peers no more."""
        failures: Failures = {}
        gone: list[Prefix] = []
        for peer in peers:
            try:
                if self.fast is not None:
                    self.fast.drop(peer.subnet)
                gone.append(peer.subnet)
            except KernelError as error:
                failures[peer.slot] = error
        if self.engine is not None:
            self.engine.change([], [(subnet.address, subnet.length) for subnet in gone])
        for subnet in gone:
            self._peers.pop(subnet, None)
        return failures

    def standing(self) -> dict[Prefix, UdpPeer]:
        """The peers as they are; of the fast path what the kernel's maps say, whatever was put there.

        Raises:
            KernelError: they cannot be read.
        """
        if self.fast is None:
            return dict(self._peers)
        found: dict[Prefix, UdpPeer] = {}
        shut: list[Prefix] = []
        for one in self.fast.peers():
            if one.passage.is_shut:
                shut.append(one.subnet)
            known = self._peers.get(one.subnet)
            is_known = known is not None and (
                (known.remote, known.port, known.mtu, known.is_near, self._index(known))
                == (one.remote, one.port, one.mtu, one.is_near, one.index)
            )
            if known is not None and is_known:
                found[one.subnet] = known
            else:
                device = self._devices.name(one.index) or ""
                found[one.subnet] = UdpPeer(
                    self.entry.device, one.subnet, one.remote, one.port, device, one.mtu, is_near=one.is_near
                )
        self._tell_of_shut(shut)
        return found

    def report(self) -> dict[str, Any]:
        """What a status page shows."""
        return {
            "acceleration": "engine" if self.fast is None else "ebpf",
            "reason": self.reason,
            "detour": self._detour_name,
            "detour_reason": self._no_detour,
            "ebpf": {} if self.fast is None else self.fast.counters(),
            "engine": {} if self.engine is None else self.engine.counters(),
            "peer_count": len(self._peers),
            "peers": self._traffic(),
        }

    @property
    def _detour_name(self) -> str:
        return "" if self.fast is None or self.detour is None else self.entry.detour

    @property
    def _no_detour(self) -> str:
        """Why packets do without the detour; empty where they need not."""
        if self.fast is None:
            return ""
        if self.detour is None:
            return self.entry.detour_reason or f"no device {self.entry.detour} of ours is up"
        if not self._shut:
            return ""
        others = f" and {len(self._shut) - 1} more" if len(self._shut) > 1 else ""
        return (
            f"nothing from {self._shut[0]}{others} comes out of {self.entry.detour}: let UDP port"
            f" {self.entry.port} in (PREROUTING, INPUT), with no strict rp_filter on {self.entry.underlay}"
        )

    def _tell_of_shut(self, shut: Sequence[Prefix]) -> None:
        """Say in the log when the detour lets nothing of some peers out, and when it does again."""
        before, self._shut = self._shut, shut
        if shut and not before:
            log.warning("udp device=%s detour=shut because=%r", self.entry.device, self._no_detour)
        elif before and not shut:
            log.info("udp device=%s detour=%s", self.entry.device, self._detour_name)

    def announce(self) -> None:
        """Say in the log what carries packets, and why nothing better does."""
        entry = self.entry
        how = [f"device={entry.device}", f"local={format_address(entry.local)}", f"port={entry.port}"]
        if self.fast is None:
            log.info("udp acceleration=engine %s because=%r", " ".join(how), self.reason)
        elif self.detour is not None:
            log.info("udp acceleration=ebpf %s detour=%s", " ".join(how), self._detour_name)
        else:
            log.info("udp acceleration=ebpf %s detour=none because=%r", " ".join(how), self._no_detour)

    def _traffic(self) -> dict[str, dict[str, int]]:
        """What went to each peer and came from it, both ways of carrying together.

        Nothing where there are so many peers that to read them all would hold the agent up.
        """
        if len(self._peers) > _MOST_SHOWN:
            return {}
        found: dict[str, dict[str, int]] = {}
        names = ("tx_packets", "tx_bytes", "rx_packets", "rx_bytes")
        if self.engine is not None:
            for address, length, *counted in self.engine.peer_counters():
                found[str(Prefix(address, length))] = dict(zip(names, counted, strict=True))
        for one in self.fast.peers() if self.fast is not None else ():
            traffic = found.setdefault(str(one.subnet), dict.fromkeys(names, 0))
            for name in names:
                traffic[name] += getattr(one.traffic, name)
        return found

    def _name(self, program: str) -> str:
        """What the kernel calls a program where it is attached: two tunnels may share an interface."""
        return f"{program}/{self.entry.device}"

    def _index(self, peer: UdpPeer) -> int:
        """Of the interface that the programs send a peer's packets out of; 0 leaves them to the engine.

        The programs leave it to the network card to fill in checksums and to cut super-packets. A peer at the
        other end of a virtual wire gets them as they are, which only programs of the same kind can take.
        """
        link = self._devices.link(peer.device)
        if link is None or len(link.mac) != _ETHERNET_BYTES:
            return 0
        return link.index if leads_out(link) or peer.is_fast or self.engine is None else 0


def open_carrier(entry: UdpTunnel, devices: Devices, before: Carrier | None) -> Carrier:
    """A carrier that is attached nowhere yet.

    Args:
        entry: the tunnel.
        devices: which devices there are.
        before: what serves the tunnel until now, and whose peers the new one knows from the start.

    Raises:
        NotSupported: there is no way to carry packets on this host.
        KernelError: the device cannot be used, or the one way that the entry asks for.
    """
    carrier = Carrier(entry, devices, before)
    try:
        _load_programs(carrier, devices)
        _start_engine(carrier)
        failures = carrier.put(before.peers.values()) if before is not None else {}
        if failures:
            raise next(iter(failures.values()))
    except BaseException:
        carrier.close()
        raise
    carrier.announce()
    return carrier


def _load_programs(carrier: Carrier, devices: Devices) -> None:
    """The programs, or why they cannot be used.

    Raises:
        KernelError: they cannot, and the entry says they must.
    """
    entry = carrier.entry
    if entry.acceleration == "engine":
        carrier.reason = entry.reason
        return
    from loden.tables.udp_bpf import FastPath, Settings  # noqa: PLC0415  # and with it ctypes

    try:
        underlay = devices.link(entry.underlay)
        if underlay is None or len(underlay.mac) != _ETHERNET_BYTES:
            raise NotSupported(
                "attach",
                f"eBPF programs to {entry.underlay}",
                errnos.EOPNOTSUPP,
                detail="the interface has no Ethernet addresses",
            )
        detour = carrier.detour or Detour(0, 0, 0)
        settings = Settings(
            local=entry.local,
            port=entry.port,
            tun=carrier.tun_index,
            inside=entry.source,
            allow_unknown=entry.allow_unknown,
            detour_port=detour.port,
            detour_vni=detour.vni,
        )
        carrier.fast = FastPath(settings)
    except KernelError as error:
        if entry.acceleration == "ebpf":
            raise
        carrier.reason = str(error)


def _start_engine(carrier: Carrier) -> None:
    """The engine, where there is one.

    Raises:
        NotSupported: there is none, and no programs do without it.
    """
    from loden.tables import engine  # noqa: PLC0415  # a C extension that only udp needs

    entry = carrier.entry
    lack = engine.is_available()
    if lack:
        if carrier.fast is None:
            detail = f"no eBPF: {carrier.reason}; no engine: {lack}"
            raise NotSupported("carry", str(entry), errnos.ENOSYS, detail=detail, hint=_NEITHER)
        log.warning(
            "udp has no engine: %s; unroutable packets get no answer, fragments are not put together%s",
            lack,
            "" if carrier.detour else ", and over virtual wires rows of datagrams are lost",
        )
        return
    is_ipv4 = Family.of(entry.source) is Family.IPV4
    carrier.engine = engine.Engine(
        [carrier.queue],
        [carrier.socket.fileno()],
        source4=entry.source if is_ipv4 else b"",
        source6=b"" if is_ipv4 else entry.source,
        allow_unknown=entry.allow_unknown,
    )
    if carrier.fast is None:
        # Else whoever feeds it gets the processor first, and it finds long queues that no cache holds.
        missing = go_first()
        if missing:
            log.info("udp engine may have to wait for processors: %s", missing)
    carrier.engine.start()
    # The programs take one datagram at a time: what is merged before they see it goes the long way.
    merge(carrier.socket, is_on=carrier.fast is None)


def _require(devices: Devices, name: str) -> int:
    index = devices.index(name)
    if index is None:
        raise KernelError("use", f"device {name}", errnos.ENODEV)
    return index


def _for_engine(peer: UdpPeer) -> "Peer":
    from loden.tables.engine import Peer  # noqa: PLC0415

    return Peer(peer.subnet.address, peer.subnet.length, peer.remote, peer.port, peer.mtu)
