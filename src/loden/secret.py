# SPDX-License-Identifier: Apache-2.0
"""A text that must not be seen: whatever prints it prints that it is there."""


class Secret:
    """A password or a key. It compares by its text and shows it to nobody who does not ask by name.

    Args:
        text: the secret itself.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text, for the one who has to send it."""
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return "(secret)" if self._text else "(none)"
