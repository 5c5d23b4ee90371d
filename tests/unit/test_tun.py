# SPDX-License-Identifier: Apache-2.0
"""How a kernel counts what is asked of a TUN device."""

import pytest

from loden.tables.tun import request


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ("x86_64", 0x400454CA),
        ("aarch64", 0x400454CA),
        ("armv7l", 0x400454CA),
        ("riscv64", 0x400454CA),
        ("s390x", 0x400454CA),
        ("ppc64le", 0x800454CA),
        ("mips64", 0x800454CA),
    ],
)
def test_request_is_that_of_the_processors_kernel(machine: str, expected: int) -> None:
    assert request(202, machine) == expected
