# SPDX-License-Identifier: Apache-2.0
"""The programs that change the firewall: which there are, what they can, and running one."""

import asyncio
import enum
import os
import re
import shutil
from collections.abc import Sequence
from typing import Protocol

import msgspec

from loden.address import Family
from loden.errors import FirewallError
from loden.firewall.rules import RuleSet

#: A program that has not ended by then is not going to: nothing here takes longer than a second.
_MOST_S = 20.0

_VERSION = re.compile(r"v(\d+)\.(\d+)(?:\.(\d+))?")

#: The first with ``iptables-restore --wait`` and ``--random-fully``.
_LEAST_IPTABLES = (1, 6, 2)
#: The first with comments on tables (COMPAT §9.2).
_LEAST_NFT = (1, 0, 1)


class Kind(enum.StrEnum):
    """A way to change the firewall; each has rules of its own in the kernel."""

    NFT = "nft"
    IPTABLES_NFT = "iptables-nft"
    IPTABLES_LEGACY = "iptables-legacy"


class Output(msgspec.Struct, frozen=True):
    """How a program ended.

    Args:
        status: its exit status, negative for a signal.
        text: what it wrote to its standard output.
        complaint: the useful line of its standard error.
    """

    status: int
    text: str
    complaint: str


class Change(msgspec.Struct, frozen=True):
    """One transaction: all of it happens, or nothing.

    Args:
        command: the program and its arguments.
        script: what it reads.
    """

    command: tuple[str, ...]
    script: str

    async def apply(self) -> None:
        """Make the change.

        Raises:
            FirewallError: nothing was changed.
        """
        done = await run(*self.command, script=self.script)
        if done.status:
            name = os.path.basename(self.command[0])
            raise FirewallError(f"write rules with {name}: {done.complaint}", hint=_hint(done))


class Tool(Protocol):
    """A way to change the firewall."""

    async def difference(self, wanted: Sequence[RuleSet]) -> list[Change]:
        """What to change so that these chains are as wanted; those without rules shall not be there."""
        ...


class Program(msgspec.Struct, frozen=True):
    """A program that is installed.

    Args:
        kind: what it changes.
        path: of the program for IPv4; of the only one, for ``nft``.
        path_ipv6: of the program for IPv6, or empty.
        flaw: why it cannot be used, or empty.
    """

    kind: Kind
    path: str
    path_ipv6: str = ""
    flaw: str = ""

    def path_of(self, family: Family) -> str:
        """The program for one family.

        Raises:
            FirewallError: it is not installed.
        """
        path = self.path if family is Family.IPV4 or self.kind is Kind.NFT else self.path_ipv6
        if not path:
            raise FirewallError(
                f"write rules with {self.kind}: there is no program for {family}", hint=INSTALL
            )
        return path


INSTALL = "install nftables, or iptables with ip6tables"


async def run(*command: str, script: str = "") -> Output:
    """Run a program to its end; a program whose caller is cancelled is killed.

    Args:
        command: its path and its arguments.
        script: what it reads.

    Raises:
        FirewallError: it cannot be started, or does not end.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE if script else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        )
    except OSError as error:
        raise FirewallError(f"run {command[0]}: {error.strerror}", hint=INSTALL) from error
    try:
        async with asyncio.timeout(_MOST_S):
            text, complaint = await process.communicate(script.encode() if script else None)
    except TimeoutError as error:
        raise FirewallError(f"run {' '.join(command)}: no end after {_MOST_S:.0f} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Output(
        process.returncode, text.decode(errors="replace"), _useful_line(complaint.decode(errors="replace"))
    )


async def find_programs() -> tuple[Program, ...]:
    """What is installed: nft, and both kinds of iptables the one called plain iptables first."""
    found: dict[Kind, Program] = {}
    for name in ("iptables", "iptables-nft", "iptables-legacy", "nft"):
        path = shutil.which(name)
        if path is None:
            continue
        program = read_version(path, (await run(path, "--version")).text)
        if program.kind not in found:
            found[program.kind] = program
    return tuple(found.values())


def read_version(path: str, text: str) -> Program:
    """What a program is, from what it says of itself.

    Args:
        path: of the program; the one for IPv6 is looked for beside it.
        text: such as ``iptables v1.8.9 (nf_tables)``; old ones that are legacy say nothing in brackets.
    """
    match = _VERSION.search(text)
    version = tuple(int(part or 0) for part in match.groups()) if match else ()
    if text.startswith("nftables"):
        return Program(Kind.NFT, path, flaw=_flaw(version, _LEAST_NFT))
    folder, name = os.path.split(path)
    beside = os.path.join(folder, name.replace("iptables", "ip6tables"))
    return Program(
        Kind.IPTABLES_NFT if "nf_tables" in text else Kind.IPTABLES_LEGACY,
        path,
        beside if os.access(beside, os.X_OK) else "",
        _flaw(version, _LEAST_IPTABLES),
    )


def _flaw(version: tuple[int, ...], least: tuple[int, ...]) -> str:
    if not version:
        return "says no version"
    if version < least:
        return f"version {_dotted(version)} is too old, {_dotted(least)} is the first that works"
    return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _useful_line(text: str) -> str:
    """The line that says what is wrong; warnings about other backends and pointers to help come and go."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return lines[0] if lines else ""


def _hint(done: Output) -> str:
    if "xtables lock" in done.complaint or "xtables.lock" in done.complaint:
        return "another program holds /run/xtables.lock; 'fuser /run/xtables.lock' names it"
    if "ermission denied" in done.complaint or "not permitted" in done.complaint:
        return "run as root, or give the process CAP_NET_ADMIN"
    if (
        "does not exist" in done.complaint
        or "nitialize" in done.complaint
        or "not supported" in done.complaint
    ):
        return "the kernel may lack NAT: load nft_masq, or iptable_nat and xt_MASQUERADE"
    return ""
