# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server in threads, for doubles: one function answers everything."""

import contextlib
import http.server
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import parse_qsl, urlsplit

import msgspec


class Request(msgspec.Struct, frozen=True):
    """What a client asked.

    Args:
        method: such as ``GET``.
        path: without the query.
        query: its last value for each name; in a form's body too.
        headers: by name in lower case.
        body: as it came.
        client: the address that it came from, as text.
        text: of the query, as it came.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes
    client: str
    text: str = ""


class Answer(msgspec.Struct, frozen=True):
    """What it gets.

    Args:
        status: of HTTP.
        body: as it goes.
        kind: its content type.
        headers: further ones.
    """

    status: int
    body: bytes
    kind: str = "text/plain"
    headers: Mapping[str, str] = {}


def json_answer(status: int, body: object) -> Answer:
    """An answer in JSON."""
    return Answer(status, msgspec.json.encode(body), "application/json; charset=utf-8")


Handle = Callable[[Request], Answer]


class Server:
    """Answers on one listening socket until it is closed.

    Args:
        handle: called in a thread for each connection.
        listener: listens already; the server closes it.
        poll_s: how soon it notices that it is to end.
    """

    def __init__(self, handle: Handle, listener: socket.socket, *, poll_s: float = 0.5) -> None:
        address = listener.getsockname()

        class Handler(_Handler):
            answer = staticmethod(handle)

        self.url = f"http://{address[0]}:{address[1]}"
        self._server = _Threads(address, Handler, bind_and_activate=False)
        self._server.socket.close()
        self._server.socket = listener
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": poll_s}, name="double", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextlib.contextmanager
def serving(handle: Handle, address: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Answer on an address of this namespace for the length of a block; yields the URL."""
    server = Server(handle, socket.create_server((address, port), backlog=512), poll_s=0.01)
    try:
        yield server.url
    finally:
        server.close()


class _Threads(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    answer: Handle

    def handle_one_request(self) -> None:
        # Who leaves in the middle of it has its reasons.
        with contextlib.suppress(ConnectionError, TimeoutError):
            super().handle_one_request()
            return
        self.close_connection = True

    def _work(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if "form-urlencoded" in self.headers.get("Content-Type", ""):
            query |= parse_qsl(body.decode(errors="replace"), keep_blank_values=True)
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = type(self).answer(
            Request(self.command, parts.path, query, headers, body, self.client_address[0], parts.query)
        )
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _work

    def log_message(self, *args: object) -> None:
        """The journal has it."""
