# SPDX-License-Identifier: Apache-2.0
"""How this process stands against others where processors are short."""

import os
from contextlib import suppress
from pathlib import Path

#: In place of nice 0, which has a tenth of that weight (``sched_prio_to_weight``, kernel/sched/core.c).
#: With a quarter (nice -6) four streams of TCP fell to 0.38 of the underlay at times; with a tenth, whoever
#: reads a flood of datagrams on the same processor gets less of it.
NICE = -10
_THREADS = Path("/proc/self/task")
_SESSION = Path("/proc/self/autogroup")
_HAS_SESSIONS = Path("/proc/sys/kernel/sched_autogroup_enabled")


def go_first() -> str:
    """Get processor time before ordinary processes, until this one ends: its threads, and programs it runs.

    With autogroups (sched(7)) a nice value counts within a session only, and sessions share alike, so that of
    the session goes down too if this process leads it: in a terminal's session it would be others' as well.
    Whoever has started the process with another nice value or scheduling policy has chosen, and is let be.

    Returns:
        Empty; or what is missing of it, and what to change.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) != 0 or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return ""
    try:
        for thread in _THREADS.iterdir():  # on Linux each has a nice value of its own
            with suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, int(thread.name), NICE)
    except OSError as error:
        return f"nice {NICE}: {error.strerror}; it takes CAP_SYS_NICE in the machine's own user namespace"
    return _lift_session()


def _lift_session() -> str:
    try:
        if _HAS_SESSIONS.read_text().strip() != "1":
            return ""
        if os.getsid(0) != os.getpid():
            return f"nice {NICE} counts in its session only: have it lead one of its own (setsid)"
        _SESSION.write_text(str(NICE))
    except FileNotFoundError:
        return ""
    except OSError as error:
        return f"{_SESSION}: {error.strerror}, nice {NICE} counts in its session only"
    return ""
