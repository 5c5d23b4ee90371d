# SPDX-License-Identifier: Apache-2.0
"""The store in etcd, beside flannel's nodes or without them.

*Ownership* is one transaction: create where no key is and nobody claims the addresses, replace and delete
where the key still has the revision that was seen. A write whose answer got lost raises; whoever looks again
finds out.

*Ends.* Each lease goes with an etcd lease of its own, and etcd removes it at its end. Its holder's view of
that end counts from before the etcd lease was asked for, so it is never the later one. Others' ends are not
asked for: a request for each would be twenty thousand. Their records say "some time" (infinity).

*Renewal* keeps the etcd lease alive, and makes sure that the key still is ours. Nothing is written, so
nobody is woken, and a database that is full renews all the same.

*etcd leases* are revoked when their last key has gone elsewhere; never one that holds a key of somebody else.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing, suppress

import msgspec

from loden.errors import Conflict, StoreError, StoreUnavailable
from loden.lease import Lease, encode_value, parse_key
from loden.stores.access import Access
from loden.stores.base import Changes, Holder, Record, Snapshot
from loden.stores.clock import Clock, SystemClock
from loden.stores.etcd import claims, messages
from loden.stores.etcd.client import LISTING_S, Client, Compacted, LeaseGone
from loden.stores.etcd.messages import Answer, Grant, KeyValue, News, Target
from loden.stores.etcd.place import Place, parse_location
from loden.stores.etcd.records import Keys, Reading, encode_beside

_log = logging.getLogger(__name__)

#: One answer for all of fifty thousand leases would be in memory at once, here and in etcd.
_PAGE = 10_000
_AT_ONCE = 32


def open_location(location: str, *, ttl_s: float, create: bool, access: Access) -> "EtcdStore":
    """The store at ``host:2379,host2:2379/prefix``; see :class:`loden.stores.Opener`.

    Raises:
        ConfigError: the location is not of that form.
    """
    return EtcdStore(parse_location(location), access=access, ttl_s=ttl_s, create=create)


class _Held(msgspec.Struct, frozen=True):
    """What this handle wrote last under a key, and the etcd lease that it goes with."""

    record: Record
    lease_id: int


class EtcdStore:
    """A handle to the store in a cluster. The methods are those of :class:`loden.stores.base.Store`.

    Args:
        place: where it is.
        access: who we are.
        ttl_s: how long a lease lasts after a write, in seconds; etcd knows whole ones.
        clock: what this host's own leases end by.
        create: have an etcd lease ready as soon as the store was looked at; a prefix needs no making.
    """

    def __init__(
        self,
        place: Place,
        *,
        access: Access,
        ttl_s: float,
        clock: Clock | None = None,
        create: bool = True,
    ) -> None:
        self._keys = Keys(place.prefix)
        self._client = Client(place, access)
        self._ttl_s = math.ceil(ttl_s)
        self._clock = clock or SystemClock()
        self._create = create
        self._is_closed = False
        self._cluster = 0
        #: When the etcd leases end that this handle had granted, on the boot clock.
        self._ends: dict[int, float] = {}
        self._held: dict[str, _Held] = {}
        #: Granted, and not used, as somebody else was faster.
        self._spares: list[int] = []
        #: Those that a write was about whose answer got lost.
        self._unsure: set[int] = set()

    @property
    def ttl_s(self) -> float:
        return float(self._ttl_s)

    @property
    def calls(self) -> int:
        """How many requests were sent so far."""
        return self._client.calls

    async def get_network(self) -> bytes | None:
        found = await self._get(self._keys.config)
        return None if found is None else found.value

    async def put_network(self, text: bytes) -> None:
        await self._txn((), [messages.op_put(self._keys.config, text)])

    async def watch_network(self) -> AsyncGenerator[bytes | None, None]:
        key = self._keys.config
        while True:
            page = await self._range(messages.get(key))
            yield page.found[0].value if page.found else None
            async with aclosing(self._news(key, b"", since=page.revision)) as heard:
                async for news in heard:
                    if news is None:
                        break  # it missed something: look
                    is_put, found = news.events[-1]
                    yield found.value if is_put else None
                else:
                    return

    async def snapshot(self) -> Snapshot:
        failed: StoreError | None = None
        async with asyncio.TaskGroup() as tasks:  # who looks without a lease is about to take one
            if self._create and not self._held and not self._spares:
                tasks.create_task(self._prepare(), name="etcd lease")
            try:
                return await self._list()
            except StoreError as error:
                failed = error
        raise failed

    async def _list(self) -> Snapshot:
        while True:
            with suppress(Compacted):  # between two pages: begin again
                return await self._list_pages()

    async def _list_pages(self) -> Snapshot:
        start, end = self._keys.leases
        reading = Reading(self._keys, self._end_of)
        revision, has_more = 0, True
        while has_more:
            page = await self._range(messages.get(start, end, limit=_PAGE, revision=revision))
            reading.take(page.found)
            self._cluster = page.cluster
            revision = revision or page.revision
            has_more = page.has_more
            start = page.found[-1].key + b"\0" if page.found else end
        return reading.snapshot(revision)

    async def with_ends(self, snapshot: Snapshot) -> Snapshot:
        start, end = self._keys.subnets, messages.prefix_end(self._keys.subnets)
        listed = await self._range(messages.get(start, end, keys_only=True))
        unknown = {
            name: one.lease
            for one in listed.found
            if (name := self._keys.name(one.key)) in snapshot.records
            and snapshot.records[name].expires == math.inf
            and one.lease
        }
        ends: dict[str, float] = {}
        failures: list[StoreError] = []
        waiting = iter(unknown.items())

        async def ask() -> None:
            for name, number in waiting:
                try:
                    left = await self._time_to_live(number)
                except StoreError as error:
                    failures.append(error)
                    return
                ends[name] = self._clock.since_boot_s() + left.ttl_s

        async with asyncio.TaskGroup() as tasks:
            for _ in range(_AT_ONCE):
                tasks.create_task(ask(), name="ends")
        if failures:
            raise failures[0]
        records = {
            name: msgspec.structs.replace(record, expires=ends[name]) if name in ends else record
            for name, record in snapshot.records.items()
        }
        return msgspec.structs.replace(snapshot, records=records)

    async def create(self, lease: Lease, *, holder: Holder | None, reserve: bool = False) -> Record:
        key = lease.key
        parse_key(key)
        record = Record(key, lease, 0, holder=holder)
        granted = 0 if reserve else await self._grant()
        compare = [*self._absent(lease), *claims.unclaimed(self._keys.claims, lease)]
        puts, looks = self._puts(record, granted), self._looks(lease)
        try:
            answer = await self._write(compare, puts, looks, unsure=(granted,))
            if not answer.succeeded and await self._clear_stale_claims(lease, answer):
                answer = await self._write(compare, puts, looks, unsure=(granted,))
        except LeaseGone as error:
            raise Conflict(f"create lease {key}: its etcd lease has ended meanwhile") from error
        if not answer.succeeded:
            self._keep_spare(granted)
            raise Conflict(f"create lease {key}: {self._who_has(lease, answer)}")
        return self._wrote(record, granted, answer)

    async def replace(self, record: Record, *, extend: bool = True) -> Record:
        held = self._held.get(record.key)
        is_same = (
            held is not None and msgspec.structs.replace(record, expires=held.record.expires) == held.record
        )
        if extend and is_same and record.expires is not None and held is not None:
            renewed = await self._renew(held)
            if renewed is not None:
                return renewed
        found = await self._get(self._keys.subnet(record.key))
        if found is None or found.modified != record.revision:
            raise _conflict("replace", record.key)
        stays = found.lease == 0 or not extend
        granted = 0 if stays or record.expires is None else await self._grant()
        lease_id = 0 if record.expires is None else granted or found.lease
        self._held.pop(record.key, None)
        try:
            answer = await self._write(
                [messages.equal(Target.MODIFIED, found.key, found.modified)],
                self._puts(record, lease_id),
                unsure=(granted, found.lease),
            )
        except LeaseGone as error:
            raise _conflict("replace", record.key) from error
        if not answer.succeeded:
            self._keep_spare(granted)
            raise _conflict("replace", record.key)
        if found.lease not in (0, lease_id):
            await self._retire(found.lease)
        end = record.expires if lease_id == found.lease else None
        return self._wrote(record, lease_id, answer, end=end)

    async def delete(self, record: Record) -> None:
        key = self._keys.subnet(record.key)
        operations = [
            messages.op_delete(key, previous=True),
            messages.op_delete(self._keys.holder(record.key)),
        ]
        operations += [messages.op_delete(one) for one in self._claim_keys(record.lease)]
        answer = await self._txn([messages.equal(Target.MODIFIED, key, record.revision)], operations)
        if not answer.succeeded:
            raise _conflict("delete", record.key)
        self._held.pop(record.key, None)
        for before in answer.previous:
            if before.lease:
                await self._retire(before.lease)

    async def watch(self, revision: int) -> AsyncGenerator[Changes | Snapshot, None]:
        start, end = self._keys.leases
        while True:
            async with aclosing(self._news(start, end, since=revision)) as heard:
                async for news in heard:
                    if news is None:
                        break
                    # What the answer's own revision says is beyond events that are yet to come (COMPAT §2.7).
                    revision = news.events[-1][1].modified
                    reading = Reading(self._keys, self._end_of)
                    reading.take_events(news.events)
                    if (changes := reading.changes(revision)) is not None:
                        yield changes
                else:
                    return
            snapshot = await self.snapshot()
            revision = snapshot.revision
            yield snapshot

    async def close(self) -> None:
        if self._is_closed:
            return
        with suppress(StoreError):
            for spare in self._spares:
                await self._client.call(messages.REVOKE, messages.lease_id(spare), timeout_s=1.0)
        self._is_closed = True
        await self._client.close()

    # Reading.

    async def _range(self, request: bytes) -> messages.Range:
        return messages.read_range(
            await self._client.call(messages.RANGE, request, reads=True, timeout_s=LISTING_S)
        )

    async def _get(self, key: bytes) -> KeyValue | None:
        found = (await self._range(messages.get(key))).found
        return found[0] if found else None

    async def _news(self, key: bytes, end: bytes, *, since: int) -> AsyncGenerator[News | None, None]:
        """What happens to some keys after a revision; None where that is not known: then it ends.

        It ends without that when this handle is closed.
        """
        for is_last_try in (False, True):
            try:
                async with self._client.stream(
                    messages.WATCH, messages.watch(key, end, since=since + 1)
                ) as call:
                    while (data := await call.receive()) is not None:
                        news = messages.read_news(data)
                        if news.is_canceled and not news.compacted:
                            break
                        if news.compacted or (news.is_created and self._is_another(news, since)):
                            yield None
                            return
                        if news.events:
                            yield news
                    else:
                        raise StoreUnavailable("watch etcd: it ended the watch")
            except StoreUnavailable:
                if self._is_closed:
                    return
                raise
            if is_last_try or not self._client.forget_token():
                raise self._client.refusal(news.reason or "it canceled the watch")

    def _is_another(self, news: News, since: int) -> bool:
        """Whether the cluster was made anew, or put back from a copy: then etcd would wait for the future."""
        is_new = self._cluster not in (0, news.cluster)
        self._cluster = news.cluster
        return is_new or news.revision < since

    def _end_of(self, lease_id: int) -> float:
        return self._ends.get(lease_id, math.inf)

    # Writing.

    def _absent(self, lease: Lease) -> Iterable[bytes]:
        """Nobody has this key, and no flannel node its IPv4 half in a dual-stack key."""
        yield messages.equal(Target.VERSION, self._keys.subnet(lease.key), 0)
        if lease.ipv4 is not None:
            ipv4 = self._keys.subnet(lease.key.partition("&")[0])
            yield messages.equal(Target.VERSION, ipv4, 0, end=ipv4 + b"'")

    def _puts(self, record: Record, lease_id: int) -> list[bytes]:
        """A lease, its holder and its claims, all with one etcd lease."""
        name = record.key.encode()
        operations = [
            messages.op_put(self._keys.subnet(record.key), encode_value(record.lease), lease=lease_id),
            messages.op_put(self._keys.holder(record.key), encode_beside(record), lease=lease_id),
        ]
        return operations + [
            messages.op_put(key, name, lease=lease_id) for key in self._claim_keys(record.lease)
        ]

    def _claim_keys(self, lease: Lease) -> list[bytes]:
        return [claims.claim_key(self._keys.claims, leg.subnet) for leg in lease.legs]

    async def _txn(
        self, compare: Iterable[bytes], success: Iterable[bytes], failure: Iterable[bytes] = ()
    ) -> Answer:
        request = messages.txn(compare, success, failure)
        return messages.read_answer(await self._client.call(messages.TXN, request))

    async def _write(
        self,
        compare: Iterable[bytes],
        puts: Iterable[bytes],
        looks: Iterable[bytes] = (),
        *,
        unsure: Iterable[int],
    ) -> Answer:
        """A transaction that moves keys from one etcd lease to another.

        Where its answer gets lost, both stay until it is known which of them is in use.
        """
        try:
            return await self._txn(compare, puts, looks)
        except StoreUnavailable:
            self._unsure.update(number for number in unsure if number)
            raise

    def _wrote(self, record: Record, lease_id: int, answer: Answer, *, end: float | None = None) -> Record:
        expires = self._ends.get(lease_id, end) if lease_id else None
        written = msgspec.structs.replace(record, revision=answer.revision, expires=expires)
        if lease_id in self._ends:
            self._held[record.key] = _Held(written, lease_id)
        else:
            self._held.pop(record.key, None)
        return written

    async def _renew(self, held: _Held) -> Record | None:
        """Keep the etcd lease alive; None where it is not certain that the cluster did so.

        It does not ask the others: a leader that was stopped keeps leases alive when it goes on, and only
        then hears of another one, where they end sooner. So the key is read afterwards, which the
        others must confirm, and the leader's term must be what it was before.
        """
        record = held.record
        key = self._keys.subnet(record.key)
        began_s = self._clock.since_boot_s()
        kept = await self._lease_call(messages.KEEP_ALIVE, held.lease_id)
        page = await self._range(messages.get(key, keys_only=True))
        if kept.ttl_s <= 0 or not page.found or page.found[0].modified != record.revision:
            self._held.pop(record.key, None)
            raise _conflict("renew", record.key)
        if page.term != kept.term:
            return None
        self._ends[held.lease_id] = end = began_s + kept.ttl_s
        renewed = msgspec.structs.replace(record, expires=end)
        self._held[record.key] = _Held(renewed, held.lease_id)
        await self._settle_unsure()
        return renewed

    # Claims that stand in the way.

    def _looks(self, lease: Lease) -> list[bytes]:
        """What to read where a lease cannot be created: its own key, then the claims that it meets."""
        reads = [messages.op_get(self._keys.subnet(lease.key), keys_only=True)]
        return reads + [messages.op_get(key, end) for key, end in claims.ranges(self._keys.claims, lease)]

    async def _clear_stale_claims(self, lease: Lease, looked: Answer) -> bool:
        """Delete what claims this lease's addresses for leases that are gone; whether there was any.

        A person who deletes a lease's key leaves its claim, which goes only with its etcd lease.
        """
        exists, *met = looked.ranges
        cleared = False
        for claim in (found for page in met for found in page.found):
            if exists.found and claim.value == lease.key.encode():
                continue
            compare = [
                messages.equal(Target.VERSION, self._keys.subnets + claim.value, 0),
                messages.equal(Target.MODIFIED, claim.key, claim.modified),
            ]
            answer = await self._txn(compare, [messages.op_delete(claim.key)])
            cleared |= answer.succeeded
        return cleared

    def _who_has(self, lease: Lease, looked: Answer) -> str:
        claiming = {
            found.value.decode(errors="replace") for page in looked.ranges[1:] for found in page.found
        }
        others = claiming - {lease.key}
        return f"it overlaps lease {min(others)}" if others else "it exists"

    # etcd leases.

    async def _grant(self) -> int:
        while self._spares:
            spare = self._spares.pop()
            if self._ends[spare] > self._clock.since_boot_s() + 0.9 * self._ttl_s:
                return spare
        began_s = self._clock.since_boot_s()
        granted = messages.read_grant(
            await self._client.call(messages.GRANT, messages.grant(self._ttl_s), reads=True)
        )
        self._ends[granted.id] = began_s + granted.ttl_s
        return granted.id

    async def _prepare(self) -> None:
        with suppress(StoreError):  # it is asked for again when it is needed
            self._keep_spare(await self._grant())

    def _keep_spare(self, granted: int) -> None:
        if granted:
            self._spares.append(granted)

    async def _lease_call(self, path: str, number: int, *, keys: bool = False) -> Grant:
        try:
            answer = await self._client.call(path, messages.lease_id(number, keys=keys), reads=True)
        except LeaseGone:
            return Grant(number, 0)
        return messages.read_grant(answer)

    async def _time_to_live(self, number: int, *, keys: bool = False) -> Grant:
        return await self._lease_call(messages.TIME_TO_LIVE, number, keys=keys)

    async def _retire(self, number: int) -> None:
        """Revoke an etcd lease that nothing goes with any more (COMPAT W23); it ends by itself otherwise."""
        try:
            await self._revoke_if_idle(number)
            await self._settle_unsure()
        except StoreError as error:
            _log.debug("etcd lease stays id=%x: %s", number, error)

    async def _settle_unsure(self) -> None:
        for number in tuple(self._unsure):
            if all(held.lease_id != number for held in self._held.values()):
                await self._revoke_if_idle(number)
            self._unsure.discard(number)

    async def _revoke_if_idle(self, number: int) -> None:
        """Somebody else may have put keys of their own under it."""
        found = await self._time_to_live(number, keys=True)
        if found.ttl_s > 0 and not found.keys:
            await self._lease_call(messages.REVOKE, number)
            self._ends.pop(number, None)


def _conflict(verb: str, key: str) -> Conflict:
    return Conflict(f"{verb} lease {key}: it is gone, or somebody else wrote it")
