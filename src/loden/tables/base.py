# SPDX-License-Identifier: Apache-2.0
"""What a table is: a place that holds entries of one type and can be listed and changed in batches."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from loden.errors import LodenError
from loden.tables.entries import Entry
from loden.tables.netlink import Message

E = TypeVar("E", bound=Entry)

#: A notification that can mean anything: everything has to be read again.
LOOK: Final = object()

#: What did not work, by slot; everything not in it did.
Failures = dict[Hashable, LodenError]


class Table(Protocol[E]):
    """Entries of one type, somewhere outside this process.

    The methods await between batches so that others may run, and are called one at a time.
    A failure concerns the entry it is reported for and no other.
    """

    @property
    def entry_type(self) -> type[E]:
        """The type of entry that the table holds."""
        ...

    async def read(self, wanted: Mapping[Hashable, E]) -> dict[Hashable, E]:
        """What stands in the table and is ours, by slot.

        Args:
            wanted: what should stand; an entry found equal to a wanted one is returned as that same object,
                so that a hundred thousand of them are not held twice.

        Raises:
            LodenError: the table cannot be read at all (KernelError, CloudError).
        """
        ...

    async def put(self, entries: Sequence[E]) -> Failures:
        """Add entries or change what stands in their slots; idempotent."""
        ...

    async def drop(self, entries: Sequence[E]) -> Failures:
        """Remove entries; what is gone already counts as removed. Nothing that is not ours is removed.

        Called with none, it tidies up what earlier changes left behind where nobody sees it.
        """
        ...

    def heard(self, message: Message, wanted: Mapping[Hashable, E]) -> Hashable | None:
        """What a notification means: the wanted slot that no longer is as wanted, or :data:`LOOK`.

        None where it is about something else, or says what we want to hear. Does not block.
        """
        ...


@runtime_checkable
class Reporting(Protocol):
    """A table that has more to say of itself than which entries fail."""

    def report(self) -> Mapping[str, Any]:
        """What a status page shows, by name; what JSON can hold. Does not block.

        Raises:
            KernelError: it cannot be found out now.
        """
        ...
