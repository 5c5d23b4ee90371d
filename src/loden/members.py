# SPDX-License-Identifier: Apache-2.0
"""JSON objects as Go's decoder reads them, which is how flannel's configuration is read (COMPAT §1.1).

Member names match in any case, of members that differ in case alone the last one counts, and anything
behind the object is an error.
"""

import difflib
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from loden.errors import ConfigError

Members = dict[str, Any]
T = TypeVar("T")


def read_object(text: bytes, *, key: str = "") -> Members:
    """The members of a JSON object, under names as written of which no two differ in case alone.

    Args:
        text: UTF-8.
        key: what the text is, for the message; empty for the whole configuration.

    Raises:
        ConfigError: with the line and column where the text stops being JSON.
    """
    try:
        found = json.loads(text.decode(), object_pairs_hook=_last_of_each, parse_constant=_refuse)
        json.dumps(found, ensure_ascii=False).encode()  # an escape may stand for half a character
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno} column {error.colno}: {error.msg.lower()}"
        raise ConfigError(key, f"not JSON: {reason}", hint="one JSON object and nothing behind it") from error
    except UnicodeDecodeError as error:
        raise ConfigError(key, f"not UTF-8: byte {error.start}", hint="save the text as UTF-8") from error
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise ConfigError(
            key, f"{half} is half a character", hint="write both halves of the pair, or the character itself"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(key, f"not JSON: {error}", hint="one JSON object of usual size") from error
    if not isinstance(found, dict):
        raise ConfigError(
            key, f"{show(found)} is not a JSON object", hint='an object such as {"Network": "10.5.0.0/16"}'
        )
    return found


def write_object(members: Members) -> bytes:
    """Compact JSON text of an object, in ASCII."""
    return json.dumps(members, separators=(",", ":")).encode()


def folded(members: Members) -> dict[str, tuple[str, Any]]:
    """The members by their name in one case: each with its name as written and its value."""
    return {name.casefold(): (name, value) for name, value in members.items()}


def show(value: object) -> str:
    """A JSON value as it stands in the text, cut where it is long, for messages."""
    try:
        text = json.dumps(value)
    except RecursionError:  # it was read with fewer callers around
        return "a value of too many levels"
    return text if len(text) <= 60 else f"{text[:57]}..."


def unknown_key_note(key: str, known: Iterable[str]) -> str:
    """The sentence for a key that nothing reads, with the one that may have been meant.

    Args:
        key: the key's path as written.
        known: the paths that are read.
    """
    by_fold = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(key.casefold(), by_fold, n=1)
    return f"{key}: unknown key, ignored" + (f"; did you mean {by_fold[close[0]]}?" if close else "")


class Reader:
    """Takes typed members out of an object and collects what is wrong with them.

    Args:
        members: of the object.
    """

    def __init__(self, members: Members) -> None:
        self._unread = folded(members)
        self._known: list[str] = []
        self.errors: list[ConfigError] = []
        self.notes: list[str] = []

    def take(self, key: str) -> tuple[bool, Any]:
        """Whether a member is there, and its value."""
        self._known.append(key)
        found = self._unread.pop(key.casefold(), None)
        return (False, None) if found is None else (True, found[1])

    def fail(self, key: str, reason: str, *, hint: str) -> None:
        """Remember an error; the arguments are those of :class:`~loden.errors.ConfigError`."""
        self.errors.append(ConfigError(key, reason, hint=hint))

    def flag(self, key: str, *, default: bool) -> bool:
        """A boolean; null counts as absent."""
        _, value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self._refuse(key, value, "a boolean", "true or false, without quotes")
            return default
        return value

    def number(self, key: str, *, hint: str) -> int:
        """A whole number, not negative; 0 stands for absent and null."""
        _, value = self.take(key)
        if value is None:
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            self._refuse(key, value, "a whole number", hint)
            return 0
        return value

    def text(
        self, key: str, parse: Callable[[str], T], *, kind: str, hint: str, takes_null: bool = False
    ) -> T | None:
        """What *parse* makes of a string; None where the member is absent or wrong.

        Args:
            key: the member's name.
            parse: raises ValueError on text that it cannot use.
            kind: what the text is to be, such as ``an IPv4 address``.
            hint: what is allowed.
            takes_null: whether null counts as absent.
        """
        is_there, value = self.take(key)
        if not is_there or (value is None and takes_null):
            return None
        if isinstance(value, str):
            with suppress(ValueError):
                return parse(value)
        self._refuse(key, value, kind, hint)
        return None

    def _refuse(self, key: str, value: object, kind: str, hint: str) -> None:
        self.fail(key, f"{show(value)} is not {kind}", hint=hint)

    def note_unread(self) -> None:
        """Say of each member that nothing took that it is ignored."""
        for name, _ in self._unread.values():
            self.notes.append(unknown_key_note(name, self._known))


def _last_of_each(pairs: list[tuple[str, Any]]) -> Members:
    return dict({name.casefold(): (name, value) for name, value in pairs}.values())


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
