# SPDX-License-Identifier: Apache-2.0
"""What a double was asked, and what it is told to answer instead."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec


class Call(msgspec.Struct, frozen=True):
    """One call of an API.

    Args:
        action: in the API's words, such as ``CreateRoute``; for Google, ``routes.insert``.
        is_write: whether it changes anything.
        parameters: of the call.
        client: the address that it came from.
        outcome: what it got: ``ok`` or an error's code.
    """

    action: str
    is_write: bool
    parameters: Mapping[str, str]
    client: str
    outcome: str

    def __str__(self) -> str:
        return f"{self.action} {self.outcome}"


class Fault(msgspec.Struct, frozen=True):
    """An error that a double gives.

    Args:
        action: of the calls that get it.
        status: of HTTP.
        code: in the API's words.
        message: for people.
        times: how many calls get it.
        is_late: whether the call seems to work, and what it started fails afterwards.
    """

    action: str
    status: int
    code: str
    message: str = "said so"
    times: int = 1
    is_late: bool = False


class Journal:
    """The calls so far, and the faults to come. Safe to use from any thread.

    Args:
        file: gets a line for each call.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._faults: list[Fault] = []
        self._file = file
        self._before: dict[str, Callable[[], None]] = {}

    @property
    def calls(self) -> list[Call]:
        """All that came so far."""
        with self._lock:
            return list(self._calls)

    @property
    def writes(self) -> list[Call]:
        """Those that change something."""
        return [call for call in self.calls if call.is_write]

    @property
    def actions(self) -> list[str]:
        """What was called, in order."""
        return [call.action for call in self.calls]

    def clear(self) -> None:
        """Forget the calls, and the faults that nobody ran into."""
        with self._lock:
            self._calls.clear()
            self._faults.clear()
            self._before.clear()

    def note(self, call: Call) -> None:
        """Write a call down."""
        with self._lock:
            self._calls.append(call)
            if self._file is not None:
                with self._file.open("ab") as file:
                    file.write(msgspec.json.encode(call) + b"\n")

    def fail(self, *faults: Fault) -> None:
        """Answer so, before anything else that was asked for."""
        with self._lock:
            self._faults += faults

    def before(self, action: str, act: Callable[[], None]) -> None:
        """Do something once, right before a call of that action is worked on: another client's call, say."""
        with self._lock:
            self._before[action] = act

    def take_fault(self, action: str, *, late: bool = False) -> Fault | None:
        """The fault that is due for a call; it counts as given."""
        with self._lock:
            act = None if late else self._before.pop(action, None)
        if act is not None:
            act()
        with self._lock:
            for place, fault in enumerate(self._faults):
                if fault.action == action and fault.is_late is late:
                    left = msgspec.structs.replace(fault, times=fault.times - 1)
                    self._faults[place : place + 1] = [left] if left.times else []
                    return fault
        return None


def read_calls(file: Path) -> list[Call]:
    """The calls that a double in another process wrote down."""
    try:
        written, _, _ = file.read_bytes().rpartition(b"\n")  # the last line may be on its way
    except FileNotFoundError:
        return []
    return [msgspec.json.decode(line, type=Call) for line in written.splitlines()]
