# SPDX-License-Identifier: Apache-2.0
import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import msgspec
import pytest

from loden.errors import ConfigError, LodenError
from loden.status import health
from loden.status.health import serve_health

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(address: tuple[str, int]) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


class Patient(msgspec.Struct, frozen=True):
    """Whose health is asked for."""

    is_ready: bool

    def report(self) -> bytes:
        return b'{"is_ready":%s}' % str(self.is_ready).lower().encode()


async def is_dropped(reader: asyncio.StreamReader) -> bool:
    """Whether the connection ends without an answer."""
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


async def ask(address: tuple[str, int], request: bytes) -> tuple[bytes, bytes]:
    """The status line and the body of the answer."""
    async with connected(address) as (reader, writer):
        writer.write(request)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0], body


@pytest.mark.parametrize(
    ("request_line", "is_ready", "status", "body"),
    [
        (b"GET /healthz HTTP/1.1", False, b"HTTP/1.1 200 OK", b"flanneld is running"),
        (b"GET /readyz HTTP/1.1", True, b"HTTP/1.1 200 OK", b"flanneld is ready"),
        (b"GET /readyz HTTP/1.1", False, b"HTTP/1.1 503 Service Unavailable", b"flanneld is not ready yet"),
        (b"GET /readyz?verbose HTTP/1.0", True, b"HTTP/1.1 200 OK", b"flanneld is ready"),
        (b"BREW /healthz HTTP/1.1", True, b"HTTP/1.1 200 OK", b"flanneld is running"),
        (b"HEAD /healthz HTTP/1.1", True, b"HTTP/1.1 200 OK", b""),
        (b"GET /status HTTP/1.1", False, b"HTTP/1.1 200 OK", b'{"is_ready":false}'),
        (b"GET / HTTP/1.1", True, b"HTTP/1.1 404 Not Found", b"404 page not found\n"),
        (b"GET /healthz/ HTTP/1.1", True, b"HTTP/1.1 404 Not Found", b"404 page not found\n"),
        (b"nonsense", True, b"HTTP/1.1 400 Bad Request", b"malformed request"),
        (b"\xff\x00 \xfe \x01", True, b"HTTP/1.1 400 Bad Request", b"malformed request"),
    ],
)
def test_pages_are_flannels(request_line: bytes, is_ready: bool, status: bytes, body: bytes) -> None:
    async def scenario() -> None:
        async with serve_health("127.0.0.1", 0, lambda: Patient(is_ready)) as address:
            assert await ask(address, request_line + b"\r\nHost: x\r\n\r\n") == (status, body)

    asyncio.run(scenario())


def test_readiness_is_asked_each_time() -> None:
    answers = iter([False, True])

    async def scenario() -> None:
        async with serve_health("127.0.0.1", 0, lambda: Patient(next(answers))) as address:
            request = b"GET /readyz HTTP/1.1\r\n\r\n"
            assert (await ask(address, request))[0].endswith(b"503 Service Unavailable")
            assert (await ask(address, request))[0].endswith(b"200 OK")

    asyncio.run(scenario())


@pytest.mark.skipif(not socket.has_ipv6, reason="Python was built without IPv6")
def test_ipv6_is_served() -> None:
    async def scenario() -> None:
        async with serve_health("::1", 0, lambda: Patient(True)) as address:
            assert (await ask(address, b"GET /healthz HTTP/1.1\r\n\r\n"))[1] == b"flanneld is running"

    asyncio.run(scenario())


def test_request_in_pieces_is_answered() -> None:
    async def scenario() -> None:
        async with (
            serve_health("127.0.0.1", 0, lambda: Patient(True)) as address,
            connected(address) as (reader, writer),
        ):
            for byte in b"GET /healthz HTTP/1.1\r\n\r\n":
                writer.write(bytes([byte]))
                await writer.drain()
            assert (await reader.read()).endswith(b"flanneld is running")

    asyncio.run(scenario())


def test_endless_request_is_dropped() -> None:
    async def scenario() -> None:
        async with (
            serve_health("127.0.0.1", 0, lambda: Patient(True)) as address,
            connected(address) as (reader, writer),
        ):
            writer.write(b"x" * (health.MOST_REQUEST_BYTES + 1))
            assert await is_dropped(reader)

    asyncio.run(scenario())


def test_silent_client_is_dropped_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PATIENCE_S", 0.01)

    async def scenario() -> None:
        async with (
            serve_health("127.0.0.1", 0, lambda: Patient(True)) as address,
            connected(address) as (reader, _),
        ):
            assert await is_dropped(reader)

    asyncio.run(scenario())


def test_many_silent_clients_do_not_keep_a_probe_out() -> None:
    async def scenario() -> None:
        async with serve_health("127.0.0.1", 0, lambda: Patient(True)) as address:
            silent = AsyncExitStack()
            async with silent:
                for _ in range(health.MOST_CONNECTIONS + 20):
                    await silent.enter_async_context(connected(address))
                assert (await ask(address, b"GET /healthz HTTP/1.1\r\n\r\n"))[0] == b"HTTP/1.1 200 OK"

    asyncio.run(scenario())


def test_end_does_not_wait_for_clients() -> None:
    async def scenario() -> None:
        async with AsyncExitStack() as clients:
            async with serve_health("127.0.0.1", 0, lambda: Patient(True)) as address:
                await clients.enter_async_context(connected(address))
            assert clients is not None

    asyncio.run(scenario())


def test_port_that_is_taken_is_named_with_the_flag() -> None:
    async def scenario() -> None:
        async with serve_health("127.0.0.1", 0, lambda: Patient(True)) as (ip, port):
            with pytest.raises(LodenError, match=f"listen 127.0.0.1 port {port}: ") as caught:
                async with serve_health(ip, port, lambda: Patient(True)):
                    pass
            assert "--healthz-port" in caught.value.hint

    asyncio.run(scenario())


def test_name_is_no_address() -> None:
    async def scenario() -> None:
        async with serve_health("localhost", 0, lambda: Patient(True)):
            pass

    with pytest.raises(ConfigError, match="--healthz-ip"):
        asyncio.run(scenario())
