# SPDX-License-Identifier: Apache-2.0
"""One connection to one member: gRPC calls over HTTP/2, many at once.

``h2`` knows HTTP/2; here are the socket, gRPC's five-byte frames, and deadlines for a peer that says nothing.
What goes wrong is one of three things: :class:`Lost`, where an answer may or may not have been on its way;
:class:`Refused`, an answer that says no; :class:`NotEtcd`, an answer that no etcd gives. No exception of
``h2``, ``ssl`` or the sockets leaves this module otherwise.

Incoming data are acknowledged as they are taken: a consumer of a watch that is slow holds up that watch, in
the member, and nothing else.
"""

import asyncio
import os
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

from loden.stores.etcd.place import Endpoint

#: How much may be on its way for one call, and for all of them, in bytes.
_STREAM_WINDOW = 1 << 20
_WINDOW = 1 << 24
#: How much a slow consumer lets wait here before it is made to wait in the member.
_MOST_QUEUED = 1 << 20
#: A connection with calls in progress that was silent for so long is asked whether it lives. etcd ends a
#: connection that asks more often than every 5 s.
_SILENCE_S = 8.0
_PING_S = 4.0
_MOST_BYTES = 1 << 30  # of one message
_AT_ONCE = "it closed the connection at once"
_SETTINGS = 4  # the type of the frame that a server begins with
_FRAME = struct.Struct("!BI")  # gRPC's: compressed or not, the length of the message


class ChannelError(Exception):
    """The base of what goes wrong on a connection."""


class Lost(ChannelError):
    """The connection is gone, or never came about; what was sent may have been done."""


class NotEtcd(ChannelError):
    """Somebody answers who is no etcd."""


class Refused(ChannelError):
    """etcd said no.

    Args:
        code: gRPC's.
        reason: etcd's own words.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Call:
    """One call in progress: messages come in, until a status ends it."""

    def __init__(self, channel: "Channel", number: int) -> None:
        self._channel = channel
        self.number = number
        self._data = bytearray()
        self._messages: deque[bytes] = deque()
        self._queued_bytes = 0
        self._unacknowledged = 0
        self._wake = asyncio.Event()
        self._end: ChannelError | None = None
        self.is_over = False
        self.can_send = asyncio.Event()

    async def receive(self) -> bytes | None:
        """The next message; None where the call has ended well.

        Raises:
            ChannelError: it has ended otherwise.
        """
        while not self._messages:
            if self.is_over:
                if self._end is not None:
                    raise self._end
                return None
            self._wake.clear()
            await self._wake.wait()
        message = self._messages.popleft()
        self._queued_bytes -= len(message)
        if self._unacknowledged and self._queued_bytes <= _MOST_QUEUED:
            self._channel.acknowledge(self.number, self._unacknowledged)
            self._unacknowledged = 0
        return message

    def take(self, data: bytes, flow_bytes: int) -> None:
        """Data have come, which count *flow_bytes* for flow control."""
        self._data += data
        while len(self._data) >= _FRAME.size:
            is_compressed, length = _FRAME.unpack_from(self._data)
            if is_compressed or length > _MOST_BYTES:
                self.end(NotEtcd("its messages are not gRPC's"))
                return
            size = _FRAME.size + length
            if len(self._data) < size:
                break
            self._messages.append(bytes(memoryview(self._data)[_FRAME.size : size]))
            self._queued_bytes += length
            del self._data[:size]
            self._wake.set()
        if self._queued_bytes <= _MOST_QUEUED:
            self._channel.acknowledge(self.number, flow_bytes)
        else:
            self._unacknowledged += flow_bytes

    def end(self, error: ChannelError | None) -> None:
        """Nothing comes any more."""
        if not self.is_over:
            self.is_over = True
            self._end = error
            self._wake.set()
            self.can_send.set()


class Channel(asyncio.Protocol):
    """A connection; made by :func:`connect`.

    Args:
        endpoint: whom it goes to.
        is_tls: what the paths' scheme is.
    """

    def __init__(self, endpoint: Endpoint, *, is_tls: bool) -> None:
        self.endpoint = endpoint
        self._scheme = "https" if is_tls else "http"
        config = h2.config.H2Configuration(header_encoding="utf-8", validate_inbound_headers=False)
        self._h2 = h2.connection.H2Connection(config)
        self._transport: asyncio.Transport | None = None
        self._calls: dict[int, Call] = {}
        self._is_greeted = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._last_heard_s = 0.0
        self._pinged = False
        self.error: ChannelError | None = None
        self._is_gone = asyncio.Event()

    @property
    def is_usable(self) -> bool:
        """Whether a call can be begun."""
        return self.error is None

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        with suppress(OSError):
            taken = transport.get_extra_info("socket")
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * (_SILENCE_S + _PING_S)))
        self._h2.local_settings = h2.settings.Settings(
            client=True,
            initial_values={
                h2.settings.SettingCodes.ENABLE_PUSH: 0,
                h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: _STREAM_WINDOW,
                h2.settings.SettingCodes.MAX_FRAME_SIZE: 1 << 20,
            },
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(_WINDOW)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._last_heard_s = asyncio.get_running_loop().time()
        self._pinged = False
        if not self._is_greeted.is_set() and len(data) > 3 and data[3] != _SETTINGS:
            self.fail(NotEtcd(_not_http2(data)))
            return
        try:
            for event in self._h2.receive_data(data):
                self._handle(event)
        except h2.exceptions.ProtocolError:
            self.fail(Lost("it broke the rules of HTTP/2"))
            return
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_gone.set()
        if isinstance(exc, ssl.SSLError):
            self.fail(NotEtcd(_tls_words(exc)))
        elif not self._is_greeted.is_set():
            self.fail(Lost(_AT_ONCE))
        else:
            self.fail(Lost(f"the connection broke: {_words(exc)}" if exc else "it closed the connection"))

    # What the client calls.

    async def wait_greeted(self) -> None:
        """Return when the other side has shown that it speaks HTTP/2.

        Raises:
            ChannelError: it does not.
        """
        await self._is_greeted.wait()
        if self.error is not None:
            raise self.error

    async def unary(
        self, path: str, message: bytes, metadata: Mapping[str, str], *, timeout_s: float
    ) -> bytes:
        """One message there, one back.

        Raises:
            ChannelError: no message came back.
        """
        async with self.call(path, message, metadata, timeout_s=timeout_s) as call:
            answer = await call.receive()
            if answer is None:
                raise NotEtcd("it answered with nothing")
            if (more := await call.receive()) is not None:
                raise NotEtcd(f"it answered with {len(more)} bytes too much")
            return answer

    @asynccontextmanager
    async def call(
        self,
        path: str,
        message: bytes,
        metadata: Mapping[str, str],
        *,
        timeout_s: float | None = None,
        is_open: bool = False,
    ) -> AsyncIterator[Call]:
        """A call for the length of a block.

        Args:
            path: gRPC's name of what is called.
            message: the request.
            metadata: headers.
            timeout_s: what the other side is told; None for no end.
            is_open: more may be sent; else the request is known to be whole.

        Raises:
            ChannelError: the connection is not usable.
        """
        if self.error is not None:
            raise self.error
        headers = [
            (":method", "POST"),
            (":scheme", self._scheme),
            (":path", path),
            (":authority", str(self.endpoint)),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "loden"),
            *metadata.items(),
        ]
        if timeout_s is not None:
            headers.append(("grpc-timeout", f"{max(1, int(timeout_s * 1000))}m"))
        number = self._h2.get_next_available_stream_id()
        call = self._calls[number] = Call(self, number)
        try:
            self._h2.send_headers(number, headers)
            await self._send(call, _FRAME.pack(0, len(message)) + message, is_open=is_open)
            self._watch_silence()
            yield call
        except h2.exceptions.ProtocolError as error:
            raise Lost(f"the call could not be sent: {error}") from error
        finally:
            self._calls.pop(number, None)
            if not call.is_over and self.error is None:
                with suppress(h2.exceptions.ProtocolError):
                    self._h2.reset_stream(number, error_code=8)  # CANCEL
                self._flush()

    async def _send(self, call: Call, data: bytes, *, is_open: bool) -> None:
        """As much at a time as the other side takes."""
        view = memoryview(data)
        while True:
            room = min(self._h2.local_flow_control_window(call.number), self._h2.max_outbound_frame_size)
            piece, view = view[:room], view[room:]
            self._h2.send_data(call.number, bytes(piece), end_stream=not view and not is_open)
            self._flush()
            if not view:
                return
            call.can_send.clear()
            if self._h2.local_flow_control_window(call.number) <= 0:
                await call.can_send.wait()
            if call.is_over:
                return  # whoever receives hears why

    def acknowledge(self, number: int, size: int) -> None:
        """So many bytes of a stream have been taken."""
        if self.error is None and size:
            with suppress(h2.exceptions.ProtocolError):
                self._h2.acknowledge_received_data(size, number)
                self._flush()

    def fail(self, error: ChannelError) -> None:
        """End the connection and every call on it; idempotent."""
        if self.error is not None:
            return
        self.error = error
        self._is_greeted.set()
        if self._timer is not None:
            self._timer.cancel()
        for call in tuple(self._calls.values()):
            call.end(error)
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        """Say goodbye; idempotent. Calls end as with a lost connection."""
        transport, self._transport = self._transport, None
        if self.error is None and transport is not None:
            with suppress(h2.exceptions.ProtocolError):
                self._h2.close_connection()
            transport.write(self._h2.data_to_send())
            transport.close()
        self.fail(Lost("closed"))
        self._transport = transport

    async def wait_gone(self) -> None:
        """Return when the socket of a connection that has failed or was closed is closed too."""
        if self._transport is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._is_gone.wait()

    # The rest is inside.

    def _flush(self) -> None:
        if self._transport is not None and (data := self._h2.data_to_send()):
            self._transport.write(data)

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.DataReceived):
            call = self._calls.get(event.stream_id)
            if call is None:
                self.acknowledge(event.stream_id, event.flow_controlled_length)
            else:
                call.take(event.data, event.flow_controlled_length)
        elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            self._read_headers(event)
        elif isinstance(event, h2.events.StreamEnded):
            if (call := self._calls.get(event.stream_id)) is not None:
                call.end(None)
        elif isinstance(event, h2.events.StreamReset):
            if (call := self._calls.get(event.stream_id)) is not None:
                call.end(Lost("it broke off the call"))
        elif isinstance(event, h2.events.RemoteSettingsChanged):
            self._is_greeted.set()
            self._wake_senders()
        elif isinstance(event, h2.events.WindowUpdated):
            self._wake_senders()
        elif isinstance(event, h2.events.ConnectionTerminated):
            said = (event.additional_data or b"").decode("latin-1")
            self.fail(Lost(f"it ended the connection{f': {said}' if said else ''}"))

    def _wake_senders(self) -> None:
        for call in self._calls.values():
            call.can_send.set()

    def _read_headers(self, event: h2.events.ResponseReceived | h2.events.TrailersReceived) -> None:
        call = self._calls.get(event.stream_id)
        if call is None:
            return
        headers = {_text(name): _text(value) for name, value in event.headers}
        status = headers.get(":status", "200")
        kind = headers.get("content-type", "application/grpc")
        if status != "200" or not kind.startswith("application/grpc"):
            call.end(NotEtcd(f"it answers a gRPC call with HTTP status {status} and {kind}"))
        elif (code := headers.get("grpc-status", "")) and code != "0":
            reason = unquote(headers.get("grpc-message", ""))
            call.end(Refused(int(code) if code.isdigit() else 2, reason or f"gRPC status {code}"))

    def _watch_silence(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._last_heard_s = loop.time()
            self._timer = loop.call_later(_SILENCE_S, self._look_for_silence)

    def _look_for_silence(self) -> None:
        self._timer = None
        if not self._calls or self.error is not None:
            return
        loop = asyncio.get_running_loop()
        left_s = self._last_heard_s + _SILENCE_S - loop.time()
        if left_s > 0:
            self._timer = loop.call_later(left_s, self._look_for_silence)
        elif self._pinged:
            self.fail(Lost(f"it has been silent for {_SILENCE_S + _PING_S:g} s"))
        else:
            self._pinged = True
            self._h2.ping(b"loden???")
            self._flush()
            self._timer = loop.call_later(_PING_S, self._look_for_silence)


async def connect(endpoint: Endpoint, context: ssl.SSLContext | None, *, timeout_s: float) -> Channel:
    """A connection to a member that has shown that it speaks HTTP/2.

    Args:
        endpoint: the member.
        context: for TLS; None for none.
        timeout_s: how long it may take, in seconds.

    Raises:
        ChannelError: there is no such connection.
    """
    channel = Channel(endpoint, is_tls=context is not None)
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(lambda: channel, endpoint.host, endpoint.port, ssl=context)
            await channel.wait_greeted()
    except TimeoutError as error:
        channel.fail(Lost("closed"))
        await channel.wait_gone()
        raise Lost(f"no answer within {timeout_s:g} s") from error
    except ssl.SSLError as error:
        raise NotEtcd(_tls_words(error)) from error
    except OSError as error:
        # A member without TLS may reset the connection before or after it has read our greeting.
        raise Lost(_AT_ONCE if isinstance(error, ConnectionResetError) else _words(error)) from error
    except BaseException:
        channel.fail(Lost("closed"))
        raise
    return channel


def _not_http2(data: bytes) -> str:
    if data.startswith(b"HTTP"):
        return "it answers in HTTP/1"
    return "it speaks TLS" if data.startswith(b"\x15\x03") else "it does not speak HTTP/2"


def _tls_words(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return "it does not speak TLS"
    return f"TLS fails: {(error.reason or str(error)).replace('_', ' ').lower()}"


def _words(error: Exception) -> str:
    """The system's own words; asyncio puts its own before them."""
    if isinstance(error, ssl.SSLError):
        return _tls_words(error)
    if isinstance(error, ConnectionError) and error.errno is None:
        return _AT_ONCE  # asyncio's, where TLS was to begin
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno > 0 else str(error.strerror)  # below 0: names
    return str(error) or type(error).__name__


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")
