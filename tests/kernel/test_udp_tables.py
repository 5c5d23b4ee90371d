# SPDX-License-Identifier: Apache-2.0
"""Tunnels and peers in the kernel: who else is there, what goes missing, and what comes after an agent."""

import errno
import json
import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest

from loden.address import Family, format_address
from loden.errors import KernelError
from loden.tables import tc, udp_probe
from loden.tables.entries import VxlanLink
from loden.tables.netlink import Refusal
from loden.tables.tun import open_queue
from loden.tables.udp_bpf import FastPath
from loden.tables.udp_detour import detour_link
from tests.kernel.datagrams import WIRES, ethernet, udp
from tests.kernel.kernel import BOTH, command, ip, link_json, require_bpf, require_tun, run, until
from tests.kernel.test_udp_path import frames, listen
from tests.kernel.udp_kernel import PORT, UdpKernel, UdpNames, many_subnets

EBPF, ENGINE = (UdpNames(BOTH[0], way) for way in ("ebpf", "engine"))
BOTH_EBPF = [UdpNames(names, "ebpf") for names in BOTH]


@pytest.fixture
def kernel(underlay: None) -> Iterator[UdpKernel]:
    del underlay
    tables = UdpKernel()
    yield tables
    tables.close()


@pytest.fixture(params=BOTH_EBPF, ids=str)
def names(request: pytest.FixtureRequest) -> UdpNames:
    """Each family, with the programs."""
    require_bpf()
    found = request.param
    assert isinstance(found, UdpNames)
    return found


def attached(kernel: UdpKernel) -> list[tuple[str, int]]:
    """The programs of ours in tc: name and number."""
    return [(one.name, one.program) for one in run(tc.list_ours(kernel.requests))]


def meant(kernel: UdpKernel, *devices: str) -> list[tuple[str, int]]:
    """The same, as it should be."""
    return [
        (name, program.number)
        for device in devices
        for name, program in kernel.carrier(device).programs.values()
    ]


def fast_path(kernel: UdpKernel, device: str) -> FastPath:
    found = kernel.carrier(device).fast
    assert found is not None
    return found


class TestPort:
    @pytest.mark.parametrize("way", ["ebpf", "engine"])
    def test_taken_port_is_named_and_waited_for(self, kernel: UdpKernel, way: str) -> None:
        names = UdpNames(BOTH[0], way)
        names.require()
        run(kernel.tuns.put([names.link()]))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as rival:
            rival.bind(("192.0.2.1", PORT))
            error = run(kernel.tunnels.put([names.tunnel()]))[names.device]
            assert "bind UDP port 8285 of 192.0.2.1: Address already in use" in error.message
            assert "ss -lunp" in error.hint
            assert attached(kernel) == []
        assert run(kernel.tunnels.put([names.tunnel()])) == {}

    def test_detours_port_that_is_taken_is_named_and_waited_for(self, kernel: UdpKernel) -> None:
        require_bpf()
        kernel.reconciler.want("test", [*EBPF.own(), EBPF.peer(9)])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as rival:
            rival.bind(("0.0.0.0", EBPF.detour().port))
            run(kernel.reconciler.look())
            (error,) = kernel.reconciler.failures("test")
            assert "Address already in use" in error.message
            assert error.hint.startswith("another program uses VNI 5001028 or UDP port 285")
            report = kernel.carrier(EBPF.device).report()
            assert (report["acceleration"], report["detour"]) == ("ebpf", "")
            assert report["detour_reason"] == "no device flannel0.in of ours is up"
        run(kernel.reconciler.look())
        report = kernel.carrier(EBPF.device).report()
        assert (report["detour"], report["detour_reason"]) == ("flannel0.in", "")
        assert sorted(attached(kernel)) == sorted(meant(kernel, EBPF.device))
        assert list(kernel.carrier(EBPF.device).standing().values()) == [EBPF.peer(9)]

    def test_address_that_is_not_here_is_named(self, kernel: UdpKernel) -> None:
        run(kernel.tuns.put([ENGINE.link()]))
        error = run(kernel.tunnels.put([ENGINE.tunnel(local=bytes((203, 0, 113, 1)))]))[ENGINE.device]
        assert "203.0.113.1" in error.message

    def test_port_of_a_peer_is_told_from_the_hosts(self, kernel: UdpKernel, names: UdpNames) -> None:
        run(kernel.stand(*names.own(), names.peer(9, port=18285), names.peer(8, port=28285)))
        found = {one.subnet: one.port for one in fast_path(kernel, names.device).peers()}
        assert found == {names.names.subnet(9): 18285, names.names.subnet(8): 28285}


class TestDetour:
    def test_without_its_program_the_host_takes_in_nothing(self, kernel: UdpKernel, names: UdpNames) -> None:
        """Between the device and its program, and if that is lost: of who does not know the address."""
        run(kernel.devices.put([names.detour()]))
        wire = WIRES[BOTH_EBPF.index(names)]
        remote, port = next(iter(wire.peers.values()))
        mac = bytes.fromhex(link_json("eth0")["address"].replace(":", ""))
        with socket.socket(names.names.family, socket.SOCK_DGRAM) as victim, listen("wire") as far:
            victim.bind((wire.own, 4000))
            victim.settimeout(0.3)
            with listen(names.detour().name) as behind:
                for target in ("ffffffffffff", "020000000099"):
                    packet = wire.packet(remote, wire.own, udp(9, 4000, b"data", check=0), protocol=17)
                    frame = bytes.fromhex(target) + ethernet(packet)[6:]
                    forged = bytes((8, 0, 0, 0)) + names.detour().vni.to_bytes(3, "big") + bytes(1) + frame
                    sent = wire.datagram(forged, source=remote, port=port, target_port=names.detour().port)
                    far.send(mac + sent[6:])
                    assert next(it for it in frames(behind) if it.endswith(b"data"))  # it got so far
            with pytest.raises(TimeoutError):
                victim.recv(100)

    def test_that_nothing_comes_out_is_said_once_and_so_is_the_end_of_it(
        self, kernel: UdpKernel, names: UdpNames, caplog: pytest.LogCaptureFixture
    ) -> None:
        run(kernel.stand(*names.own(), names.peer(9)))
        carrier, wire = kernel.carrier(names.device), WIRES[BOTH_EBPF.index(names)]
        remote, port = next(iter(wire.peers.values()))
        source = format_address(names.names.subnet(9).gateway)
        segment = struct.pack("!HHIIBBHHH", 1, 2, 3, 4, 5 << 4, 0x10, 9, 0, 0) + b"data"
        frame = wire.datagram(
            wire.packet(source, wire.own_container, segment, protocol=6), source=remote, port=port
        )
        frame = bytes.fromhex(link_json("eth0")["address"].replace(":", "")) + frame[6:]

        def reason() -> str:
            """Why there is no detour, when one packet more has come in and everything been looked at."""
            far.send(frame)
            carrier.standing()
            found = carrier.report()["detour_reason"]
            assert isinstance(found, str)
            return found

        caplog.set_level(logging.INFO)
        with listen("wire") as far:
            command(f"tc filter delete dev {names.detour().name} ingress")
            run(until(lambda: bool(reason())))
            for _ in range(3):
                assert reason().startswith(f"nothing from {names.names.subnet(9)} comes out of ")
            run(kernel.reconciler.look())  # which puts the program back
            run(until(lambda: not reason()))
            for _ in range(3):
                assert not reason()
        told = [message for message in caplog.messages if "detour=" in message]
        assert ["because" in message for message in told] == [True, False]


class TestDrift:
    @pytest.mark.parametrize(
        "change",
        [
            "tc filter delete dev eth0 ingress",
            "tc filter delete dev eth0 ingress pref 76",
            "tc filter delete dev eth0 ingress protocol all pref 76 handle 1 bpf",
            "tc qdisc delete dev eth0 clsact",
            "tc filter delete dev {device} egress",
            "tc qdisc delete dev {device} clsact",
            "ip link delete {device}",
            "ip link set {device} down",
            "ip link delete {device}.in",
            "ip link set {device}.in down",
            "tc filter delete dev {device}.in ingress",
            "tc qdisc delete dev {device}.in clsact",
        ],
    )
    def test_is_heard_and_mended(self, kernel: UdpKernel, names: UdpNames, change: str) -> None:
        peers = [names.peer(number) for number in range(10, 13)]

        async def act() -> None:
            kernel.reconciler.want("test", [*names.own(), *peers])
            async with kernel.running():
                await kernel.reconciler.look()  # behind the first one's end, which attaches as well
                assert is_attached(kernel, names)
                command(change.format(device=names.device))
                await until(lambda: kernel.reconciler.statistics.drifted > 0)
                await until(lambda: is_attached(kernel, names))
                await until(lambda: set(kernel.carrier(names.device).standing().values()) == set(peers))

        run(act())
        assert sorted(attached(kernel)) == sorted(meant(kernel, names.device))

    def test_of_others_is_not_ours(self, kernel: UdpKernel) -> None:
        require_bpf()

        async def act() -> None:
            kernel.reconciler.want("test", EBPF.own())
            async with kernel.running():
                await kernel.reconciler.look()
                for line in ("add dev lo clsact", "delete dev lo clsact", "add dev eth0 root pfifo"):
                    command(f"tc qdisc {line}")
                for verb in ("add", "delete"):
                    change_theirs(verb, "eth0 ingress")
                command("tc qdisc delete dev eth0 root")
                ip("link add other type bridge")
                ip("link delete other")
                command(f"tc filter delete dev {EBPF.device} egress")  # heard behind all of these
                await until(lambda: kernel.reconciler.statistics.drifted > 0 and is_attached(kernel, EBPF))

        run(act())
        assert kernel.reconciler.statistics.drifted == 1

    def test_peers_changed_in_the_map_are_mended_by_a_look(self, kernel: UdpKernel, names: UdpNames) -> None:
        peers = {number: names.peer(number) for number in range(10, 14)}
        run(kernel.stand(*names.own(), *peers.values()))
        path = fast_path(kernel, names.device)
        index = link_json("eth0")["ifindex"]
        path.put(names.peer(10, remote=names.names.remote(77)), index)
        path.put(names.peer(11, mtu=1280), index)
        path.drop(names.names.subnet(12))
        path.put(names.peer(99), index)
        run(kernel.reconciler.look())
        assert {(one.subnet, one.remote, one.mtu) for one in path.peers()} == {
            (peer.subnet, peer.remote, 0) for peer in peers.values()
        }
        assert kernel.reconciler.statistics.drifted == 3

    def test_senders_changed_in_the_map_are_mended_with_the_peer(self, kernel: UdpKernel) -> None:
        """Which says of a spoofed packet that it is one."""
        require_bpf()
        run(kernel.stand(*EBPF.own(), EBPF.peer(10)))
        path = fast_path(kernel, EBPF.device)
        run(kernel.peers.drop([EBPF.peer(10)]))
        assert list(path._object.maps["remotes"].items()) == []
        run(kernel.reconciler.look())
        assert len(list(path._object.maps["remotes"].items())) == 1

    def test_peer_that_the_map_has_no_room_for_leaves_no_sender(self, kernel: UdpKernel) -> None:
        require_bpf()
        run(kernel.stand(*EBPF.own()))
        path = fast_path(kernel, EBPF.device)
        name = "peers4" if EBPF.names.family is Family.IPV4 else "peers6"
        maps: dict[str, Any] = path._object.maps
        maps[name] = Full()
        for _ in range(2):
            with pytest.raises(KernelError, match="write to eBPF map"):
                path.put(EBPF.peer(10), 1)
        assert list(maps["remotes"].items()) == []


class Full:
    """A map that takes nothing in."""

    def get(self, key: bytes) -> None:
        del key

    def put(self, key: bytes, value: bytes) -> None:
        del key, value
        raise KernelError("write to", "eBPF map", errno.E2BIG)


def change_theirs(verb: str, where: str) -> None:
    """Another one's filter: two words of classic BPF that let everything pass."""
    line = f"tc filter {verb} dev {where} protocol all prio 10 handle 1 bpf direct-action"
    more = ["bytecode", "1,6 0 0 4294967295"] if verb == "add" else []
    done = subprocess.run([*line.split(), *more], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def is_attached(kernel: UdpKernel, names: UdpNames) -> bool:
    """Asked of tc itself, which prints a program's number."""
    carrier = kernel.tunnels.carrier(names.device)
    if carrier is None or not carrier.is_sound:
        return False
    shown = ""
    for place in (f"{names.device} egress", "eth0 ingress", f"{names.device}.in ingress"):
        done = subprocess.run(
            f"tc filter show dev {place}".split(), capture_output=True, text=True, check=False
        )
        shown += done.stdout
    return all(f" id {program.number} " in shown for _, program in carrier.programs.values())


class TestFamilies:
    def test_side_by_side_on_one_underlay(self, kernel: UdpKernel) -> None:
        require_bpf()
        entries = [entry for names in BOTH_EBPF for entry in (*names.own(), names.peer(9))]
        run(kernel.stand(*entries))
        assert sorted(attached(kernel)) == sorted(meant(kernel, "flannel0", "flannel-v6"))
        with listen("wire") as far:
            for names, wire in zip(BOTH_EBPF, WIRES, strict=True):
                subnet, (remote, port) = next(iter(wire.peers.items()))
                assert str(names.names.subnet(9)) == subnet
                source = format_address(names.names.subnet(9).address[:-1] + b"\x02")
                with listen(names.device) as near:
                    packet = wire.packet(source, wire.own_container, b"data")
                    far.send(wire.datagram(packet, source=remote, port=port))
                    assert next(it for it in frames(near) if it.endswith(b"data")) == wire.older(packet)
                counted = fast_path(kernel, names.device).counters()
                assert (counted["rx_packets"], counted["rx_bytes"]) == (1, len(packet))

    def test_one_that_goes_leaves_the_other(self, kernel: UdpKernel) -> None:
        require_bpf()
        run(kernel.stand(*(entry for names in BOTH_EBPF for entry in names.own())))
        run(kernel.stand(*EBPF.own()))
        assert sorted(attached(kernel)) == sorted(meant(kernel, "flannel0"))
        assert "flannel-v6" not in ip("link show")


class TestAfterwards:
    def test_what_comes_after_finds_all_and_replaces_it(self, kernel: UdpKernel, names: UdpNames) -> None:
        run(kernel.stand(*names.own(), names.peer(9)))
        before, index = attached(kernel), link_json(names.device)["ifindex"]
        run(kernel.stack.aclose())
        assert attached(kernel) == before  # no agent, and packets still have their way
        with closing(UdpKernel()) as after:
            run(after.stand(*names.own(), names.peer(9)))
            assert sorted(attached(after)) == sorted(meant(after, names.device))
            assert set(attached(after)).isdisjoint(before)
            assert link_json(names.device)["ifindex"] == index

    def test_predecessors_programs_stay_until_all_peers_are_in(self, kernel: UdpKernel) -> None:
        require_bpf()
        run(kernel.stand(*EBPF.own(), EBPF.peer(9)))
        before = attached(kernel)
        run(kernel.stack.aclose())
        with closing(UdpKernel()) as after:
            run(after.devices.refresh())
            assert run(after.tunnels.put([EBPF.tunnel()])) == {}
            assert run(after.tunnels.read({EBPF.device: EBPF.tunnel()})) == {EBPF.device: EBPF.tunnel()}
            assert attached(after) == before
            assert run(after.peers.put([EBPF.peer(9)])) == {}
            assert attached(after) == before
            assert run(after.peers.drop([])) == {}
            assert sorted(attached(after)) == sorted(meant(after, EBPF.device))

    @pytest.mark.parametrize("backend", ["vxlan", "host-gw", "alloc"])
    def test_other_backend_removes_what_udp_left(self, kernel: UdpKernel, backend: str) -> None:
        require_bpf()
        run(kernel.stand(*(entry for names in BOTH_EBPF for entry in (*names.own(), names.peer(9)))))
        run(kernel.stack.aclose())
        with closing(UdpKernel(backend)) as after:
            run(after.reconciler.look())
            assert attached(after) == []
            shown = ip("link show")
            assert "flannel" not in shown
            assert "clsact" not in command("tc qdisc show dev eth0")

    def test_engine_takes_over_from_programs(self, kernel: UdpKernel) -> None:
        require_bpf()
        run(kernel.stand(*EBPF.own(), EBPF.peer(9)))
        run(kernel.stand(*ENGINE.own(), ENGINE.peer(9)))
        assert attached(kernel) == []
        assert kernel.carrier(ENGINE.device).report()["acceleration"] == "engine"
        run(kernel.stand(*EBPF.own(), EBPF.peer(9)))
        assert sorted(attached(kernel)) == sorted(meant(kernel, EBPF.device))
        assert [one.subnet for one in fast_path(kernel, EBPF.device).peers()] == [EBPF.peer(9).subnet]

    def test_other_local_address_keeps_the_peers(self, kernel: UdpKernel) -> None:
        require_bpf()
        run(kernel.stand(*EBPF.own(), EBPF.peer(9)))
        ip("address add 192.0.2.111/24 dev eth0")
        moved = EBPF.tunnel(local=bytes((192, 0, 2, 111)))
        assert run(kernel.tunnels.put([moved])) == {}
        assert list(kernel.carrier(EBPF.device).standing().values()) == [EBPF.peer(9)]
        assert sorted(attached(kernel)) == sorted(meant(kernel, EBPF.device))


class TestManyPeers:
    @pytest.mark.parametrize("way", ["ebpf", "engine"])
    def test_are_put_and_read_back(self, kernel: UdpKernel, way: str) -> None:
        names = UdpNames(BOTH[0], way)
        names.require()
        run(kernel.tuns.put([names.link()]))
        run(kernel.tunnels.put([names.tunnel()]))
        peers = [
            names.peer(9, subnet=subnet, remote=bytes((172, 16, number >> 8, number & 255)))
            for number, subnet in enumerate(many_subnets(20_000))
        ]
        assert run(kernel.peers.put(peers)) == {}
        wanted = {peer.slot: peer for peer in peers}
        found = run(kernel.peers.read(wanted))
        assert found == wanted
        assert all(found[slot] is peer for slot, peer in wanted.items())
        carrier = kernel.carrier(names.device)
        assert (carrier.report()["peer_count"], carrier.report()["peers"]) == (20_000, {})
        assert run(kernel.peers.drop(peers[1:])) == {}
        assert run(kernel.peers.read(wanted)) == {peers[0].slot: peers[0]}
        report = carrier.report()
        assert (report["peer_count"], list(report["peers"])) == (1, [str(peers[0].subnet)])


class TestWays:
    """Which way packets are carried, where one or the other is not to be had."""

    def test_peer_on_a_virtual_wire_that_has_the_engine_only_is_the_engines(self, kernel: UdpKernel) -> None:
        """It could not take what the programs leave to the network card."""
        require_bpf()
        run(kernel.stand(*EBPF.own(), EBPF.peer(9), EBPF.peer(8, is_fast=False), EBPF.peer(7, device="gone")))
        index = link_json("eth0")["ifindex"]
        found = {one.subnet: one.index for one in fast_path(kernel, EBPF.device).peers()}
        expected = {EBPF.names.subnet(9): index, EBPF.names.subnet(8): 0, EBPF.names.subnet(7): 0}
        assert found == expected
        assert len(kernel.carrier(EBPF.device).standing()) == 3

    def test_underlay_without_ethernet(self, kernel: UdpKernel) -> None:
        require_bpf()
        held = open_queue("wan0")
        try:
            ip("link set wan0 up")
            ip("address add 203.0.113.1/24 dev wan0")
            run(kernel.tuns.put([EBPF.link()]))
            tunnel = EBPF.tunnel(underlay="wan0", local=bytes((203, 0, 113, 1)))
            error = run(kernel.tunnels.put([tunnel]))[EBPF.device]
            assert "wan0: the interface has no Ethernet addresses" in error.message
            assert run(kernel.tunnels.put([msgspec.structs.replace(tunnel, acceleration="auto")])) == {}
            report = kernel.carrier(EBPF.device).report()
            assert (report["acceleration"], "no Ethernet" in report["reason"]) == ("engine", True)
        finally:
            os.close(held)

    @pytest.mark.parametrize("way", ["auto", "ebpf", "engine"])
    def test_kernel_that_refuses_programs(self, underlay: None, way: str) -> None:
        del underlay
        found = elsewhere(way, wrap=WITHOUT_BPF)
        if way == "ebpf":
            assert "load eBPF programs" in found["error"]
            assert "CAP_BPF" in found["hint"]
            assert "a kernel in lockdown allows it to nobody" in found["hint"]
            return
        assert found["acceleration"] == "engine"
        assert "load eBPF programs" in found["reason"] or way == "engine"

    @pytest.mark.parametrize("way", ["auto", "ebpf", "engine"])
    def test_host_without_the_engine(self, underlay: None, way: str) -> None:
        del underlay
        require_bpf()
        found = elsewhere(way, lacks="loden._engine")
        if way == "engine":
            assert "the packet engine was not compiled" in found["error"]
            assert "gcc" in found["error"]
            return
        assert found["acceleration"] == "ebpf"
        assert found["peers"] == 1
        assert "udp has no engine" in found["log"]
        assert "rows of datagrams are lost" in found["log"]  # the detour's device is not there either

    @pytest.mark.parametrize("way", ["auto", "ebpf"])
    def test_host_without_libbpf(self, underlay: None, way: str) -> None:
        del underlay
        found = elsewhere(way, library="libbpf.so.missing")
        if way == "ebpf":
            assert "load libbpf.so.missing" in found["error"]
            assert "libbpf1" in found["hint"]
            return
        assert found["acceleration"] == "engine"
        assert "libbpf.so.missing" in found["reason"]

    def test_host_with_neither(self, underlay: None) -> None:
        del underlay
        found = elsewhere("auto", wrap=WITHOUT_BPF, lacks="loden._engine")
        assert "no eBPF: load eBPF programs" in found["error"]
        assert "no engine: the packet engine was not compiled" in found["error"]
        assert found["hint"]

    def test_probe_says_that_it_works_here(self) -> None:
        require_bpf()
        assert elsewhere("probe")["lacks"] == [{}, {}]

    def test_probe_says_why_it_does_not(self) -> None:
        for lacks in elsewhere("probe", wrap=WITHOUT_BPF)["lacks"]:
            assert "eBPF" in lacks["ebpf"]

    def test_probe_says_that_the_kernel_has_no_place_for_programs(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As one without ``clsact`` or BPF classifiers answers."""
        require_bpf()

        async def refuse(*_: object) -> Refusal:
            return Refusal(errno.ENOENT, "Specified qdisc kind is unknown")

        monkeypatch.setattr(tc, "attach", refuse)
        found = udp_probe.find_lacks.__wrapped__(Family.IPV4)
        assert list(found) == ["ebpf"]
        assert "attach eBPF program loden_encap: Specified qdisc kind is unknown" in found["ebpf"]

    @pytest.mark.parametrize("family", Family, ids=str)
    def test_probe_says_that_no_packet_comes_through(
        self, monkeypatch: pytest.MonkeyPatch, family: Family
    ) -> None:
        """It believes a packet alone, not programs that load."""
        require_bpf()
        monkeypatch.setattr(FastPath, "put", lambda *_: None)  # what knows no peer carries nothing
        monkeypatch.setattr(udp_probe, "_PATIENCE_S", 0.2)
        found = udp_probe.find_lacks.__wrapped__(family)
        assert list(found) == ["ebpf"]
        assert f"an {family} packet does not come through" in found["ebpf"]

    def test_probe_of_ipv4_needs_no_settings_of_ipv6(self) -> None:
        """A container may have them read-only, and a kernel may have no IPv6."""
        require_bpf()
        ipv4, ipv6 = elsewhere("probe", wrap=WITHOUT_SETTINGS)["lacks"]
        assert ipv4 == {}
        assert "Read-only" in ipv6["ebpf"]

    @pytest.mark.parametrize(
        ("family", "changed", "reason"),
        [
            (Family.IPV4, {"underlay": "missing"}, "there is no interface missing"),
            (Family.IPV6, {"zero_checksum": False}, "an IPv6 super-packet does not come through"),
        ],
        ids=["no device", "no passage"],
    )
    def test_probe_says_why_super_packets_have_no_detour(
        self, monkeypatch: pytest.MonkeyPatch, family: Family, changed: dict[str, Any], reason: str
    ) -> None:
        require_bpf()

        def spoiled(*given: Any) -> VxlanLink:
            return msgspec.structs.replace(detour_link(*given), **changed)

        monkeypatch.setattr(udp_probe, "detour_link", spoiled)
        monkeypatch.setattr(udp_probe, "_PATIENCE_S", 0.2)
        found = udp_probe.find_lacks.__wrapped__(family)
        assert list(found) == ["detour"]
        assert reason in found["detour"]


#: Root that may do everything but load programs.
WITHOUT_BPF = ("setpriv", "--bounding-set=-bpf,-sys_admin,-perfmon")
_READ_ONLY = 'mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys && exec "$@"'
WITHOUT_SETTINGS = ("unshare", "--mount", "--", "sh", "-c", _READ_ONLY, "sh")

_ELSEWHERE = """
import asyncio, io, json, logging, sys
way, lacks, library = sys.argv[1:]
if lacks:
    sys.modules[lacks] = None
heard = io.StringIO()
logging.basicConfig(stream=heard)
from loden.address import Family
from loden.tables import bpf
from tests.kernel.kernel import BOTH, run
from tests.kernel.udp_kernel import UdpKernel, UdpNames
bpf._LIBRARY = library or bpf._LIBRARY

def try_tables():
    names = UdpNames(BOTH[0], way)
    kernel = UdpKernel()
    assert run(kernel.tuns.put([names.link()])) == {}
    failures = run(kernel.tunnels.put([names.tunnel()]))
    for error in failures.values():
        return {"error": error.message, "hint": error.hint}
    assert run(kernel.peers.put([names.peer(9)])) == {}
    carrier = kernel.carrier(names.device)
    found = carrier.report() | {"peers": len(carrier.standing()), "log": heard.getvalue()}
    kernel.close()
    return found

def try_probe():
    from loden.tables.udp_probe import find_lacks
    return {"lacks": [dict(find_lacks(family)) for family in Family]}

print(json.dumps(try_probe() if way == "probe" else try_tables()))
"""


def elsewhere(way: str, *, wrap: tuple[str, ...] = (), lacks: str = "", library: str = "") -> dict[str, Any]:
    """What becomes of a tunnel in another process, which has not got something."""
    require_tun()
    line = [*wrap, sys.executable, "-c", _ELSEWHERE, way, lacks, library]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found
