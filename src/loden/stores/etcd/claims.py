# SPDX-License-Identifier: Apache-2.0
"""How two hosts are kept from overlapping subnets by one comparison in etcd (COMPAT W7); pure.

Flannel's keys exclude each other only where they are equal. So each lease of ours also has a *claim* for each
of its subnets, whose key spells the subnet's bits: ``…/claims/4/0000101000000101…``. Subnets inside it have
keys that begin so, which is a range, and subnets around it have the keys that it begins with, which are few.
A transaction that finds all of those absent, and writes its own, cannot overlap another that did the same.
Flannel's nodes make no claims: of theirs we know by looking, before and after.
"""

from collections.abc import Iterator

from loden.address import Family, Prefix
from loden.lease import Lease
from loden.stores.etcd.messages import Target, equal

#: Nobody gives a host a subnet that is larger. Without a bound, the comparisons of a dual-stack lease might
#: be more than the 128 operations that etcd allows in a transaction.
_SHORTEST = {Family.IPV4: 8, Family.IPV6: 32}


def claim_key(claims: bytes, subnet: Prefix) -> bytes:
    """The key that claims a subnet.

    Args:
        claims: before all claims' keys.
        subnet: of either family.
    """
    bits = f"{subnet.first:0{subnet.family.bits}b}"[: subnet.length]
    return claims + (b"4/" if subnet.family is Family.IPV4 else b"6/") + bits.encode()


def ranges(claims: bytes, lease: Lease) -> Iterator[tuple[bytes, bytes]]:
    """Where claims lie that a lease would overlap: single keys, and ranges of keys with their ends."""
    for leg in lease.legs:
        key = claim_key(claims, leg.subnet)
        yield key, key + b"2"
        for length in range(_SHORTEST[leg.subnet.family], leg.subnet.length):
            yield claim_key(claims, Prefix.of(leg.subnet.address, length)), b""


def unclaimed(claims: bytes, lease: Lease) -> Iterator[bytes]:
    """The comparisons that hold where nobody claims what a lease claims; arguments as in :func:`ranges`."""
    return (equal(Target.VERSION, key, 0, end=end) for key, end in ranges(claims, lease))
