# SPDX-License-Identifier: Apache-2.0
"""Which tool a host gets, and what is said where none works; the programs are small scripts."""

import asyncio
import os
from pathlib import Path

import pytest

from loden.address import Family, Prefix
from loden.errors import FirewallError
from loden.firewall.choice import Census, choose
from loden.firewall.keeper import Firewall
from loden.firewall.programs import Change, Kind, Program, find_programs, read_version, run
from loden.firewall.rules import FirewallOptions, make_rules
from tests.contract.firewall import network_of

NFT = Program(Kind.NFT, "/bin/nft")
IPTABLES_NFT = Program(Kind.IPTABLES_NFT, "/bin/iptables", "/bin/ip6tables")
IPTABLES_LEGACY = Program(Kind.IPTABLES_LEGACY, "/bin/iptables-legacy", "/bin/ip6tables-legacy")
ALL = (IPTABLES_NFT, IPTABLES_LEGACY, NFT)
OLD = Program(Kind.NFT, "/bin/nft", flaw="version 0.9.8 is too old, 1.0.1 is the first that works")
TABLES = frozenset(("inet filter", "ip nft-nat"))
SETS = make_rules(FirewallOptions(), network_of(Prefix.parse("10.5.0.0/16")), {})


@pytest.mark.parametrize(
    ("programs", "census", "kind", "reason"),
    [
        (ALL, Census(), Kind.IPTABLES_NFT, "the host's iptables"),
        ((IPTABLES_LEGACY, IPTABLES_NFT, NFT), Census(), Kind.IPTABLES_LEGACY, "the host's iptables"),
        (ALL, Census(iptables_legacy=7), Kind.IPTABLES_LEGACY, "rules 7 are in iptables-legacy"),
        (
            ALL,
            Census(iptables_nft=7, iptables_legacy=3),
            Kind.IPTABLES_NFT,
            "7 are in iptables-nft and 3",
        ),
        (
            ALL,
            Census(iptables_nft=3, iptables_legacy=7),
            Kind.IPTABLES_LEGACY,
            "7 are in iptables-legacy",
        ),
        (ALL, Census(iptables_nft=3, iptables_legacy=3), Kind.IPTABLES_NFT, "the host's iptables"),
        (ALL, Census(nft_tables=TABLES), Kind.NFT, "2 tables"),
        (ALL, Census(nft_tables=TABLES, iptables_legacy=1), Kind.IPTABLES_LEGACY, "1 are in"),
        ((IPTABLES_NFT,), Census(nft_tables=TABLES), Kind.IPTABLES_NFT, "the host's iptables"),
        ((NFT,), Census(iptables_legacy=2), Kind.NFT, "no iptables that works"),
        ((OLD, IPTABLES_NFT), Census(nft_tables=TABLES), Kind.IPTABLES_NFT, "the host's iptables"),
    ],
)
def test_tool_follows_the_rules_of_others(
    programs: tuple[Program, ...], census: Census, kind: Kind, reason: str
) -> None:
    choice = choose(programs, census, enable_nftables=False)
    assert choice.program.kind is kind
    assert reason in choice.reason


def test_configuration_can_ask_for_nftables() -> None:
    choice = choose(ALL, Census(nft_tables=TABLES), enable_nftables=True)
    assert (choice.program, choice.reason) == (NFT, "EnableNFTables is true")


@pytest.mark.parametrize(
    ("programs", "census", "enable_nftables", "others"),
    [
        (ALL, Census(iptables_legacy=9), True, "9 are in iptables-legacy"),
        (
            ALL,
            Census(iptables_nft=3, iptables_legacy=3),
            False,
            "3 are in iptables-nft and 3 are in iptables-leg",
        ),
        ((NFT,), Census(iptables_legacy=2), False, "2 are in iptables-legacy"),
    ],
)
def test_rules_of_others_that_the_choice_does_not_follow_are_said(
    programs: tuple[Program, ...], census: Census, enable_nftables: bool, others: str
) -> None:
    assert others in choose(programs, census, enable_nftables=enable_nftables).reason


@pytest.mark.parametrize(
    ("programs", "enable_nftables", "said"),
    [
        ((), False, "no firewall tool is installed"),
        ((IPTABLES_NFT,), True, "no nft is installed"),
        ((OLD, IPTABLES_NFT), True, "/bin/nft: version 0.9.8 is too old"),
        ((OLD,), False, "/bin/nft: version 0.9.8 is too old"),
    ],
)
def test_what_tools_lack_is_said(programs: tuple[Program, ...], enable_nftables: bool, said: str) -> None:
    with pytest.raises(FirewallError, match=said) as caught:
        choose(programs, Census(), enable_nftables=enable_nftables)
    assert "1.0.1" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "kind", "flaw"),
    [
        ("iptables v1.8.9 (nf_tables)", Kind.IPTABLES_NFT, ""),
        ("iptables v1.8.9 (legacy)", Kind.IPTABLES_LEGACY, ""),
        ("iptables v1.6.2", Kind.IPTABLES_LEGACY, ""),
        ("iptables v1.6.1", Kind.IPTABLES_LEGACY, "version 1.6.1 is too old, 1.6.2 is the first that works"),
        ("iptables v2.0", Kind.IPTABLES_LEGACY, ""),
        ("nftables v1.0.6 (Lester Gooch #5)", Kind.NFT, ""),
        (
            "nftables v1.0.0",
            Kind.NFT,
            "version 1.0.0 is too old, 1.0.1 is the first that works",
        ),
        ("", Kind.IPTABLES_LEGACY, "says no version"),
    ],
)
def test_version_says_what_a_program_is(text: str, kind: Kind, flaw: str) -> None:
    program = read_version("/nowhere/iptables", text)
    assert (program.kind, program.flaw) == (kind, flaw)


#: What a program does that takes its standard input; with PATH as it is there is no cat.
READ = "while read -r line; do :; done"


def install(folder: Path, name: str, script: str) -> None:
    """A program that does what a few lines of shell say."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def test_programs_are_found_under_any_name_and_plain_iptables_comes_first(folder: Path) -> None:
    install(folder, "nft", "echo 'nftables v1.0.6'")
    install(folder, "iptables-nft", "echo 'iptables v1.8.9 (nf_tables)'")
    install(folder, "iptables", "echo 'iptables v1.8.9 (legacy)'")
    install(folder, "ip6tables", "")
    found = asyncio.run(find_programs())
    assert [program.kind for program in found] == [Kind.IPTABLES_LEGACY, Kind.IPTABLES_NFT, Kind.NFT]
    assert [program.path_ipv6 for program in found] == [str(folder / "ip6tables"), "", ""]
    with pytest.raises(FirewallError, match="iptables-nft: there is no program for IPv6"):
        found[1].path_of(Family.IPV6)


def test_host_without_tools_is_an_error_only_where_there_are_rules_to_write(folder: Path) -> None:
    assert not os.listdir(folder)

    async def scenario() -> None:
        firewall = Firewall()
        try:
            await firewall.settle()
            assert firewall.statistics.is_standing
            firewall.want(SETS)
            with pytest.raises(FirewallError, match="no firewall tool is installed"):
                await firewall.settle()
            assert not firewall.statistics.is_standing
        finally:
            firewall.close()

    asyncio.run(scenario())


def test_refused_transaction_is_said_with_its_useful_line(folder: Path) -> None:
    install(
        folder,
        "iptables-restore",
        f"{READ}; echo '# Warning: x' >&2; echo ' line 2 failed' >&2; exit 2",
    )
    change = Change((str(folder / "iptables-restore"),), "*nat\nCOMMIT\n")
    with pytest.raises(FirewallError, match="write rules with iptables-restore: line 2 failed"):
        asyncio.run(change.apply())


@pytest.mark.parametrize(
    ("complaint", "hint"),
    [
        ("Another app is currently holding the xtables lock.", "fuser /run/xtables.lock"),
        ("Can't lock /run/xtables.lock: Resource temporarily unavailable", "fuser /run/xtables.lock"),
        ("can't initialize iptables table nat: Table does not exist (do you need to insmod?)", "lack NAT"),
        ("Could not fetch rule set generation id: Permission denied (you must be root)", "CAP_NET_ADMIN"),
        ("netlink: Error: cache initialization failed: Operation not permitted", "CAP_NET_ADMIN"),
    ],
)
def test_known_complaints_have_a_remedy(folder: Path, complaint: str, hint: str) -> None:
    install(folder, "nft", f'{READ}; echo "{complaint}" >&2; exit 4')
    with pytest.raises(FirewallError) as caught:
        asyncio.run(Change((str(folder / "nft"),), "x").apply())
    assert hint in caught.value.hint


def test_program_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FirewallError, match="No such file"):
        asyncio.run(run(str(tmp_path / "nft")))


def test_program_that_reads_nothing_and_ends_is_no_crash(folder: Path) -> None:
    install(folder, "nft", "exit 1")
    with pytest.raises(FirewallError, match="write rules with nft"):
        asyncio.run(Change((str(folder / "nft"),), "x" * 1_000_000).apply())
