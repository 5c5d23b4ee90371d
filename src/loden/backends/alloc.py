# SPDX-License-Identifier: Apache-2.0
"""``alloc``: hands out subnets and forwards nothing (COMPAT §7.1)."""

from collections.abc import Sequence
from typing import ClassVar

import msgspec

from loden.address import Family
from loden.backends.base import Host, Plain
from loden.interface import Hop
from loden.lease import Leg
from loden.tables.entries import Entry


class Options(msgspec.Struct, frozen=True):
    """It has none."""


class Alloc(Plain):
    """A lease, and nothing in the kernel."""

    Options: ClassVar[type[msgspec.Struct]] = Options
    lease_type: ClassVar[str] = ""

    def __init__(self, host: Host, options: msgspec.Struct) -> None:
        del options
        self.needs_hops = False
        self.mtu = host.underlay.mtu

    def data(self, family: Family) -> bytes | None:
        del family
        return None

    def own_entries(self, leg: Leg) -> Sequence[Entry]:
        del leg
        return ()

    def entries(self, leg: Leg, hop: Hop | None) -> Sequence[Entry]:
        del leg, hop
        return ()
