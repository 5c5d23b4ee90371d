# SPDX-License-Identifier: Apache-2.0
"""What all doubles have in common: machines in a network, and where their router sends packets."""

from collections.abc import Mapping
from typing import Protocol

import msgspec

from loden.address import Prefix, format_address
from loden.lab.clouds.http import Answer, Request
from loden.lab.clouds.journal import Journal

NETWORK = Prefix.parse("198.18.0.0/16")


class Machine(msgspec.Struct, frozen=True):
    """An instance, as the lab knows it.

    Args:
        name: such as ``h1``.
        number: from 1.
        address: its own (packed).
        mac: of its network card.
        subnet: where it is.
    """

    name: str
    number: int
    address: bytes
    mac: bytes
    subnet: Prefix

    @property
    def ip(self) -> str:
        """The address as text."""
        return format_address(self.address)


def machine(number: int) -> Machine:
    """A machine for tests, in a subnet of its own."""
    subnet = Prefix.from_int(NETWORK.family, NETWORK.first + ((number - 1) << 8), 24)
    return Machine(
        name=f"h{number}",
        number=number,
        address=(subnet.first + 1).to_bytes(4, "big"),
        mac=b"\x02\x00" + number.to_bytes(4, "big"),
        subnet=subnet,
    )


class View(msgspec.Struct, frozen=True):
    """What a VPC's router goes by.

    Args:
        routes: to which machine's address (packed) a destination leads.
        free: the addresses (packed) of machines that may send and get packets of others.
    """

    routes: Mapping[Prefix, bytes]
    free: frozenset[bytes]


class Double(Protocol):
    """A cloud that is not one."""

    journal: Journal

    def answer(self, request: Request) -> Answer:
        """What the API says."""
        ...

    def metadata(self, request: Request) -> Answer:
        """What the metadata service says to the machine that asks."""
        ...

    @staticmethod
    def environment(api: str, metadata: str) -> dict[str, str]:
        """The variables that make the vendor's client come here.

        Args:
            api, metadata: URLs.
        """
        ...

    def view(self) -> View:
        """Where packets go now."""
        ...
