# SPDX-License-Identifier: Apache-2.0
"""Time that tests move."""


class FakeClock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, *, boot: str = "boot-1", since_boot_s: float = 1000.0, wall_s: float = 1.7e9) -> None:
        self.boot = boot
        self.boot_s = since_boot_s
        self.wall = wall_s

    def since_boot_s(self) -> float:
        return self.boot_s

    def wall_s(self) -> float:
        return self.wall

    def boot_id(self) -> str:
        return self.boot

    def advance(self, seconds: float) -> None:
        """Let time pass, as all clocks see it."""
        self.boot_s += seconds
        self.wall += seconds

    def reboot(self, *, down_s: float) -> None:
        """Another boot, which has just begun."""
        self.boot += "+"
        self.wall += down_s
        self.boot_s = 5.0
