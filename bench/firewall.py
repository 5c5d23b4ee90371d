# SPDX-License-Identifier: Apache-2.0
"""What keeping rules costs beside those of hundreds of services, and how soon they are put back."""

import argparse
import asyncio
import random
import resource
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bench._common import Arguments, Figure, figure, median, run
from bench._ping import Ping
from loden.address import Family, Prefix
from loden.firewall.keeper import Firewall
from loden.firewall.programs import Kind
from loden.firewall.rules import FirewallOptions, make_rules
from loden.lab.namespaces import inside
from loden.network import parse_network

_NETWORK = parse_network(b'{"Network": "10.5.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:5::/48"}')
_OWN = {Family.IPV4: Prefix.parse("10.5.1.0/24"), Family.IPV6: Prefix.parse("fd00:5:0:1::/64")}
_RULES = make_rules(FirewallOptions(masquerade=True), _NETWORK, _OWN)
_ENDPOINTS = 3  # of a service

_RESYNC_S = 1.0
_DROP = "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n"
#: As somebody would by mistake.
_FLUSH = {
    Kind.NFT: "nft flush table ip flannel-ipv4; nft flush chain ip filter FLANNEL-FWD",
    Kind.IPTABLES_NFT: "iptables-nft -t nat -F FLANNEL-POSTRTG; iptables-nft -F FLANNEL-FWD",
    Kind.IPTABLES_LEGACY: "iptables-legacy -t nat -F FLANNEL-POSTRTG; iptables-legacy -F FLANNEL-FWD",
}
_HOST = "bench"
_CONTAINER, _OUTSIDE, _TARGET = "bench-c", "bench-o", "198.51.100.2"
#: A container, and a host that knows no way to it, each on a wire of its own.
_WIRES = f"""
    link set lo up
    link add c type veth peer name eth0 netns {_CONTAINER}
    link add o type veth peer name eth0 netns {_OUTSIDE}
    address add 10.5.1.1/24 dev c
    address add 198.51.100.1/24 dev o
    link set c up
    link set o up
    """
_ENDS = {
    _CONTAINER: "address add 10.5.1.2/24 dev eth0\nlink set eth0 up\nroute add default via 10.5.1.1",
    _OUTSIDE: f"address add {_TARGET}/24 dev eth0\nlink set eth0 up",
}


def measure(arguments: Arguments) -> Iterator[Figure]:
    anchor = ("starting a process", 1000 * median([_cpu_s_of_a_process() for _ in range(arguments.rounds)]))
    for kind in Kind:
        yield from _with(kind, arguments, anchor)


def _with(kind: Kind, arguments: Arguments, anchor: tuple[str, float]) -> Iterator[Figure]:
    with ExitStack() as stack:
        for name in (_HOST, *_ENDS):
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "delete", name], check=True)
        for name, commands in ((_HOST, _WIRES), *_ENDS.items()):
            subprocess.run(["ip", "-n", name, "-batch", "-"], input=commands, text=True, check=True)
        inside(_HOST, lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
        yield from inside(_HOST, lambda: asyncio.run(_measure(kind, arguments, anchor)))


async def _measure(kind: Kind, arguments: Arguments, anchor: tuple[str, float]) -> list[Figure]:
    found = [figure(f"{kind}: idle", await _idle_percent(kind, arguments), "%", "<= 0.2")]
    flavour = Kind.IPTABLES_NFT if kind is Kind.NFT else kind
    _restore(flavour, Family.IPV4, services(Family.IPV4, arguments.services))
    firewall = Firewall(enable_nftables=kind is Kind.NFT)
    firewall.want(_RULES)
    beside = f"{kind}, {arguments.services} services"
    found.append(figure(f"{beside}: first rules", 1000 * await _cpu_s(firewall.settle), "ms", anchor=anchor))
    assert firewall.statistics.tool == kind
    look = await _look_ms(firewall, flavour, arguments)
    found.append(figure(f"{beside}: a look that finds nothing", look, "ms", "<= 50", anchor=anchor))
    if kind is not Kind.IPTABLES_LEGACY:
        quiet = [1000 * await _cpu_s(firewall.settle) for _ in range(arguments.rounds)]
        found.append(figure(f"{beside}: the same after no change", median(quiet), "ms", "<= 50"))
    _restore(flavour, Family.IPV6, services(Family.IPV6, arguments.services))
    look = await _look_ms(firewall, flavour, arguments)
    found.append(figure(f"{beside} in both families: a look", look, "ms", "<= 50", anchor=anchor))
    firewall.close()
    return [*found, *await _repair(kind, arguments)]


async def _look_ms(firewall: Firewall, flavour: Kind, arguments: Arguments) -> float:
    """Processor time of a look that finds nothing, each after somebody changed something of his own."""
    looks = []
    for _ in range(arguments.rounds):
        _restore(flavour, Family.IPV4, "*filter\n:OTHER - [0:0]\n-A OTHER -j RETURN\nCOMMIT\n")
        looks.append(1000 * await _cpu_s(firewall.settle))
    return median(looks)


async def _idle_percent(kind: Kind, arguments: Arguments) -> float:
    if kind is not Kind.NFT:
        _restore(kind, Family.IPV4, "*nat\n-A POSTROUTING -d 192.0.2.1 -j ACCEPT\nCOMMIT\n")
    firewall = Firewall(enable_nftables=kind is Kind.NFT)
    firewall.want(_RULES)
    await firewall.settle()

    async def rest() -> None:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(firewall.run())
            await asyncio.sleep(arguments.seconds)
            task.cancel()

    used = await _cpu_s(rest)
    firewall.close()
    return 100 * used / float(arguments.seconds)


async def _repair(kind: Kind, arguments: Arguments) -> list[Figure]:
    """How long our rules are gone when somebody flushes them, and what a ping each millisecond notices.

    The ping is masqueraded, and FORWARD drops it unless our rules accept it.
    """
    for family in Family:
        _restore(Kind.IPTABLES_NFT if kind is Kind.NFT else kind, family, _DROP)
    firewall = Firewall(enable_nftables=kind is Kind.NFT, resync_s=_RESYNC_S)
    firewall.want(_RULES)
    await firewall.settle()
    ping = Ping(_CONTAINER, _TARGET)
    with ping.running():
        spans = await _repair_s(firewall, _FLUSH[kind], arguments.rounds)
    firewall.close()
    promise = "<= 1000" if kind is Kind.NFT else "1 resync"
    name = f"{kind}: from a flush to repaired"
    if kind is not Kind.NFT:
        name += f", resync {_RESYNC_S:g} s"
    return [
        figure(f"{name}, most", 1000 * max(spans), "ms", promise),
        figure(
            f"{kind}: pings lost at {arguments.rounds} flushes", ping.lost, "", anchor=("sent", ping.sent)
        ),
    ]


async def _repair_s(firewall: Firewall, flush: str, rounds: int) -> list[float]:
    spans = []
    async with asyncio.TaskGroup() as group:
        task = group.create_task(firewall.run())
        for done in range(rounds):
            await asyncio.sleep(random.uniform(0, _RESYNC_S))  # nobody flushes in step with our looks
            started = time.monotonic()
            await asyncio.to_thread(partial(subprocess.run, ["sh", "-ec", flush], check=True))
            while firewall.statistics.repairs == done or not firewall.statistics.is_standing:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            spans.append(time.monotonic() - started)
        task.cancel()
    return spans


def services(family: Family, count: int) -> str:
    """The rules that kube-proxy writes into the nat table for so many services."""
    chains = [":KUBE-SERVICES - [0:0]", ":KUBE-MARK-MASQ - [0:0]"]
    rules = [
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
        "-A PREROUTING -j KUBE-SERVICES",
        "-A OUTPUT -j KUBE-SERVICES",
    ]
    for number in range(count):
        name, comment = f"KUBE-SVC-{number:016d}", f'-m comment --comment "ns/service-{number}:http"'
        chains.append(f":{name} - [0:0]")
        rules.append(
            f"-A KUBE-SERVICES -d {_address(family, 96, number)} -p tcp {comment} -m tcp --dport 80 -j {name}"
        )
        for endpoint in range(_ENDPOINTS):
            own = f"KUBE-SEP-{number:012d}{endpoint:04d}"
            address = _address(family, 5 + endpoint, number)
            target = f"[{address}]:80" if family is Family.IPV6 else f"{address}:80"
            dice = f"-m statistic --mode random --probability {1 / (_ENDPOINTS - endpoint):.5f}"
            chains.append(f":{own} - [0:0]")
            rules.append(f"-A {name} {comment} {dice if endpoint + 1 < _ENDPOINTS else ''} -j {own}")
            rules.append(f"-A {own} -s {address} {comment} -j KUBE-MARK-MASQ")
            rules.append(f"-A {own} -p tcp {comment} -m tcp -j DNAT --to-destination {target}")
    return "\n".join(("*nat", *chains, *rules, "COMMIT", ""))


def _address(family: Family, network: int, number: int) -> str:
    high, low = divmod(number, 256)
    return f"fd00:10::{network:x}:{high:x}:{low:x}" if family is Family.IPV6 else f"10.{network}.{high}.{low}"


def _restore(kind: Kind, family: Family, payload: str) -> None:
    program = f"{kind}-restore".replace("iptables", "ip6tables" if family is Family.IPV6 else "iptables")
    subprocess.run([program, "--noflush", "--wait"], input=payload, text=True, check=True)


async def _cpu_s(work: Callable[[], Awaitable[None]]) -> float:
    """Processor time of this process and of its children that ended."""
    before = _used_s()
    await work()
    return _used_s() - before


def _cpu_s_of_a_process() -> float:
    before = _used_s()
    subprocess.run(["true"], check=True)
    return _used_s() - before


def _used_s() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--services", type=int, default=818, help="how many [818]")
    parser.add_argument("--rounds", type=int, default=5, help="how often [5]")
    parser.add_argument("--seconds", type=float, default=20, help="how long to rest [20]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
