# SPDX-License-Identifier: Apache-2.0
"""The time that leases run out by: since boot, which nobody can set and which suspend does not stop."""

import time
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    """What a store asks of time; tests bring their own."""

    def since_boot_s(self) -> float:
        """Seconds since boot, suspended ones included; it never jumps."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970, as far as the host knows; it may jump either way."""
        ...

    def boot_id(self) -> str:
        """Another one after each boot: times since boot compare only under the same one."""
        ...


class SystemClock:
    """The host's own clock."""

    def since_boot_s(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall_s(self) -> float:
        return time.time()

    def boot_id(self) -> str:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
