# SPDX-License-Identifier: Apache-2.0
"""A cluster: whom to ask, as whom, for how long, and what its refusals mean.

One connection is open at a time. Where it breaks, or the member behind it has no leader or does not answer,
the next call goes to the next member. What only reads is asked again there; what writes is not, because it
may have been done. This is the one place where the channel's errors, and etcd's own, become ours.
"""

import asyncio
import random
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from loden.errors import StoreError, StoreUnavailable, StoreUnusable
from loden.stores.access import Access
from loden.stores.etcd import messages
from loden.stores.etcd.channel import Call, Channel, ChannelError, Lost, NotEtcd, Refused, connect
from loden.stores.etcd.place import Place

#: How long a member may take to let us in, and to answer; seconds. A listing of many keys takes longer.
CONNECT_S = 3.0
ANSWER_S = 5.0
LISTING_S = 30.0

# gRPC's codes.
_UNIMPLEMENTED, _UNAVAILABLE = 12, 14

#: With these words a member says that it did nothing, and that another may. (What else is "unavailable",
#: such as a request that timed out, may have been done.)
_NOT_DONE = ("no leader", "server stopped", "not capable")
#: With these that it does not know our token any more.
_STALE_TOKEN = ("invalid auth token", "revision of auth store is old", "revision in header is old")
_AUTH_IS_OFF = "authentication is not enabled"
_QUOTA = "database space exceeded"


class LeaseGone(StoreError):
    """The etcd lease that a key was to go with has ended."""


class Compacted(StoreError):
    """The revision that was to be read is forgotten."""


class Client:
    """A handle to a cluster. It touches nothing before the first call.

    Args:
        place: its members.
        access: who we are, and whom we trust.
    """

    def __init__(self, place: Place, access: Access) -> None:
        self._place = place
        self._access = access
        self._channel: Channel | None = None
        self._connecting = asyncio.Lock()
        self._turn = random.randrange(len(place.endpoints))  # not everybody's first member is the first
        self._token = ""
        self._needs_token = bool(access.username)
        self._is_closed = False
        self.calls = 0

    async def call(
        self, path: str, message: bytes, *, reads: bool = False, timeout_s: float = ANSWER_S
    ) -> bytes:
        """One request, one answer.

        Args:
            path: what is called.
            message: the request.
            reads: it may be asked again elsewhere, as doing it twice does no harm.
            timeout_s: how long an answer may take, in seconds.

        Raises:
            StoreUnavailable, StoreUnusable, LeaseGone, Compacted: there is none.
        """
        left = len(self._place.endpoints)
        while True:
            channel = await self._connected()
            try:
                return await self._ask(channel, path, message, timeout_s=timeout_s)
            except ChannelError as error:
                if not self._may_repeat(channel, error, reads=reads) or left <= 0:
                    raise self._translated(channel, error) from error
            left -= 1

    @asynccontextmanager
    async def stream(self, path: str, message: bytes) -> AsyncIterator[Call]:
        """A call that goes on, for the length of a block; what goes wrong in it is translated here.

        Raises:
            StoreUnavailable, StoreUnusable: it cannot go on.
        """
        channel = await self._connected()
        try:
            metadata = await self._metadata(channel)
            self.calls += 1
            async with channel.call(path, message, metadata, is_open=True) as call:
                yield call
        except ChannelError as error:
            self._may_repeat(channel, error, reads=True)
            raise self._translated(channel, error) from error

    def forget_token(self) -> bool:
        """Ask for a new token before the next call; whether we are anybody who gets one.

        Of calls that run side by side each may find the token stale, and each tries again.
        """
        self._token = ""
        self._needs_token = bool(self._access.username)
        return self._needs_token

    async def close(self) -> None:
        """Let go of the connection; idempotent."""
        self._is_closed = True
        if self._channel is not None:
            self._channel.close()
            await self._channel.wait_gone()

    async def _ask(self, channel: Channel, path: str, message: bytes, *, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):
                metadata = await self._metadata(channel)
                self.calls += 1
                return await channel.unary(path, message, metadata, timeout_s=timeout_s)
        except TimeoutError as error:
            raise Lost(f"no answer within {timeout_s:g} s") from error

    async def _metadata(self, channel: Channel) -> dict[str, str]:
        """Headers: do not wait for a leader that a member has not got, and who we are."""
        metadata = {"hasleader": "true"}
        if self._needs_token:
            await self._authenticate(channel)
        if self._token:
            metadata["token"] = self._token
        return metadata

    async def _authenticate(self, channel: Channel) -> None:
        request = messages.authenticate(self._access.username, self._access.password.reveal())
        try:
            async with asyncio.timeout(ANSWER_S):
                answer = await channel.unary(messages.AUTHENTICATE, request, {}, timeout_s=ANSWER_S)
        except TimeoutError as error:
            raise Lost(f"no answer within {ANSWER_S:g} s") from error
        except Refused as refused:
            if _AUTH_IS_OFF not in refused.reason:
                raise
        else:
            self._token = messages.read_token(answer)
        self._needs_token = False

    async def _connected(self) -> Channel:
        if (channel := self._usable()) is not None:
            return channel
        async with self._connecting:
            if (channel := self._usable()) is not None:
                return channel
            endpoints = self._place.endpoints
            context = self._tls()
            reasons = []
            for _ in endpoints:
                endpoint = endpoints[self._turn % len(endpoints)]
                try:
                    self._channel = await connect(endpoint, context, timeout_s=CONNECT_S)
                except ChannelError as error:
                    self._turn += 1
                    reasons.append(f"{endpoint}: {error}")
                else:
                    return self._channel
        raise StoreUnavailable(f"reach etcd: {'; '.join(reasons)}", hint=_reach_hint("; ".join(reasons)))

    def _usable(self) -> Channel | None:
        if self._is_closed:
            raise StoreUnavailable("ask etcd: this handle is closed")
        return self._channel if self._channel is not None and self._channel.is_usable else None

    def _may_repeat(self, channel: Channel, error: ChannelError, *, reads: bool) -> bool:
        """Make the most of an error for the next call; whether this one may simply be made again."""
        if not isinstance(error, Refused):
            self._drop(channel, error)
            return reads and not isinstance(error, NotEtcd)
        if any(words in error.reason for words in _STALE_TOKEN):
            return self.forget_token()
        if any(words in error.reason for words in _NOT_DONE):
            self._drop(channel, error)
            return True
        if error.code == _UNAVAILABLE:
            self._drop(channel, error)
        return reads and error.code == _UNAVAILABLE

    def _drop(self, channel: Channel, error: ChannelError) -> None:
        channel.fail(error if isinstance(error, Lost | NotEtcd) else Lost(f"it was given up: {error}"))
        if self._channel is channel:
            self._channel = None
            self._turn += 1

    def _translated(self, channel: Channel, error: ChannelError) -> StoreError:
        """What an error means to a person."""
        if isinstance(error, Refused):
            return self.refusal(error.reason, at=f" at {channel.endpoint}", code=error.code)
        return StoreUnavailable(f"ask etcd at {channel.endpoint}: {error}", hint=_reach_hint(str(error)))

    def refusal(self, reason: str, *, at: str = "", code: int = 0) -> StoreError:
        """What etcd's own words mean to a person.

        Args:
            reason: the words.
            at: whose they are.
            code: gRPC's.
        """
        doing, reason = f"ask etcd{at}", reason.rpartition("etcdserver: ")[2]
        if "requested lease not found" in reason:
            return LeaseGone(f"{doing}: {reason}")
        if "has been compacted" in reason:
            return Compacted(f"{doing}: {reason}")
        user = f"user {self._access.username!r}" if self._access.username else "nobody"
        for words, hint in _HINTS.items():
            if words in reason:
                remedy = hint.format(user=user, prefix=self._place.prefix)
                return StoreUnavailable(f"{doing} as {user}: {reason}", hint=remedy)
        if code == _UNIMPLEMENTED:
            return StoreUnusable(f"{doing}: {reason}", hint="it is no etcd 3.3 or newer")
        return StoreUnavailable(f"{doing}: {reason}")

    def _tls(self) -> ssl.SSLContext | None:
        """Made for each connection, so that renewed certificates are used.

        Raises:
            StoreUnusable: a file cannot be used.
        """
        access = self._access
        if not (access.is_tls or access.ca_file or access.cert_file):
            return None
        try:
            name = access.ca_file
            context = ssl.create_default_context(cafile=access.ca_file or None)
            if access.cert_file:
                name = f"{access.cert_file} and {access.key_file}"
                context.load_cert_chain(access.cert_file, access.key_file)
        except OSError as error:  # ssl's own errors are of that kind
            reason = "no usable PEM" if isinstance(error, ssl.SSLError) else error.strerror
            raise StoreUnusable(
                f"read {name}: {reason}", hint="see --etcd-cafile, --etcd-certfile and --etcd-keyfile"
            ) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["h2"])
        return context


_HINTS = {
    "invalid user ID or password": "see --etcd-username and the variable LODEN_ETCD_PASSWORD",
    "permission denied": "give {user} a role with: "
    "etcdctl role grant-permission ROLE --prefix=true readwrite {prefix}/",
    "user name is empty": "etcd asks who we are: --etcd-username and the variable LODEN_ETCD_PASSWORD",
    _QUOTA: "compact and defragment it, then: etcdctl alarm disarm; or raise its --quota-backend-bytes. "
    "Leases are renewed all the same, but no new one can be taken",
    "too many operations": "raise etcd's --max-txn-ops to its default of 128",
    "no leader": "most of the cluster's members are away or cannot reach each other",
}


def _reach_hint(reasons: str) -> str:
    if "certificate is not accepted" in reasons:
        return "renew it, name its authority with --etcd-cafile, or use a name for the member that is in it"
    if "does not speak TLS" in reasons:
        return "write etcd:// or http:// and give no certificates, or let etcd listen with TLS"
    if "TLS fails" in reasons:
        return "does it ask for a certificate? give one with --etcd-certfile and --etcd-keyfile"
    if "it speaks TLS" in reasons:
        return "write etcds:// or https://"
    if any(words in reasons for words in ("HTTP/1", "HTTP/2", "gRPC", "at once")):
        return "is it etcd's client port? it is etcds:// or https:// with TLS, etcd:// or http:// without"
    return "is etcd running there, and does a firewall let us in?"
