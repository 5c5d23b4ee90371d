# SPDX-License-Identifier: Apache-2.0
"""The pure part of the lab's clouds: layout, wiring, the router's rules."""

import os
from pathlib import Path

import msgspec
import pytest

from loden.address import Prefix, parse_address
from loden.errors import LabError
from loden.lab.clouds import catalogue
from loden.lab.clouds.catalogue import CLOUDS, environment, require_installed
from loden.lab.clouds.journal import Call, Journal, read_calls
from loden.lab.clouds.machines import View
from loden.lab.clouds.router import Wire, check_rules, route_commands
from loden.lab.clouds.serve import machines, wires
from loden.lab.topology import Spec, Stack, Topology, plan
from loden.lab.wiring import switch_wiring

A, B = parse_address("198.18.0.1"), parse_address("198.18.1.1")
WIRES = (Wire("s0", A), Wire("s1", B))
ONE, TWO = Prefix.parse("10.5.1.0/24"), Prefix.parse("10.5.2.0/24")


@pytest.mark.parametrize("backend", list(CLOUDS))
class TestLayout:
    def test_every_host_is_alone_with_the_router(self, backend: str) -> None:
        made = plan(Spec(backend=backend, hosts=3))
        assert made.spec.topology is Topology.ROUTED
        assert len({host.segment.bridge for host in made.hosts}) == 3
        assert all(host.segment.routers for host in made.hosts)

    def test_a_single_host_has_the_router_too(self, backend: str) -> None:
        made = plan(Spec(backend=backend, hosts=1))
        assert made.hosts[0].segment.routers
        assert switch_wiring(made).forwards == made.families

    def test_router_answers_for_api_and_metadata(self, backend: str) -> None:
        commands = switch_wiring(plan(Spec(backend=backend))).commands
        assert "addr add 169.254.169.253/32 dev lo" in commands
        assert f"addr add {CLOUDS[backend].metadata}/32 dev lo" in commands

    def test_hosts_are_machines(self, backend: str) -> None:
        made = plan(Spec(backend=backend, hosts=2))
        assert [one.ip for one in machines(made)] == ["198.18.0.1", "198.18.1.1"]
        assert wires(made) == list(WIRES)

    @pytest.mark.parametrize("family", [Stack.DUAL, Stack.IPV6])
    def test_other_families_are_refused(self, backend: str, family: Stack) -> None:
        with pytest.raises(LabError, match=f"have no --family {family}"):
            plan(Spec(backend=backend, family=family))

    def test_shared_segments_are_refused(self, backend: str) -> None:
        with pytest.raises(LabError, match="no two hosts share a segment"):
            plan(Spec(backend=backend, topology=Topology.MIXED))

    def test_what_is_missing_is_named(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        require_installed(backend)
        monkeypatch.setattr(catalogue, "find_spec", lambda _: None)
        with pytest.raises(LabError, match="is not installed") as caught:
            require_installed(backend)
        assert caught.value.hint.startswith("pip install 'loden[")

    def test_agents_cannot_reach_a_real_cloud(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        real = {
            "AWS_ACCESS_KEY_ID": "real",
            "AWS_PROFILE": "real",
            "GOOGLE_APPLICATION_CREDENTIALS": "/real",
            "ACCESS_KEY_SECRET": "real",
            "HTTPS_PROXY": "http://real",
        }
        for name, value in real.items():
            monkeypatch.setenv(name, value)
        found = environment(backend)
        assert not real.keys() & found.keys()
        assert found["PATH"] == os.environ["PATH"]
        ours = {value for name, value in found.items() if name not in os.environ}
        assert all("169.254.169.25" in value or "100.100.100.200" in value for value in ours)


class TestRouter:
    def test_routes_follow_the_table(self) -> None:
        first = View({ONE: A}, frozenset())
        assert route_commands(WIRES, None, first) == [
            "route replace 10.5.1.0/24 via 198.18.0.1 dev s0 proto 99"
        ]
        second = View({ONE: B, TWO: B}, frozenset())
        assert route_commands(WIRES, first, second) == [
            "route replace 10.5.1.0/24 via 198.18.1.1 dev s1 proto 99",
            "route replace 10.5.2.0/24 via 198.18.1.1 dev s1 proto 99",
        ]
        assert route_commands(WIRES, second, View({TWO: B}, frozenset())) == [
            "route del 10.5.1.0/24 proto 99"
        ]

    def test_machine_that_may_not_forward_has_its_own_packets_only(self) -> None:
        rules = check_rules(WIRES, View({}, frozenset([B])))
        assert 'iifname "s0" ip saddr != 198.18.0.1 counter drop' in rules
        assert 'oifname "s0" ip daddr != 198.18.0.1 counter drop' in rules
        assert "s1" not in rules
        assert rules.startswith("table ip vpc {}\ndelete table ip vpc\n")


def test_call_that_is_still_being_written_down_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "calls"
    assert read_calls(file) == []
    call = Call("DescribeRouteTables", False, {"Page": "1"}, "192.0.2.1", "ok")
    Journal(file).note(call)
    with file.open("ab") as being_written:
        being_written.write(msgspec.json.encode(call)[:-3])
    assert read_calls(file) == [call]
