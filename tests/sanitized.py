# SPDX-License-Identifier: Apache-2.0
"""Tests of the engine again, with the engine built for AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hatch_build import build

_FLAGS = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

# The interpreter was not built for it, so the library has to be there before it; and the module stands in the
# place of the usual one from the start.
_START = """
import importlib.util, os, sys
del os.environ["LD_PRELOAD"]  # for this process alone, not for those that it starts
spec = importlib.util.spec_from_file_location("loden._engine", {module!r})
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
"""


def run_sanitized(folder: Path, *words: str) -> None:
    """Run pytest on some tests with such an engine; they must pass.

    Args:
        folder: to build in.
        words: for pytest.
    """
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    module = folder / "_engine.abi3.so"
    os.environ["CC"], before = "gcc", os.environ.get("CC", "")
    try:
        assert build(Path("native/engine"), module, flags=_FLAGS) == ""
    finally:
        os.environ["CC"] = before
    (folder / "sitecustomize.py").write_text(_START.format(module=str(module)))
    library = subprocess.run(
        ["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        "PYTHONPATH": str(folder),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # the interpreter's own leaks would be all of them
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that what Python has freed is known to be free
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-s", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    assert "passed" in done.stdout
