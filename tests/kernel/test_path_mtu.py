# SPDX-License-Identifier: Apache-2.0
"""A router on the way to a peer whose other link carries less: who hears of it, and what comes of it.

::

    host, eth0 ═══ wire, router, narrow ═══ eth0, far
          1500                      1400
"""

import errno
import socket
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import pytest

from loden.address import Family, format_address, parse_address
from loden.backend_options import decode_options
from loden.backends.udp import OVERHEAD, Udp
from loden.lease import Leg
from loden.tables.entries import Route, UdpPeer
from loden.tables.host import find_hops
from loden.tables.netlink import Netlink
from loden.tables.path_mtu import PathMtuWatch
from loden.tables.udp_sockets import open_bound
from tests.kernel.kernel import BOTH, Names, command, ip, lines, run, until
from tests.kernel.udp_kernel import PORT, UdpKernel, UdpNames
from tests.unit.test_backends import host

NARROW = 1400
FAR = {Family.IPV4: "198.51.100.2", Family.IPV6: "2001:db8:9::2"}

_SETUP = """
    router ip link set wire up
    router ip address add 192.0.2.254/24 dev wire
    router ip address add 2001:db8::fe/64 dev wire nodad
    router ip link set narrow up mtu 1400
    router ip address add 198.51.100.1/24 dev narrow
    router ip address add 2001:db8:9::1/64 dev narrow nodad
    router sysctl -q net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
    far ip link set lo up
    far ip link set eth0 up mtu 1400
    far ip address add 198.51.100.2/24 dev eth0
    far ip address add 2001:db8:9::2/64 dev eth0 nodad
    far ip route add default via 198.51.100.1
    far ip -6 route add default via 2001:db8:9::1
"""


@pytest.fixture
def router(underlay: None) -> Iterator[None]:
    """Between this namespace and ``far``."""
    del underlay
    names = ("router", "far")
    for name in names:
        ip(f"netns add {name}")
    try:
        ip("link set wire netns router")
        command("ip -netns router link add narrow type veth peer name eth0 netns far")
        for line in lines(_SETUP):
            command(f"ip netns exec {line}")
        ip("route add default via 192.0.2.254")
        ip("-6 route add default via 2001:db8::fe")
        yield
    finally:
        for name in names:
            ip(f"netns delete {name}")


class Case(NamedTuple):
    """The far host as a peer, and the host's own backend."""

    names: Names
    remote: bytes
    leg: Leg
    backend: Udp


def case(names: Names, acceleration: str = "engine") -> Case:
    given = host("v4" if names.family is Family.IPV4 else "v6")
    options, _notes = decode_options(f'{{"Acceleration": "{acceleration}"}}'.encode(), Udp.Options)
    remote = parse_address(FAR[names.family])
    fast = b'{"Acceleration":"ebpf"}' if acceleration == "ebpf" else None
    return Case(names, remote, Leg(names.subnet(9), remote, fast), Udp(given, options))


@pytest.fixture(params=BOTH, ids=str)
def names(request: pytest.FixtureRequest) -> Names:
    found = request.param
    assert isinstance(found, Names)
    return found


def hop_mtu(requests: Netlink, remote: bytes) -> int:
    hop = find_hops(requests, [remote])[remote]
    assert hop is not None
    return hop.mtu


def test_watch_hears_the_router_and_the_kernel_remembers(router: None, names: Names) -> None:
    del router
    remote = parse_address(FAR[names.family])

    async def act() -> None:
        requests, heard = Netlink(), list[int]()
        watch = PathMtuWatch(lambda: heard.append(hop_mtu(requests, remote)))
        watch.use(names.family, PORT)
        with open_bound(names.local, PORT) as ours, open_bound(names.local, PORT + 1) as others:
            assert hop_mtu(requests, remote) == 0
            # Behind the small one, which fits: whatever was to come for it is there before the other's.
            ours.sendto(bytes(NARROW - 48), (FAR[names.family], PORT))
            ours.sendto(bytes(NARROW), (FAR[names.family], PORT))
            await until(lambda: heard != [])
            assert heard == [NARROW]
            with pytest.raises(OSError, match="too long"):
                others.sendto(bytes(NARROW), (FAR[names.family], PORT))
        watch.close()
        requests.close()

    run(act())


def test_watch_leaves_what_is_about_other_ports(router: None, names: Names) -> None:
    del router

    async def act() -> None:
        heard = list[None]()
        watch = PathMtuWatch(lambda: heard.append(None))
        watch.use(names.family, PORT + 1)
        requests = Netlink()
        with open_bound(names.local, PORT) as ours:
            ours.sendto(bytes(NARROW), (FAR[names.family], PORT))
            await until(lambda: hop_mtu(requests, parse_address(FAR[names.family])) == NARROW)
        # What the kernel has taken in already, the watch's socket has got as well.
        for family, one in watch._sockets.items():
            watch._receive(family)
            with pytest.raises(BlockingIOError):
                one.recv(1)
        assert heard == []
        watch.close()
        requests.close()

    run(act())


@pytest.mark.parametrize("way", ["ebpf", "engine"])
def test_peer_behind_it_gets_a_route_with_what_is_left(router: None, names: Names, way: str) -> None:
    """A packet that does not fit teaches the host; from then on whoever sends more is told."""
    del router
    UdpNames(names, way).require()
    one = case(names, way)
    container = format_address(names.subnet(9).address[:-1] + b"\x02")
    own = list(one.backend.own_entries(Leg(names.subnet(1), names.local, None)))
    left = NARROW - OVERHEAD[names.family]

    async def act(kernel: UdpKernel) -> None:
        kernel.reconciler.want("own", own)
        kernel.reconciler.want("peer", peer_entries(kernel, one))
        async with kernel.running():
            await kernel.reconciler.look()
            assert kernel.reconciler.problems == {}
            assert len(peer_entries(kernel, one)) == 1
            with socket.socket(names.family, socket.SOCK_DGRAM) as sender:
                sender.bind((format_address(names.subnet(1).address), 0))
                sender.sendto(bytes(NARROW), (container, 9))
                await until(lambda: kernel.host_changes > 0)
            counted = kernel.carrier(UdpNames(names, way).device).report()[way]
            assert counted["tx_packets"] > 0
            peer, route = peer_entries(kernel, one)
            assert isinstance(peer, UdpPeer)
            assert isinstance(route, Route)
            assert (peer.mtu, route.mtu) == (left, left)
            kernel.reconciler.want("peer", [peer, route])
            await kernel.reconciler.settle()
            assert f"mtu {left}" in ip(f"{names.flag} route show {names.subnet(9)}")
            assert list(kernel.carrier(peer.tunnel).standing().values()) == [peer]
            headers = 28 if names.family is Family.IPV4 else 48
            with open_bound(names.subnet(1).address, 40000) as sender:  # with "don't fragment"
                sender.sendto(bytes(left - headers), (container, 9))
                with pytest.raises(OSError, match="too long") as caught:
                    sender.sendto(bytes(left - headers + 1), (container, 9))
                assert caught.value.errno == errno.EMSGSIZE

    with closing(UdpKernel()) as kernel:
        run(act(kernel))


def peer_entries(kernel: UdpKernel, one: Case) -> list[UdpPeer | Route]:
    """What the backend wants for the peer, as the kernel sees the way there now."""
    hop = find_hops(kernel.requests, [one.remote])[one.remote]
    found = one.backend.entries(one.leg, hop)
    return [entry for entry in found if isinstance(entry, UdpPeer | Route)]
