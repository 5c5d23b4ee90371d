# SPDX-License-Identifier: Apache-2.0
"""Addresses and prefixes, small enough to have a hundred thousand of.

An address is its packed form: 4 or 16 bytes in network byte order, as the kernel and the wire have it, so
that the family follows from the length and nothing is ever converted between the store's text and a
netlink message more than once. ``ipaddress`` objects cost two to three times the memory and five times the
time to hash (``bench.values`` prints both).
"""

import enum
import socket
from typing import Self

import msgspec


class Family(enum.IntEnum):
    """An address family, by its number in the kernel (``AF_INET``, ``AF_INET6``)."""

    IPV4 = socket.AF_INET
    IPV6 = socket.AF_INET6

    @property
    def bits(self) -> int:
        """The length of an address, in bits."""
        return 32 if self is Family.IPV4 else 128

    @property
    def size(self) -> int:
        """The length of an address, in bytes."""
        return self.bits // 8

    @classmethod
    def of(cls, address: bytes) -> "Family":
        """The family of a packed address.

        Raises:
            ValueError: neither 4 nor 16 bytes long.
        """
        if len(address) == 4:
            return cls.IPV4
        if len(address) == 16:
            return cls.IPV6
        raise ValueError(f"an address has 4 or 16 bytes, not {len(address)}")

    def __str__(self) -> str:
        return "IPv4" if self is Family.IPV4 else "IPv6"


def parse_address(text: str) -> bytes:
    """The packed form of an address in text, IPv4 without leading zeros, IPv6 without a zone.

    Raises:
        ValueError: the text is no address.
    """
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return socket.inet_pton(family, text)
    except (OSError, UnicodeEncodeError) as error:
        raise ValueError(f"{text!r} is no IP address") from error


def format_address(address: bytes) -> str:
    """The usual text of a packed address: dotted, or lower-case compressed hex.

    A v4-mapped IPv6 address prints as ``::ffff:192.0.2.1``; see COMPAT §1.1 for flannel's form of it.
    """
    return socket.inet_ntop(socket.AF_INET if len(address) == 4 else socket.AF_INET6, address)


def is_host(address: bytes) -> bool:
    """Whether an address can be another host's: not unspecified, loopback, multicast or broadcast."""
    if len(address) == 4:
        return address[0] not in (0, 127) and address[0] < 224
    return address[0] != 0xFF and int.from_bytes(address, "big") > 1


class Prefix(msgspec.Struct, frozen=True, order=True, gc=False):
    """A range of addresses, such as ``10.5.34.0/24``; the bits after *length* are zero.

    Args:
        address: the first address, packed.
        length: the number of leading bits that all share.
    """

    address: bytes
    length: int

    @classmethod
    def of(cls, address: bytes, length: int) -> Self:
        """The prefix that holds an address: bits after *length* are masked off.

        Raises:
            ValueError: the length does not fit the address's family.
        """
        bits = len(address) * 8
        if not 0 <= length <= bits:
            raise ValueError(f"a prefix length of {Family.of(address)} is 0 to {bits}, not {length}")
        host = bits - length
        value = int.from_bytes(address, "big") >> host << host
        return cls(value.to_bytes(len(address), "big"), length)

    @classmethod
    def parse(cls, text: str) -> Self:
        """A prefix in CIDR text; host bits are masked off, as flannel does (COMPAT §1.1).

        Raises:
            ValueError: the text is not an address, a slash and a length.
        """
        base, slash, length = text.partition("/")
        if (
            not slash
            or not length.isascii()
            or not length.isdigit()
            or (len(length) > 1 and length[0] == "0")
        ):
            raise ValueError(f"{text!r} is not an address range such as 10.5.0.0/16")
        return cls.of(parse_address(base), int(length))

    @classmethod
    def from_int(cls, family: Family, first: int, length: int) -> Self:
        """The prefix whose first address has the number *first*."""
        return cls.of(first.to_bytes(family.size, "big"), length)

    @property
    def family(self) -> Family:
        return Family.of(self.address)

    @property
    def first(self) -> int:
        """The first address, as a number."""
        return int.from_bytes(self.address, "big")

    @property
    def last(self) -> int:
        """The last address, as a number."""
        return self.first + self.size - 1

    @property
    def size(self) -> int:
        """How many addresses the prefix holds."""
        return 1 << (len(self.address) * 8 - self.length)

    @property
    def gateway(self) -> bytes:
        """The first address after the base, which the host's bridge carries (COMPAT §6)."""
        return (self.first + 1).to_bytes(len(self.address), "big")

    def holds(self, address: bytes) -> bool:
        """Whether an address lies in the prefix; never for the other family."""
        shift = len(self.address) * 8 - self.length
        return (
            len(address) == len(self.address)
            and int.from_bytes(address, "big") >> shift == self.first >> shift
        )

    def contains(self, other: "Prefix") -> bool:
        """Whether all of the other prefix lies in this one; never for the other family."""
        return other.length >= self.length and self.holds(other.address)

    def overlaps(self, other: "Prefix") -> bool:
        """Whether the two share an address: of two prefixes that do, one contains the other."""
        return self.contains(other) or other.contains(self)

    def __str__(self) -> str:
        return f"{format_address(self.address)}/{self.length}"
