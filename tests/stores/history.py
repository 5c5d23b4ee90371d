# SPDX-License-Identifier: Apache-2.0
"""Who believed to own what, and when: recorded while hosts run, and checked afterwards.

A host *begins* to believe when it has taken a lease, and *ends* when it lets go, takes another instead, or
dies. What is checked is the one promise that matters: no two hosts believe at one time that they own the same
address.
"""

from collections.abc import Iterable, Iterator
from itertools import combinations

import msgspec

from loden.address import Prefix


class Event(msgspec.Struct, frozen=True):
    """One step.

    Args:
        at_s: when, on a clock that all hosts share.
        host: whose.
        begins: whether it believes from here on; else up to here.
        subnet: in what.
    """

    at_s: float
    host: str
    begins: bool
    subnet: Prefix


class Belief(msgspec.Struct, frozen=True):
    """From when to when a host believed to own a subnet; seconds, infinity for one that still does."""

    host: str
    subnet: Prefix
    from_s: float
    to_s: float


class Violation(msgspec.Struct, frozen=True):
    """Two beliefs that exclude each other, and for how long they stood side by side."""

    one: Belief
    other: Belief
    for_s: float


class History:
    """The record of one run. Hosts write to it as things happen."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def begin(self, at_s: float, host: str, subnet: Prefix) -> None:
        self.events.append(Event(at_s, host, True, subnet))

    def end(self, at_s: float, host: str, subnet: Prefix) -> None:
        self.events.append(Event(at_s, host, False, subnet))


def beliefs(events: Iterable[Event]) -> Iterator[Belief]:
    """The beliefs that events come to.

    Raises:
        ValueError: the record contradicts itself, and nothing can be said of it.
    """
    open_since: dict[tuple[str, Prefix], float] = {}
    last_s = float("-inf")
    for event in events:
        if event.at_s < last_s:
            raise ValueError(f"{event} is earlier than the event before it")
        last_s = event.at_s
        what = (event.host, event.subnet)
        if event.begins:
            if what in open_since:
                raise ValueError(f"{event}: it believes that already")
            open_since[what] = event.at_s
        else:
            if what not in open_since:
                raise ValueError(f"{event}: it did not believe that")
            yield Belief(*what, open_since.pop(what), event.at_s)
    for what, from_s in open_since.items():
        yield Belief(*what, from_s, float("inf"))


def violations(events: Iterable[Event], *, bound_s: float) -> list[Violation]:
    """Every pair of hosts that believed in the same addresses for longer than the bound.

    Args:
        events: in order of time.
        bound_s: how long two may overlap, in seconds.
    """
    found = []
    for one, other in combinations(beliefs(events), 2):
        if one.host == other.host or not one.subnet.overlaps(other.subnet):
            continue
        for_s = min(one.to_s, other.to_s) - max(one.from_s, other.from_s)
        if for_s > bound_s:
            found.append(Violation(one, other, for_s))
    return found
