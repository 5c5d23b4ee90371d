# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Processes of their own: who has gone first does not come back.
_SCRIPT = """
import os
import sys
from pathlib import Path
from loden.priority import go_first

before, user = map(int, sys.argv[1:])
os.setpriority(os.PRIO_PROCESS, 0, before)
os.setuid(user)
reason = go_first()
group = Path("/proc/self/autogroup")
print(os.getpriority(os.PRIO_PROCESS, 0), group.read_text().split()[-1] if group.exists() else "none", reason)
"""
_NOBODY = 65534

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="no root: nobody else gives processes priority")


def after_going_first(*, leads_session: bool, before: int = 0, user: int = 0) -> str:
    command = [sys.executable, "-c", _SCRIPT, str(before), str(user)]
    return subprocess.run(
        command, start_new_session=leads_session, capture_output=True, text=True, check=True
    ).stdout.strip()


def session_nice() -> str:
    group = Path("/proc/self/autogroup")
    return group.read_text().split()[-1] if group.exists() else "none"


def test_process_and_the_session_that_it_leads_go_first() -> None:
    assert after_going_first(leads_session=True) == f"-10 {'none' if session_nice() == 'none' else -10}"


def test_session_of_others_stays_as_it_is() -> None:
    assert after_going_first(leads_session=False) == f"-10 {session_nice()}"


def test_nice_value_that_was_given_is_kept() -> None:
    own = "none" if session_nice() == "none" else 0
    assert after_going_first(leads_session=True, before=5) == f"5 {own}"


def test_user_without_the_right_is_told() -> None:
    said = after_going_first(leads_session=True, user=_NOBODY)
    assert said.startswith("0 ")
    assert said.endswith("nice -10: Permission denied")
