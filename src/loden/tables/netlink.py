# SPDX-License-Identifier: Apache-2.0
"""rtnetlink and nfnetlink: messages in batches, dumps, and the socket they go through.

The one module that opens AF_NETLINK. Three things make it fast (``bench/netlink`` prints the figures):

- One ``send`` carries many messages. The kernel works through them in order before ``send`` returns, so the
  answers are waiting when we read.
- Only the last message of a batch asks for an acknowledgement. A message that fails is answered whether it
  asked or not, so thousands that work cost no answer at all.
- A message whose layout is known is packed by one precompiled ``struct``.

Layouts (``linux/netlink.h``), all integers in host byte order unless a name says otherwise::

    struct nlmsghdr { u32 nlmsg_len; u16 nlmsg_type; u16 nlmsg_flags; u32 nlmsg_seq; u32 nlmsg_pid; };
    struct nlattr   { u16 nla_len; u16 nla_type; };  followed by the value, padded to 4 bytes
    struct nlmsgerr { int error; struct nlmsghdr msg; };  then, with NETLINK_EXT_ACK, attributes
"""

import array
import asyncio
import errno as errnos
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import msgspec

from loden.errors import KernelError, NotSupported

#: ``NETLINK_NETFILTER``; Python names only ``NETLINK_ROUTE`` and a few that are gone.
NETLINK_NETFILTER = 12

NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_DUMP = 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400

NLMSG_ERROR, NLMSG_DONE = 2, 3

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWQDISC, RTM_DELQDISC, RTM_GETQDISC = 36, 37, 38
RTM_NEWTFILTER, RTM_DELTFILTER, RTM_GETTFILTER = 44, 45, 46
RTM_NEWNETCONF = 80
RTM_NEWNEXTHOP, RTM_DELNEXTHOP, RTM_GETNEXTHOP = 104, 105, 106

#: Ours, for routes, nexthops and neighbours (``rtm_protocol``, ``nh_protocol``, ``NDA_PROTOCOL``): an L.
#: None of the numbers in ``linux/rtnetlink.h`` and iproute2's ``rt_protos`` is 76.
PROTOCOL = 76

AF_BRIDGE = 7

_SOL_NETLINK = 270
_NETLINK_ADD_MEMBERSHIP, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 1, 10, 11, 12
_SO_RCVBUFFORCE = 33
_SO_ATTACH_FILTER = 26
_BPF_LOAD_U32, _BPF_LOAD_U16 = 0x20, 0x28
_NLMSGERR_ATTR_MSG = 1
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200

_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_SEQUENCE_OFFSET, _FLAGS_OFFSET = 8, 6
_U16, _U32, _I32 = struct.Struct("=H"), struct.Struct("=I"), struct.Struct("=i")

#: Messages in one send: enough that system calls do not count, little enough that a batch blocks the
#: event loop for a few milliseconds at most.
_BATCH = 256
_RECEIVE_BYTES = 1 << 16  # the kernel fills datagrams of a dump up to 32 KiB
_BUFFER_BYTES = 8 << 20
_DUMP_TRIES = 5


#: The fixed part of a message's body, bytes, by its type without the lowest two bits, which tell new, delete
#: and get apart: ifinfomsg, ifaddrmsg, rtmsg, ndmsg, tcmsg twice, nhmsg.
_FIXED_BYTES = {16: 16, 20: 8, 24: 12, 28: 12, 36: 20, 44: 20, 104: 8}


class Refusal(msgspec.Struct, frozen=True):
    """The kernel's answer to a message that failed.

    Args:
        errno: positive; 0 in what only acknowledges.
        detail: the kernel's own words (``NLMSGERR_ATTR_MSG``), or empty.
    """

    errno: int
    detail: str = ""

    def error(self, operation: str, subject: object, *, hint: str = "") -> KernelError:
        """The refusal as an error about one operation on one object."""
        return KernelError(operation, str(subject), self.errno, detail=self.detail, hint=hint)


def attribute(kind: int, value: bytes) -> bytes:
    """One ``struct nlattr`` with its value and padding."""
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def attribute_u32(kind: int, value: int) -> bytes:
    """An attribute holding a 32-bit number in host byte order."""
    return attribute(kind, _U32.pack(value))


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(kind, b"".join(attributes))


def message(kind: int, flags: int, body: bytes) -> bytes:
    """A request; its sequence number is filled in when it is sent."""
    return _HEADER.pack(16 + len(body), kind, flags | NLM_F_REQUEST, 0, 0) + body


def parse_attributes(buffer: bytes, start: int, end: int) -> dict[int, bytes]:
    """The attributes between two offsets, by type without its flag bits; the last of a type wins.

    An attribute whose length lies ends the walk: what stands before it is returned.
    """
    found: dict[int, bytes] = {}
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(buffer, start)
        if length < 4 or start + length > end:
            break
        found[kind & 0x3FFF] = buffer[start + 4 : start + length]
        start += (length + 3) & ~3
    return found


class Message(msgspec.Struct, frozen=True, gc=False):
    """One message inside what was received.

    Args:
        kind: ``nlmsg_type``.
        buffer: the whole datagram.
        start: offset of the body, behind the header.
        end: offset behind the message.
    """

    kind: int
    buffer: bytes
    start: int
    end: int


def number_in(attributes: Mapping[int, bytes], kind: int, default: int = 0) -> int:
    """A 32-bit number in host byte order among attributes; the default where there is none."""
    value = attributes.get(kind, b"")
    return int.from_bytes(value, sys.byteorder) if len(value) == 4 else default


def parse_messages(buffer: bytes) -> Iterator[Message]:
    """The messages of one datagram, ``NLMSG_DONE`` and ``NLMSG_ERROR`` not among them.

    A message whose length lies ends the walk; one too short for the fixed part of its type is left out.
    """
    for offset, length, kind, _flags, _sequence in _walk(buffer):
        if kind > NLMSG_DONE and length >= 16 + _FIXED_BYTES.get(kind & ~3, 0):
            yield Message(kind, buffer, offset + 16, offset + length)


def _walk(buffer: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """The headers in one datagram: offset, length, type, flags, sequence number."""
    offset, size = 0, len(buffer)
    while offset + 16 <= size:
        length, kind, flags, sequence, _port = _HEADER.unpack_from(buffer, offset)
        if length < 16 or offset + length > size:
            return
        yield offset, length, kind, flags, sequence
        offset += (length + 3) & ~3


class Netlink:
    """A socket for requests, in the network namespace of the thread that makes it.

    Not for two tasks at once: the reconciler has one, and whoever else asks the kernel has its own.

    Args:
        protocol: of the netlink family (``NETLINK_ROUTE``, ``NETLINK_NETFILTER``).

    Raises:
        OSError: the kernel has no such protocol.
        KernelError: it is too old.
    """

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = _open(protocol)
        self._sequence = 1
        self.port: int = self._socket.getsockname()[0]

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._socket.close()

    async def batch(self, messages: Iterable[bytes]) -> dict[int, Refusal]:
        """Send messages in order; for each that failed, its place and the kernel's answer.

        The messages behind one that failed are worked on all the same. What the kernel's answer to is lost
        (``ENOBUFS``) counts as failed: every message that the tables send may be sent again.

        Args:
            messages: made as they are needed, so that a hundred thousand of them are never held at once.
        """
        refused: dict[int, Refusal] = {}
        coming = iter(messages)
        first = 0
        while part := list(islice(coming, _BATCH)):
            for place, answer in self._exchange(part, has_answers=False).items():
                if isinstance(answer, Refusal) and answer.errno:
                    refused[first + place] = answer
            first += len(part)
            await asyncio.sleep(0)
        return refused

    async def request(self, one: bytes) -> Refusal | None:
        """Send one message; the kernel's answer if it failed."""
        return (await self.batch([one])).get(0)

    async def dump(self, kind: int, body: bytes) -> list[bytes]:
        """The datagrams that answer a dump, for :func:`parse_messages`.

        A dump that the kernel marks as interrupted is read again, whole, a few times: partial data is
        never returned (``NLM_F_DUMP_INTR``).

        Raises:
            KernelError: the kernel refused, or kept changing under the dump.
        """
        for _attempt in range(_DUMP_TRIES):
            datagrams = await self._dump_once(kind, body)
            if datagrams is not None:
                return datagrams
        raise KernelError("dump", f"rtnetlink type {kind}", errnos.EINTR, detail="the table kept changing")

    def ask(self, messages: Sequence[bytes]) -> list[Message | Refusal]:
        """Send requests that are answered with one message each (route lookups); the answers, in order."""
        answers: list[Message | Refusal] = []
        for first in range(0, len(messages), _BATCH):
            part = messages[first : first + _BATCH]
            found = self._exchange(part, has_answers=True)
            answers += [found[place] for place in range(len(part))]
        return answers

    def _exchange(self, messages: Sequence[bytes], *, has_answers: bool) -> dict[int, Message | Refusal]:
        """Send messages; what comes back for each, by place.

        Args:
            messages: at most a batch.
            has_answers: each is answered with a message; else only what fails is, and the last one.
        """
        found: dict[int, Message | Refusal] = {}
        last = len(messages) - 1
        try:
            first = self._send(messages, acknowledge_last=not has_answers)
            while len(found) <= last if has_answers else last not in found:
                for place, answer in _parse_answers(self._socket.recv(_RECEIVE_BYTES), first):
                    found[place] = answer
        except OSError as error:
            # Some answers are lost. Those still to be read must go as well: while the queue is not empty
            # the kernel drops every further answer without a word (NETLINK_S_CONGESTED).
            self._drain()
            lost = Refusal(error.errno or errnos.EIO, "the kernel's answer was lost")
            found = {place: found.get(place, lost) for place in range(last + 1)}
        return found

    def _drain(self) -> None:
        """Read and forget all that is waiting, a dump that is under way included."""
        while True:
            try:
                self._socket.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errnos.ENOBUFS:  # that is said once, before what is in the queue
                    return

    def _send(self, messages: Sequence[bytes], *, acknowledge_last: bool = False) -> int:
        """Number the messages and send them; the first number."""
        first = self._sequence
        self._sequence = (first + len(messages)) & 0x7FFFFFFF or 1
        buffer = bytearray().join(messages)
        offset = 0
        for place, one in enumerate(messages):
            _U32.pack_into(buffer, offset + _SEQUENCE_OFFSET, first + place)
            offset += len(one)
        if acknowledge_last:
            flags = offset - len(messages[-1]) + _FLAGS_OFFSET
            _U16.pack_into(buffer, flags, _U16.unpack_from(buffer, flags)[0] | NLM_F_ACK)
        self._socket.send(buffer)
        return first

    async def _dump_once(self, kind: int, body: bytes) -> list[bytes] | None:
        datagrams: list[bytes] = []
        is_consistent = True
        try:
            self._send([message(kind, NLM_F_DUMP, body)])
            while True:
                datagram = self._socket.recv(_RECEIVE_BYTES)
                for offset, _length, answer, flags, _sequence in _walk(datagram):
                    is_consistent = is_consistent and not flags & NLM_F_DUMP_INTR
                    if answer in (NLMSG_ERROR, NLMSG_DONE):
                        _require_success(datagram, offset, f"rtnetlink type {kind}")
                        return [*datagrams, datagram] if is_consistent else None
                datagrams.append(datagram)
                await asyncio.sleep(0)
        except (OSError, asyncio.CancelledError) as error:
            self._drain()  # the kernel serves one dump a socket at a time
            if isinstance(error, OSError):
                raise KernelError("dump", f"rtnetlink type {kind}", error.errno or errnos.EIO) from error
            raise


class Monitor:
    """A socket that hears what others change, in the network namespace of the thread that makes it.

    Args:
        groups: multicast groups (``RTNLGRP_*``).
        ignore_port: the :attr:`Netlink.port` whose own changes are of no interest. A classic BPF filter drops
            them inside the kernel, so that programming 80,000 entries does not flood the listener. Changes of
            a VXLAN device's forwarding entries are heard all the same: the kernel does not name the port.
        protocol: as for :class:`Netlink`.
        only_kind: the one type of message to hear, where that is not all; filtered inside the kernel too.
    """

    def __init__(
        self,
        groups: Sequence[int],
        *,
        ignore_port: int = 0,
        protocol: int = socket.NETLINK_ROUTE,
        only_kind: int = 0,
    ) -> None:
        self._socket = _open(protocol)
        self._socket.setblocking(False)
        if ignore_port:  # nlmsg_pid is the requester's port
            _filter(self._socket, _BPF_LOAD_U32, 12, _U32.pack(ignore_port), keeps=False)
        if only_kind:
            _filter(self._socket, _BPF_LOAD_U16, 4, _U16.pack(only_kind), keeps=True)
        try:
            for group in groups:
                self._socket.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._socket.close()

    def receive(self, most: int = 2 * _BATCH) -> list[Message] | None:
        """What has come in, up to a number of datagrams; None where something was lost (``ENOBUFS``)."""
        found: list[Message] = []
        for _datagram in range(most):
            try:
                found += parse_messages(self._socket.recv(_RECEIVE_BYTES))
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno == errnos.ENOBUFS:
                    return None
                raise
        return found


def _open(protocol: int) -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    try:
        opened.bind((0, 0))
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK):
            opened.setsockopt(_SOL_NETLINK, option, 1)
        try:
            opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
        except PermissionError:  # in a user namespace; what overflows is noticed and read again
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
    except OSError as error:
        opened.close()
        if error.errno == errnos.ENOPROTOOPT:
            hint = "Linux 4.20 or newer is needed (NETLINK_GET_STRICT_CHK)"
            raise NotSupported("open", "rtnetlink", errnos.ENOPROTOOPT, hint=hint) from error
        raise KernelError("open", "rtnetlink", error.errno or errnos.EIO) from error
    return opened


def _filter(opened: socket.socket, load: int, offset: int, value: bytes, *, keeps: bool) -> None:
    """Drop notifications whose first header has a value at an offset, or keep those alone.

    A classic BPF program of four instructions; its loads are big-endian, the header is not::

        ld [offset]; jeq #value, 0, 1; ret #equal; ret #unequal
    """
    swapped = int.from_bytes(value, "big")
    equal, unequal = (0xFFFFFFFF, 0) if keeps else (0, 0xFFFFFFFF)
    instructions = ((load, 0, 0, offset), (0x15, 0, 1, swapped), (0x06, 0, 0, equal), (0x06, 0, 0, unequal))
    program = array.array("B", b"".join(struct.pack("=HBBI", *one) for one in instructions))
    address, _bytes = program.buffer_info()
    opened.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(instructions), address))


def _parse_answers(datagram: bytes, first: int) -> Iterator[tuple[int, Message | Refusal]]:
    """The place of each request and what came back for it; a refusal of errno 0 is an acknowledgement."""
    for offset, length, kind, _flags, sequence in _walk(datagram):
        if not first <= sequence < first + _BATCH:
            continue  # of what was sent before and is of no interest any more
        if kind == NLMSG_ERROR:
            yield sequence - first, _refusal(datagram, offset)
        else:
            yield sequence - first, Message(kind, datagram, offset + 16, offset + length)


def _require_success(datagram: bytes, offset: int, subject: str) -> None:
    """The end of a dump carries 0 or a negative errno, in the same place as an error does.

    A routing table that nobody has put anything into yet does not exist (``ENOENT``): it is empty.
    """
    refusal = _refusal(datagram, offset)
    if refusal.errno not in (0, errnos.ENOENT):
        raise refusal.error("dump", subject)


def _refusal(datagram: bytes, offset: int) -> Refusal:
    """``NLMSG_ERROR`` or ``NLMSG_DONE`` as the errno and the words in it; errno 0 is success."""
    length, kind, flags, _sequence, _port = _HEADER.unpack_from(datagram, offset)
    if length < 20:
        return Refusal(0 if kind == NLMSG_DONE else errnos.EBADMSG)
    (error,) = _I32.unpack_from(datagram, offset + 16)
    start = offset + 20
    if kind == NLMSG_ERROR and length >= 36:  # the header of the request, and all of it unless capped
        start += 16 if flags & _NLM_F_CAPPED else _U32.unpack_from(datagram, start)[0]
    detail = b""
    if flags & _NLM_F_ACK_TLVS:
        detail = parse_attributes(datagram, start, offset + length).get(_NLMSGERR_ATTR_MSG, b"")
    return Refusal(abs(error), os.fsdecode(detail.rstrip(b"\0")))
