# SPDX-License-Identifier: Apache-2.0
"""The engine's table of peers, against a list that is searched from one end to the other."""

import random
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loden import _engine
from loden.address import Prefix, parse_address
from loden.errors import KernelError
from loden.tables.engine import Engine, Peer, Traffic

REMOTE = parse_address("192.0.2.7")


def longest(peers: Sequence[Peer], address: bytes) -> Peer | None:
    """The plain way; of two with one prefix the last counts."""
    found: Peer | None = None
    for peer in peers:
        if Prefix(peer.prefix, peer.length).holds(address) and (found is None or peer.length >= found.length):
            found = peer
    return found


def looked_up(peers: Sequence[Peer], addresses: Sequence[bytes]) -> list[Peer | None]:
    return [None if one is None else Peer(*one) for one in _engine._lookup(peers, addresses)]


addresses4 = st.one_of(
    st.binary(min_size=4, max_size=4),
    st.integers(0, 255).map(lambda n: bytes((10, 5, 0, n))),
    st.sampled_from([bytes(4), b"\xff" * 4]),
)
addresses6 = st.one_of(
    st.binary(min_size=16, max_size=16),
    st.integers(0, 255).map(lambda n: parse_address("fd00::")[:15] + bytes([n])),
    st.integers(0, 255).map(lambda n: parse_address("fd00::")[:7] + bytes([n]) + bytes(8)),
    st.sampled_from([bytes(16), b"\xff" * 16]),
)
prefixes = st.one_of(
    st.tuples(addresses4, st.integers(0, 32)), st.tuples(addresses6, st.integers(0, 128))
).map(lambda found: Prefix.of(*found))
peer_lists = st.lists(
    st.builds(
        lambda prefix, port: Peer(prefix.address, prefix.length, REMOTE, port),
        prefixes,
        st.integers(0, 65535),
    ),
    max_size=20,
)


@given(peer_lists, st.lists(st.one_of(addresses4, addresses6), max_size=20))
@settings(max_examples=300)
def test_lookup_finds_the_longest_prefix(peers: list[Peer], addresses: list[bytes]) -> None:
    edges = [
        edge.to_bytes(len(peer.prefix), "big")
        for peer in peers
        for prefix in [Prefix(peer.prefix, peer.length)]
        for edge in (prefix.first - 1, prefix.first, prefix.last, prefix.last + 1)
        if 0 <= edge < 1 << (8 * len(peer.prefix))
    ]
    asked = addresses + edges
    assert looked_up(peers, asked) == [longest(peers, address) for address in asked]


def test_lookup_among_many_finds_the_longest_prefix() -> None:
    chance = random.Random(4)
    peers = [
        Peer(prefix.address, prefix.length, REMOTE, number)
        for number in range(3000)
        for prefix in [Prefix.of(bytes([10]) + chance.randbytes(3), chance.choice([12, 16, 24, 24, 28, 32]))]
    ]
    asked = [bytes([10]) + chance.randbytes(3) for _ in range(2000)] + [peer.prefix for peer in peers]
    # The first bytes decide which peers can hold an address: the plain way is slow.
    by_start: dict[bytes, list[Peer]] = {}
    wide = [peer for peer in peers if peer.length < 16]
    for peer in peers:
        by_start.setdefault(peer.prefix[:2], []).append(peer)
    for address, found in zip(asked, looked_up(peers, asked), strict=True):
        assert found == longest(wide + [p for p in by_start.get(address[:2], []) if p.length >= 16], address)


@pytest.fixture
def engine() -> Iterator[Engine]:
    """One that never runs: what is no TUN device can be given as one until it is read."""
    with ExitStack() as stack:
        ends = socket.socketpair()
        for end in ends:
            stack.enter_context(end)
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        yield Engine([ends[0].fileno()], [udp.fileno()])


def peer(number: int, **changed: object) -> Peer:
    fields = {"prefix": bytes((10, 5, number, 0)), "length": 24, "remote": REMOTE, "port": 8285, "mtu": 1472}
    return Peer(**(fields | changed))  # type: ignore[arg-type]  # the fields are those of Peer


def test_peers_are_put_replaced_and_dropped(engine: Engine) -> None:
    six = Peer(parse_address("fd00::"), 64, parse_address("2001:db8::7"), 1, 0)
    engine.change([peer(3), six, peer(1), peer(2)], ())
    assert engine.peers() == [peer(1), peer(2), peer(3), six]
    engine.change([peer(2, port=9)], [(peer(1).prefix, 24), (peer(9).prefix, 24)])
    assert engine.peers() == [peer(2, port=9), peer(3), six]
    engine.change((), [(six.prefix, six.length), (peer(3).prefix, 23 + 1)])
    assert engine.peers() == [peer(2, port=9)]
    assert engine.peer_counters() == [Traffic(peer(2).prefix, 24, 0, 0, 0, 0)]


def test_last_of_one_prefix_and_puts_before_drops_count(engine: Engine) -> None:
    engine.change([peer(1, port=1), peer(1, port=2), peer(1, port=3)], [(peer(1).prefix, 24)])
    assert engine.peers() == [peer(1, port=3)]


def test_prefix_of_every_length_stands(engine: Engine) -> None:
    four = [Peer(Prefix.of(b"\xff" * 4, n).address, n, REMOTE, n) for n in range(33)]
    six = [Peer(Prefix.of(b"\xff" * 16, n).address, n, REMOTE, n) for n in range(129)]
    engine.change(six + four, ())
    assert engine.peers() == sorted(four) + sorted(six)
    assert looked_up(four + six, [b"\xff" * 4, b"\xff" * 16, bytes(4), bytes(16)]) == [
        four[-1],
        six[-1],
        four[0],
        six[0],
    ]


@st.composite
def changes(draw: st.DrawFn) -> tuple[list[Peer], list[tuple[bytes, int]]]:
    numbers = st.lists(st.integers(0, 12), max_size=8)
    puts = [peer(number, port=draw(st.integers(1, 9))) for number in draw(numbers)]
    return puts, [(peer(number).prefix, 24) for number in draw(numbers)]


@given(st.lists(changes(), max_size=8))
@settings(max_examples=60)
def test_changes_add_up_to_what_a_dictionary_has(
    steps: list[tuple[list[Peer], list[tuple[bytes, int]]]],
) -> None:
    wanted: dict[bytes, Peer] = {}
    with ExitStack() as stack:
        ends = [stack.enter_context(end) for end in socket.socketpair()]
        udp = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        engine = Engine([ends[0].fileno()], [udp.fileno()])
        for puts, drops in steps:
            engine.change(puts, drops)
            for prefix, _ in drops:
                wanted.pop(prefix, None)
            wanted |= {one.prefix: one for one in puts}
            assert engine.peers() == sorted(wanted.values())
            assert engine.counters()["tables"] == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (peer(1, prefix=bytes(5)), "4 or 16 bytes"),
        (peer(1, prefix=bytes((10, 5, 1, 1))), "bits behind"),
        (peer(1, length=33), "length is 0 to 32"),
        (peer(1, length=-1), "length is 0 to 32"),
        (peer(1, length=2**70), "length is 0 to 32"),
        (peer(1, remote=b""), "remote has 4 or 16"),
        (peer(1, port=65536), "port is 0 to 65535"),
        (peer(1, mtu=65536), "mtu is 0 to 65535"),
    ],
)
def test_wrong_peer_is_refused_and_nothing_changes(engine: Engine, wrong: Peer, message: str) -> None:
    engine.change([peer(1)], ())
    with pytest.raises(ValueError, match=message):
        engine.change([peer(2), wrong], [(peer(1).prefix, 24)])
    assert engine.peers() == [peer(1)]


@pytest.mark.parametrize("wrong", [None, (), (b"", 1), "12345", peer(1, port=b"")])
def test_what_is_no_peer_is_refused(engine: Engine, wrong: Peer) -> None:
    with pytest.raises(TypeError):
        engine.change([wrong], ())
    with pytest.raises((TypeError, ValueError)):
        engine.change((), [wrong])  # type: ignore[list-item]  # it is wrong


def test_wrong_descriptors_are_refused() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp,
        socket.socket(type=socket.SOCK_DGRAM) as udp,
    ):
        for tun, sockets in (([], [udp]), ([udp], []), ([udp], [tcp]), ([udp] * 65, [udp])):
            with pytest.raises(KernelError):
                Engine([one.fileno() for one in tun], [one.fileno() for one in sockets])
        with pytest.raises(KernelError, match="Bad file descriptor"):
            Engine([10**6], [udp.fileno()])
        with pytest.raises(ValueError, match="source4 has 4 bytes"):
            Engine([udp.fileno()], [udp.fileno()], source4=bytes(5))
        with pytest.raises(ValueError, match="source6 has 16 bytes"):
            Engine([udp.fileno()], [udp.fileno()], source6=bytes(4))


def test_start_and_stop_can_be_repeated(engine: Engine) -> None:
    engine.stop()
    for _ in range(3):
        engine.start()
        engine.start()
        engine.stop()
        engine.stop()
    engine.start()  # and is forgotten: the threads end with the object


def test_many_peers_are_one_change(engine: Engine) -> None:
    many = [
        peer(0, prefix=bytes((10, number >> 8, number & 255, 0)), port=number % 7) for number in range(20_000)
    ]
    engine.change(many, ())
    assert engine.peers() == many
    engine.change((), [(one.prefix, one.length) for one in many[1:]])
    assert engine.peers() == many[:1]
