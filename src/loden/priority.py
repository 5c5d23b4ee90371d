# SPDX-License-Identifier: Apache-2.0
"""How this process stands against others where processors are short."""

import os
from pathlib import Path

#: In place of nice 0, which has a tenth of that weight (``sched_prio_to_weight``, kernel/sched/core.c).
_NICE = -10
_SESSION = Path("/proc/self/autogroup")


def go_first() -> str:
    """Get processor time before ordinary processes do: this thread, and those that it starts from now on.

    With autogroups (sched(7)) a nice value counts within a session only, and sessions share alike, so that of
    the session goes down too if this process leads it: in a terminal's session it would be others' as well.
    Whoever has started the process with another nice value has chosen, and is left alone.

    Returns:
        Empty; or why it has remained an ordinary process.
    """
    if os.getpriority(os.PRIO_PROCESS, 0) != 0:
        return ""
    try:
        os.setpriority(os.PRIO_PROCESS, 0, _NICE)
        if os.getsid(0) == os.getpid() and _SESSION.exists():
            _SESSION.write_text(str(_NICE))
    except OSError as error:
        return f"nice {_NICE}: {error.strerror}"
    return ""
