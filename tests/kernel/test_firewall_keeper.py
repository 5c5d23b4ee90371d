# SPDX-License-Identifier: Apache-2.0
"""The keeper against real firewalls and somebody else who changes them."""

import asyncio
import fcntl
import logging
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loden.address import Family, Prefix
from loden.errors import FirewallError
from loden.firewall.keeper import Firewall
from loden.firewall.nfnetlink import Place
from loden.firewall.programs import Kind
from loden.firewall.rules import FirewallOptions, RuleSet, make_rules
from loden.firewall.view import View
from loden.lab.namespaces import inside
from tests.contract.firewall import network_of

NETWORK = network_of(Prefix.parse("10.5.0.0/16"), Prefix.parse("fd00:5::/48"))
OWN = {Family.IPV4: Prefix.parse("10.5.1.0/24"), Family.IPV6: Prefix.parse("fd00:5:0:1::/64")}
MASQUERADE = FirewallOptions(masquerade=True)
SETS = make_rules(MASQUERADE, NETWORK, OWN)
NOTHING = make_rules(FirewallOptions(forward=False), NETWORK, OWN)

#: Somebody else's rules, which decide for a tool, and which nothing of ours may touch.
FOREIGN = """*nat
:KUBE-POSTROUTING - [0:0]
-A POSTROUTING -m comment --comment "kubernetes \\"postrouting\\" rules" -j KUBE-POSTROUTING
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
COMMIT
"""
_IPTABLES = (Kind.IPTABLES_NFT, Kind.IPTABLES_LEGACY)


@pytest.fixture
def host() -> Iterator[str]:
    """A network namespace with nothing in it."""
    name = "keeper"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


Scenario = Callable[[], Awaitable[None]]


def play(host: str, scenario: Scenario) -> None:
    async def timed() -> None:
        async with asyncio.timeout(20):
            await scenario()

    inside(host, lambda: asyncio.run(timed()))


def shell(script: str, *, text: str = "") -> str:
    return subprocess.run(
        ["sh", "-ec", script], input=text, text=True, check=True, capture_output=True
    ).stdout


def restore(kind: Kind, payload: str) -> None:
    shell(f"{kind}-restore --noflush --wait", text=payload)


def decide_for(kind: Kind) -> None:
    """Have rules of others that make the keeper take a tool; nft it takes when it is told to."""
    if kind is not Kind.NFT:
        restore(kind, FOREIGN)


def dump(kind: Kind) -> str:
    """What a tool shows, without counters and the time of day; of nft, our tables."""
    commands = {
        Kind.NFT: "nft list table ip flannel-ipv4; nft list table ip6 flannel-ipv6",
        Kind.IPTABLES_NFT: "iptables-nft-save; ip6tables-nft-save",
        Kind.IPTABLES_LEGACY: "iptables-legacy-save; ip6tables-legacy-save",
    }
    text = subprocess.run(["sh", "-c", commands[kind]], capture_output=True, text=True, check=False).stdout
    return "\n".join(line.partition(" [")[0] for line in text.splitlines() if not line.startswith("#"))


def ours(kind: Kind) -> list[str]:
    return [line for line in dump(kind).splitlines() if kind is Kind.NFT or "FLANNEL" in line]


@asynccontextmanager
async def kept(kind: Kind, *, resync_s: float = 3600.0) -> AsyncIterator[Firewall]:
    """A keeper at work, whose rules stand."""
    firewall = Firewall(enable_nftables=kind is Kind.NFT, resync_s=resync_s)
    firewall.want(SETS)
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(firewall.run())
            await until(lambda: firewall.statistics.is_standing)
            assert firewall.statistics.tool == kind
            yield firewall
            task.cancel()
    finally:
        firewall.close()


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - what is waited for is outside of this process
        await asyncio.sleep(0.01)


DAMAGE = {
    "rules flushed": {
        "nft": "nft flush chain ip flannel-ipv4 postrtg",
        "iptables": "{} -t nat -F FLANNEL-POSTRTG",
    },
    "one rule deleted": {
        "nft": "nft flush chain ip6 flannel-ipv6 forward; nft add rule ip6 flannel-ipv6 forward accept",
        "iptables": "{} -t nat -D FLANNEL-POSTRTG 4",
    },
    "rules reordered": {
        "nft": "nft insert rule ip flannel-ipv4 postrtg ip saddr 10.5.0.0/16 masquerade",
        "iptables": "{0} -t filter -D FLANNEL-FWD 1;"
        ' {0} -t filter -A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
    },
    "chain deleted": {
        "nft": "nft delete chain ip flannel-ipv4 postrtg",
        "iptables": '{0} -t nat -D POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG;'
        " {0} -t nat -F FLANNEL-POSTRTG; {0} -t nat -X FLANNEL-POSTRTG",
    },
    "jump deleted": {
        "nft": "nft delete table ip6 flannel-ipv6",
        "iptables": '{0} -t filter -D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
    },
    "jump doubled": {
        "nft": "nft add chain ip flannel-ipv4 other",
        "iptables": '{0} -t nat -I POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG',
    },
    "everything flushed": {
        "nft": "nft flush ruleset",
        "iptables": "{0} -t nat -F; {0} -t nat -X; {0} -t filter -F; {0} -t filter -X",
    },
    "policy changed": {
        "nft": "nft 'chain ip flannel-ipv4 forward {{ policy drop; }}'",
        "iptables": "{} -t nat -R FLANNEL-POSTRTG 5 -s 10.5.0.0/16 -j ACCEPT",
    },
}


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_repaired(host: str, kind: Kind, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """With nft by notification alone: its next look is an hour away. With iptables by the next look."""
    resync_s = 3600.0 if kind is Kind.NFT else 0.2
    script = DAMAGE[damage]["nft" if kind is Kind.NFT else "iptables"].format(kind)

    async def scenario() -> None:
        decide_for(kind)
        async with kept(kind, resync_s=resync_s) as firewall:
            before = ours(kind)
            assert len(before) > 4
            shell(script)
            assert ours(kind) != before
            await until(lambda: firewall.statistics.repairs == 1 and firewall.statistics.is_standing)
            assert sorted(ours(kind)) == sorted(before)
            assert firewall.statistics.repairs == 1

    with caplog.at_level(logging.INFO):
        play(host, scenario)
    drift = [record.getMessage() for record in caplog.records if "drift" in record.getMessage()]
    assert len(drift) == 1
    if kind is not Kind.IPTABLES_LEGACY:
        name = "nft[" if kind is Kind.NFT else "iptables"
        assert f"changed_by={name}" in drift[0]


@pytest.mark.parametrize("kind", _IPTABLES)
def test_foreign_rules_stay_in_their_order(host: str, kind: Kind) -> None:
    def foreign() -> list[str]:
        return [line for line in dump(kind).splitlines() if "FLANNEL" not in line and line.startswith("-A")]

    async def scenario() -> None:
        decide_for(kind)
        before = foreign()
        assert len(before) == 3
        async with kept(kind, resync_s=0.2) as firewall:
            assert foreign() == before
            shell(f"{kind} -t nat -A POSTROUTING -d 192.0.2.1 -j ACCEPT; {kind} -t nat -F FLANNEL-POSTRTG")
            after = foreign()
            await until(lambda: firewall.statistics.repairs == 1 and firewall.statistics.is_standing)
            assert foreign() == after
            firewall.want(NOTHING)
            await until(lambda: not ours(kind))
            assert foreign() == after

    play(host, scenario)


async def settle(sets: tuple[RuleSet, ...] = SETS, *, enable_nftables: bool = False) -> str:
    """What one start of an agent does; the tool it took."""
    firewall = Firewall(enable_nftables=enable_nftables)
    try:
        firewall.want(sets)
        await firewall.settle()
        return firewall.statistics.tool
    finally:
        firewall.close()


@pytest.mark.parametrize("kind", _IPTABLES)
def test_switch_to_nftables_and_back_leaves_nothing(host: str, kind: Kind) -> None:
    """W17: flannel looks for the forward chain in the wrong table, and leaves the jumps."""

    async def scenario() -> None:
        restore(kind, FOREIGN)
        before = dump(kind)
        assert await settle() == kind
        assert {"POSTROUTING", "FORWARD"} <= {line.split()[1] for line in ours(kind) if line[0] == "-"}
        assert await settle(enable_nftables=True) == Kind.NFT
        assert ours(kind) == []
        assert [line for line in dump(kind).splitlines() if line.startswith("-A")] == [
            line for line in before.splitlines() if line.startswith("-A")
        ]
        assert ours(Kind.NFT) != []
        assert await settle() == kind
        assert ours(Kind.NFT) == []
        assert ours(kind) != []

    play(host, scenario)


def test_rules_in_the_other_iptables_are_removed_and_said(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        restore(Kind.IPTABLES_LEGACY, FOREIGN)
        assert await settle() == Kind.IPTABLES_LEGACY
        shell("iptables-legacy -t nat -F; iptables-legacy -t nat -X KUBE-POSTROUTING", text="")
        restore(Kind.IPTABLES_NFT, FOREIGN)
        assert await settle() == Kind.IPTABLES_NFT
        assert ours(Kind.IPTABLES_LEGACY) == []

    with caplog.at_level(logging.INFO):
        play(host, scenario)
    assert "firewall rules of ours found in iptables-legacy: removing them" in caplog.messages


def test_nftables_needs_no_iptables(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W19: flannel ends there."""
    (tmp_path / "nft").symlink_to("/usr/sbin/nft")

    async def scenario() -> None:
        with monkeypatch.context() as context:
            context.setenv("PATH", str(tmp_path))
            assert await settle(enable_nftables=True) == Kind.NFT
            assert await settle() == Kind.NFT  # the only one that there is
        assert ours(Kind.NFT) != []

    play(host, scenario)


@pytest.mark.parametrize("kind", _IPTABLES)
def test_family_without_a_program_does_not_hold_the_other_back(
    host: str, kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (kind, f"{kind}-restore", f"{kind}-save"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)

    async def scenario() -> None:
        restore(kind, FOREIGN)
        with monkeypatch.context() as context:
            context.setenv("PATH", str(tmp_path))
            with pytest.raises(FirewallError, match=f"{kind}: there is no program for IPv6"):
                await settle()
        chains = {line.split()[1] for line in ours(kind) if line.startswith("-A FLANNEL")}
        assert chains == {"FLANNEL-POSTRTG", "FLANNEL-FWD"}
        assert "fd00:5::" not in dump(kind)

    play(host, scenario)


def test_nftables_removes_what_iptables_left_though_that_is_gone(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W17 and W19 together."""
    (tmp_path / "nft").symlink_to("/usr/sbin/nft")

    async def scenario() -> None:
        restore(Kind.IPTABLES_NFT, FOREIGN)
        foreign = [line for line in dump(Kind.IPTABLES_NFT).splitlines() if line.startswith("-A")]
        await settle()
        with monkeypatch.context() as context:
            context.setenv("PATH", str(tmp_path))
            await settle(enable_nftables=True)
        assert ours(Kind.IPTABLES_NFT) == []
        assert [line for line in dump(Kind.IPTABLES_NFT).splitlines() if line.startswith("-A")] == foreign
        assert ours(Kind.NFT) != []

    play(host, scenario)


OLD_FLANNEL = """*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -s 10.9.0.0/16 -d 10.9.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A POSTROUTING -j FLANNEL-POSTRTG
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -s 10.9.0.0/16 -d 10.9.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.9.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
COMMIT
*filter
:FLANNEL-FWD - [0:0]
-A FORWARD -s 10.9.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.9.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"""


@pytest.mark.parametrize("kind", _IPTABLES)
def test_what_flannel_left_for_another_network_is_taken_over(host: str, kind: Kind) -> None:
    async def scenario() -> None:
        restore(kind, FOREIGN)
        restore(kind, OLD_FLANNEL)
        assert await settle() == kind
        assert "10.9.0.0" not in dump(kind)
        jumps = [line for line in shell(f"{kind}-save").splitlines() if "-j FLANNEL" in line]
        assert len(jumps) == 2

    play(host, scenario)


@pytest.mark.parametrize("kind", list(Kind))
def test_rules_follow_the_subnet_and_the_options(host: str, kind: Kind) -> None:
    other = {Family.IPV4: Prefix.parse("10.5.77.0/24"), Family.IPV6: Prefix.parse("fd00:5:0:77::/64")}

    async def scenario() -> None:
        decide_for(kind)
        async with kept(kind) as firewall:
            firewall.want(make_rules(MASQUERADE, NETWORK, other))
            await until(lambda: "10.5.77.0/24" in dump(kind) and "fd00:5:0:77::/64" in dump(kind))
            assert "10.5.1.0/24" not in dump(kind)
            firewall.want(make_rules(FirewallOptions(), NETWORK, other))
            await until(lambda: "10.5.77.0/24" not in dump(kind) and "fd00:5:0:77::/64" not in dump(kind))
            assert "10.5.0.0/16" in dump(kind)
            firewall.want(NOTHING)
            await until(lambda: not ours(kind))

    play(host, scenario)


@pytest.mark.parametrize("kind", list(Kind))
def test_nothing_is_written_where_nothing_differs(host: str, kind: Kind) -> None:
    async def scenario() -> None:
        decide_for(kind)
        async with kept(kind, resync_s=0.05) as firewall:
            before = shell("nft monitor & sleep 0.4; kill $!")
            assert before == ""
            assert firewall.statistics.repairs == 0

    play(host, scenario)


@pytest.mark.parametrize("kind", [Kind.NFT, Kind.IPTABLES_NFT])
def test_look_is_not_even_taken_while_the_kernel_says_that_nothing_changed(host: str, kind: Kind) -> None:
    async def scenario() -> None:
        decide_for(kind)
        async with kept(kind, resync_s=0.01) as firewall:
            await until(lambda: firewall.statistics.looks > 1)
            await asyncio.sleep(0.2)
            looks = firewall.statistics.looks
            assert looks < 6
            shell("nft add table ip other")
            await until(lambda: firewall.statistics.looks > looks)
            assert firewall.statistics.repairs == 0

    play(host, scenario)


def test_keeper_rests_until_something_changes(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not take what it writes itself for a reason to look again and again."""
    settles = 0
    settle_once = Firewall.settle

    async def counted(firewall: Firewall) -> None:
        nonlocal settles
        settles += 1
        await settle_once(firewall)

    async def scenario() -> None:
        monkeypatch.setattr(Firewall, "settle", counted)
        async with kept(Kind.NFT) as firewall:
            await asyncio.sleep(1)  # three times as long as a notification waits
            before = settles
            await asyncio.sleep(1)
            assert settles == before
            shell("nft add table ip other")
            await until(lambda: settles > before)
            assert firewall.statistics.repairs == 0

    play(host, scenario)


def test_held_lock_is_said_once_and_waited_for(host: str, caplog: pytest.LogCaptureFixture) -> None:
    lock = os.open("/run/xtables.lock", os.O_CREAT | os.O_CLOEXEC, 0o600)

    async def scenario() -> None:
        restore(Kind.IPTABLES_LEGACY, FOREIGN)
        fcntl.flock(lock, fcntl.LOCK_EX)
        firewall = Firewall()
        firewall.want(SETS)
        with pytest.raises(FirewallError, match=r"xtables\.lock"):
            await firewall.settle()
        assert not firewall.statistics.is_standing
        async with asyncio.TaskGroup() as group:
            task = group.create_task(firewall.run())
            await until(lambda: "keeping the firewall's rules fails" in caplog.text)
            fcntl.flock(lock, fcntl.LOCK_UN)
            await until(lambda: firewall.statistics.is_standing)
            task.cancel()
        firewall.close()

    with caplog.at_level(logging.INFO):
        play(host, scenario)
    os.close(lock)
    assert caplog.text.count("fails, trying again") == 1
    assert "works again" in caplog.text
    assert "fuser /run/xtables.lock" in caplog.text


def test_keeper_may_be_killed_between_any_two_transactions(host: str) -> None:
    """The next start makes whole what an earlier one left half."""

    async def scenario() -> None:
        restore(Kind.IPTABLES_NFT, FOREIGN)
        await settle()
        whole = dump(Kind.IPTABLES_NFT)
        for part in range(len(SETS)):
            await settle(NOTHING)
            await settle(
                tuple(RuleSet(s.family, s.purpose, s.rules * (n < part)) for n, s in enumerate(SETS))
            )
            await settle()
            assert sorted(dump(Kind.IPTABLES_NFT).split("\n")) == sorted(whole.split("\n"))

    play(host, scenario)


# What is not in the tool in use


OTHERS = [(kind, other) for kind in Kind for other in Kind if other is not kind]
#: Rules of ours as an earlier start, or flannel, would have written them.
LEFT = """*nat
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -s 10.9.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE
COMMIT
"""


def leave(kind: Kind) -> None:
    """Have rules of ours, of another network, in a tool."""
    if kind is Kind.NFT:
        shell("nft 'add table ip flannel-ipv4; add chain ip flannel-ipv4 forward'")
    else:
        restore(kind, LEFT)


@pytest.mark.parametrize(("kind", "other"), OTHERS)
def test_rules_of_ours_that_appear_elsewhere_later_are_removed_and_said(
    host: str, kind: Kind, other: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    """From nft to the other tables of nftables at once, to legacy iptables at the next look."""
    is_heard = kind is Kind.NFT and other is Kind.IPTABLES_NFT

    async def scenario() -> None:
        decide_for(kind)
        async with kept(kind, resync_s=3600.0 if is_heard else 0.1) as firewall:
            before = ours(kind)
            leave(other)
            assert ours(other)
            await until(lambda: not ours(other))
            assert ours(kind) == before
            assert firewall.statistics.repairs == 0

    with caplog.at_level(logging.INFO):
        play(host, scenario)
    said = [
        line for line in caplog.messages if f"firewall rules of ours found in {other}: removing them" in line
    ]
    assert len(said) == 1
    if other is not Kind.IPTABLES_LEGACY:
        assert "changed_by=" in said[0]


def test_rules_of_ours_that_somebody_writes_again_and_again_are_no_fight(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with kept(Kind.NFT):
            for _ in range(5):
                leave(Kind.IPTABLES_NFT)
                shell("nft add table ip other; nft delete table ip other")
                await asyncio.sleep(0.5)  # longer than a notification waits
        assert ours(Kind.IPTABLES_NFT)

    with caplog.at_level(logging.INFO):
        play(host, scenario)
    assert caplog.text.count("found in iptables-nft: removing them") == 1


@pytest.mark.parametrize(
    ("kind", "other"), [(kind, other) for kind, other in OTHERS if other is not Kind.NFT]
)
def test_rules_of_others_that_appear_elsewhere_later_are_said_once(
    host: str, kind: Kind, other: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        decide_for(kind)
        async with kept(kind, resync_s=0.1):
            restore(other, FOREIGN)
            await until(lambda: "rules of others found" in caplog.text)
            restore(other, "*filter\n-A INPUT -s 192.0.2.1 -j DROP\nCOMMIT\n")
            leave(other)  # so that the change was looked at
            await until(lambda: not ours(other))

    with caplog.at_level(logging.INFO):
        play(host, scenario)
    (said,) = [line for line in caplog.messages if "rules of others found" in line]
    assert f"found in {other} count=3 changed_by=" in said
    assert f"beside ours in {kind}" in said
    assert ("iptables" in said.partition("changed_by=")[2].split(":")[0]) == (other is Kind.IPTABLES_NFT)


def test_tables_of_others_in_nft_and_a_chain_that_drops_are_said_with_the_remedy(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        decide_for(Kind.IPTABLES_NFT)
        async with kept(Kind.IPTABLES_NFT, resync_s=0.1):
            shell(
                "nft 'add table inet site; add chain inet site way"
                " { type filter hook forward priority 0; policy drop; }'"
            )
            await until(lambda: "drops by policy" in caplog.text)

    with caplog.at_level(logging.INFO):
        play(host, scenario)
    assert "firewall tables of others found in nft: inet site; packets meet them beside ours" in caplog.text
    (said,) = [line for line in caplog.messages if "drops by policy" in line]
    for remedy in ("ip saddr 10.5.0.0/16 accept", "ip6 daddr fd00:5::/48 accept"):
        assert f"nft insert rule inet site way {remedy}" in said


def test_chain_of_others_whose_policy_turns_later_is_said(
    host: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without reading all chains again: nothing was added."""
    read: list[list[Place] | None] = []
    original = View.forwarding_chains

    async def forwarding_chains(view: View) -> list[Place] | None:
        read.append(await original(view))
        return read[-1]

    monkeypatch.setattr(View, "forwarding_chains", forwarding_chains)

    async def scenario() -> None:
        decide_for(Kind.IPTABLES_NFT)
        async with kept(Kind.IPTABLES_NFT, resync_s=0.1):
            shell("nft 'add table ip site; add chain ip site way { type filter hook forward priority 0; }'")
            await until(lambda: bool(read) and read[-1] == [Place("ip", "site", "way")])
            assert "drops by policy" not in caplog.text
            times = len(read)
            shell("nft 'chain ip site way { policy drop; }'")
            await until(lambda: "chain 'ip site way' drops by policy" in caplog.text)
            assert len(read) == times

    with caplog.at_level(logging.INFO):
        play(host, scenario)


def test_others_who_change_legacy_rules_cost_no_look_with_a_program(host: str) -> None:
    """Nor do counters; what is ours is seen to be as it was (``bench/firewall``)."""

    async def scenario() -> None:
        decide_for(Kind.IPTABLES_LEGACY)
        async with kept(Kind.IPTABLES_LEGACY, resync_s=0.02) as firewall:
            looks = firewall.statistics.looks
            for number in range(5):
                shell(f"iptables-legacy -t nat -I POSTROUTING -d 192.0.2.{number} -j ACCEPT")
                shell("iptables-legacy -t nat -A KUBE-POSTROUTING -j ACCEPT; iptables-legacy -t nat -Z")
            await asyncio.sleep(0.1)
            assert firewall.statistics.looks == looks
            shell("iptables-legacy -t nat -F FLANNEL-POSTRTG")
            await until(lambda: firewall.statistics.repairs == 1 and firewall.statistics.is_standing)

    play(host, scenario)


def forward_rules(kind: Kind) -> list[str]:
    return [line for line in ours(kind) if "-A FLANNEL-FWD" in line]


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("other", _IPTABLES)
def test_forward_rules_stand_wherever_forward_drops_and_for_as_long(
    host: str, kind: Kind, other: Kind
) -> None:
    """Docker gives FORWARD that policy, at its start and maybe after ours."""

    async def scenario() -> None:
        decide_for(kind)
        async with kept(kind, resync_s=0.1):
            assert bool(forward_rules(other)) == (kind is other)
            shell(f"{other} -P FORWARD DROP; ip6{other[2:]} -P FORWARD DROP")
            await until(lambda: len(forward_rules(other)) == 4)
            shell(f"{other} -F FLANNEL-FWD")
            await until(lambda: len(forward_rules(other)) == 4)
            shell(f"{other} -P FORWARD ACCEPT; ip6{other[2:]} -P FORWARD ACCEPT")
            await until(lambda: kind is other or not ours(other))

    play(host, scenario)


def test_forward_that_drops_where_no_program_can_reach_is_said(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nft").symlink_to("/usr/sbin/nft")

    async def scenario() -> None:
        shell("iptables-legacy -P FORWARD DROP")
        with monkeypatch.context() as context:
            context.setenv("PATH", str(tmp_path))
            await settle(enable_nftables=True)

    play(host, scenario)
    assert "FORWARD of iptables-legacy drops IPv4 by policy" in caplog.text
    assert "install iptables-legacy, or set its policy to ACCEPT" in caplog.text


def test_what_is_left_where_no_program_can_reach_is_said(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "nft").symlink_to("/usr/sbin/nft")

    async def scenario() -> None:
        leave(Kind.IPTABLES_LEGACY)
        with monkeypatch.context() as context:
            context.setenv("PATH", str(tmp_path))
            await settle(enable_nftables=True)

    play(host, scenario)
    assert "firewall rules of ours are in iptables-legacy, and no program to remove them works" in caplog.text


@pytest.mark.parametrize("kind", _IPTABLES)
def test_rules_of_others_are_counted_as_the_program_counts_them(host: str, kind: Kind) -> None:
    async def scenario() -> None:
        restore(kind, FOREIGN)
        restore(
            kind,
            "*mangle\n:X - [0:0]\n:Y - [0:0]\n-A FORWARD -j X\n-A X -j Y\n-A Y -m mark --mark 1 -j ACCEPT\n"
            "COMMIT\n",
        )
        await settle()
        view = View()
        census = await view.census()
        view.close()
        found = {Kind.IPTABLES_NFT: census.iptables_nft, Kind.IPTABLES_LEGACY: census.iptables_legacy}
        assert found[kind] == sum(
            line.startswith("-A") and "FLANNEL" not in line for line in dump(kind).splitlines()
        )
        assert sum(found.values()) == 6

    play(host, scenario)
