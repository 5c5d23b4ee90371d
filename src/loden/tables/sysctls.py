# SPDX-License-Identifier: Apache-2.0
"""Kernel settings below ``/proc/sys/net``, in the network namespace of the thread that writes them."""

import errno as errnos
import logging
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from loden.address import Family
from loden.errors import KernelError
from loden.tables.base import Failures
from loden.tables.entries import Sysctl
from loden.tables.netlink import RTM_NEWNETCONF, Message

log = logging.getLogger(__name__)

_ROOT = Path("/proc/sys")


def forwarding(families: Sequence[Family], *, underlay: str, tunnels: Sequence[str]) -> list[Sysctl]:
    """The settings without which a host does not pass its containers' packets on.

    Args:
        families: of the network.
        underlay: the interface's name. One that takes its IPv6 routes from router advertisements goes on to
            take them: the kernel ignores advertisements on hosts that forward, unless ``accept_ra`` is 2.
        tunnels: our own devices. Where the host's reverse path filter is strict, theirs is made loose: a peer
            may answer over another path while one side has moved to direct routing and the other has not.
            Where it is off it stays off: a filter costs a look-up for each packet.
    """
    found = []
    if Family.IPV4 in families:
        found.append(Sysctl("net/ipv4/ip_forward", "1"))
        if "1" in (read(f"net/ipv4/conf/{scope}/rp_filter") for scope in ("all", "default", *tunnels)):
            found += [Sysctl(f"net/ipv4/conf/{name}/rp_filter", "2") for name in tunnels]
    if Family.IPV6 in families:
        accept_ra = f"net/ipv6/conf/{underlay}/accept_ra"
        if read(accept_ra) in ("1", "2"):
            found.append(Sysctl(accept_ra, "2"))
        found.append(Sysctl("net/ipv6/conf/all/forwarding", "1"))
    return found


def report_unset(settings: Sequence[Sysctl]) -> None:
    """Say which settings are not as a fabric needs them, with the command that sets them."""
    for entry in settings:
        value = read(entry.path)
        if value != entry.value:
            log.warning("%s is %s: run sysctl -w %s=%s", entry.path, value, entry.path, entry.value)


def read(path: str) -> str | None:
    """A setting's value; None where the kernel has none of that name, or does not let us see it."""
    try:
        return (_ROOT / path).read_text(encoding="ascii").strip()
    except OSError:
        return None


class SysctlTable:
    """Settings that are wanted; all others are let alone, and one that is wanted no more stays as it is.

    Nobody says in the kernel who set a value, so there is nothing to take back.
    """

    entry_type = Sysctl

    async def read(self, wanted: Mapping[Hashable, Sysctl]) -> dict[Hashable, Sysctl]:
        """The wanted settings as they are."""
        found: dict[Hashable, Sysctl] = {}
        for slot, entry in wanted.items():
            value = read(entry.path)
            if value is not None:
                found[slot] = Sysctl(entry.path, value)
        return found

    async def put(self, entries: Sequence[Sysctl]) -> Failures:
        failures: Failures = {}
        for entry in entries:
            if read(entry.path) == entry.value:
                continue
            try:
                (_ROOT / entry.path).write_text(entry.value, encoding="ascii")
            except OSError as error:
                failures[entry.slot] = KernelError(
                    "set",
                    str(entry),
                    error.errno or errnos.EIO,
                    hint=f"run on the host: sysctl -w {entry.path}={entry.value}; or let the agent write "
                    "/proc/sys; --manage-sysctls=false leaves it to you",
                )
        return failures

    async def drop(self, entries: Sequence[Sysctl]) -> Failures:
        del entries
        return {}

    def heard(self, message: Message, wanted: Mapping[Hashable, Sysctl]) -> Hashable | None:
        """The kernel says that forwarding or a filter changed, and on which device; reading is simpler."""
        if message.kind != RTM_NEWNETCONF:
            return None
        return next((slot for slot, entry in wanted.items() if read(entry.path) != entry.value), None)
