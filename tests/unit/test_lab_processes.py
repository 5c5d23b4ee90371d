# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import msgspec

from loden.lab.processes import Process, end

_DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"


def _child(code: str) -> subprocess.Popen[bytes]:
    """A child that has said a line: it is past its start."""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert child.stdout is not None
    with child.stdout as said:
        said.readline()
    return child


def _process(pid: int) -> Process:
    found = Process.of(pid)
    assert found is not None
    return found


def test_process_is_alive_until_it_ends() -> None:
    child = _child("print(flush=True); input()")
    process = _process(child.pid)
    assert process.is_alive
    end([process])
    assert not process.is_alive
    child.returncode = 0  # end() took the status


def test_process_that_got_the_number_later_is_another_one() -> None:
    mine = _process(os.getpid())
    earlier = msgspec.structs.replace(mine, start=mine.start - 1)
    assert not earlier.is_alive
    end([earlier])  # were it taken for us, this would be our end


def test_end_kills_who_does_not_listen() -> None:
    child = _child(_DEAF)
    process = _process(child.pid)
    end([process], grace_s=0.05)
    assert not process.is_alive
    child.returncode = 0


def test_zombie_counts_as_ended() -> None:
    child = _child("print(flush=True)")
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert Process.of(child.pid) is None
    child.wait()
