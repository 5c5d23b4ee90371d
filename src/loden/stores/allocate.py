# SPDX-License-Identifier: Apache-2.0
"""Which subnets a host may have, and which one it takes. Pure: no I/O, and chance comes in as an argument."""

from collections.abc import Iterable, Iterator
from random import Random

from loden.address import Family, Prefix
from loden.errors import NoFreeSubnet
from loden.network import Range


def fits(range_: Range, subnet: Prefix) -> bool:
    """Whether the configuration would hand out this subnet: length, SubnetMin and SubnetMax (COMPAT §2.6)."""
    return (
        subnet.family is range_.family
        and subnet.length == range_.subnet_length
        and range_.first.address <= subnet.address <= range_.last.address
    )


def allocate(range_: Range, taken: Iterable[Prefix], rng: Random) -> Prefix:
    """A free subnet, each as likely as any other.

    The subnets between SubnetMin and SubnetMax are numbered slots; a taken prefix, of whatever length, makes
    an interval of them used. The cost is one sort of those intervals and one pass over them: n log n in the
    number of leases, and independent of how many slots there are. Hosts that boot together draw from all
    that is free, not from the first hundred (COMPAT W26, W28).

    Args:
        range_: what to choose from.
        taken: prefixes in use, in any order, of any length and either family; they may overlap.
        rng: the source of chance.

    Raises:
        NoFreeSubnet: everything is taken.
    """
    slot_size = range_.first.size
    slots = (range_.last.first - range_.first.first) // slot_size + 1
    used = list(_merged(_intervals(range_, taken, slots)))
    free = slots - sum(end - start for start, end in used)
    if free <= 0:
        raise _exhausted(range_, slots)
    slot = rng.randrange(free)
    for start, end in used:
        if slot < start:
            break
        slot += end - start
    return Prefix.from_int(range_.family, range_.first.first + slot * slot_size, range_.subnet_length)


def _intervals(range_: Range, taken: Iterable[Prefix], slots: int) -> list[tuple[int, int]]:
    """The slots that each taken prefix uses, half open; nothing for those outside the range."""
    base, slot_size = range_.first.first, range_.first.size
    address_size = range_.family.size
    found = []
    for prefix in taken:
        if len(prefix.address) != address_size:
            continue
        first = prefix.first - base
        start = max(0, first // slot_size)
        end = min(slots, (first + prefix.size - 1) // slot_size + 1)
        if start < end:
            found.append((start, end))
    return found


def _merged(intervals: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The same slots in order, as intervals that do not touch."""
    intervals.sort()
    start = end = 0
    for next_start, next_end in intervals:
        if next_start > end:
            if start < end:
                yield start, end
            start = next_start
        end = max(end, next_end)
    if start < end:
        yield start, end


def _exhausted(range_: Range, slots: int) -> NoFreeSubnet:
    name = "" if range_.family is Family.IPV4 else "IPv6"
    return NoFreeSubnet(
        f"allocate a /{range_.subnet_length} of {range_.network}: all {max(slots, 0)} subnets from "
        f"{range_.first} to {range_.last} are taken",
        hint=f"raise {name}SubnetMax, widen {name}Network or make {name}SubnetLen longer in the network "
        "configuration, or release leases that nobody uses: loden lease list, loden lease release",
    )
