# SPDX-License-Identifier: Apache-2.0
"""The packets that fuzzing begins with: ``python -m tests.fuzz.make_corpus`` writes ``tests/fuzz/corpus``."""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.packets import (
    ACK,
    CWR,
    FIN,
    OFFLOAD,
    PSH,
    Ip,
    Ip4,
    Ip6,
    Raw,
    Tcp,
    Udp,
    super_packet,
)

CORPUS = Path(__file__).parent / "corpus"

_TIMES = b"\1\1\x08\x0a" + bytes(8)
_ROUTER_ALERT = bytes.fromhex("94040000")
_HOP_BY_HOP = (0, bytes([0, 5, 2, 0, 0, 1, 0]))
_FRAGMENT = (44, bytes([0, 0, 1, 0, 0, 0, 7]))
_LATER = (44, bytes([0, 0, 9, 0, 0, 0, 7]))


def corpus() -> Iterator[tuple[str, bytes]]:
    """The name of each file below the corpus's folder, and what is in it."""
    for number, packet in enumerate(_PACKETS):
        yield f"parse/{number:02}.bin", struct.pack("!H", 68 + 40 * number) + packet.bytes()
    for number, whole in enumerate(_SUPERS):
        yield f"cut/{number:02}.bin", whole
    for number, packets in enumerate(_STREAMS):
        parts = [one.bytes() for one in packets]
        yield (
            f"merge/{number:02}.bin",
            bytes([number % 4]) + b"".join(struct.pack("!H", len(one)) + one for one in parts),
        )
    for number, steps in enumerate(_TABLES):
        yield f"table/{number:02}.bin", b"".join(steps)


_PACKETS: Sequence[Ip] = (
    Ip4(inner=Udp(payload=b"hello")),
    Ip4(df=False, inner=Udp(payload=bytes(300)), options=_ROUTER_ALERT + b"\x07\x07\x04" + bytes(5)),
    Ip4(df=False, mf=True, offset=3, inner=Raw(protocol=17, payload=bytes(64))),
    Ip4(inner=Tcp(options=_TIMES, payload=bytes(100))),
    Ip4(inner=Raw(protocol=1, payload=bytes([8, 0]) + bytes(30)), ttl=1),
    Ip4(inner=Raw(protocol=1, payload=bytes([3, 4]) + bytes(30))),
    Ip6(inner=Udp(payload=b"hello")),
    Ip6(inner=Tcp(payload=bytes(1400))),
    Ip6(inner=Raw(protocol=58, payload=bytes([128, 0]) + bytes(30))),
    Ip6(extensions=(_HOP_BY_HOP, _FRAGMENT), inner=Raw(protocol=17, payload=bytes(16))),
    Ip6(extensions=(_LATER,), inner=Raw(protocol=17, payload=bytes(16))),
    Ip6(extensions=((51, bytes([2]) + bytes(14)), (60, bytes(7))), inner=Udp()),
)

_SUPERS: Sequence[bytes] = (
    super_packet(Ip4(inner=Tcp(options=_TIMES, payload=bytes(300))), 100),
    super_packet(Ip4(inner=Tcp(flags=ACK | CWR | PSH | FIN, payload=bytes(301))), 7, ecn=True),
    super_packet(Ip4(options=_ROUTER_ALERT, inner=Tcp(payload=bytes(50))), 20),
    super_packet(Ip6(inner=Tcp(options=_TIMES, payload=bytes(300))), 100),
    super_packet(Ip6(extensions=(_HOP_BY_HOP,), inner=Udp(payload=bytes(90))), 30),
    super_packet(Ip4(inner=Udp(payload=bytes(90))), 31),
    OFFLOAD.pack(1, 0, 0, 0, 20, 6) + Ip4(inner=Udp(payload=b"abc")).bytes(),
    OFFLOAD.pack(0, 0, 0, 0, 0, 0) + Ip6(inner=Udp(payload=b"abc")).bytes(),
)

_STREAMS: Sequence[Sequence[Ip]] = (
    [Ip4(ident=n, inner=Tcp(sequence=40 * n, options=_TIMES, payload=bytes([n]) * 40)) for n in range(5)],
    [Ip4(ident=0, inner=Udp(payload=bytes([n]) * 20)) for n in range(5)],
    [Ip6(inner=Tcp(sequence=40 * n, payload=bytes([n]) * 40)) for n in range(5)],
    [Ip6(inner=Udp(source=n % 3, payload=bytes([n]) * 20)) for n in range(9)],
    [Ip6(inner=Udp(source=n, payload=bytes([n]) * 20)) for n in range(11)],
    [
        Ip4(ident=1, inner=Tcp(sequence=0, payload=bytes(40))),
        Ip4(ident=3, inner=Tcp(sequence=80, payload=bytes(40))),
        Ip4(ident=2, inner=Tcp(sequence=40, payload=bytes(40))),
        Ip4(ident=4, inner=Tcp(sequence=120, flags=ACK | PSH, payload=bytes(9))),
        Ip4(ident=5, inner=Tcp(sequence=129, flags=ACK | FIN)),
        Ip4(options=_ROUTER_ALERT, inner=Tcp(payload=b"x")),
    ],
)


def _step(what: int, length: int, outer: int, address: str) -> bytes:
    return bytes([what, length, outer, outer]) + bytes.fromhex(address).ljust(16, b"\0")


_TABLES: Sequence[Sequence[bytes]] = (
    [
        _step(0, 24, 2, "0a0501"),
        _step(0, 16, 4, "0a05"),
        _step(0, 32, 6, "0a050102"),
        _step(2, 24, 2, "0a0501"),
    ],
    [_step(1, 64, 3, "fd00"), _step(1, 128, 5, "fd00"), _step(1, 0, 7, ""), _step(0, 0, 8, "")],
    [
        _step(0, 32, 2, "ffffffff"),
        _step(0, 1, 2, "80"),
        _step(1, 128, 2, "ff" * 16),
        _step(1, 127, 2, "ff" * 16),
    ],
)


def main() -> None:
    """Write the files."""
    for name, data in corpus():
        path = CORPUS / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
