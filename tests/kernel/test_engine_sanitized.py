# SPDX-License-Identifier: Apache-2.0
"""The engine between real devices again, with what watches over its memory."""

from pathlib import Path

from tests.sanitized import run_sanitized


def test_sanitizers_have_nothing_to_say(tmp_path: Path) -> None:
    run_sanitized(tmp_path, "tests/kernel/test_engine.py")
