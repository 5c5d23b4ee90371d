# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

# Large blocks with smaller ones between them that stay, as a listing leaves them: 3.6 MB of them, so that
# they cannot all sit in holes that the heap had before. All zeros are not written, and hardly count.
_SCRIPT = """
import sys
from pathlib import Path
from loden.memory import return_large_blocks

def resident_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024

if sys.argv[1] == "yes":
    return_large_blocks()
bytearray(b"x" * (1 << 20))  # the C library learns from the first that is freed
before = resident_mb()
large, small = [], []
for _ in range(60):
    large.append(bytearray(b"x" * 900_000))
    small.append(bytes(60_000))
large.clear()
print(resident_mb() - before)
"""


def grown_mb(is_asked: str) -> float:
    command = [sys.executable, "-c", _SCRIPT, is_asked]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_large_blocks_go_back_to_the_kernel() -> None:
    assert grown_mb("yes") < grown_mb("no") / 4
