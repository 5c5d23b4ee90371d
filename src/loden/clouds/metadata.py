# SPDX-License-Identifier: Apache-2.0
"""The metadata service of a cloud: what an instance can ask about itself, on a link-local address.

Everything is asked over one connection, with short timeouts: the service is a hop away, and outside of the
cloud nobody answers at all.
"""

import http.client
from collections.abc import Mapping
from urllib.parse import urlsplit

from loden.errors import CloudError, CloudUnavailable

#: For each answer, seconds. All of an instance's questions together have CloudCalls' limit.
TIMEOUT_S = 2.0
_MOST_BYTES = 1 << 20
_SESSION_S = 300


class Metadata:
    """A connection to a metadata service. Its methods block.

    Args:
        cloud: for people.
        base: where it answers, such as ``http://169.254.169.254``.
        headers: sent with each question.
        hint: what to look at where nobody answers.
    """

    def __init__(self, cloud: str, base: str, *, headers: Mapping[str, str], hint: str) -> None:
        parts = urlsplit(base if "//" in base else f"http://{base}")
        self._cloud = cloud
        self._hint = hint
        self._headers = dict(headers)
        self._base = f"{parts.scheme}://{parts.netloc}"
        self._root = parts.path.rstrip("/")
        self._connection = http.client.HTTPConnection(
            parts.hostname or "", parts.port or 80, timeout=TIMEOUT_S
        )

    def begin_session(self, header: str) -> None:
        """Take a session token where the service gives them, and send it from now on.

        Args:
            header: that carries it; with ``-ttl-seconds`` behind it, the one that asks for it.

        Raises:
            CloudUnavailable: nobody answers.
        """
        status, token = self.ask("PUT", "/latest/api/token", {f"{header}-ttl-seconds": str(_SESSION_S)})
        if status == 200:
            self._headers[header] = token.strip()

    def get(self, path: str) -> str:
        """The text at a path.

        Raises:
            CloudUnavailable: nobody answers, or the service is in trouble.
            CloudError: there is no such path, or it may not be read.
        """
        found = self.find(path)
        if found is None:
            raise CloudError("read", f"metadata {self._base}{self._root}{path}", "there is no such value")
        return found

    def find(self, path: str) -> str | None:
        """The same; None where there is no such path."""
        status, text = self.ask("GET", path)
        if status == 404:
            return None
        if status != 200:
            error = CloudUnavailable if status >= 500 or status == 429 else CloudError
            raise error(
                "read", f"metadata {self._base}{self._root}{path}", f"status {status}", hint=self._hint
            )
        return text.strip()

    def ask(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Status and text of any answer.

        Raises:
            CloudUnavailable: there is none.
        """
        try:
            self._connection.request(
                method, f"{self._root}{path}", headers={**self._headers, **(headers or {})}
            )
            answer = self._connection.getresponse()
            return answer.status, answer.read(_MOST_BYTES).decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            reason = "no answer" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
            raise CloudUnavailable(
                "read", f"{self._cloud} metadata at {self._base}", reason, hint=self._hint
            ) from error

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()
