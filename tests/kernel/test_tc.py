# SPDX-License-Identifier: Apache-2.0
"""Our programs in tc beside those of others, whose places, order and qdiscs stay as they were."""

import errno
import json
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from loden.address import parse_address
from loden.tables import tc
from loden.tables.netlink import Netlink
from loden.tables.tc import Filter, Hook
from loden.tables.udp_bpf import DECAPSULATE, FastPath, Settings
from tests.kernel.datagrams import WIRES
from tests.kernel.kernel import command, link_json, require_bpf, run
from tests.kernel.test_udp_path import listen

NAME = f"{DECAPSULATE}/flannel0"
WIRE = WIRES[0]


class Hooks:
    """The hooks of ``eth0``, and programs to attach there."""

    def __init__(self) -> None:
        self.requests = Netlink()
        self.index = link_json("eth0")["ifindex"]
        self.paths = [
            FastPath(Settings(parse_address(WIRE.own), WIRE.port, 1, WIRE.inside)) for _ in range(2)
        ]

    def close(self) -> None:
        for path in self.paths:
            path.close()
        self.requests.close()

    def attach(self, number: int = 0, *, hook: Hook = Hook.INGRESS, name: str = NAME) -> str:
        """Why it was refused, if it was."""
        program = self.paths[number].decapsulate
        refused = run(tc.attach(self.requests, self.index, hook, name, program.fd))
        return refused.detail if refused else ""

    def ours(self) -> list[Filter]:
        return run(tc.list_ours(self.requests))

    def detach(self) -> None:
        assert run(tc.detach(self.requests, self.ours())) is None

    def standing(self) -> list[tuple[Hook, int, str, int]]:
        """What stands, ours: hook, priority, name, program."""
        return [(Hook(one.parent), one.priority, one.name, one.program) for one in self.ours()]

    def number(self, place: int = 0) -> int:
        return self.paths[place].decapsulate.number


@pytest.fixture
def hooks(underlay: None) -> Iterator[Hooks]:
    del underlay
    require_bpf()
    found = Hooks()
    yield found
    found.close()


def theirs(where: str = "ingress") -> list[dict[str, Any]]:
    """The filters of others, as tc prints them, in order; what they have counted left out."""
    found = json.loads(command(f"tc -json filter show dev eth0 {where}"))
    filters = [one for one in found if "options" in one]  # a classifier comes first without
    return [one for one in filters if not one["options"].get("bpf_name", "").startswith(tc.PREFIX)]


def qdiscs() -> set[str]:
    """The kinds of qdisc on eth0 that have hooks."""
    found = json.loads(command("tc -json qdisc show dev eth0"))
    return {one["kind"] for one in found} & {"clsact", "ingress"}


def add(priority: int, where: str = "ingress") -> None:
    """A filter of somebody else that lets everything pass: two words of classic BPF."""
    line = f"tc filter add dev eth0 {where} protocol all prio {priority} bpf direct-action bytecode"
    done = subprocess.run([*line.split(), "1,6 0 0 4294967295"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TestAlone:
    def test_attached_is_found_again(self, hooks: Hooks) -> None:
        assert hooks.ours() == []
        assert hooks.attach() == ""
        assert hooks.standing() == [(Hook.INGRESS, 76, NAME, hooks.number())]

    def test_replaced_in_its_place(self, hooks: Hooks) -> None:
        hooks.attach()
        hooks.attach(1)
        assert hooks.standing() == [(Hook.INGRESS, 76, NAME, hooks.number(1))]

    def test_two_of_ours_at_one_hook(self, hooks: Hooks) -> None:
        """Two tunnels share the underlay's interface."""
        second = f"{DECAPSULATE}/flannel-v6"
        hooks.attach(0)
        hooks.attach(1, name=second)
        assert hooks.standing() == [
            (Hook.INGRESS, 76, NAME, hooks.number(0)),
            (Hook.INGRESS, 77, second, hooks.number(1)),
        ]
        assert run(tc.detach(hooks.requests, hooks.ours()[:1])) is None
        assert hooks.standing() == [(Hook.INGRESS, 77, second, hooks.number(1))]

    def test_same_name_at_the_other_hook_is_another(self, hooks: Hooks) -> None:
        hooks.attach()
        hooks.attach(hook=Hook.EGRESS)
        assert [one[0] for one in hooks.standing()] == [Hook.INGRESS, Hook.EGRESS]

    def test_qdisc_goes_with_the_last_filter(self, hooks: Hooks) -> None:
        hooks.attach()
        hooks.attach(hook=Hook.EGRESS)
        assert run(tc.detach(hooks.requests, hooks.ours()[:1])) is None
        assert qdiscs() == {"clsact"}
        hooks.detach()
        assert qdiscs() == set()

    def test_gone_already_counts_as_detached(self, hooks: Hooks) -> None:
        for line in ("filter delete dev eth0 ingress", "qdisc delete dev eth0 clsact"):
            hooks.attach()
            standing = hooks.ours()
            command(f"tc {line}")
            assert run(tc.detach(hooks.requests, standing)) is None

    def test_device_that_is_gone(self, hooks: Hooks) -> None:
        hooks.attach()
        standing = hooks.ours()
        command("ip link delete eth0")
        assert run(tc.detach(hooks.requests, standing)) is None
        program = hooks.paths[0].decapsulate
        refused = run(tc.attach(hooks.requests, hooks.index, Hook.INGRESS, NAME, program.fd))
        assert refused is not None
        assert refused.errno == errno.ENODEV


class TestBesideOthers:
    @pytest.mark.parametrize("priorities", [(10,), (100,), (76,), (76, 77), (10, 76, 100)], ids=str)
    def test_their_filters_stay_as_they_were(self, hooks: Hooks, priorities: tuple[int, ...]) -> None:
        command("tc qdisc add dev eth0 clsact")
        for priority in priorities:
            add(priority)
        before = theirs()
        for number in (0, 1):
            assert hooks.attach(number) == ""
            assert theirs() == before
        free = next(it for it in range(76, 80) if it not in priorities)
        assert hooks.standing() == [(Hook.INGRESS, free, NAME, hooks.number(1))]
        hooks.detach()
        assert theirs() == before
        assert qdiscs() == {"clsact"}

    def test_filters_that_came_after_ours_keep_the_qdisc(self, hooks: Hooks) -> None:
        hooks.attach()
        add(100, where="egress")
        before = theirs("egress")
        hooks.detach()
        assert theirs("egress") == before

    def test_empty_clsact_of_somebody_else_stays(self, hooks: Hooks) -> None:
        command("tc qdisc add dev eth0 clsact")
        hooks.attach()
        hooks.attach(1)
        hooks.attach(hook=Hook.EGRESS)
        hooks.detach()
        assert qdiscs() == {"clsact"}

    def test_ingress_qdisc_does_as_well(self, hooks: Hooks) -> None:
        command("tc qdisc add dev eth0 ingress")
        add(10)
        before = theirs()
        for number in (0, 1):
            assert hooks.attach(number) == ""
        assert hooks.standing() == [(Hook.INGRESS, 76, NAME, hooks.number(1))]
        hooks.detach()
        assert (hooks.ours(), theirs(), qdiscs()) == ([], before, {"ingress"})

    def test_ingress_qdisc_has_no_egress(self, hooks: Hooks) -> None:
        command("tc qdisc add dev eth0 ingress")
        assert "ingress qdisc" in hooks.attach(hook=Hook.EGRESS)
        assert hooks.ours() == []

    def test_program_of_somebody_else_is_not_ours(self, hooks: Hooks) -> None:
        hooks.attach(name="cil_from_netdev")
        assert hooks.ours() == []
        hooks.attach(1)
        assert [one[2] for one in hooks.standing()] == [NAME]
        hooks.detach()
        assert "cil_from_netdev" in command("tc filter show dev eth0 ingress")


class TestTraffic:
    def test_what_ours_lets_pass_meets_the_filters_behind(self, hooks: Hooks) -> None:
        hooks.attach(0)
        hooks.attach(1, name="theirs")
        passed = WIRE.datagram(b"", source=WIRE.stranger, fragment=1)
        dropped = WIRE.datagram(WIRE.packet(WIRE.nobody, WIRE.own_container), source=WIRE.stranger)
        with listen("wire") as far:
            for frame in (passed, dropped, passed):
                far.send(frame)
        ours, behind = (path.counters() for path in hooks.paths)
        assert (ours["from_engine"], ours["unknown_peer"]) == (2, 1)
        assert (behind["from_engine"], behind["unknown_peer"]) == (2, 0)

    def test_each_packet_meets_the_old_program_or_the_new_one(self, hooks: Hooks) -> None:
        """Replaced a few hundred times while packets come: none is missed, none is met twice."""
        frame = WIRE.datagram(WIRE.packet(WIRE.nobody, WIRE.own_container), source=WIRE.stranger)
        hooks.attach()
        is_over, sent = threading.Event(), 0
        with listen("wire") as far:

            def flood() -> None:
                nonlocal sent
                while not is_over.is_set():
                    far.send(frame)
                    sent += 1

            sender = threading.Thread(target=flood)
            sender.start()
            try:
                for turn in range(300):
                    assert hooks.attach(turn % 2) == ""
            finally:
                is_over.set()
                sender.join()
        found = [path.counters()["unknown_peer"] for path in hooks.paths]
        assert sum(found) == sent
        assert min(found) > 0
