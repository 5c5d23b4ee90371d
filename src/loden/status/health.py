# SPDX-License-Identifier: Apache-2.0
"""Answers to health checks over HTTP (COMPAT §10).

A hundred lines instead of a web framework: two fixed pages, one request a connection. Nothing that a
client sends or fails to send costs more than one small buffer for a few seconds.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from loden.address import parse_address
from loden.errors import ConfigError, LodenError

MOST_REQUEST_BYTES = 8192
MOST_CONNECTIONS = 64
PATIENCE_S = 5.0

_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found", 503: "Service Unavailable"}


@asynccontextmanager
async def serve_health(ip: str, port: int, is_ready: Callable[[], bool]) -> AsyncIterator[tuple[str, int]]:
    """Answer ``/healthz`` and ``/readyz`` while the context lasts; yields address and port as bound.

    Args:
        ip: the address to listen on, as text.
        port: 0 lets the kernel choose.
        is_ready: asked at each ``/readyz``; must not block.

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
        server = await loop.create_server(lambda: _Connection(is_ready, connections), ip, port)
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
        is_ready: as :func:`serve_health` takes it.
        others: all connections there are, the oldest first.
    """

    def __init__(self, is_ready: Callable[[], bool], others: "dict[_Connection, None]") -> None:
        self._is_ready = is_ready
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
            status, body = 400, "malformed request"
        head = (
            f"HTTP/1.1 {status} {_REASONS[status]}\r\n"
            "Content-Type: text/plain; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        self._transport.write((head if words[:1] == ["HEAD"] else head + body).encode())
        self._transport.close()

    def _page(self, path: str) -> tuple[int, str]:
        """Status and body; the words are flannel's, as probes in the field may look for them."""
        if path == "/healthz":
            return 200, "flanneld is running"
        if path == "/readyz":
            return (200, "flanneld is ready") if self._is_ready() else (503, "flanneld is not ready yet")
        return 404, "404 page not found\n"
