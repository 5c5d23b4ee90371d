# SPDX-License-Identifier: Apache-2.0
"""An event loop whose time jumps to the next timer when there is nothing else to do: hours pass at once."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            assert timeout is not None, "nothing will ever happen any more"
            self.now_s += max(timeout, 0.0)
        return events


class VirtualTime(asyncio.SelectorEventLoop):
    """The loop; there must be no threads in what it runs."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now_s


class LoopClock:
    """The store's clock, on the running loop's time; *suspend* passes time that the loop does not see."""

    def __init__(self) -> None:
        self.suspended_s = 0.0
        self.wall_s_offset = 0.0

    def suspend(self, seconds: float) -> None:
        self.suspended_s += seconds

    def since_boot_s(self) -> float:
        return asyncio.get_running_loop().time() + self.suspended_s

    def wall_s(self) -> float:
        return 1.7e9 + self.since_boot_s() + self.wall_s_offset

    def boot_id(self) -> str:
        return "this boot"


def run(work: Coroutine[Any, Any, T]) -> T:
    """What *work* comes to, in a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(work)
