# SPDX-License-Identifier: Apache-2.0
"""Neighbours and forwarding entries, as ``ip`` and ``bridge`` show them (COMPAT §7.3)."""

import errno
from typing import Any

import msgspec
import pytest

from loden.address import format_address
from loden.errors import errno_of
from loden.tables.base import Table
from loden.tables.entries import FdbEntry, Neighbour
from tests.kernel.kernel import BOTH, Kernel, Names, bridge, ip, leave_fdb, leave_neighbour, lines, run


@pytest.fixture
def standing(kernel: Kernel, names: Names) -> Kernel:
    assert run(kernel.devices.put([names.link()])) == {}
    return kernel


def test_neighbour_is_permanent_and_marked(standing: Kernel, names: Names) -> None:
    neighbour, _, _ = names.peer(9)
    assert run(standing.neighbours.put([neighbour])) == {}
    shown = lines(ip(f"{names.flag} neighbour show nud permanent dev {names.device}"))
    assert shown == [
        f"{format_address(neighbour.address)} lladdr 02:00:00:00:00:09 PERMANENT proto 76"
    ] or shown == [f"{format_address(neighbour.address)} lladdr 02:00:00:00:00:09 proto 76 PERMANENT"]


def test_forwarding_entry_is_permanent_and_of_the_device_itself(standing: Kernel, names: Names) -> None:
    _, fdb, _ = names.peer(9)
    assert run(standing.fdb.put([fdb])) == {}
    assert lines(bridge(f"fdb show dev {names.device}")) == [
        f"02:00:00:00:00:09 dst {format_address(fdb.remote)} self permanent"
    ]


def test_what_flannel_left_unmarked_on_our_device_is_ours(standing: Kernel, names: Names) -> None:
    neighbour, fdb, _ = names.peer(9)
    leave_neighbour(neighbour, "permanent")
    leave_fdb(fdb)
    assert run(standing.neighbours.read({})) == {neighbour.slot: neighbour}
    assert run(standing.fdb.read({})) == {fdb.slot: fdb}


def test_nothing_on_a_device_of_others_is_read(kernel: Kernel, names: Names) -> None:
    local = format_address(names.local)
    ip(f"link add theirs type vxlan id 7 local {local} dev eth0 dstport 8472")
    ip("link set theirs up")
    neighbour, fdb, _ = names.peer(9)
    for device in ("theirs", "eth0"):
        leave_neighbour(msgspec.structs.replace(neighbour, device=device), "permanent")
    leave_fdb(msgspec.structs.replace(fdb, device="theirs"))
    run(kernel.devices.refresh())
    assert run(kernel.neighbours.read({})) == {}
    assert run(kernel.fdb.read({})) == {}


def test_learned_entries_and_the_all_zero_entry_are_let_alone(standing: Kernel, names: Names) -> None:
    remote = format_address(names.remote(9))
    bridge(f"fdb append 00:00:00:00:00:00 dst {remote} dev {names.device} self permanent")
    bridge(f"fdb add 02:00:00:00:00:77 dst {remote} dev {names.device} self dynamic")
    leave_neighbour(names.peer(9)[0], "reachable")
    assert run(standing.fdb.read({})) == {}
    assert run(standing.neighbours.read({})) == {}


def test_a_learned_neighbour_becomes_permanent(standing: Kernel, names: Names) -> None:
    neighbour, _, _ = names.peer(9)
    leave_neighbour(msgspec.structs.replace(neighbour, mac=names.mac(77)), "stale")
    assert run(standing.neighbours.put([neighbour])) == {}
    assert run(standing.neighbours.read({})) == {neighbour.slot: neighbour}


def test_five_thousand_are_listed_as_they_were_put_and_shared(standing: Kernel, names: Names) -> None:
    peers = [names.peer(number) for number in range(2, 5002)]
    tables: tuple[Table[Any], ...] = (standing.neighbours, standing.fdb)
    for place, table in enumerate(tables):
        wanted = {peer[place].slot: peer[place] for peer in peers}
        assert run(table.put(list(wanted.values()))) == {}
        found = run(table.read(wanted))
        assert found == wanted
        assert all(found[slot] is wanted[slot] for slot in wanted)


def test_one_bad_entry_among_a_thousand_fails_alone(standing: Kernel, names: Names) -> None:
    entries = [names.peer(number)[1] for number in range(2, 1002)]
    other = BOTH[1] if names is BOTH[0] else BOTH[0]
    bad = FdbEntry(names.device, names.mac(0xFFFF), other.remote(9))
    failures = run(standing.fdb.put([*entries[:500], bad, *entries[500:]]))
    assert {slot: errno_of(error) for slot, error in failures.items()} == {bad.slot: errno.EAFNOSUPPORT}
    assert str(bad) in str(failures[bad.slot])
    assert run(standing.fdb.read({})) == {entry.slot: entry for entry in entries}


def test_entries_of_a_missing_device_share_one_error(standing: Kernel, names: Names) -> None:
    entries = [Neighbour("flannel.99", names.subnet(number).address, names.mac(1)) for number in range(50)]
    failures = run(standing.neighbours.put(entries))
    assert len(failures) == 50
    assert len(set(map(id, failures.values()))) == 1
    assert "device flannel.99" in str(failures[entries[0].slot])
