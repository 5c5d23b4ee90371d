# SPDX-License-Identifier: Apache-2.0
"""Two hosts on a wire, and tunnels between them that need no agent; what carries them is up to the caller."""

import fcntl
import os
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from bench._common import ROOT
from loden.address import Family, Prefix, format_address, parse_address
from loden.errors import LabError
from loden.lab import namespaces
from loden.tables.engine import Engine, Peer

WIRE_MTU = 1500
OVERHEAD = {Family.IPV4: 28, Family.IPV6: 48}  # bytes of the outer IP and UDP headers
PORT = 8285
LOOP_PORT = 8286

_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # <linux/if_tun.h>
_IFF_TUN, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x0100, 0x1000, 0x4000
_CSUM, _TSO4, _TSO6, _TSO_ECN, _USO4, _USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33  # <asm-generic/socket.h>
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO = 10, 2  # <linux/in.h>
_IPV6_MTU_DISCOVER = 23  # <linux/in6.h>
_BUFFER_BYTES = 8 << 20
_PATIENCE_S = 10.0


class Side(msgspec.Struct, frozen=True):
    """One host of the two.

    Args:
        number: 1 or 2.
    """

    number: int

    @property
    def namespace(self) -> str:
        return f"wire-{self.number}"

    def wire(self, family: Family = Family.IPV4) -> bytes:
        """Its address on the wire, packed."""
        return parse_address(
            f"192.0.2.{self.number}" if family is Family.IPV4 else f"2001:db8::{self.number}"
        )

    def subnet(self, family: Family = Family.IPV4) -> Prefix:
        """What is behind the engine's tunnel; its first address is the host's own."""
        return Prefix.parse(
            f"10.5.{self.number}.0/24" if family is Family.IPV4 else f"fd00:5:0:{self.number}::/64"
        )

    @property
    def loop_address(self) -> bytes:
        """Its address in the tunnel of the one-packet loop."""
        return parse_address(f"10.6.0.{self.number}")


SIDES = (Side(1), Side(2))

#: What goes through the tunnel.
NETWORKS = {Family.IPV4: Prefix.parse("10.5.0.0/16"), Family.IPV6: Prefix.parse("fd00:5::/48")}


@contextmanager
def wire() -> Iterator[None]:
    """The two namespaces, ``eth0`` in each the end of one wire."""
    lines = [f"netns add {side.namespace}" for side in SIDES]
    lines.append("link add eth0 netns wire-1 type veth peer name eth0 netns wire-2")
    run_ip(lines)
    try:
        for side in SIDES:
            run_ip(
                [
                    "link set lo up",
                    f"address add {format_address(side.wire())}/24 dev eth0",
                    f"address add {format_address(side.wire(Family.IPV6))}/64 dev eth0 nodad",
                    "link set eth0 up",
                ],
                side,
            )
        for side in SIDES:
            _wait_until_usable(side, side.wire(Family.IPV6))
        yield
    finally:
        run_ip([f"netns del {side.namespace}" for side in SIDES])


def _wait_until_usable(side: Side, address: bytes) -> None:
    """The kernel takes an IPv6 address into use when it has noticed the carrier."""
    text = format_address(address)
    command = ("ip", "-netns", side.namespace, "-6", "route", "show", "table", "local", "type", "local")
    deadline = time.monotonic() + _PATIENCE_S
    while f"{text} " not in subprocess.run(command, capture_output=True, text=True, check=False).stdout:
        if time.monotonic() > deadline:
            raise LabError(f"use {text} in {side.namespace}: not possible after {_PATIENCE_S:g} s")
        time.sleep(0.01)


def run_ip(lines: Sequence[str], side: Side | None = None) -> None:
    """``ip -batch``, in the namespace of a side or in the caller's.

    Raises:
        LabError: with what it said.
    """
    where = () if side is None else ("-netns", side.namespace)
    text = "\n".join(lines) + "\n"
    done = subprocess.run(
        ("ip", *where, "-batch", "-"), input=text, text=True, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise LabError(f"run ip: {done.stderr.strip()}")


def open_tun(name: str, *, plain: bool = False, queues: int = 1) -> list[int]:
    """The queues of a new TUN device in the caller's namespace; with all offloads that the kernel has.

    Args:
        name: of the device.
        plain: without virtio headers and offloads.
        queues: how many.
    """
    flags = _IFF_TUN | _IFF_NO_PI | (0 if plain else _IFF_VNET_HDR) | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    found = []
    for _ in range(queues):
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        found.append(fd)
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if not plain:
            _set_offloads(fd)
    return found


def _set_offloads(fd: int) -> None:
    usual = _CSUM | _TSO4 | _TSO6 | _TSO_ECN
    try:
        fcntl.ioctl(fd, _TUNSETOFFLOAD, usual | _USO4 | _USO6)
    except OSError:  # before 399e0827642f ("driver/net/tun: Added features for USO.", v6.2)
        fcntl.ioctl(fd, _TUNSETOFFLOAD, usual)


def open_udp(family: Family, port: int) -> socket.socket:
    """A bound socket as the engine wants it, in the caller's namespace."""
    found = socket.socket(family, socket.SOCK_DGRAM)
    if family is Family.IPV6:
        found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _IP_PMTUDISC_DO)
    else:
        found.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _IP_PMTUDISC_DO)
    for forced, usual in ((_SO_SNDBUFFORCE, socket.SO_SNDBUF), (_SO_RCVBUFFORCE, socket.SO_RCVBUF)):
        try:
            found.setsockopt(socket.SOL_SOCKET, forced, _BUFFER_BYTES)
        except PermissionError:  # root in a user namespace: as much as the system allows
            found.setsockopt(socket.SOL_SOCKET, usual, _BUFFER_BYTES)
    found.bind(("", port))
    return found


def engine_on(
    side: Side,
    stack: ExitStack,
    *,
    outer: Family = Family.IPV4,
    queues: int = 1,
    allow_unknown: bool = False,
) -> Engine:
    """The engine between a new device ``flannel0`` and port 8285 of a side; the other side is its peer.

    Args:
        side: where.
        stack: stops the engine.
        outer: the family between the hosts.
        queues: of the device.
        allow_unknown: as in :class:`Engine`.
    """
    engine = namespaces.inside(side.namespace, lambda: _open_engine(side, queues, allow_unknown))
    stack.callback(engine.stop)
    mtu = WIRE_MTU - OVERHEAD[outer]
    lines = [f"link set flannel0 mtu {mtu} gso_max_size {_gso_size(mtu)} up"]
    for family in Family:
        own, whole = side.subnet(family), NETWORKS[family]
        nodad = "nodad" if family is Family.IPV6 else ""
        lines.append(f"address add {format_address(own.address)}/{family.bits} dev flannel0 {nodad}")
        lines.append(f"route add {whole} dev flannel0 src {format_address(own.address)}")
    run_ip(lines, side)
    _wait_until_usable(side, side.subnet(Family.IPV6).address)
    engine.change([peer_of(other_of(side), family, outer=outer) for family in Family], ())
    engine.start()
    return engine


def _gso_size(mtu: int) -> int:
    """Super-packets that fit, with the headers of every segment, into one message to the socket."""
    outer, inner = 65_487, 52  # most bytes of a message; a TCP header with its usual options, and one of IPv4
    return outer // mtu * (mtu - inner) + inner


def other_of(side: Side) -> Side:
    """The side at the other end."""
    return SIDES[2 - side.number]


def peer_of(side: Side, family: Family, *, outer: Family = Family.IPV4, mtu: int = 0) -> Peer:
    """A side as the other one's peer.

    Args:
        side: the peer.
        family: of its subnet.
        outer: of its address on the wire.
        mtu: as in :class:`Peer`.
    """
    return Peer(side.subnet(family).address, side.subnet(family).length, side.wire(outer), PORT, mtu)


def _open_engine(side: Side, queues: int, allow_unknown: bool) -> Engine:
    tun = open_tun("flannel0", queues=queues)
    # The kernel takes ICMP errors from one of its own addresses only where it is told to.
    Path("/proc/sys/net/ipv4/conf/flannel0/accept_local").write_text("1")
    udp = [open_udp(family, PORT) for family in Family]
    try:
        return Engine(
            tun,
            [one.fileno() for one in udp],
            source4=side.subnet(Family.IPV4).address,
            source6=side.subnet(Family.IPV6).address,
            allow_unknown=allow_unknown,
        )
    finally:
        for fd in tun:
            os.close(fd)
        for one in udp:
            one.close()


@contextmanager
def engines() -> Iterator[tuple[Engine, Engine]]:
    """The engine on both sides, with the other as its peer."""
    with ExitStack() as stack:
        one, two = (engine_on(side, stack) for side in SIDES)
        yield one, two


@contextmanager
def loops(program: Path, sides: Sequence[Side] = SIDES) -> Iterator[None]:
    """The anchor on both sides: a tunnel that moves one packet with each system call."""
    with ExitStack() as stack:
        for side in sides:
            (other,) = (one for one in sides if one is not side)
            (tun,), udp = namespaces.inside(side.namespace, _open_loop)
            address = format_address(side.loop_address)
            run_ip(["link set loop0 mtu 1472 up", f"address add {address}/24 dev loop0"], side)
            words = (tun, udp.fileno(), format_address(other.wire()), LOOP_PORT)
            running = subprocess.Popen(
                (program, "loop", *map(str, words)), pass_fds=(tun, udp.fileno()), stdin=subprocess.DEVNULL
            )
            stack.callback(running.wait)
            stack.callback(running.kill)
            os.close(tun)
            udp.close()
        yield


def _open_loop() -> tuple[list[int], socket.socket]:
    return open_tun("loop0", plain=True), open_udp(Family.IPV4, LOOP_PORT)


@contextmanager
def packets_program() -> Iterator[Path]:
    """``bench/packets.c``, compiled.

    Raises:
        LabError: there is no compiler.
    """
    with tempfile.TemporaryDirectory(prefix="loden-bench-") as folder:
        program = Path(folder, "packets")
        source = ROOT / "bench" / "packets.c"
        command = ("cc", "-std=gnu11", "-D_GNU_SOURCE", "-O2", str(source), "-o", str(program))
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise LabError("compile bench/packets.c: no C compiler", hint="apt install gcc") from error
        if done.returncode != 0:
            raise LabError(f"compile bench/packets.c: {done.stderr}")
        yield program
