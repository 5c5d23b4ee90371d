# SPDX-License-Identifier: Apache-2.0
"""Legacy iptables' tables as the kernel itself has them: read in one system call, without the program.

The kernel numbers no states of these tables and tells nobody of changes, so whoever wants to know has to
look. ``iptables-legacy-save`` turns thousands of rules of others into text for it; here the table comes as
one piece of memory, and only what concerns us is looked at.

Layouts (``linux/netfilter_ipv4/ip_tables.h``, ``netfilter_ipv6/ip6_tables.h``), in host byte order::

    struct ipt_getinfo     { char name[32]; u32 valid_hooks, hook_entry[5], underflow[5];
                             u32 num_entries, size; };
    struct ipt_get_entries { char name[32]; u32 size; u32 padding; struct ipt_entry entrytable[]; };
    struct ipt_entry       { struct ipt_ip ip (84 bytes, 136 in ip6t_entry); u32 nfcache;
                             u16 target_offset, next_offset; u32 comefrom; u64 packets, bytes; };
    struct xt_entry_target { u16 size; char name[29]; u8 revision; };  then the target's own

A chain of a user begins with an entry whose target is ``ERROR`` and says the chain's name; a jump is the
nameless target with the offset of the entry behind that one.
"""

import ctypes
import errno as errnos
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import msgspec

from loden.address import Family
from loden.errors import KernelError
from loden.firewall.iptables import CHAINS, Chain, legacy_tables

_libc = ctypes.CDLL(None, use_errno=True)

_SO_GET_INFO, _SO_GET_ENTRIES = 64, 65
_LEVELS = {Family.IPV4: socket.IPPROTO_IP, Family.IPV6: socket.IPPROTO_IPV6}
_INFO = struct.Struct("=32sI5I5III")
_ENTRIES = struct.Struct("=32sII")
_OFFSETS = struct.Struct("=HH")  # target_offset, next_offset
#: Where an entry's parts are: those offsets, and what follows the counters, which are no part of a rule.
_OFFSETS_AT = {Family.IPV4: 88, Family.IPV6: 140}
_ENTRY_BYTES = {Family.IPV4: 112, Family.IPV6: 168}
_TARGET_BYTES = 32
_VERDICT = struct.Struct("=i")
#: The beginning of a target that names a chain: its size, its name.
_CHAIN_HEAD = struct.pack("=H", 64) + b"ERROR\0"
#: ``NF_INET_*`` of the chains that jump to ours.
_HOOKS = {"FORWARD": 2, "POSTROUTING": 4}
_DROP = -1  # -NF_DROP - 1
_TRIES = 5


class Size(msgspec.Struct, frozen=True):
    """How large a table is.

    Args:
        entries: rules, policies, and the beginnings and ends of chains.
        size: in bytes.
    """

    entries: int
    size: int


class LegacyTables:
    """The tables of the network namespace of the thread that makes it. Looking creates none."""

    def __init__(self) -> None:
        self._sockets: dict[Family, socket.socket] = {}
        for family in Family:
            with suppress(OSError):  # a kernel without IPv6
                self._sockets[family] = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)

    def close(self) -> None:
        """Close the sockets; idempotent."""
        for opened in self._sockets.values():
            opened.close()

    def sizes(self) -> dict[tuple[Family, str], Size]:
        """Every table that there is. Costs next to nothing.

        Raises:
            KernelError: we may not look.
        """
        return {
            (family, name): Size(*self._info(family, name)[-2:])
            for family in self._sockets
            for name in sorted(legacy_tables(family))
        }

    def read(self, family: Family, name: str) -> "LegacyTable":
        """One table, which must be there: 1.2 ms of processor time a thousand rules.

        Raises:
            KernelError: we may not look, or it changes all the time.
        """
        for _ in range(_TRIES):
            info = self._info(family, name)
            buffer = bytearray(_ENTRIES.size + info[-1])
            _ENTRIES.pack_into(buffer, 0, name.encode(), info[-1], 0)
            with suppress(BlockingIOError):  # its size changed meanwhile
                self._ask(family, _SO_GET_ENTRIES, buffer)
                return LegacyTable(family, info, buffer)
        raise KernelError("read", f"legacy table {name} of {family}", errnos.EAGAIN)

    def _info(self, family: Family, name: str) -> tuple[int, ...]:
        """``hook_entry`` and ``underflow`` of five hooks each, the number of entries, their size."""
        buffer = bytearray(_INFO.size)
        buffer[: len(name)] = name.encode()
        try:
            self._ask(family, _SO_GET_INFO, buffer)
        except BlockingIOError as error:
            raise KernelError("read", f"legacy table {name} of {family}", errnos.EAGAIN) from error
        return _INFO.unpack(buffer)[2:]

    def _ask(self, family: Family, option: int, buffer: bytearray) -> None:
        """Have the kernel fill a buffer that says what is asked for; Python's own call passes none in."""
        size = ctypes.c_uint(len(buffer))
        where = (ctypes.c_char * len(buffer)).from_buffer(buffer)
        number = self._sockets[family].fileno()
        if _libc.getsockopt(number, _LEVELS[family], option, where, ctypes.byref(size)):
            errno = ctypes.get_errno()
            if errno == errnos.EAGAIN:
                raise BlockingIOError(errno, os.strerror(errno))
            raise KernelError("read", f"legacy tables of {family}", errno)


class LegacyTable:
    """What one table held.

    Args:
        family: of its addresses.
        info: as :meth:`LegacyTables.read` has it.
        buffer: the kernel's answer, entries behind a head.
    """

    def __init__(self, family: Family, info: tuple[int, ...], buffer: bytearray) -> None:
        self._family = family
        self._starts, self._policies, self._count = info[:5], info[5:10], info[10]
        self._buffer = buffer

    def drops(self, base: str) -> bool:
        """Whether the policy of a base chain is DROP."""
        return self._verdict(_ENTRIES.size + self._policies[_HOOKS[base]]) == _DROP

    def ours(self, chain: Chain) -> tuple[bytes, ...]:
        """The jumps to a chain of ours and its rules, in order, as bytes that compare; maybe none."""
        first = self._first_rule(chain)
        hook = _HOOKS[chain.base]
        jumps = [
            b"jump" + self._matches(start)
            for start in self._entries(self._starts[hook], self._policies[hook])
            if self._is_jump(start, chain, first)
        ]
        rules = [] if first is None else [self._rule(start) for start in self._chain(first)]
        return (*jumps, *rules)

    def count_foreign(self) -> int:
        """How many rules others have."""
        chains = self._buffer.count(_CHAIN_HEAD) - 1  # the table ends with one more
        hooks = len(set(self._policies) - {0xFFFFFFFF})
        own = 0
        for chain in CHAINS.values():
            first = self._first_rule(chain)
            # A chain of ours ends with a return of its own, which was counted with the chain.
            own += max(0, len(self.ours(chain)) - (first is not None))
        return self._count - 1 - hooks - 2 * chains - own

    def _first_rule(self, chain: Chain) -> int | None:
        """The offset behind the entry that names a chain."""
        name, place = chain.name.encode() + b"\0", 0
        while (place := self._buffer.find(name, place)) >= 0:
            head = place - _TARGET_BYTES
            if self._buffer.startswith(_CHAIN_HEAD, head):
                return self._next(head - _ENTRY_BYTES[self._family])
            place += 1
        return None

    def _entries(self, start: int, end: int) -> Iterator[int]:
        """Offsets in the buffer of the entries from one to before another, by their offsets in the table."""
        if start == 0xFFFFFFFF:  # this table has no such hook
            return
        place = _ENTRIES.size + start
        while place < _ENTRIES.size + end:
            yield place
            place = self._next(place)

    def _chain(self, first: int) -> Iterator[int]:
        """The entries of a user's chain, its end included."""
        place = first
        while place < len(self._buffer) and not self._buffer.startswith(_CHAIN_HEAD, self._target(place)):
            yield place
            place = self._next(place)

    def _target(self, start: int) -> int:
        offset: int = _OFFSETS.unpack_from(self._buffer, start + _OFFSETS_AT[self._family])[0]
        return start + offset

    def _next(self, start: int) -> int:
        step: int = _OFFSETS.unpack_from(self._buffer, start + _OFFSETS_AT[self._family])[1]
        return start + max(step, _ENTRY_BYTES[self._family])

    def _verdict(self, start: int) -> int | None:
        """What a plain target says: negative for a verdict, else the offset jumped to."""
        target = self._target(start)
        if self._buffer[target + 2]:  # it has a name, and decides for itself
            return None
        (verdict,) = _VERDICT.unpack_from(self._buffer, target + _TARGET_BYTES)
        return int(verdict)

    def _is_jump(self, start: int, chain: Chain, first: int | None) -> bool:
        if first is not None and self._verdict(start) == first - _ENTRIES.size:
            return True
        return self._buffer.find(chain.comment.encode() + b"\0", start, self._target(start)) >= 0

    def _matches(self, start: int) -> bytes:
        addresses = self._buffer[start : start + _OFFSETS_AT[self._family]]
        return bytes(addresses + self._buffer[start + _ENTRY_BYTES[self._family] : self._target(start)])

    def _rule(self, start: int) -> bytes:
        return self._matches(start) + bytes(self._buffer[self._target(start) : self._next(start)])
