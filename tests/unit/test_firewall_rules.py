# SPDX-License-Identifier: Apache-2.0
"""The rules, and that both renderings do with every packet what the table in COMPAT §9 says."""

import re
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.address import Family, Prefix
from loden.firewall import iptables, nftables
from loden.firewall.rules import FirewallOptions, Purpose, RuleSet, make_rules
from loden.network import Network
from tests.contract.firewall import (
    ACCEPTED,
    KEPT,
    MASQUERADED,
    PASSED,
    Packet,
    Setup,
    network_of,
    reference,
)

Walk = Callable[[Sequence[RuleSet], Packet], tuple[str, str]]


def walk_iptables(sets: Sequence[RuleSet], packet: Packet) -> tuple[str, str]:
    """What POSTROUTING and FORWARD do with a packet, read from what iptables-restore is given."""
    family = Family.of(packet.source)
    text = "".join(iptables.render(one) for one in sets if one.family is family)
    chains: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("-A "):
            chains.setdefault(line.split()[1], []).append(line)

    def matches(line: str) -> bool:
        for negation, side, prefix in re.findall(r"(! )?-([sd]) (\S+)", line):
            address = packet.source if side == "s" else packet.destination
            if Prefix.parse(prefix).holds(address) == bool(negation):
                return False
        mark = re.search(r"--mark (\w+)/(\w+)", line)
        return mark is None or packet.mark & int(mark[2], 16) == int(mark[1], 16)

    def walk(chain: str) -> str | None:
        for line in filter(matches, chains.get(chain, ())):
            target = line.split(" -j ")[1].split()[0]
            verdict = walk(target) if target in chains else target
            if verdict == "RETURN":
                return None
            if verdict is not None:
                return verdict
        return None

    return (
        {None: KEPT, "MASQUERADE": MASQUERADED}[walk("POSTROUTING")],
        {None: PASSED, "ACCEPT": ACCEPTED}[walk("FORWARD")],
    )


def walk_nftables(sets: Sequence[RuleSet], packet: Packet) -> tuple[str, str]:
    """The same, read from what nft is given."""
    family = Family.of(packet.source)
    text = nftables.render(family, [one for one in sets if one.family is family])
    bodies = dict(re.findall(r"chain (\w+) \{\n(.*?)\n\t\}", text, re.DOTALL))

    def matches(line: str) -> bool:
        for side, negation, prefix in re.findall(r"(saddr|daddr) (!= )?(\S+)", line):
            address = packet.source if side == "saddr" else packet.destination
            if Prefix.parse(prefix).holds(address) == bool(negation):
                return False
        mark = re.search(r"meta mark & (\w+) == (\w+)", line)
        return mark is None or packet.mark & int(mark[1], 16) == int(mark[2], 16)

    def walk(chain: str) -> str:
        lines = bodies[chain].splitlines()[1:] if chain in bodies else []
        words = next((line.split() for line in lines if matches(line)), ["return"])
        return next(word for word in ("masquerade", "accept", "return") if word in words)

    return (
        {"return": KEPT, "masquerade": MASQUERADED}[walk("postrtg")],
        {"return": PASSED, "accept": ACCEPTED}[walk("forward")],
    )


@st.composite
def prefixes(draw: st.DrawFn, family: Family, *, within: Prefix | None = None) -> Prefix:
    first = 0 if within is None else within.length
    length = draw(st.integers(first, family.bits))
    number = draw(st.integers(0, (1 << family.bits) - 1))
    if within is not None:
        number = within.first | number & (within.size - 1)
    return Prefix.of(number.to_bytes(family.size, "big"), length)


@st.composite
def setups(draw: st.DrawFn) -> Setup:
    family = draw(st.sampled_from(Family))
    number = draw(st.integers(0, (1 << family.bits) - 1))
    cluster = Prefix.of(number.to_bytes(family.size, "big"), draw(st.integers(1, family.bits - 8)))
    inside = cluster.first | draw(st.integers(0, cluster.size - 1))
    own = Prefix.of(
        inside.to_bytes(family.size, "big"), draw(st.integers(cluster.length + 2, family.bits - 2))
    )
    exclude = draw(st.lists(st.one_of(prefixes(family), prefixes(family, within=cluster)), max_size=3))
    told = FirewallOptions(draw(st.booleans()), tuple(exclude), draw(st.booleans()), draw(st.booleans()))
    return Setup(cluster, own, told)


@st.composite
def packets(draw: st.DrawFn, setup: Setup) -> Packet:
    """Addresses from everywhere that a rule speaks of, borders included, and from anywhere else."""
    family = setup.cluster.family
    multicast = Prefix.parse("224.0.0.0/4" if family is Family.IPV4 else "ff00::/8")
    everything = Prefix(bytes(family.size), 0)
    ranges = (setup.own, setup.cluster, multicast, everything, *setup.told.exclude)

    def address() -> bytes:
        chosen = draw(st.sampled_from(ranges))
        number = draw(
            st.one_of(
                st.integers(chosen.first, chosen.last),
                st.sampled_from((chosen.first, chosen.last, max(0, chosen.first - 1))),
                st.just(min(everything.last, chosen.last + 1)),
            )
        )
        return number.to_bytes(family.size, "big")

    return Packet(address(), address(), draw(st.sampled_from((0, 0x4000, 0x4001, 0xC000, 0x8000))))


@given(st.data())
def test_iptables_and_nftables_do_with_every_packet_what_the_table_says(data: st.DataObject) -> None:
    setup = data.draw(setups())
    packet = data.draw(packets(setup))
    touches = setup.cluster.holds(packet.source) or setup.cluster.holds(packet.destination)
    expected = (
        reference(setup, packet),
        ACCEPTED if touches and setup.told.forward else PASSED,
    )
    sets = setup.sets()
    assert walk_iptables(sets, packet) == expected
    assert walk_nftables(sets, packet) == expected


SETUP = Setup(Prefix.parse("10.5.0.0/16"), Prefix.parse("10.5.1.0/24"), FirewallOptions(masquerade=True))
_ADDRESSES = {
    "own": bytes((10, 5, 1, 9)),
    "peer": bytes((10, 5, 2, 9)),
    "outside": bytes((192, 0, 2, 1)),
    "multicast": bytes((224, 0, 0, 5)),
}


@pytest.mark.parametrize("walk", [walk_iptables, walk_nftables])
@pytest.mark.parametrize(
    ("source", "destination", "mark", "expected"),
    [
        ("own", "own", 0, KEPT),
        ("own", "peer", 0, KEPT),
        ("own", "outside", 0, MASQUERADED),
        ("own", "multicast", 0, KEPT),
        ("own", "outside", 0x4000, KEPT),
        ("own", "outside", 0xC000, KEPT),  # W18: flannel's nftables compares the mark without its mask
        ("peer", "own", 0, KEPT),
        ("peer", "peer", 0, MASQUERADED),  # a peer's packet that only passes through
        ("peer", "outside", 0, MASQUERADED),
        ("outside", "own", 0, KEPT),  # W18: flannel's nftables rule 4 is another one
        ("outside", "peer", 0, MASQUERADED),  # W18: and makes its rule 6 unreachable
        ("outside", "multicast", 0, KEPT),
    ],
)
def test_each_pair_of_the_table(walk: Walk, source: str, destination: str, mark: int, expected: str) -> None:
    packet = Packet(_ADDRESSES[source], _ADDRESSES[destination], mark)
    assert reference(SETUP, packet) == expected
    assert walk(SETUP.sets(), packet)[0] == expected


def rules_of(
    network: Network, told: FirewallOptions, *subnets: str
) -> dict[tuple[Family, Purpose], list[str]]:
    own = {prefix.family: prefix for prefix in map(Prefix.parse, subnets)}
    sets = make_rules(told, network, own)
    return {(one.family, one.purpose): [str(rule) for rule in one.rules] for one in sets if one.rules}


def test_family_that_is_off_gets_no_rules_though_it_has_a_network() -> None:
    """W20: flannel installs IPv4 rules with an own subnet of 0.0.0.0/0 there."""
    network = network_of(Prefix.parse("fd00:5::/48"), Network="10.5.0.0/16")
    found = rules_of(network, FirewallOptions(masquerade=True), "fd00:5:0:1::/64")
    assert {family for family, _ in found} == {Family.IPV6}


def test_every_chain_is_named_so_that_those_without_rules_go() -> None:
    sets = make_rules(FirewallOptions(forward=False), network_of(SETUP.cluster), {Family.IPV4: SETUP.own})
    assert [one.rules for one in sets] == [(), (), (), ()]
    assert {(one.family, one.purpose) for one in sets} == {(f, p) for f in Family for p in Purpose}


def test_excluded_ranges_of_flags_and_network_come_together_in_order_and_once() -> None:
    network = network_of(SETUP.cluster, IPMasqExclude=["203.0.113.0/24", "2001:db8::/32", "192.0.2.0/24"])
    told = FirewallOptions(
        masquerade=True, exclude=(Prefix.parse("192.0.2.0/24"), Prefix.parse("198.18.0.0/15"))
    )
    rules = rules_of(network, told, "10.5.1.0/24")[Family.IPV4, Purpose.MASQUERADE]
    assert rules[4:7] == [
        "from 10.5.0.0/16 to 192.0.2.0/24: return",
        "from 10.5.0.0/16 to 198.18.0.0/15: return",
        "from 10.5.0.0/16 to 203.0.113.0/24: return",
    ]


def test_iptables_payload_is_flannels() -> None:
    masquerade, forward = (one for one in SETUP.sets() if one.rules)
    assert iptables.render(masquerade).splitlines() == [
        "*nat",
        ":FLANNEL-POSTRTG - [0:0]",
        '-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG',
        *(
            f'-A FLANNEL-POSTRTG {matches} -m comment --comment "flanneld masq" -j {target}'
            for matches, target in (
                ("-m mark --mark 0x4000/0x4000", "RETURN"),
                ("-s 10.5.1.0/24 -d 10.5.0.0/16", "RETURN"),
                ("-s 10.5.0.0/16 -d 10.5.1.0/24", "RETURN"),
                ("! -s 10.5.0.0/16 -d 10.5.1.0/24", "RETURN"),
                ("-s 10.5.0.0/16 ! -d 224.0.0.0/4", "MASQUERADE --random-fully"),
                ("! -s 10.5.0.0/16 -d 10.5.0.0/16", "MASQUERADE --random-fully"),
            )
        ),
        "COMMIT",
    ]
    assert iptables.render(forward).splitlines() == [
        "*filter",
        ":FLANNEL-FWD - [0:0]",
        '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
        '-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
        '-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
        "COMMIT",
    ]


def test_nft_script_makes_the_table_anew() -> None:
    told = FirewallOptions(masquerade=True, is_fully_random=False)
    setup = Setup(Prefix.parse("fd00:5::/48"), Prefix.parse("fd00:5:0:1::/64"), told)
    sets = [one for one in setup.sets() if one.family is Family.IPV6]
    assert nftables.render(Family.IPV6, sets) == (
        "add table ip6 flannel-ipv6\n"
        "delete table ip6 flannel-ipv6\n"
        "table ip6 flannel-ipv6 {\n"
        '\tcomment "rules for flannel-ipv6"\n'
        "\tchain postrtg {\n"
        "\t\ttype nat hook postrouting priority srcnat; policy accept;\n"
        "\t\tmeta mark & 0x4000 == 0x4000 return\n"
        "\t\tip6 saddr fd00:5:0:1::/64 ip6 daddr fd00:5::/48 return\n"
        "\t\tip6 saddr fd00:5::/48 ip6 daddr fd00:5:0:1::/64 return\n"
        "\t\tip6 saddr != fd00:5::/48 ip6 daddr fd00:5:0:1::/64 return\n"
        "\t\tip6 saddr fd00:5::/48 ip6 daddr != ff00::/8 masquerade\n"
        "\t\tip6 saddr != fd00:5::/48 ip6 daddr fd00:5::/48 masquerade\n"
        "\t}\n"
        "\tchain forward {\n"
        "\t\ttype filter hook forward priority filter; policy accept;\n"
        "\t\tip6 saddr fd00:5::/48 accept\n"
        "\t\tip6 daddr fd00:5::/48 accept\n"
        "\t}\n"
        "}\n"
    )


def test_nft_table_without_rules_goes() -> None:
    script = nftables.render(Family.IPV4, [RuleSet(Family.IPV4, purpose) for purpose in Purpose])
    assert script == "add table ip flannel-ipv4\ndelete table ip flannel-ipv4\n"
