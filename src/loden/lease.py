# SPDX-License-Identifier: Apache-2.0
"""A lease: one host's claim to a subnet, and what others need to reach it.

Keys and values are flannel's, byte for byte where flannel reads them (COMPAT §2.2 and §2.3), in every
store: what SQLite holds could be copied into etcd as it stands.
"""

import re
import struct
import sys
from collections.abc import Iterator

import msgspec

from loden.address import Family, Prefix, format_address, parse_address
from loden.errors import MalformedLease


class Leg(msgspec.Struct, frozen=True, gc=False):
    """What a lease says for one address family.

    Args:
        subnet: the host's container subnet.
        public: where the host is reached, packed; None where the writer left it out.
        data: the backend's own JSON for this family, as compact text; None where there is none.
    """

    subnet: Prefix
    public: bytes | None = None
    data: bytes | None = None


class _Port(msgspec.Struct, frozen=True):
    """What several backends' data have in common (COMPAT §2.3)."""

    Port: int = 0


_port_decoder = msgspec.json.Decoder(_Port)


def public_port(leg: Leg) -> int:
    """The UDP port that a lease announces for one family; 0 where it says nothing of one that could be."""
    try:
        port = _port_decoder.decode(leg.data or b"{}").Port
    except msgspec.DecodeError:
        return 0
    return port if 0 < port < 1 << 16 else 0


class Lease(msgspec.Struct, frozen=True, gc=False):
    """One host's claim: a leg for each address family, at least one.

    Args:
        ipv4, ipv6: the legs.
        backend_type: the name peers compare, case and all; empty for udp, alloc and the clouds.
    """

    ipv4: Leg | None = None
    ipv6: Leg | None = None
    backend_type: str = ""

    def leg(self, family: Family) -> Leg | None:
        """The leg of one family."""
        return self.ipv4 if family is Family.IPV4 else self.ipv6

    @property
    def legs(self) -> Iterator[Leg]:
        """The legs there are, IPv4 first."""
        if self.ipv4 is not None:
            yield self.ipv4
        if self.ipv6 is not None:
            yield self.ipv6

    @property
    def key(self) -> str:
        """The lease's name in a store: ``10.5.34.0-24``, with ``&fc00:0:0:1::-64`` behind it in dual stack.

        An IPv6-only lease has the zero IPv4 part, ``0.0.0.0-0&…``.
        """
        ipv4 = _key_text(self.ipv4.subnet) if self.ipv4 else "0.0.0.0-0"
        return ipv4 if self.ipv6 is None else f"{ipv4}&{_key_text(self.ipv6.subnet)}"

    @classmethod
    def make(cls, legs: dict[Family, Leg], backend_type: str = "") -> "Lease":
        """A lease from its legs."""
        return cls(ipv4=legs.get(Family.IPV4), ipv6=legs.get(Family.IPV6), backend_type=backend_type)

    def __str__(self) -> str:
        return " ".join(str(leg.subnet) for leg in self.legs)


def _key_text(subnet: Prefix) -> str:
    text = format_address(subnet.address)
    if ":" in text and "." in text:
        # The dotted tail that inet_ntop gives to ::/96 and v4-mapped addresses is not in a key's grammar.
        words = struct.unpack("!8H", subnet.address)
        text = "::" + ":".join(f"{word:x}" for word in words[5 if words[5] else 6 :])
    return f"{text}-{subnet.length}"


# The pattern is anchored at its end only, so that any path may stand before the key (COMPAT §2.2).
_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([a-f0-9:]+)-(\d+))?\Z", re.ASCII)


def parse_key(key: str) -> tuple[Prefix | None, Prefix | None]:
    """The subnets in a lease's key, IPv4 and IPv6; the zero IPv4 part counts as none.

    Args:
        key: the last part of a store's key, or the whole of it.

    Raises:
        MalformedLease: the key does not have the form of COMPAT §2.2.
    """
    match = _KEY.search(key)
    if match is None:
        raise MalformedLease(
            f"read lease key {key!r}: not of the form 10.5.34.0-24 or 10.5.34.0-24&fc00:0:0:1::-64"
        )
    base4, length4, base6, length6 = match.groups()
    try:
        ipv4 = _key_part(base4, length4, most=31)
        ipv6 = None if base6 is None else _key_part(base6, length6, most=127)
    except ValueError as error:
        raise MalformedLease(f"read lease key {key!r}: {error}") from error
    if ipv4.length == 0 and ipv4.first == 0:
        if ipv6 is None:
            raise MalformedLease(f"read lease key {key!r}: it names no subnet of either family")
        return None, ipv6
    return ipv4, ipv6


def _key_part(base: str, length: str, *, most: int) -> Prefix:
    if int(length) > most:
        raise ValueError(f"prefix length {length} is more than {most}")
    return Prefix.of(parse_address(base), int(length))


class _Value(msgspec.Struct, frozen=True):
    """The lease's JSON; PublicIPv6 is always there, the others are left out when empty (COMPAT §2.3)."""

    PublicIP: str = "0.0.0.0"
    PublicIPv6: str | None = None
    BackendType: str | msgspec.UnsetType | None = msgspec.UNSET
    BackendData: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    BackendV6Data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(_Value)
_members_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_FIELDS = {name.lower(): name for name in _Value.__struct_fields__}


def encode_value(lease: Lease) -> bytes:
    """The lease's value in a store, flannel's JSON in flannel's order of fields."""
    v4, v6 = lease.ipv4, lease.ipv6
    return _encoder.encode(
        _Value(
            PublicIP=format_address(v4.public) if v4 and v4.public else "0.0.0.0",
            PublicIPv6=format_address(v6.public) if v6 and v6.public else None,
            BackendType=lease.backend_type or msgspec.UNSET,
            BackendData=msgspec.Raw(v4.data) if v4 and v4.data else msgspec.UNSET,
            BackendV6Data=msgspec.Raw(v6.data) if v6 and v6.data else msgspec.UNSET,
        )
    )


def decode(key: str, value: bytes) -> Lease:
    """The lease that a key and a value in a store stand for.

    Args:
        key: as :func:`parse_key` takes it.
        value: flannel's JSON; member names in any case, unknown members ignored, absent ones tolerated.

    Raises:
        MalformedLease: with the key's name; it says nothing of other leases.
    """
    subnet4, subnet6 = parse_key(key)
    try:
        found = _decode_value(value)
        public4 = None if found.PublicIP in ("", "0.0.0.0") else parse_address(found.PublicIP)
        public6 = parse_address(found.PublicIPv6) if found.PublicIPv6 else None
        if public4 is not None and len(public4) != 4:
            raise ValueError(f"PublicIP {found.PublicIP!r} is not an IPv4 address")
        if public6 is not None and len(public6) != 16:
            raise ValueError(f"PublicIPv6 {found.PublicIPv6!r} is not an IPv6 address")
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise MalformedLease(f"read lease {key!r}: {error}") from error
    return Lease(
        ipv4=None if subnet4 is None else Leg(subnet4, public4, _data(found.BackendData)),
        ipv6=None if subnet6 is None else Leg(subnet6, public6, _data(found.BackendV6Data)),
        backend_type=sys.intern(found.BackendType or ""),  # the same one in every lease of a cluster
    )


# What flannel and Loden write: these names in this case and order. Backend data is whatever follows.
_USUAL = re.compile(
    rb'\{"PublicIP":"[^"\\]*","PublicIPv6":(?:null|"[^"\\]*")(?:,"BackendType":"[^"\\]*")?'
    rb'(?:\}|,"BackendData":|,"BackendV6Data":)'
)


# No backend's data has so many. How deep a reader gets depends on who calls it: what passes here may end the
# process elsewhere.
_MOST_BRACKETS = 100


def _decode_value(value: bytes) -> _Value:
    """The usual spelling is read at once; any other, with names in any case, by a second look.

    Backend data that gets through can be read by whoever reads it later: it is UTF-8 and not deep, which the
    decoder does not ask of what it leaves raw.
    """
    if not value.isascii():
        value.decode()
    if value.count(b"[") + value.count(b"{") > _MOST_BRACKETS:
        raise ValueError(f"it has more than {_MOST_BRACKETS} lists and objects in it")
    if _USUAL.match(value):
        return _decoder.decode(value)
    members = _members_decoder.decode(value)
    folded = {_FIELDS[name.lower()]: raw for name, raw in members.items() if name.lower() in _FIELDS}
    return _decoder.decode(_encoder.encode(folded))


def _data(raw: msgspec.Raw | msgspec.UnsetType) -> bytes | None:
    """A copy of the raw JSON: a view would keep the whole value in memory. ``null`` is no data."""
    if raw is msgspec.UNSET or raw is None:
        return None
    text = bytes(raw)
    return None if text == b"null" else text
