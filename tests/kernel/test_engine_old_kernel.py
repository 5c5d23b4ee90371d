# SPDX-License-Identifier: Apache-2.0
"""The engine on kernels that take fewer kinds of super-packets than the one that the tests run on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def test_packets_go_one_by_one_where_the_kernel_takes_no_more(tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    library = tmp_path / "old_kernel.so"
    command = ["gcc", "-D_GNU_SOURCE", "-Wall", "-Werror", "-shared", "-fPIC", "tests/kernel/old_kernel.c"]
    subprocess.run([*command, "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel.old_kernel"],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
