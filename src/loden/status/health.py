# SPDX-License-Identifier: Apache-2.0
"""Answers to health checks over HTTP (COMPAT §10), and what the agent has to say of itself as JSON.

A hundred lines instead of a web framework: three pages, one request a connection. Nothing that a client
sends or fails to send costs more than one small buffer for a few seconds.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

from loden.address import parse_address
from loden.errors import ConfigError, LodenError

MOST_REQUEST_BYTES = 8192
MOST_CONNECTIONS = 64
PATIENCE_S = 5.0

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}


class Subject(Protocol):
    """Whose health it is. Neither may block."""

    @property
    def is_ready(self) -> bool:
        """What ``/readyz`` answers."""
        ...

    def report(self) -> bytes:
        """What ``/status`` answers: a JSON object."""
        ...


@asynccontextmanager
async def serve_health(
    ip: str, port: int, subject: Callable[[], Subject | None]
) -> AsyncIterator[tuple[str, int]]:
    """Answer ``/healthz``, ``/readyz`` and ``/status`` while the context lasts; yields the bound address and
    port.

    Args:
        ip: the address to listen on, as text.
        port: 0 lets the kernel choose.
        subject: whose health it is, asked at each request; None while it is not there yet.

    Raises:
        ConfigError: *ip* is no address.
        LodenError: the port is taken, or the address is not this host's.
    """
    try:
        parse_address(ip)  # a name would be looked up, which can take long
    except ValueError as error:
        raise ConfigError(
            "--healthz-ip", str(error), hint="an IP address of this host, or 0.0.0.0"
        ) from error
    connections: dict[_Connection, None] = {}
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(lambda: _Connection(subject, connections), ip, port)
    except OSError as error:
        raise LodenError(
            f"listen {ip} port {port}: {error.strerror or error}",
            hint="choose another with --healthz-ip and --healthz-port, or stop what listens there",
        ) from error
    try:
        name = server.sockets[0].getsockname()
        yield name[0], name[1]
    finally:
        server.close()
        for connection in tuple(connections):
            connection.abort()
        await server.wait_closed()


class _Connection(asyncio.Protocol):
    """One request and its answer. There is no task: a silent client holds a buffer and a timer.

    Args:
        subject: as :func:`serve_health` takes it.
        others: all connections there are, the oldest first.
    """

    def __init__(self, subject: Callable[[], Subject | None], others: "dict[_Connection, None]") -> None:
        self._subject = subject
        self._others = others
        self._request = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._deadline = asyncio.get_running_loop().call_later(PATIENCE_S, self.abort)
        self._others[self] = None
        if len(self._others) > MOST_CONNECTIONS:
            next(iter(self._others)).abort()  # the oldest: the probe that comes now is answered

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._others.pop(self, None)

    def abort(self) -> None:
        """Drop the connection, whatever state it is in."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing():
            return
        self._request += data
        if b"\r\n\r\n" in self._request or b"\n\n" in self._request:
            self._answer()
        elif len(self._request) > MOST_REQUEST_BYTES:
            self.abort()

    def _answer(self) -> None:
        words = self._request.split(b"\n", 1)[0].decode("latin-1").split()
        if len(words) == 3 and words[2].startswith("HTTP/1."):
            status, body = self._page(words[1].partition("?")[0])
        else:
            status, body = 400, b"malformed request"
        kind = "application/json" if body.startswith(b"{") else "text/plain; charset=utf-8"
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\n"
            f"Content-Type: {kind}\r\n"
            f"Content-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self._transport.write(head.encode() + (b"" if words[:1] == ["HEAD"] else body))
        self._transport.close()

    def _page(self, path: str) -> tuple[int, bytes]:
        """Status and body; the words are flannel's, as probes in the field may look for them."""
        subject = self._subject()
        if path == "/healthz":
            return 200, b"flanneld is running"
        if path == "/readyz":
            is_ready = subject is not None and subject.is_ready
            return (200, b"flanneld is ready") if is_ready else (503, b"flanneld is not ready yet")
        if path == "/status":
            return 200, b"{}" if subject is None else subject.report()
        return 404, b"404 page not found\n"
