# SPDX-License-Identifier: Apache-2.0
"""The udp backend with real agents: both ways of carrying packets, mixed clusters, and whatever may happen
to them."""

import hashlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from loden.address import Family, Prefix, format_address, parse_address
from loden.backends.udp import DEVICES
from loden.lab import namespaces, probe
from loden.lab.lab import running
from loden.lab.topology import Spec, Stack, Topology
from loden.priority import NICE
from loden.tables.udp_probe import inner_packet
from tests.end_to_end.conftest import MakeHosts
from tests.end_to_end.hosts import Agent, Host, Hosts, Pinger, wait_until
from tests.end_to_end.talk import Talk, connection
from tests.end_to_end.test_agent_interface import readdress

BOTH = ("ebpf", "engine")
UDP_SEGMENT = 103  # <linux/udp.h>
IPV6_DSTOPTS = 59  # <linux/in6.h>
PORT = 8285
STATUS_PORT = 8080
#: What the kernel asks for when programs are loaded, away: the engine alone is left.
WITHOUT_BPF = ("setpriv", "--bounding-set", "-bpf,-sys_admin", "--inh-caps", "-all", "--")
PLAIN_PEER = Path(__file__).with_name("plain_udp_peer.py")


def network(acceleration: str = "auto", **more: object) -> str:
    backend = {"Type": "udp", "Acceleration": acceleration, **more}
    return json.dumps({"Network": "10.5.0.0/16", "Backend": backend})


def status(host: Host) -> dict[str, object]:
    """What the host's agent says of its tunnel."""
    with host.inside(lambda: socket.create_connection(("127.0.0.1", STATUS_PORT), timeout=10)) as asking:
        asking.sendall(b"GET /status HTTP/1.1\r\nHost: h\r\n\r\n")
        answer = b"".join(iter(lambda: asking.recv(65536), b""))
    found = json.loads(answer.partition(b"\r\n\r\n")[2])["tables"]["UdpTunnel"]["flannel0"]
    assert isinstance(found, dict)
    return found


def counter(host: Host, name: str) -> int:
    """One counter, of whichever way of carrying has it."""
    found = status(host)
    return sum(
        counters.get(name, 0) for counters in (found["ebpf"], found["engine"]) if isinstance(counters, dict)
    )


def give_options(opened: socket.socket) -> None:
    """Have a socket's packets carry options that say nothing, of the destination where that is IPv6."""
    if opened.family is socket.AF_INET:
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01\x01\x01\x00")
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, IPV6_DSTOPTS, b"\0\0\x01\x04" + bytes(4))


def require_bytes_arrive(
    source: probe.End, target: probe.End, count: int = 3_000_000, *, have_options: bool = False
) -> None:
    """TCP carries so many bytes, and the same ones arrive."""
    family = Family.of(target.address)
    address = format_address(target.address)
    data = random.Random(count).randbytes(count)
    with ExitStack() as stack:
        listener = stack.enter_context(
            namespaces.inside(target.namespace, lambda: socket.create_server((address, 4001), family=family))
        )
        sender = stack.enter_context(
            namespaces.inside(source.namespace, lambda: socket.socket(family, socket.SOCK_STREAM))
        )
        sender.settimeout(10)
        if have_options:
            give_options(sender)
        sender.connect((address, 4001))
        receiver = stack.enter_context(listener.accept()[0])
        receiver.settimeout(10)

        def send() -> None:
            sender.sendall(data)
            sender.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        digest = hashlib.sha256()
        while part := receiver.recv(1 << 20):
            digest.update(part)
        thread.join()
    assert digest.digest() == hashlib.sha256(data).digest()


@contextmanager
def datagram_sockets(source: probe.End, target: probe.End) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A socket at each end; the second is bound."""
    family = Family.of(target.address)
    with ExitStack() as stack:
        near, far = (
            stack.enter_context(
                namespaces.inside(end.namespace, lambda: socket.socket(family, socket.SOCK_DGRAM))
            )
            for end in (source, target)
        )
        far.bind((format_address(target.address), 4002))
        far.settimeout(10)
        yield near, far


def require_row_arrives(near: socket.socket, far: socket.socket) -> None:
    """Datagrams that are sent as one arrive each by itself."""
    row = [random.Random(size).randbytes(size) for size in (*[1200] * 20, 37)]
    near.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(row[0]))
    near.sendto(b"".join(row), far.getsockname())
    assert [far.recv(65536) for _ in row] == row
    near.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 0)


def require_datagrams_arrive(source: probe.End, target: probe.End) -> None:
    """Datagrams arrive whole: those that IP has to cut, those that are sent in rows, and with options."""
    with datagram_sockets(source, target) as (near, far):
        for size in (1, 37, 1400, 1472, 5000, 30_000):
            data = random.Random(size).randbytes(size)
            near.sendto(data, far.getsockname())
            assert far.recv(65536) == data
        require_row_arrives(near, far)
        give_options(near)
        near.sendto(b"one", far.getsockname())
        assert far.recv(65536) == b"one"
        require_row_arrives(near, far)


def require_all_kinds(ends: list[probe.End]) -> None:
    """ICMP, TCP and UDP, from each to each."""
    answers = probe.all_pairs(ends, tries=8, patience_s=0.5)
    assert not [one for one in answers if one.rtt_ms is None]
    for source in ends:
        for target in ends:
            if source is not target:
                require_bytes_arrive(source, target)
                if Family.of(source.address) is Family.IPV4:
                    # Over IPv6 the kernel may make super-packets that it then finds too big to forward.
                    require_bytes_arrive(source, target, have_options=True)
                require_datagrams_arrive(source, target)


def start_all(hosts: Hosts, text: str, *flags: str) -> list[Agent]:
    hosts.put_network(text)
    agents = [host.start("--iface", "eth0", "--healthz-port", str(STATUS_PORT), *flags) for host in hosts]
    for agent in agents:
        agent.wait_ready()
    for host in hosts:
        host.add_containers()
    hosts.require_all_reached()
    return agents


def nice_values(agent: Agent) -> set[int]:
    """Of all its threads."""
    found = set()
    for task in Path(f"/proc/{agent.pid}/task").iterdir():
        with suppress(ProcessLookupError):  # it has ended
            found.add(os.getpriority(os.PRIO_PROCESS, int(task.name)))
    return found


@pytest.mark.parametrize("acceleration", BOTH)
def test_carries_everything_and_says_how(make_hosts: MakeHosts, acceleration: str) -> None:
    hosts = make_hosts()
    agents = start_all(hosts, network(acceleration))
    require_all_kinds([host.container() for host in hosts])
    for agent in agents:
        agent.wait_line(f"udp acceleration={acceleration} device=flannel0")
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for agent in agents:
        may = own == 0 and not agent.lines(f"wait for processors: nice {NICE}: ")
        expected = NICE if acceleration == "engine" and may else own
        assert nice_values(agent) == {expected}
    found = status(hosts[0])
    assert found["acceleration"] == acceleration
    assert bool(found["reason"]) is (acceleration == "engine")
    (traffic,) = found["peers"].values()  # type: ignore[attr-defined]
    assert min(traffic.values()) > 0


@pytest.mark.parametrize("stack", [Stack.DUAL, Stack.IPV6])
@pytest.mark.parametrize("acceleration", BOTH)
def test_every_family_carries_everything(
    stack: Stack, acceleration: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LODEN_LAB_DIR", str(tmp_path))
    asked = json.dumps({"Acceleration": acceleration})
    spec = Spec(name=f"u{os.getpid()}", hosts=2, family=stack, backend="udp", backend_config=asked)
    with running(spec) as lab:
        assert lab.check().reachable
        for family in stack.families:
            require_all_kinds([lab.containers(host, family)[0] for host in lab.plan.hosts])
        for host in lab.plan.hosts:
            for family in stack.families:
                said = f"udp acceleration={acceleration} device={DEVICES[family]} "
                assert len([line for line in lab.state.log_lines(host.name) if said in f"{line} "]) == 1


@pytest.mark.parametrize("acceleration", BOTH)
def test_tunnel_between_containers_goes_through_the_tunnel(make_hosts: MakeHosts, acceleration: str) -> None:
    """What is in a tunnel already is no packet that the kernel would put other headers on."""
    hosts = make_hosts()
    start_all(hosts, network(acceleration))
    ends = [host.container() for host in hosts]
    inner = []
    for number, (own, other) in enumerate(zip(ends, reversed(ends), strict=True), start=1):
        local, remote = (format_address(end.address) for end in (own, other))
        for line in (
            f"link add vx0 type vxlan id 5 dstport 4789 local {local} remote {remote}",
            f"address add 192.168.5.{number}/24 dev vx0",
            "link set vx0 up",
        ):
            subprocess.run(["ip", "-netns", own.namespace, *line.split()], check=True)
        inner.append(probe.End(own.name, own.namespace, parse_address(f"192.168.5.{number}")))
    for source, target in (inner, inner[::-1]):
        require_bytes_arrive(source, target)
        require_datagrams_arrive(source, target)


@contextmanager
def talking(one: Host, other: Host) -> Iterator[Talk]:
    """A connection between the containers of two hosts that is in use all the time."""
    seen = format_address(one.container().address)
    with connection(one.container(), other.container(), seen) as ends, Talk("a connection", *ends) as talk:
        talk.require_alive("its start")
        yield talk


@contextmanager
def plain_peer(hosts: Hosts, host: Host, subnet: str) -> Iterator[None]:
    """A host with a peer on it that knows nothing of us, and its lease, as flannel would write it."""
    key = subnet.replace("/", "-")
    hosts.write_raw((key, json.dumps({"PublicIP": host.address, "PublicIPv6": None}, separators=(",", ":"))))
    host.subnet_file.parent.mkdir()
    gateway = format_address(Prefix.parse(subnet).gateway)
    host.subnet_file.write_text(
        f"FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET={gateway}/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    )
    others = [f"{other.subnet}={other.address}" for other in hosts if other is not host]
    command = [sys.executable, str(PLAIN_PEER), host.address, "10.5.0.0/16", subnet, *others]
    running = host.inside(lambda: subprocess.Popen(command, stdout=subprocess.PIPE))
    try:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        yield
    finally:
        running.kill()
        running.wait()
        assert running.stdout is not None
        running.stdout.close()


def test_mixed_cluster(make_hosts: MakeHosts) -> None:
    """Programs here, the engine there, and a third that knows of neither."""
    hosts = make_hosts(count=3)
    fast, slow, plain = hosts
    hosts.put_network(network())
    agents = [fast.start(), slow.start(under=WITHOUT_BPF)]
    for agent, used in zip(agents, BOTH, strict=True):
        agent.wait_ready()
        agent.wait_line(f"udp acceleration={used}")
    agents[1].wait_line("because=", "CAP_SYS_ADMIN")
    with plain_peer(hosts, plain, "10.5.250.0/24"):
        for host in hosts:
            host.add_containers()
        require_all_kinds([host.container() for host in hosts])


def ebpf(host: Host) -> dict[str, int]:
    """The programs' counters."""
    found = status(host)["ebpf"]
    assert isinstance(found, dict)
    return found


def require_detour(hosts: Hosts) -> None:
    """A row, and TCP, arrive at the second host's container by the detour."""
    source, target = hosts[0].container(), hosts[1].container()
    before = ebpf(hosts[1])["detoured"]
    with datagram_sockets(source, target) as (near, far):
        require_row_arrives(near, far)
    assert ebpf(hosts[1])["detoured"] == before + 1
    require_bytes_arrive(source, target)
    assert ebpf(hosts[1])["detoured"] > before + 1


def have_all_programs(host: Host) -> bool:
    """Whether each is where it belongs, as tc says."""
    places = {"encap": "flannel0 egress", "decap": "eth0 ingress", "detour": "flannel0.in ingress"}

    def shown(place: str) -> str:
        line = ["tc", "filter", "show", "dev", *place.split()]
        return subprocess.run(line, capture_output=True, text=True, check=False).stdout

    return all(
        f"loden_{name}/flannel0" in host.inside(lambda place=place: shown(place))  # type: ignore[misc]
        for name, place in places.items()
    )


def test_row_that_nobody_has_cut_is_handed_on_as_one(make_hosts: MakeHosts) -> None:
    """By the detour, with an agent and without."""
    hosts = make_hosts()
    agents = start_all(hosts, network("ebpf"))
    before = ebpf(hosts[1])
    with datagram_sockets(hosts[0].container(), hosts[1].container()) as (near, far):
        require_row_arrives(near, far)
        now = ebpf(hosts[1])
        assert now["detoured"] - before["detoured"] == now["rx_packets"] - before["rx_packets"] == 1
        agents[1].kill()
        require_row_arrives(near, far)


def test_tcp_for_containers_is_handed_on_as_it_came(make_hosts: MakeHosts) -> None:
    """In large packets, so that no bridge cuts them."""
    hosts = make_hosts()
    start_all(hosts, network("ebpf"))
    before = ebpf(hosts[1])
    require_bytes_arrive(hosts[0].container(), hosts[1].container())
    now = ebpf(hosts[1])
    assert now["rx_bytes"] - before["rx_bytes"] > 3_000_000
    assert (now["rx_bytes"] - before["rx_bytes"]) / (now["rx_packets"] - before["rx_packets"]) > 10_000
    alone = 10  # what sets the connection up, and acknowledges
    assert now["detoured"] - before["detoured"] >= now["rx_packets"] - before["rx_packets"] - alone


def test_tcp_for_containers_that_a_card_has_cut_is_merged_again(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    start_all(hosts, network("ebpf"))
    cut = ["ethtool", "-K", "eth0", "tso", "off", "gso", "off", "tx-udp-segmentation", "off"]
    hosts[0].inside(lambda: subprocess.run(cut, check=True))
    source, target = (host.container() for host in hosts)
    arrived, before = packets_in(target), ebpf(hosts[1])["rx_packets"]
    require_bytes_arrive(source, target)
    cut_in = ebpf(hosts[1])["rx_packets"] - before
    assert cut_in > 3_000_000 // 1420
    assert packets_in(target) - arrived < cut_in / 2


def packets_in(end: probe.End) -> int:
    """How many packets a container's interfaces have got."""
    line = ["ip", "-netns", end.namespace, "-json", "-stats", "link"]
    links = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    return sum(link["stats64"]["rx"]["packets"] for link in links if link["ifname"] != "lo")


class Stream:
    """TCP from one container to another for the length of a block, as fast as it goes. Nothing is lost.

    Args:
        source, target: the containers.
        may_lose: something may be lost, and is sent again.
    """

    def __init__(self, source: probe.End, target: probe.End, *, may_lose: bool = False) -> None:
        self._may_lose = may_lose
        self._stack = ExitStack()
        address = (format_address(target.address), 4003)
        listener = self._stack.enter_context(
            namespaces.inside(target.namespace, lambda: socket.create_server(address))
        )
        self._sender = self._stack.enter_context(
            namespaces.inside(source.namespace, lambda: socket.create_connection(address, timeout=10))
        )
        self._receiver = self._stack.enter_context(listener.accept()[0])
        self._is_over = False
        self.received = 0
        self._threads = [threading.Thread(target=one) for one in (self._send, self._receive)]

    def __enter__(self) -> "Stream":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        for thread in self._threads:
            thread.join()
        with self._stack:
            # What was sent twice may be on its way still.
            wait_until("all that was sent", lambda: self._may_lose or self._lost_segments() == 0)

    def _send(self) -> None:
        data = bytes(1 << 20)
        while not self._is_over:
            self._sender.sendall(data)
        self._sender.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while part := self._receiver.recv(1 << 20):
            self.received += len(part)

    def wait_for(self, count: int) -> None:
        """Until so many bytes more have arrived."""
        reached = self.received
        wait_until("TCP", lambda: self.received > reached + count)

    def _lost_segments(self) -> int:
        """How many of those that were sent never came, whatever was sent again.

        As both ends have counted them: ``tcpi_data_segs_out`` and ``tcpi_data_segs_in``.
        """
        sent, came = (
            struct.unpack_from("=I", one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160), place)[0]
            for one, place in ((self._sender, 156), (self._receiver, 152))
        )
        return int(sent - came)


def test_killed_under_tcp_for_containers_no_segment_is_lost(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    agents = start_all(hosts, network("ebpf"))
    with Stream(hosts[0].container(), hosts[1].container()) as stream:
        stream.wait_for(200_000_000)
        for agent in agents:
            agent.kill()
        stream.wait_for(200_000_000)
        for agent in [host.start() for host in hosts]:
            agent.wait_ready()
        stream.wait_for(200_000_000)


def test_stopped_agent_stops_nothing(make_hosts: MakeHosts) -> None:
    """Neither TCP of containers nor datagrams in rows wait for a process."""
    hosts = make_hosts()
    agents = start_all(hosts, network("ebpf"))
    for agent in agents:
        os.kill(agent.pid, signal.SIGSTOP)
    try:
        source, target = (host.container() for host in hosts)
        require_bytes_arrive(source, target)
        with datagram_sockets(source, target) as (near, far):
            require_row_arrives(near, far)
    finally:
        for agent in agents:
            os.kill(agent.pid, signal.SIGCONT)


def test_nat_on_a_host_leaves_the_detour_alone(make_hosts: MakeHosts) -> None:
    """Where there is any chain of NAT the kernel looks at each packet's socket again, in INPUT."""
    hosts = make_hosts()
    start_all(hosts, network("ebpf"), "--ip-masq")
    require_detour(hosts)
    engine = status(hosts[1])["engine"]
    assert isinstance(engine, dict)
    assert (engine["udp_packets"], engine["version"]) == (0, 0)


def test_filters_of_others_behind_ours_see_nothing_of_the_detour(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    start_all(hosts, network("ebpf"))
    command = ["tc", "filter", "add", "dev", "eth0", "ingress", "protocol", "ip", "pref", "100"]
    drop_all = [*command, "bpf", "da", "bytecode", "1,6 0 0 2,"]
    hosts[1].inside(lambda: subprocess.run(drop_all, check=True))
    require_detour(hosts)


def test_port_of_the_detour_in_use_costs_the_detour_alone(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    rival = hosts[1].inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    with rival:
        rival.bind(("0.0.0.0", 285))
        agents = start_all(hosts, network("ebpf"))
        agents[1].wait_line("detour=none because=", "flannel0.in")
        agents[1].wait_line("flannel0.in", "Address already in use", "UDP port 285")
        found = status(hosts[1])
        assert (found["acceleration"], found["detour"]) == ("ebpf", "")
        assert "flannel0.in" in str(found["detour_reason"])
        source, target = (host.container() for host in hosts)
        require_bytes_arrive(source, target)
        with datagram_sockets(source, target) as (near, far):
            require_row_arrives(near, far)
        assert ebpf(hosts[1])["detoured"] == 0
        rival.setblocking(False)
        with pytest.raises(BlockingIOError):
            rival.recv(1)


def test_killed_and_started_again_no_packet_is_lost(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    agents = start_all(hosts, network("ebpf"))
    with Pinger(hosts[0].container(), hosts[1].container()) as pinger:
        for agent in agents:
            agent.kill()
        reached = pinger.sent
        wait_until("pings without agents", lambda: pinger.sent > reached + 300)
        again = [host.start() for host in hosts]
        for agent in again:
            agent.wait_ready()
        reached = pinger.sent
        wait_until("pings with new agents", lambda: pinger.sent > reached + 300)
    assert pinger.lost == 0
    hosts.require_all_reached()


@pytest.mark.parametrize("acceleration", BOTH)
def test_device_deleted_under_load_comes_back(make_hosts: MakeHosts, acceleration: str) -> None:
    hosts = make_hosts()
    agents = start_all(hosts, network(acceleration))
    with talking(hosts[0], hosts[1]) as talk:
        for _ in range(3):
            hosts[1].ip("link delete flannel0")
            hosts.require_all_reached()
        talk.require_alive("the device was deleted")
    if acceleration == "ebpf":
        require_detour(hosts)
    assert agents[1].process.poll() is None
    assert hosts[1].routes() == ["10.5.0.0/16 dev flannel0 scope link"]


def test_device_of_the_detour_deleted_under_load_comes_back(make_hosts: MakeHosts) -> None:
    """TCP goes on: what is in the device is lost, and sent again; the rest goes the short way."""
    hosts = make_hosts()
    start_all(hosts, network("ebpf"))
    with Stream(hosts[0].container(), hosts[1].container(), may_lose=True) as stream:
        for _ in range(3):
            hosts[1].ip("link delete flannel0.in")
            stream.wait_for(50_000_000)
            wait_until("the detour", lambda: have_all_programs(hosts[1]))
    require_detour(hosts)


@pytest.mark.parametrize("acceleration", BOTH)
def test_address_that_changes_is_followed_and_connections_survive(
    make_hosts: MakeHosts, acceleration: str
) -> None:
    hosts = make_hosts()
    agents = start_all(hosts, network(acceleration))
    with talking(hosts[0], hosts[1]) as talk:
        readdress(hosts[1], "198.18.0.77")
        agents[1].wait_line("interface changed", "198.18.0.77")
        hosts.require_all_reached()
        talk.require_alive("the change")
    if acceleration == "ebpf":
        require_detour(hosts)


@pytest.mark.parametrize(
    "damage",
    [
        "filter delete dev eth0 ingress",
        "filter delete dev flannel0 egress",
        "filter delete dev flannel0.in ingress",
        "qdisc delete dev eth0 clsact",
    ],
)
def test_program_that_somebody_detached_is_attached_again(make_hosts: MakeHosts, damage: str) -> None:
    """The kernel says that it is gone."""
    hosts = make_hosts()
    agents = start_all(hosts, network("ebpf"))
    host = hosts[1]
    assert have_all_programs(host)
    host.inside(lambda: subprocess.run(["tc", *damage.split()], check=True))
    wait_until("all programs", lambda: have_all_programs(host))
    agents[1].wait_line("drift", "tunnel flannel0")
    require_bytes_arrive(hosts[0].container(), hosts[1].container())
    require_detour(hosts)


def send_raw(host: Host, target: str, packet: bytes) -> None:
    """One datagram from the host's own port, beside whoever has it."""
    length = 20 + 8 + len(packet)
    header = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, length, 7, 0, 64, 17, 0, parse_address(host.address), parse_address(target)
    )
    datagram = header + struct.pack("!HHHH", PORT, PORT, 8 + len(packet), 0) + packet
    with host.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)) as raw:
        raw.sendto(datagram, (target, 0))


@pytest.mark.parametrize("acceleration", BOTH)
def test_lies_about_the_source_are_dropped_and_counted(make_hosts: MakeHosts, acceleration: str) -> None:
    hosts = make_hosts(count=3)
    start_all(hosts, network(acceleration))
    victim, peer, liar = hosts
    target = victim.container()

    def arrived(source: bytes) -> bool:
        """Whether a packet from an address reaches the container, sent by the liar."""
        with namespaces.inside(
            target.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)
        ) as sink:
            send_raw(liar, victim.address, inner_packet(source, target.address, 9))
            sink.settimeout(0.3)
            try:
                return sink.recv(2000)[12:16] == source
            except TimeoutError:
                return False

    wait_until("an honest packet arrives", lambda: arrived(liar.container().address))
    assert not arrived(peer.container().address)
    assert counter(victim, "spoofed") == 1
    assert not arrived(parse_address("203.0.113.5"))
    assert counter(victim, "spoofed") == 2
    hosts.leases()
    liar.agents[0].stop()
    with_store = hosts.leases()[liar.subnet]

    async def release(store: object) -> None:
        await store.delete(with_store)  # type: ignore[attr-defined]

    hosts.with_store(release)
    wait_until("the liar is nobody's peer", lambda: liar.subnet not in json.dumps(status(victim)))
    assert not arrived(liar.container().address)
    assert counter(victim, "unknown_peer") >= 1


@pytest.mark.parametrize("acceleration", BOTH)
def test_strangers_are_let_in_on_demand(make_hosts: MakeHosts, acceleration: str) -> None:
    hosts = make_hosts()
    start_all(hosts, network(acceleration, AllowUnknownPeers=True))
    victim, stranger = hosts
    target = victim.container()
    source = parse_address("10.5.251.7")
    with namespaces.inside(
        target.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 253)
    ) as sink:
        send_raw(stranger, victim.address, inner_packet(source, target.address, 9))
        sink.settimeout(10)
        came = sink.recv(2000)
    assert came[12:16] == source
    assert came[8] == 9 - 2  # here, and where the kernel passes it on


def test_unknown_subnet_is_answered_with_unreachable(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(count=1)
    start_all(hosts, network())
    container = hosts[0].container()
    with namespaces.inside(
        container.namespace, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    ) as asking:
        asking.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
        asking.settimeout(10)
        unused = next(f"10.5.{number}.9" for number in (250, 251) if f"10.5.{number}.0/24" != hosts[0].subnet)
        asking.sendto(b"anybody?", (unused, 9))
        with pytest.raises(OSError, match="unreachable"):
            asking.recv(100)


@pytest.mark.parametrize("acceleration", BOTH)
def test_narrow_path_is_noticed_and_senders_are_told(make_hosts: MakeHosts, acceleration: str) -> None:
    hosts = make_hosts(shape=Topology.ROUTED)
    agents = start_all(hosts, network(acceleration))
    one, other = hosts
    bridge = other.plan.segment.bridge
    for name in (bridge, other.name):
        command = ["ip", "link", "set", name, "mtu", "1400"]
        namespaces.inside(hosts.plan.switch, lambda command=command: subprocess.run(command, check=True))  # type: ignore[misc]
    require_bytes_arrive(one.container(), other.container(), 1_000_000)
    wait_until("a route of its own", lambda: "mtu 1372" in one.ip(f"route show {other.subnet}"))
    require_bytes_arrive(one.container(), other.container())
    require_datagrams_arrive(one.container(), other.container())
    assert agents[0].process.poll() is None


def test_port_in_use_is_said_and_taken_when_free(make_hosts: MakeHosts) -> None:
    hosts = make_hosts()
    hosts.put_network(network())
    host = hosts[0]
    with host.inside(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as taken:
        taken.bind((host.address, PORT))
        agent = host.start()
        agent.wait_line(f"bind UDP port {PORT} of {host.address}", "EADDRINUSE", "Backend.Port")
        assert not host.subnet_file.exists()
    agent.wait_ready()


def test_several_peers_behind_one_address(make_hosts: MakeHosts) -> None:
    """Two hosts behind a router that translates addresses: told apart by their ports."""
    hosts = make_hosts(count=3, shape=Topology.ROUTED)
    shared = "198.18.200.1"
    hosts.put_network(network())
    hidden = {18285: hosts[1], 28285: hosts[2]}
    rules = ["table ip hide {", "chain in { type nat hook prerouting priority dstnat;"]
    rules += [
        f"ip daddr {shared} udp dport {port} dnat to {host.address}:{PORT}" for port, host in hidden.items()
    ]
    rules += ["}", "chain out { type nat hook postrouting priority srcnat;"]
    rules += [
        f"ip saddr {host.address} udp sport {PORT} snat to {shared}:{port}" for port, host in hidden.items()
    ]
    script = "\n".join([*rules, "}", "}"])

    def hide() -> None:
        subprocess.run(["ip", "address", "add", f"{shared}/32", "dev", "lo"], check=True)
        subprocess.run(["nft", "-f", "-"], input=script, text=True, check=True)

    namespaces.inside(hosts.plan.switch, hide)
    agents = [hosts[0].start()]
    agents += [
        host.start("--iface", "eth0", "--public-ip", shared, "--public-port", str(port))
        for port, host in hidden.items()
    ]
    for agent in agents:
        agent.wait_ready()
    for host in hosts:
        host.add_containers()
    hosts.require_all_reached()
    require_bytes_arrive(hosts[0].container(), hosts[1].container())
    require_bytes_arrive(hosts[1].container(), hosts[2].container())
    assert not [line for agent in agents for line in agent.lines("contended")]


@pytest.mark.parametrize("text", [network(), '{"Network": "10.5.0.0/16"}'], ids=["udp", "vxlan"])
def test_stopping_for_good_leaves_nothing(make_hosts: MakeHosts, text: str) -> None:
    hosts = make_hosts()
    host = hosts[0]
    before = host.ip("-o link"), host.ip("route"), host.ip("-6 route"), host.inside(qdiscs)
    agents = hosts.up(text, containers=False)
    wait_until("the peer", lambda: agents[0].told.count("1 peers") > 0)
    agents[0].stop()
    command = [sys.executable, "-m", "loden.cli.main", "run", "--cleanup"]
    done = host.inside(lambda: subprocess.run(command, capture_output=True, text=True, check=False))
    assert done.returncode == 0, done.stderr
    assert (host.ip("-o link"), host.ip("route"), host.ip("-6 route"), host.inside(qdiscs)) == before
    assert "FLANNEL" not in host.inside(rules_of_all_tools)
    again = host.inside(lambda: subprocess.run(command, capture_output=True, text=True, check=False))
    assert again.returncode == 0, again.stderr


def qdiscs() -> str:
    return subprocess.run(["tc", "qdisc", "show"], capture_output=True, text=True, check=True).stdout


def rules_of_all_tools() -> str:
    commands = (["nft", "list", "ruleset"], ["iptables-save"], ["iptables-legacy-save"])
    return "".join(
        subprocess.run(one, capture_output=True, text=True, check=False).stdout for one in commands
    )
