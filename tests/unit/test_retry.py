# SPDX-License-Identifier: Apache-2.0
"""Growing pauses, and one line in the log for one trouble."""

import asyncio
import logging

import pytest

from loden.errors import KernelError, StoreUnavailable
from loden.retry import Backoff, Trouble, until_done

log = logging.getLogger("test")


def test_pauses_double_up_to_the_most_and_begin_anew() -> None:
    backoff = Backoff(first_s=1.0, most_s=5.0)
    for whole_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert 0.8 * whole_s <= backoff.next_s() <= whole_s
    backoff.reset()
    assert backoff.next_s() <= 1.0


def test_trouble_is_said_when_it_begins_changes_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trouble = Trouble(log, "reading leases")
    for reason in ("busy", "busy", "busy", "full"):
        trouble.happened(StoreUnavailable(reason))
        assert trouble.is_on
    trouble.ended()
    trouble.ended()
    assert not trouble.is_on
    assert [record.getMessage() for record in caplog.records] == [
        "reading leases fails, trying again: busy",
        "reading leases fails, trying again: full",
        "reading leases works again after 4 failures",
    ]


def test_trouble_that_comes_back_is_said_again(caplog: pytest.LogCaptureFixture) -> None:
    trouble = Trouble(log, "reading leases")
    for _ in range(2):
        trouble.happened(StoreUnavailable("busy"))
        trouble.ended()
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2


def test_until_done_tries_until_it_works_and_gives_the_result() -> None:
    tries: list[int] = []

    async def call() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise StoreUnavailable("busy")
        return "done"

    assert asyncio.run(until_done(Trouble(log, "calling"), call, most_s=0.0)) == "done"
    assert len(tries) == 3


def test_until_done_does_not_repeat_what_cannot_be_mended() -> None:
    async def call() -> None:
        raise KernelError("add", "link x", 1)

    with pytest.raises(KernelError, match="CAP_NET_ADMIN"):
        asyncio.run(until_done(Trouble(log, "calling"), call))
