# SPDX-License-Identifier: Apache-2.0
"""Processes of their own: who has gone first does not come back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from loden.priority import NICE

_NOBODY = 65534

# Prints the nice values of its threads, of a program that it runs, and of its session; then what was said.
_SCRIPT = """
import os, subprocess, sys, threading
from pathlib import Path
from loden.priority import go_first

before, user, policy = map(int, sys.argv[1:])
os.setpriority(os.PRIO_PROCESS, 0, before)
os.sched_setscheduler(0, policy, os.sched_param(0))
over = threading.Event()
earlier = threading.Thread(target=over.wait)
earlier.start()
os.setuid(user)
said = go_first()
later = threading.Thread(target=over.wait)
later.start()
threads = {os.getpriority(os.PRIO_PROCESS, int(task.name)) for task in Path("/proc/self/task").iterdir()}
over.set()
child = subprocess.run(["nice"], capture_output=True, text=True, check=True).stdout.strip()
group = Path("/proc/self/autogroup")
words = group.read_text().split() if group.exists() else []
print(*sorted(threads), child, words[-1] if words else "none", said, sep="|")
"""


def go_first(
    *, leads_session: bool, before: int = 0, user: int = 0, policy: int = os.SCHED_OTHER
) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(before), str(user), str(policy)],
        start_new_session=leads_session,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip("\n").split("|")


@pytest.fixture
def session() -> str:
    """The nice value of this process's own session, where sessions have one; and processes may go first."""
    probe = [sys.executable, "-c", f"import os; os.setpriority(os.PRIO_PROCESS, 0, {NICE})"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("needs CAP_SYS_NICE in the machine's own user namespace")
    group = Path("/proc/self/autogroup")
    words = group.read_text().split() if group.exists() else []
    return words[-1] if words else "none"


def are_sessions_scheduled() -> bool:
    switch = Path("/proc/sys/kernel/sched_autogroup_enabled")
    return switch.exists() and switch.read_text().strip() == "1"


def test_process_and_the_session_that_it_leads_go_first(session: str) -> None:
    own = str(NICE)
    expected = own if are_sessions_scheduled() else session
    assert go_first(leads_session=True) == [own, own, expected, ""]


def test_session_of_others_stays_as_it_is_which_is_said(session: str) -> None:
    *values, said = go_first(leads_session=False)
    assert values == [str(NICE), str(NICE), session]
    assert ("session only" in said) == are_sessions_scheduled()


def test_nice_value_that_was_given_is_kept() -> None:
    threads, child, _, said = go_first(leads_session=True, before=5)
    assert (threads, child, said) == ("5", "5", "")


def test_scheduling_policy_that_was_given_is_kept() -> None:
    threads, child, _, said = go_first(leads_session=True, policy=os.SCHED_IDLE)
    assert (threads, child, said) == ("0", "0", "")


def test_user_without_the_right_is_told(session: str) -> None:
    threads, child, _, said = go_first(leads_session=True, user=_NOBODY)
    assert (threads, child) == ("0", "0")
    assert said.startswith(f"nice {NICE}: Permission denied; it takes CAP_SYS_NICE")
