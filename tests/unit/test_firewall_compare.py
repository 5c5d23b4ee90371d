# SPDX-License-Identifier: Apache-2.0
"""What stands against what is wanted: nothing to write where nothing differs, the whole chain otherwise."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from loden.address import Family, Prefix
from loden.firewall import iptables, nftables
from loden.firewall.rules import FirewallOptions, Purpose, RuleSet, make_rules
from tests.contract.firewall import network_of

_SETS = make_rules(
    FirewallOptions(masquerade=True, exclude=(Prefix.parse("192.0.2.1/32"),)),
    network_of(Prefix.parse("10.5.0.0/16")),
    {Family.IPV4: Prefix.parse("10.5.1.0/24")},
)
MASQUERADE, FORWARD = (one for one in _SETS if one.rules)
NOTHING = RuleSet(Family.IPV4, Purpose.MASQUERADE)
JUMP = '-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG'
DECLARE = ":FLANNEL-POSTRTG - [0:0]"
FILL = [line for line in iptables.render(MASQUERADE).splitlines() if line.startswith("-A FLANNEL")]
STANDING = [":FLANNEL-POSTRTG - [5:300]", JUMP, *FILL]


def test_iptables_writes_nothing_where_all_stands() -> None:
    assert iptables.compare(MASQUERADE, STANDING) == []
    listed = ["-N FLANNEL-POSTRTG", JUMP, *FILL]
    assert iptables.compare(MASQUERADE, listed) == []


def test_iptables_knows_a_rule_however_its_options_are_ordered() -> None:
    marked = '-A FLANNEL-POSTRTG -m comment --comment "flanneld masq" -m mark --mark 0x4000/0x4000 -j RETURN'
    assert iptables.compare(MASQUERADE, [DECLARE, JUMP, marked, *FILL[1:]]) == []


@pytest.mark.parametrize(
    "rules",
    [[], FILL[1:], [*FILL, FILL[0]], [FILL[1], FILL[0], *FILL[2:]], [f"{FILL[0]} --x", *FILL[1:]], ["-A 'x"]],
    ids=["none", "one missing", "one more", "reordered", "another option", "quote open"],
)
def test_iptables_fills_the_chain_again_and_leaves_the_jump(rules: list[str]) -> None:
    assert iptables.compare(MASQUERADE, [DECLARE, JUMP, *rules]) == [DECLARE, *FILL]


@pytest.mark.parametrize(
    "jumps",
    [
        [],
        [JUMP, JUMP],
        ["-A POSTROUTING -j FLANNEL-POSTRTG"],
        [JUMP, '-A POSTROUTING -s 10.9.0.0/16 -m comment --comment "flanneld masq" -j RETURN'],
    ],
    ids=["none", "two", "without comment", "early flannel's rule beside it"],
)
def test_iptables_puts_one_jump_in_the_place_of_all(jumps: list[str]) -> None:
    deletes = [f"-D{jump[2:]}" for jump in jumps]
    assert iptables.compare(MASQUERADE, [DECLARE, *jumps, *FILL]) == [DECLARE, *deletes, JUMP, *FILL]


def test_iptables_leaves_alone_what_only_sounds_like_ours() -> None:
    others = [
        '-A POSTROUTING -m comment --comment "not flanneld masq" -j ACCEPT',
        "-A POSTROUTING -j FLANNEL-POSTRTG-2",
        ":FLANNEL-POSTRTG-2 - [0:0]",
        "-A FLANNEL-POSTRTG-2 -j RETURN",
    ]
    assert iptables.compare(MASQUERADE, [*STANDING, *others]) == []
    assert iptables.compare(NOTHING, others) == []


def test_iptables_removes_chain_and_jump_of_what_is_not_wanted() -> None:
    assert iptables.compare(NOTHING, STANDING) == [DECLARE, f"-D{JUMP[2:]}", "-X FLANNEL-POSTRTG"]
    assert iptables.compare(NOTHING, [DECLARE]) == [DECLARE, "-X FLANNEL-POSTRTG"]
    assert iptables.compare(NOTHING, []) == []
    assert iptables.render(NOTHING) == ""


def _payload(field: str, prefix: str, operator: str = "==") -> dict[str, Any]:
    address, _, length = prefix.partition("/")
    right: object = {"prefix": {"addr": address, "len": int(length)}} if length else address
    left = {"payload": {"protocol": "ip", "field": field}}
    return {"match": {"op": operator, "left": left, "right": right}}


_MARK = {"match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, 16384]}, "right": 16384}}
_C, _N = "10.5.0.0/16", "10.5.1.0/24"
_EXPRESSIONS = (
    ("postrtg", [_MARK, {"return": None}]),
    ("postrtg", [_payload("saddr", _N), _payload("daddr", _C), {"return": None}]),
    ("postrtg", [_payload("saddr", _C), _payload("daddr", _N), {"return": None}]),
    ("postrtg", [_payload("saddr", _C, "!="), _payload("daddr", _N), {"return": None}]),
    ("postrtg", [_payload("saddr", _C), _payload("daddr", "192.0.2.1"), {"return": None}]),
    (
        "postrtg",
        [
            _payload("saddr", _C),
            _payload("daddr", "224.0.0.0/4", "!="),
            {"masquerade": {"flags": "fully-random"}},
        ],
    ),
    (
        "postrtg",
        [_payload("saddr", _C, "!="), _payload("daddr", _C), {"masquerade": {"flags": ["fully-random"]}}],
    ),
    ("forward", [_payload("saddr", _C), {"accept": None}]),
    ("forward", [_payload("daddr", _C), {"accept": None}]),
)


def _chain(name: str, kind: str, hook: str, priority: int) -> dict[str, Any]:
    where = {"family": "ip", "table": "flannel-ipv4", "name": name, "handle": 1}
    return {"chain": {**where, "type": kind, "hook": hook, "prio": priority, "policy": "accept"}}


#: As nft 1.0.6 lists it; whether a single flag is a list depends on the version.
LISTED: list[dict[str, Any]] = [
    {"metainfo": {"version": "1.0.6", "json_schema_version": 1}},
    {"table": {"family": "ip", "name": "flannel-ipv4", "handle": 3}},
    _chain("postrtg", "nat", "postrouting", 100),
    _chain("forward", "filter", "forward", 0),
    *(
        {"rule": {"family": "ip", "table": "flannel-ipv4", "chain": chain, "handle": 9, "expr": expression}}
        for chain, expression in _EXPRESSIONS
    ),
]


def test_nft_writes_nothing_where_all_stands() -> None:
    assert nftables.is_same((MASQUERADE, FORWARD), LISTED)
    assert nftables.is_same((NOTHING,), [])


Break = Callable[[list[dict[str, Any]]], object]
BREAKS: dict[str, Break] = {
    "table deleted": lambda listed: listed.clear(),
    "chain deleted": lambda listed: listed.pop(2),
    "rule deleted": lambda listed: listed.pop(4),
    "rules reordered": lambda listed: listed.append(listed.pop(4)),
    "rule added": lambda listed: listed.append(listed[4]),
    "chain added": lambda listed: listed.append(_chain("other", "nat", "input", 0)),
    "set added": lambda listed: listed.append({"set": {"name": "x"}}),
    "other priority": lambda listed: listed[2]["chain"].update(prio=0),
    "other hook": lambda listed: listed[2]["chain"].update(hook="input"),
    "policy drop": lambda listed: listed[3]["chain"].update(policy="drop"),
    "no hook": lambda listed: [listed[3]["chain"].pop(key) for key in ("type", "hook", "prio", "policy")],
    "mark without mask": lambda listed: listed[4]["rule"]["expr"].pop(0),
    "other verdict": lambda listed: listed[4]["rule"]["expr"].__setitem__(1, {"accept": None}),
    "counter added": lambda listed: listed[4]["rule"]["expr"].append({"counter": {"packets": 0, "bytes": 0}}),
    "ports not random": lambda listed: listed[9]["rule"]["expr"].__setitem__(2, {"masquerade": None}),
}


@pytest.mark.parametrize("what", BREAKS)
def test_nft_notices(what: str) -> None:
    listed = copy.deepcopy(LISTED)
    BREAKS[what](listed)
    assert json.dumps(listed) != json.dumps(LISTED)
    assert not nftables.is_same((MASQUERADE, FORWARD), listed)
