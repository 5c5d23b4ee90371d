# SPDX-License-Identifier: Apache-2.0
"""What all tests share: which of them need a kernel, and where those may run."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Machines are shared, and the engine is tested in slow builds too: no test fails for the time that it takes.
settings.register_profile("loden", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("loden")

_HERE = Path(__file__).parent
_KERNEL_FOLDERS = {"kernel", "end_to_end"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies in the folders of kernel tests, and keep it off the machine's own interfaces."""
    reason = os.environ.get("LODEN_TEST_NO_WORLD", "runs in a world of its own: make kernel")
    for item in items:
        if _KERNEL_FOLDERS.intersection(item.path.relative_to(_HERE).parts):
            item.add_marker(pytest.mark.kernel)
        if item.get_closest_marker("kernel") and "LODEN_TEST_WORLD" not in os.environ:
            item.add_marker(pytest.mark.skip(reason=reason))
