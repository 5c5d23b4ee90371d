# SPDX-License-Identifier: Apache-2.0
"""Trying again: with growing pauses, and with one line in the log for one trouble."""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from loden.errors import LodenError

T = TypeVar("T")


class Backoff:
    """Pauses that double from the first to the most, each shortened by up to a fifth at random.

    Args:
        first_s, most_s: seconds.
    """

    def __init__(self, *, first_s: float = 0.1, most_s: float = 30.0) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._next_s = first_s

    def reset(self) -> None:
        """Begin with the first pause again."""
        self._next_s = self._first_s

    def next_s(self) -> float:
        """The next pause, seconds."""
        pause_s = self._next_s * random.uniform(0.8, 1.0)
        self._next_s = min(self._next_s * 2, self._most_s)
        return pause_s


class Trouble:
    """Says that something does not work when that begins, changes or ends, not each time it is tried.

    Args:
        log: where to say it.
        doing: what does not work, as a verb and an object.
    """

    def __init__(self, log: logging.Logger, doing: str) -> None:
        self._log = log
        self._doing = doing
        self._said = ""
        self.count = 0

    @property
    def is_on(self) -> bool:
        """Whether the last try failed."""
        return self.count > 0

    def happened(self, error: Exception) -> None:
        """It failed."""
        self.count += 1
        if str(error) != self._said:
            self._said = str(error)
            self._log.error("%s fails, trying again: %s", self._doing, error)

    def ended(self) -> None:
        """It worked."""
        if self.count:
            self._log.info("%s works again after %d failures", self._doing, self.count)
        self.count, self._said = 0, ""


async def until_done(trouble: Trouble, call: Callable[[], Awaitable[T]], *, most_s: float = 30.0) -> T:
    """Call until it works; what it returns.

    Raises:
        LodenError: one that says of itself that trying again cannot help (``is_final``).
    """
    backoff = Backoff(most_s=most_s)
    while True:
        try:
            result = await call()
        except LodenError as error:
            if error.is_final:
                raise
            trouble.happened(error)
            await asyncio.sleep(backoff.next_s())
        else:
            trouble.ended()
            return result
