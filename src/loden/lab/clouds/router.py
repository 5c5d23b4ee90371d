# SPDX-License-Identifier: Apache-2.0
"""The router of a VPC: a namespace that forwards by the doubled route table, and by nothing else.

Like the real ones it knows which machine is on which wire. What comes from a machine under another source
address, or goes to one under another destination, is dropped, unless the cloud says that the machine may
forward: the source/destination check is off, or ``canIpForward`` is on.
"""

import subprocess
from collections.abc import Mapping, Sequence

import msgspec

from loden.address import Prefix, format_address
from loden.errors import LabError
from loden.lab.clouds.machines import View

#: Routes of the router's own doing, among those of the wires.
_PROTOCOL = 99


class Wire(msgspec.Struct, frozen=True):
    """Which machine is on which interface of the router.

    Args:
        interface: its name.
        address: the machine's (packed).
    """

    interface: str
    address: bytes


def route_commands(wires: Sequence[Wire], old: View | None, new: View) -> list[str]:
    """The lines of ``ip -batch`` that make the routes of one view those of another."""
    interfaces = {wire.address: wire.interface for wire in wires}
    before: Mapping[Prefix, bytes] = old.routes if old is not None else {}
    lines = [f"route del {dst} proto {_PROTOCOL}" for dst in before if dst not in new.routes]
    for dst, address in new.routes.items():
        if before.get(dst) != address:
            via, interface = format_address(address), interfaces[address]
            lines.append(f"route replace {dst} via {via} dev {interface} proto {_PROTOCOL}")
    return lines


def check_rules(wires: Sequence[Wire], view: View) -> str:
    """The source/destination check as an ``nft`` script, which replaces the one before as a whole."""
    lines = ["table ip vpc {}", "delete table ip vpc", "table ip vpc {", "  chain check {"]
    lines.append("    type filter hook forward priority 0; policy accept;")
    for wire in wires:
        if wire.address not in view.free:
            own = format_address(wire.address)
            lines.append(f'    iifname "{wire.interface}" ip saddr != {own} counter drop comment "source"')
            lines.append(
                f'    oifname "{wire.interface}" ip daddr != {own} counter drop comment "destination"'
            )
    return "\n".join([*lines, "  }", "}", ""])


class Router:
    """Keeps the namespace that it is in as a cloud says.

    Args:
        wires: to the machines.
    """

    def __init__(self, wires: Sequence[Wire]) -> None:
        self._wires = tuple(wires)
        self._view: View | None = None

    def follow(self, view: View) -> None:
        """Forward as this view has it.

        Raises:
            LabError: with what a tool said.
        """
        if view == self._view:
            return
        _run(["nft", "-f", "-"], check_rules(self._wires, view))
        _run(["ip", "-batch", "-"], "\n".join(route_commands(self._wires, self._view, view)))
        self._view = view


def _run(command: list[str], text: str) -> None:
    if not text:
        return
    try:
        done = subprocess.run(command, input=f"{text}\n", text=True, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise LabError(f"run {command[0]}: not found", hint="apt install iproute2 nftables") from error
    if done.returncode != 0:
        raise LabError(f"run {' '.join(command)}: {done.stderr.strip()}")
