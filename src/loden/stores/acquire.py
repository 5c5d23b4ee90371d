# SPDX-License-Identifier: Apache-2.0
"""How a host comes to its lease, on any store (COMPAT §2.6).

What to do is a pure function of a snapshot, :func:`decide`. Doing it is one compare-and-swap; who loses
one looks again and decides anew, until somebody must have won (W2).

Two hosts under one public address (W33) are told apart by the lease's holder. Nobody takes a lease from
another holder without asking: the newcomer writes itself down as the *contender*, and a holder that lives
strikes it out again (:func:`answer`). Silence hands the lease over: to a host after its reboot, or its heir.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import aclosing
from random import Random

import msgspec

from loden.address import Family, Prefix, format_address
from loden.errors import Conflict, DuplicateAddress, MalformedLease, StoreUnavailable
from loden.lease import Lease, parse_key, public_port
from loden.network import Range
from loden.stores.allocate import allocate, fits
from loden.stores.base import Changes, Holder, Record, Snapshot, Store
from loden.stores.clock import SystemClock

_log = logging.getLogger(__name__)

# Each lost race is somebody else's success. When all of a range's last hundred subnets go at once, a third of
# the contenders lose each round.
_TRIES = 40
_BACKOFF_S = 0.01

#: A holder that lives answers in milliseconds. The rest is for one whose machine is overloaded, or whose
#: store makes it wait for others' writes. The first start after a reboot waits this long for its old lease.
ANSWER_S = 3.0


class Claim(msgspec.Struct, frozen=True):
    """What a host asks for.

    Args:
        ranges: one for each enabled family.
        public: the host's own addresses, packed; what it is recognised by.
        port: the UDP port that its lease announces besides, which tells hosts behind one address apart; else
            0.
        previous: the subnets it had, from subnet.env; taken again where they are free and fit.
        held: the subnets that it holds while it runs. They need not fit: the range may have been moved since.
        holder: this host.
        make: the lease to write, from the subnets it is to have.
    """

    ranges: tuple[Range, ...]
    public: Mapping[Family, bytes]
    previous: tuple[Prefix, ...]
    holder: Holder
    make: Callable[[dict[Family, Prefix]], Lease]
    port: int = 0
    held: tuple[Prefix, ...] = ()


class Acquired(msgspec.Struct, frozen=True):
    """A lease, and what the store held when it was decided upon.

    Args:
        record: the lease.
        seen: a watch from its revision tells everything since, our own lease included.
    """

    record: Record
    seen: Snapshot


class Create(msgspec.Struct, frozen=True):
    """Write a new lease for these subnets, as nobody had our address at this revision of the store."""

    subnets: Mapping[Family, Prefix]
    revision: int


class Reuse(msgspec.Struct, frozen=True):
    """Write our lease over this record, which is ours."""

    record: Record


class Drop(msgspec.Struct, frozen=True):
    """Delete this record, which is ours and does not fit the configuration any more, and decide again."""

    record: Record


class Ask(msgspec.Struct, frozen=True):
    """Ask whether the holder of this record lives; do *otherwise* if it does not."""

    record: Record
    otherwise: Reuse | Drop


Decision = Create | Reuse | Drop | Ask


def this_host() -> Holder:
    """Who we are: one network namespace in one boot of one kernel. It reads /proc and does not block."""
    namespace = os.stat("/proc/self/ns/net").st_ino
    return Holder(f"{SystemClock().boot_id()}/{namespace}", socket.gethostname())


def decide(snapshot: Snapshot, claim: Claim, rng: Random) -> Decision:
    """What to do about a claim, given everything in the store. Pure.

    In this order: the lease under one of our public addresses; the lease that we hold, under an address that
    we had; our previous subnets; any free ones.

    Raises:
        NoFreeSubnet: nothing is left in one of the ranges.
    """
    record = _ours(snapshot, claim)
    if record is None:
        return Create(_choose(snapshot, claim, rng), snapshot.revision)
    settled = Reuse(record) if _fits(record.lease, claim) else Drop(record)
    if record.holder is None or _is_held(record, claim):
        return settled
    return Ask(record, settled)


def _ours(snapshot: Snapshot, claim: Claim) -> Record | None:
    """The record to settle: under our address, else held by us.

    Of several, what a person reserved for us comes first, then what we hold, then the first in key order.
    """
    records = snapshot.records.values()
    ours = [record for record in records if _has_our_address(record.lease, claim)]
    # What a person reserved is not ours to delete, even where the configuration has moved on.
    ours = [record for record in ours if not record.is_reservation or _fits(record.lease, claim)]
    ours = ours or [record for record in records if _is_held(record, claim) and not record.is_reservation]
    return min(
        ours,
        key=lambda record: (not record.is_reservation, not _is_held(record, claim), record.key),
        default=None,
    )


def _is_held(record: Record, claim: Claim) -> bool:
    return record.holder is not None and record.holder.id == claim.holder.id


def _has_our_address(lease: Lease, claim: Claim) -> bool:
    """Whether any enabled family's address is ours; not IPv4's alone, which IPv6-only hosts share (W6)."""
    return any(
        (leg := lease.leg(family)) is not None and leg.public == address and public_port(leg) == claim.port
        for family, address in claim.public.items()
    )


def _fits(lease: Lease, claim: Claim) -> bool:
    """Whether a lease has a subnet that fits for each enabled family, and none for others."""
    wanted = {range_.family: range_ for range_ in claim.ranges}
    subnets = [leg.subnet for leg in lease.legs]
    return len(subnets) == len(wanted) and all(
        subnet.family in wanted and (subnet in claim.held or fits(wanted[subnet.family], subnet))
        for subnet in subnets
    )


def _choose(snapshot: Snapshot, claim: Claim, rng: Random) -> dict[Family, Prefix]:
    taken = [leg.subnet for record in snapshot.records.values() for leg in record.lease.legs]
    taken += [subnet for key in snapshot.malformed for subnet in _subnets(key)]
    return {range_.family: _choose_one(range_, claim.previous, taken, rng) for range_ in claim.ranges}


def _subnets(key: str) -> list[Prefix]:
    """What a key claims, whatever its value says; a key that is malformed itself claims nothing."""
    try:
        return [subnet for subnet in parse_key(key) if subnet is not None]
    except MalformedLease:
        return []


def _choose_one(range_: Range, previous: tuple[Prefix, ...], taken: list[Prefix], rng: Random) -> Prefix:
    for subnet in previous:
        if fits(range_, subnet) and not any(subnet.overlaps(other) for other in taken):
            return subnet
    return allocate(range_, taken, rng)


async def acquire(store: Store, claim: Claim, *, rng: Random, answer_s: float = ANSWER_S) -> Record:
    """A lease for this host, in the store by the time this returns.

    It may block on the store, and for *answer_s* where another host has a lease under our address. Safe to
    cancel and to repeat: whatever was written is found again by its public address.

    Args:
        store: any.
        claim: what is asked for.
        rng: the source of chance.
        answer_s: how long a holder that is asked may take to answer, in seconds.

    Raises:
        NoFreeSubnet: nothing is left.
        DuplicateAddress: a live host holds a lease under one of our addresses. It keeps it.
        StoreUnavailable, StoreUnusable: the store's own failures, or it changes too fast.
    """
    return (await acquire_seen(store, claim, rng=rng, answer_s=answer_s)).record


async def acquire_seen(store: Store, claim: Claim, *, rng: Random, answer_s: float = ANSWER_S) -> Acquired:
    """As :func:`acquire`, with what was seen on the way: who follows the store need not list it again."""
    for lost in range(_TRIES):
        await asyncio.sleep(rng.uniform(0, _BACKOFF_S * lost))
        seen = await store.snapshot()
        decision = decide(seen, claim, rng)
        try:
            record = await _perform(store, claim, decision, answer_s=answer_s)
        except Conflict as conflict:
            _log.debug("acquire.lost_race try=%d reason=%s", lost + 1, conflict)
            continue
        if record is not None:
            return Acquired(record, seen)
    raise StoreUnavailable(
        f"acquire a lease: lost {_TRIES} races in a row",
        hint="many hosts start at once, or one writes all the time; see loden lease list",
    )


async def _perform(store: Store, claim: Claim, decision: Decision, *, answer_s: float) -> Record | None:
    """Do what was decided; None where that only cleared the way for another decision."""
    match decision:
        case Create(subnets, revision):
            created = await store.create(claim.make(dict(subnets)), holder=claim.holder)
            return created if await _is_alone(store, created, claim, since=revision) else None
        case Reuse(record):
            subnets = {leg.subnet.family: leg.subnet for leg in record.lease.legs}
            return await store.replace(
                msgspec.structs.replace(
                    record, lease=claim.make(subnets), holder=claim.holder, contender=None
                )
            )
        case Drop(record):
            _log.warning("acquire.dropped lease=%s: it does not fit the configuration", record.key)
            await store.delete(record)
            return None
        case Ask(record, otherwise):
            unanswered = await _ask(store, record, claim, answer_s=answer_s)
            if unanswered is None:
                return None
            settled = msgspec.structs.replace(otherwise, record=unanswered)
            return await _perform(store, claim, settled, answer_s=answer_s)


async def _is_alone(store: Store, created: Record, claim: Claim, *, since: int) -> bool:
    """Whether nobody took our address or our addresses between our look and our write; else ours goes.

    Of two hosts under one public address the one that wrote first never sees the other in between, so that
    exactly one of them gives way, and then finds the other's lease as any newcomer does. A subnet that
    overlaps ours can only be a flannel node's, as the store keeps the others apart; that never gives way.
    """
    if created.revision == since + 1:
        return True
    for other in (await _written(store, since=since, until=created.revision)).values():
        is_first = other.revision < created.revision
        overlaps = any(
            leg.subnet.overlaps(own.subnet) for leg in other.lease.legs for own in created.lease.legs
        )
        if other.key != created.key and (
            (is_first and _has_our_address(other.lease, claim))
            or (overlaps and (is_first or other.holder is None))
        ):
            await store.delete(created)
            return False
    return True


async def _written(store: Store, *, since: int, until: int) -> dict[str, Record]:
    """What was written after a revision, up to another one that is in the past; by key."""
    found: dict[str, Record] = {}
    async with aclosing(store.watch(since)) as events:
        async for event in events:
            found.update(event.records if isinstance(event, Snapshot) else event.written)
            if event.revision >= until:
                return found
    raise StoreUnavailable("watch the leases: the store was closed")


async def _ask(store: Store, record: Record, claim: Claim, *, answer_s: float) -> Record | None:
    """The record with our question in it, after nobody answered; None where it changed otherwise.

    Raises:
        DuplicateAddress: the holder answered.
        Conflict: somebody wrote before we could ask.
    """
    contender = record.contender
    is_asked = contender is not None and contender.id != claim.holder.id
    # Where somebody else is asking, what comes of it goes first: two that ask over each other never end.
    if is_asked and await _has_news(store, record, answer_s=answer_s):
        return None
    asked = await store.replace(msgspec.structs.replace(record, contender=claim.holder), extend=False)
    try:
        async with asyncio.timeout(answer_s):
            now = await _next_state(store, asked)
    except TimeoutError:
        _log.warning("acquire.took_over lease=%s holder=%s: it did not answer", record.key, record.holder)
        return asked
    if now is not None and now.holder == record.holder and now.contender is None:
        raise _duplicate(now, claim)
    return None


async def _has_news(store: Store, record: Record, *, answer_s: float) -> bool:
    try:
        async with asyncio.timeout(answer_s):
            await _next_state(store, record)
    except TimeoutError:
        return False
    return True


async def _next_state(store: Store, record: Record) -> Record | None:
    """What a record's key holds after its next change; None when it is gone."""
    async with aclosing(store.watch(record.revision)) as events:
        async for event in events:
            match event:
                case Changes(written=written, removed=removed):
                    if record.key in written or record.key in removed:
                        return written.get(record.key)
                case Snapshot(records=records):
                    if records.get(record.key) != record:
                        return records.get(record.key)
    raise StoreUnavailable(f"watch lease {record.key}: the store was closed")


def _duplicate(record: Record, claim: Claim) -> DuplicateAddress:
    addresses = " and ".join(format_address(address) for address in claim.public.values())
    holder = record.holder.name if record.holder else ""
    return DuplicateAddress(
        f"acquire a lease under {addresses}: host {holder!r} lives and holds {record.lease} under the same "
        f"address; this host is {claim.holder.name!r}",
        hint="give each host an address of its own with --public-ip or --public-ipv6, or choose another "
        "interface with --iface",
    )


async def answer(store: Store, record: Record, me: Holder) -> Record | None:
    """Strike out a contender that asks whether we live; for the agent, whenever its own record shows one.

    Args:
        store: any.
        record: our own, as last seen.
        me: this host.

    Returns:
        The record as it is now; None where there was nothing to answer, or somebody wrote since: the next
        event of the watch says what.
    """
    if record.contender is None or record.holder is None or record.holder.id != me.id:
        return None
    try:
        return await store.replace(msgspec.structs.replace(record, contender=None))
    except Conflict:
        return None
