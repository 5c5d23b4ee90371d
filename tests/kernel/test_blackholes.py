# SPDX-License-Identifier: Apache-2.0
import asyncio
import subprocess
from collections.abc import Callable, Coroutine, Iterator

import pytest

from loden.address import Prefix
from loden.lab.namespaces import inside
from loden.reconcile import Reconciler
from loden.tables.blackholes import METRIC, BlackholeTable
from loden.tables.entries import Blackhole
from loden.tables.netlink import Monitor, Netlink

SUBNETS = [Blackhole(Prefix.parse(text)) for text in ("10.5.1.0/24", "fd00:5:0:1::/64")]


@pytest.fixture
def host() -> Iterator[str]:
    subprocess.run(["ip", "netns", "add", "blackholes"], check=True)
    yield "blackholes"
    subprocess.run(["ip", "netns", "delete", "blackholes"], check=True)


Scenario = Callable[[Reconciler], Coroutine[None, None, None]]


def play(host: str, scenario: Scenario) -> None:
    async def with_table() -> None:
        requests = Netlink()
        try:
            await scenario(Reconciler([BlackholeTable(requests)]))
        finally:
            requests.close()

    inside(host, lambda: asyncio.run(with_table()))


def ip(command: str) -> str:
    done = subprocess.run(["ip", *command.split()], check=True, capture_output=True, text=True)
    return done.stdout


def standing() -> list[str]:
    text = ip("-4 route show type blackhole") + ip("-6 route show type blackhole")
    return [" ".join(line.split()[:2]) for line in text.splitlines()]


WANTED = ["blackhole 10.5.1.0/24", "blackhole fd00:5:0:1::/64"]


def test_blackholes_come_and_go_and_others_stay(host: str) -> None:
    async def scenario(reconciler: Reconciler) -> None:
        ip("route add blackhole 10.9.0.0/24 protocol 76")
        ip("route add blackhole 10.5.2.0/24")
        reconciler.want("own", SUBNETS)
        await reconciler.look()
        assert sorted(standing()) == sorted([*WANTED, "blackhole 10.5.2.0/24", "blackhole 10.9.0.0/24"])
        assert f"metric {METRIC}" in ip("route show 10.5.1.0/24")
        reconciler.want("own", ())
        await reconciler.settle()
        assert sorted(standing()) == ["blackhole 10.5.2.0/24", "blackhole 10.9.0.0/24"]
        assert reconciler.statistics.failing == 0

    play(host, scenario)


def test_what_a_dead_agent_left_is_found_again_or_removed(host: str) -> None:
    async def scenario(reconciler: Reconciler) -> None:
        ip(f"route add blackhole 10.5.1.0/24 protocol 76 metric {METRIC}")
        ip(f"route add blackhole 10.5.77.0/24 protocol 76 metric {METRIC}")
        reconciler.want("own", SUBNETS)
        await reconciler.look()
        assert standing() == WANTED
        await reconciler.look()
        assert (standing(), reconciler.statistics.drifted) == (WANTED, 0)

    play(host, scenario)


def test_deleted_blackhole_is_put_back(host: str) -> None:
    async def scenario(reconciler: Reconciler) -> None:
        monitor = Monitor([7, 11])
        reconciler.want("own", SUBNETS)
        await reconciler.look()
        await reconciler.look()
        monitor.receive()
        for subnet in SUBNETS:
            ip(f"route delete blackhole {subnet.dst}")
        for message in monitor.receive() or ():
            reconciler.hear(message)
        monitor.close()
        assert standing() == []
        await asyncio.sleep(0.25)  # repairs are spaced
        await reconciler.settle()
        assert (standing(), reconciler.statistics.drifted) == (WANTED, 2)

    play(host, scenario)


def test_route_to_the_containers_wins_whichever_was_first(host: str) -> None:
    async def scenario(reconciler: Reconciler) -> None:
        ip("link add cni0 type veth peer name container")
        ip("link set cni0 up")
        ip("link set container up")
        ip("address add 10.5.1.1/24 dev cni0")
        reconciler.want("own", SUBNETS)
        await reconciler.look()
        assert "dev cni0" in ip("route get 10.5.1.9")
        ip("address add fd00:5:0:1::1/64 dev cni0 nodad")
        assert "dev cni0" in ip("route get fd00:5:0:1::9")
        ip("link delete cni0")
        for address in ("10.5.1.9", "fd00:5:0:1::9"):
            with pytest.raises(subprocess.CalledProcessError) as refused:
                ip(f"route get {address}")
            assert "Invalid argument" in refused.value.stderr

    play(host, scenario)
