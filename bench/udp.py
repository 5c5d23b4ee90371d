# SPDX-License-Identifier: Apache-2.0
"""The udp backend, with eBPF and with the engine, beside the bare underlay and vxlan.

Labs stand side by side, one for each way to carry packets, and take turns. Their rounds go against each other
in time: a ratio is the median of the ratios of one round.
"""

import argparse
import functools
import json
import math
import os
import pathlib
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from bench import _engine, _iperf
from bench._common import Arguments, Figure, figure, median, run
from bench._paths import back, containers, fabric, underlay
from bench._site import NETWORK, add_leases, remove_leases
from bench._tunnel import Side, loops, packets_program
from bench.restart import AFTER_S, BEFORE_S, ping_between, restart
from loden.address import Family, format_address
from loden.errors import LabError
from loden.lab import namespaces
from loden.lab.agents import loden_run
from loden.lab.lab import Lab, running
from loden.lab.throughput import Path
from loden.lab.topology import UNDERLAY, Spec
from loden.lab.wiring import BRIDGE, UPLINK, container_address

_HOSTS = 2
_TCP_S = 1  # behind half a second in which congestion control settles
_DATAGRAMS_S = 0.5
_LARGE_BYTES, _LARGE_ROW = 1200, 40  # as QUIC sends them
_LATENCY_S = 0.6
_RESTARTS = 2
_PEERS, _FILLS = 10_000, 4
_SETTLE_S = 1.0
_STATUS_PORT = 8080
_PATIENCE_S = 60.0
_TCP, _SMALL = "TCP, 1 stream", f"{_engine.DATAGRAM_BYTES}-byte datagrams"

#: What is measured, in this order: the anchor first.
_BARE, _EBPF, _ENGINE, _VXLAN, _LOOP = "bare underlay", "udp ebpf", "udp engine", "vxlan", "one packet a call"

_TSO, _GSO, _GRO = "tcp-segmentation-offload", "generic-segmentation-offload", "generic-receive-offload"
_USO = "tx-udp-segmentation"

#: Of eBPF's and the engine's share of the underlay, and of eBPF beside vxlan.
_PROMISES = {_EBPF: ">= 0.95", _ENGINE: ">= 0.45", _VXLAN: ">= vxlan"}


class Meter:
    """Measures TCP, and the processor time of the whole machine with it.

    Args:
        program: ``bench/packets.c``, compiled; carries TCP where there is no iperf3.
        congestion: the senders' congestion control, for which there has to be one; empty for the host's.
    """

    def __init__(self, program: pathlib.Path, congestion: str = "") -> None:
        if congestion and not _iperf.is_available():
            raise LabError(f"measure TCP with {congestion}: no iperf3", hint="apt install iperf3")
        self._program = program
        self._congestion = congestion
        self.busy_s_per_gb: dict[str, list[float]] = {}

    def tcp(self, name: str, path: Path, *, streams: int, seconds: int = _TCP_S) -> float:
        """Gbit/s over a path; its processor time is kept by name."""
        started, busy = time.monotonic(), _busy_s()
        if _iperf.is_available():
            found = _iperf.tcp(path, streams=streams, seconds=seconds, congestion=self._congestion)
        else:
            found = _engine.tcp(self._program, path, streams=streams, seconds=seconds)
        share = (_busy_s() - busy) / (time.monotonic() - started)
        self.busy_s_per_gb.setdefault(name, []).append(share / (found / 8))
        return found


def _busy_s() -> float:
    """Processor time since boot that went to anything on this machine but idling, in seconds."""
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(arguments: Arguments) -> Iterator[Figure]:
    parts = arguments.only or _PARTS
    with packets_program() as program, ExitStack() as stack:
        labs = {
            name: stack.enter_context(_lab(short, backend, config))
            for name, short, backend, config in (
                (_EBPF, "ebpf", "udp", '{"Acceleration": "ebpf"}'),
                (_ENGINE, "engine", "udp", '{"Acceleration": "engine"}'),
                (_VXLAN, "vxlan", "vxlan", "{}"),
            )
        }
        meter = Meter(program, arguments.congestion)
        for part in parts:
            yield from _PARTS[part](labs, meter, program, arguments.rounds)


@contextmanager
def _lab(name: str, backend: str, config: str) -> Iterator[Lab]:
    network = str(NETWORK)
    spec = Spec(name=f"bench-{name}", hosts=_HOSTS, backend=backend, backend_config=config, network=network)
    with running(spec, launch=_launch) as lab:
        yield lab


def _paths(labs: Mapping[str, Lab]) -> dict[str, Path]:
    """The underlay over the same wires as eBPF: of two labs that are alike one is some percent faster."""
    return {_BARE: underlay(labs[_EBPF]), **{name: fabric(lab) for name, lab in labs.items()}}


def _tcp(labs: Mapping[str, Lab], meter: Meter, program: pathlib.Path, rounds: int) -> Iterator[Figure]:
    """Streams, directions, with offloads, without, and with those of a plain card; and what all that cost."""
    del program
    paths = _paths(labs)
    for streams in (1, 4):
        yield from _tcp_figures(paths, meter, 3 * rounds, streams, _PROMISES)
    for name in paths:
        beside = (_BARE, median(meter.busy_s_per_gb[_BARE]))
        spent = median(meter.busy_s_per_gb[name])
        yield figure(f"processor time for TCP, {name}", spent, "s/GB", anchor=beside)
    yield from _container_figures(labs, meter, rounds, promise=">= vxlan")
    with _without_offloads(labs.values()):
        for streams in (1, 4):
            promises = {**_PROMISES, _EBPF: ">= 0.88"}
            yield from _tcp_figures(paths, meter, 2 * rounds, streams, promises, suffix=", no offloads")
    with _plain_cards(labs.values()):
        for streams in (1, 4):
            yield from _tcp_figures(paths, meter, rounds, streams, {}, suffix=", plain cards")
        yield from _container_figures(labs, meter, rounds, suffix=", plain cards")


def _tcp_figures(
    paths: Mapping[str, Path],
    meter: Meter,
    rounds: int,
    streams: int,
    promises: Mapping[str, str],
    *,
    suffix: str = "",
) -> Iterator[Figure]:
    ways: Mapping[str, Callable[[Path], Path]] = {"h1 to h2": lambda path: path, "h2 to h1": back}
    both: dict[str, dict[str, list[float]]] = {way: {name: [] for name in paths} for way in ways}
    for number in range(rounds):
        for way, turn in ways.items():
            turns = {
                name: functools.partial(meter.tcp, name, turn(path), streams=streams)
                for name, path in paths.items()
            }
            for name in reversed(list(turns)) if number % 2 else turns:
                both[way][name].append(turns[name]())
    for way, found in both.items():
        what = f"TCP {way}, {_streams(streams)}{suffix}"
        yield figure(f"{what}, {_BARE}", median(found[_BARE]), "Gbit/s")
        beside = ("vxlan", median(found[_VXLAN]))
        promise = promises.get(_VXLAN, "")
        yield figure(f"{what}, ebpf", median(found[_EBPF]), "Gbit/s", promise, anchor=beside)
        for name in (_EBPF, _ENGINE):
            share = _engine.ratio(found, name, _BARE)
            short = name.removeprefix("udp ")
            yield figure(f"{what}, {short} to underlay", share, "times", promises.get(name, ""))
    for name in (_EBPF, _ENGINE):
        what = f"TCP both ways, {_streams(streams)}{suffix}, {name.removeprefix('udp ')} to underlay"
        shares = [
            one / other
            for found in both.values()
            for one, other in zip(found[name], found[_BARE], strict=True)
        ]
        yield figure(what, median(shares), "times", promises.get(name, ""))
        yield figure(f"{what}, standard error", _error(shares), "times")


def _streams(count: int) -> str:
    return f"{count} stream{'s' if count > 1 else ''}"


def _error(values: Sequence[float]) -> float:
    """The standard error of a median: that of a mean as wide as the middle half is, and a quarter more."""
    low, _, high = statistics.quantiles(values, n=4)
    return 0.93 * (high - low) / math.sqrt(len(values))


def _container_figures(
    labs: Mapping[str, Lab], meter: Meter, rounds: int, *, promise: str = "", suffix: str = ""
) -> Iterator[Figure]:
    """With the containers on a bridge, and each on a wire of its own."""
    bridged = {name: containers(labs[name]) for name in (_EBPF, _VXLAN)}
    for streams in (1, 4):
        carry = functools.partial(meter.tcp, _FAR, streams=streams)
        found = _engine.in_turns(
            {name: functools.partial(carry, path) for name, path in bridged.items()}, rounds
        )
        beside = (f"vxlan {_FAR}", median(found[_VXLAN]))
        what = f"TCP {_FAR}, {_streams(streams)}{suffix}, ebpf"
        yield figure(what, median(found[_EBPF]), "Gbit/s", promise, anchor=beside)
        with _without_bridges(labs[_EBPF]):
            wired = [carry(bridged[_EBPF]) for _ in range(rounds)]
        yield figure(f"{what}, no bridges", median(wired), "Gbit/s", promise, anchor=beside)


_FAR = "container to container"


@contextmanager
def _without_bridges(lab: Lab) -> Iterator[None]:
    """Each host's container on a wire to the host, with a route, for the length of a block."""
    wires = []
    for host in lab.plan.hosts:
        subnet = lab.found[host.name].subnets[Family.IPV4]
        own, gateway = (f"{format_address(one)}/32" for one in (container_address(subnet, 0), subnet.gateway))
        wires.append((host.namespace, f"address {{}} {gateway} dev c1", f"route {{}} {own} dev c1"))
    for namespace, address, route in wires:
        _ip(namespace, "link set c1 nomaster", address.format("add"), route.format("add"))
    yield
    for namespace, address, route in wires:
        _ip(namespace, route.format("del"), address.format("del"), f"link set c1 master {BRIDGE}")


@contextmanager
def _without_offloads(labs: Iterable[Lab]) -> Iterator[None]:
    """GSO, TSO and GRO off on every device of the labs, for the length of a block."""
    devices = [
        (namespace, link["ifname"])
        for namespace in (name for lab in labs for name in lab.plan.namespaces)
        for link in json.loads(_output("ip", "-netns", namespace, "-json", "link"))
        if link["ifname"] != "lo"
    ]
    with _offloads(devices, dict.fromkeys((_TSO, _GSO, _GRO), "off")):
        yield


@contextmanager
def _plain_cards(labs: Iterable[Lab]) -> Iterator[None]:
    """Every host's interface cuts what it sends and merges what it gets, for the length of a block.

    So does a network card that has no offloads for tunnels.
    """
    devices = [(host.namespace, UPLINK) for lab in labs for host in lab.plan.hosts]
    with _offloads(devices, {_TSO: "off", _GSO: "off", _USO: "off", _GRO: "on"}):
        yield


@contextmanager
def _offloads(devices: Sequence[tuple[str, str]], wanted: Mapping[str, str]) -> Iterator[None]:
    """Offloads of devices (namespace and name) as ``ethtool -k`` names them, for the length of a block."""

    def run(namespace: str, *words: str) -> str:
        return namespaces.inside(namespace, functools.partial(_output, "ethtool", *words))

    def switch(device: tuple[str, str], states: Mapping[str, str]) -> None:
        if states:
            run(device[0], "-K", device[1], *(word for state in states.items() for word in state))

    def asked_for(device: tuple[str, str]) -> dict[str, str]:
        """What can be changed; what is "off [requested on]" for want of something else counts as on."""
        lines = (line.strip().partition(": ") for line in run(device[0], "-k", device[1]).splitlines())
        states = {name: state.replace("]", "").split() for name, _, state in lines if "[fixed]" not in state}
        return {name: "on" if "on" in words else "off" for name, words in states.items() if words}

    before = {device: asked_for(device) for device in devices}
    try:
        for device in devices:
            switch(device, wanted)
        yield
    finally:
        for device, states in before.items():
            now = asked_for(device)
            switch(device, {name: state for name, state in states.items() if now[name] != state})


def _ip(namespace: str, *commands: str) -> None:
    for command in commands:
        _output("ip", "-netns", namespace, *command.split())


def _output(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise LabError(f"run {words[0]}: not found", hint=f"apt install {words[0]}") from error
    if done.returncode:
        raise LabError(f"run {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class _Host(Side, frozen=True):
    """A host of a lab, as the one-packet loop wants it."""

    inside: str
    outer: bytes

    @property
    def namespace(self) -> str:
        return self.inside

    def wire(self, family: Family = Family.IPV4) -> bytes:
        assert family is Family.IPV4
        return self.outer


def _datagrams(labs: Mapping[str, Lab], meter: Meter, program: pathlib.Path, rounds: int) -> Iterator[Figure]:
    """Small datagrams, counted where they arrive, and how long an answer takes."""
    del meter
    hosts = labs[_VXLAN].plan.hosts
    sides = tuple(
        _Host(number, host.namespace, host.addresses[Family.IPV4])
        for number, host in enumerate(hosts, start=1)
    )
    with loops(program, sides):
        paths = _paths(labs)
        paths[_LOOP] = _engine.path_of(lambda side: side.loop_address, "loop", sides=sides)
        one_by_one, rows = f"{_SMALL}, one by one", f"in rows of {_engine.ROW}"
        both = {_EBPF: ">= 1", _ENGINE: ">= 4"}
        in_rows = functools.partial(_engine.most_datagrams, row=_engine.ROW)
        large = functools.partial(_engine.most_datagrams, size=_LARGE_BYTES, row=_LARGE_ROW)
        for what, measured, promises in (
            (f"{one_by_one}, at most", _engine.most_datagrams, both),
            (f"{_SMALL}, {rows}, at most", in_rows, both),
            (f"{_LARGE_BYTES}-byte datagrams, in rows of {_LARGE_ROW}, at most", large, {}),
            # With ends that cost more than the engine, and limit it.
            (f"{one_by_one}, from a UDP socket", _engine.datagrams, {_EBPF: ">= 1"}),
        ):
            yield from _datagram_figures(paths, what, measured, program, rounds, promises)
        answers = _engine.in_turns(
            {
                name: functools.partial(_engine.latency, program, path, seconds=_LATENCY_S)
                for name, path in paths.items()
            },
            rounds,
        )
    for name in paths:
        for percent in ("p50", "p99"):
            took, bare = (
                median([getattr(one, f"{percent}_us") for one in answers[which]]) for which in (name, _BARE)
            )
            what = f"answer to {_engine.DATAGRAM_BYTES} bytes, {percent}, {name}"
            yield figure(what, took, "us", anchor=(_BARE, bare))


def _datagram_figures(
    paths: Mapping[str, Path],
    what: str,
    measured: Callable[..., float],
    program: pathlib.Path,
    rounds: int,
    promises: Mapping[str, str],
) -> Iterator[Figure]:
    found = _engine.in_turns(
        {
            name: functools.partial(measured, program, path, seconds=_DATAGRAMS_S)
            for name, path in paths.items()
        },
        rounds,
    )
    beside_vxlan, beside_loop = (
        _engine.ratio(found, name, anchor) for name, anchor in ((_EBPF, _VXLAN), (_ENGINE, _LOOP))
    )
    yield figure(f"{what}, {_BARE}", median(found[_BARE]), "/s")
    yield figure(f"{what}, ebpf", median(found[_EBPF]), "/s", anchor=("vxlan", median(found[_VXLAN])))
    yield figure(f"{what}, ebpf to vxlan", beside_vxlan, "times", promises.get(_EBPF, ""))
    yield figure(f"{what}, engine", median(found[_ENGINE]), "/s", anchor=(_LOOP, median(found[_LOOP])))
    yield figure(f"{what}, engine to such a loop", beside_loop, "times", promises.get(_ENGINE, ""))


def _peers(labs: Mapping[str, Lab], meter: Meter, program: pathlib.Path, rounds: int) -> Iterator[Figure]:
    """The same hosts with one peer, with thousands, with one, and so on: other hosts would differ by more.

    What a machine can do changes within a minute by more than peers change it, so each time with thousands
    stands between two with one, a few seconds away.
    """
    labs = {name: lab for name, lab in labs.items() if name != _VXLAN}
    one_peer, all_peers = "1 peer", f"{_PEERS:,} peers"
    for lab in labs.values():
        _let_reach_strangers(lab)
    few, many = [_carried(labs, meter, program, one_peer)], []
    for _ in range(_FILLS * rounds):
        for lab in labs.values():
            add_leases(_store(lab), _PEERS, "")
        _wait_for_peers(labs.values(), lambda count: count > _PEERS * 0.99)
        many.append(_carried(labs, meter, program, all_peers))
        for lab in labs.values():
            remove_leases(_store(lab))
        _wait_for_peers(labs.values(), lambda count: count == _HOSTS - 1)
        few.append(_carried(labs, meter, program, one_peer))
    for name, what in few[0]:
        alone, among = ([block[name, what] for block in blocks] for blocks in (few, many))
        shares = [
            2 * found / (before + after)
            for found, before, after in zip(among, alone, alone[1:], strict=False)
        ]
        subject = f"{what}, {name}, {all_peers}"
        unit = "Gbit/s" if what is _TCP else "/s"
        yield figure(subject, median(among), unit, anchor=(one_peer, median(alone)))
        yield figure(f"{subject} to {one_peer}", median(shares), "times", ">= 0.97")
        error = 1.15 * _error(shares)  # neighbours have a measurement in common
        yield figure(f"{subject} to {one_peer}, standard error", error, "times")
    for name in labs:
        spent, before = (median(meter.busy_s_per_gb[f"{name}, {count}"]) for count in (all_peers, one_peer))
        yield figure(f"processor time for TCP, {name}, {all_peers}", spent, "s/GB", anchor=(one_peer, before))


def _carried(
    labs: Mapping[str, Lab], meter: Meter, program: pathlib.Path, among: str
) -> dict[tuple[str, str], float]:
    """What each lab carries now, of TCP and of small datagrams."""
    found: dict[tuple[str, str], float] = {}
    for name, lab in labs.items():
        path = fabric(lab)
        tcp = [meter.tcp(f"{name}, {among}", path, streams=1) for _ in range(2)]
        small = [_engine.datagrams(program, path, seconds=_DATAGRAMS_S) for _ in range(2)]
        found |= {(name, _TCP): statistics.fmean(tcp), (name, _SMALL): statistics.fmean(small)}
    return found


def _store(lab: Lab) -> pathlib.Path:
    return lab.state.path / "store.db"


def _let_reach_strangers(lab: Lab) -> None:
    """A peer counts only where there is a way to its address."""
    for host in lab.plan.hosts:
        _ip(host.namespace, f"route replace {UNDERLAY[Family.IPV4]} dev {UPLINK}")


def _wait_for_peers(labs: Iterable[Lab], is_enough: Callable[[int], bool]) -> None:
    """Return when every host's tunnel knows so many peers, and a moment later."""
    deadline = time.monotonic() + _PATIENCE_S
    for host in (host for lab in labs for host in lab.plan.hosts):
        while not is_enough(found := namespaces.inside(host.namespace, _count_peers)):
            if time.monotonic() > deadline:
                raise LabError(f"wait for peers of {host.namespace}: {found} after {_PATIENCE_S:g} s")
            time.sleep(0.5)
    time.sleep(_SETTLE_S)


def _count_peers() -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{_STATUS_PORT}/status", timeout=_PATIENCE_S) as answer:
        tunnels = json.load(answer)["tables"]["UdpTunnel"]
    return sum(int(tunnel["peer_count"]) for tunnel in tunnels.values())


def _launch(store_url: str, subnet_file: pathlib.Path) -> tuple[str, ...]:
    """An agent that can be asked."""
    asked = ("--healthz-ip", "127.0.0.1", "--healthz-port", str(_STATUS_PORT))
    return (*loden_run(store_url, subnet_file), *asked)


def _restart(labs: Mapping[str, Lab], meter: Meter, program: pathlib.Path, rounds: int) -> Iterator[Figure]:
    """Agents are killed and started again while two containers' connection takes what it gets."""
    del meter, rounds
    for name, times, promise in ((_EBPF, _RESTARTS, "0"), (_ENGINE, 1, "")):
        lab = labs[name]
        path = containers(lab)
        ping, alone = ping_between(lab), ping_between(lab)
        lost = lost_alone = 0
        for _ in range(times):
            started = time.monotonic()
            with _engine.carrying(program, path) as carried:
                with ping.running():
                    time.sleep(BEFORE_S)
                    restart(lab, _launch)
                    time.sleep(AFTER_S)
                took = time.monotonic() - started
                lost += carried.lost_segments()
            with _engine.carrying(program, path) as carried:
                with alone.running():
                    time.sleep(took)
                lost_alone += carried.lost_segments()
        what = f"{name}, pings under load while agents restart"
        yield figure(f"{what}, sent", ping.sent, "", anchor=("left alone", alone.sent))
        yield figure(f"{what}, lost", ping.lost, "", promise, anchor=("left alone", alone.lost))
        what = f"{name}, TCP segments lost {_FAR} while agents restart"
        yield figure(what, lost, "", promise, anchor=("left alone", lost_alone))


_Part = Callable[[Mapping[str, Lab], Meter, pathlib.Path, int], Iterator[Figure]]
_PARTS: Mapping[str, _Part] = {"tcp": _tcp, "datagrams": _datagrams, "peers": _peers, "restart": _restart}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=3, help="how many, of about 200 s [3]")
    parser.add_argument("--only", action="append", choices=_PARTS, help="this part; may be repeated")
    parser.add_argument("--congestion", default="", help="TCP's congestion control [the host's]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
