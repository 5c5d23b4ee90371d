# SPDX-License-Identifier: Apache-2.0
"""What the rtnetlink module makes of datagrams, whole, cut and lying; and dumps, which need no root."""

import asyncio
import errno
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loden.errors import KernelError
from loden.tables import netlink
from loden.tables.addresses import parse_host_address, read_addresses
from loden.tables.devices import Devices, parse_link
from loden.tables.entries import Entry
from loden.tables.host import read_host
from loden.tables.neighbours import FdbTable, NeighbourTable
from loden.tables.netlink import (
    Netlink,
    Refusal,
    attribute,
    attribute_u32,
    nested,
    number_in,
    parse_attributes,
    parse_messages,
)
from loden.tables.nexthops import parse_nexthop
from loden.tables.routes import RouteTable

DONE = netlink.NLMSG_DONE
KINDS = (2, 3, *range(16, 32), *range(104, 108))


def datagram(
    kind: int, body: bytes, *, flags: int = 0, sequence: int = 1, length: int | None = None
) -> bytes:
    """One message; its length lies if told so."""
    header = struct.pack("=IHHII", length or 16 + len(body), kind, flags, sequence, 0)
    return header + body + bytes(-len(body) % 4)


class Replies:
    """Stands in for the socket: hands out datagrams, and errors, in order."""

    def __init__(self, *replies: bytes | OSError) -> None:
        self._replies = list(replies)
        self.sent = 0

    def send(self, data: bytearray) -> None:
        assert data
        self.sent += 1

    def recv(self, _size: int, flags: int = 0) -> bytes:
        if not self._replies:
            assert flags & socket.MSG_DONTWAIT, "this would block for ever"
            raise BlockingIOError
        reply = self._replies.pop(0)
        if isinstance(reply, OSError):
            raise reply
        return reply


def answered(*replies: bytes | OSError) -> Netlink:
    """A socket whose kernel is a list."""
    requests = Netlink()
    requests.close()
    requests._socket = Replies(*replies)  # type: ignore[assignment]  # what it uses of a socket
    return requests


class TestAttributes:
    def test_layout_is_that_of_nlattr(self) -> None:
        assert attribute(3, b"lo\0").hex(" ") == "07 00 03 00 6c 6f 00 00"
        assert attribute_u32(4, 1500).hex(" ") == "08 00 04 00 dc 05 00 00"
        assert nested(18, attribute(1, b"ab")).hex(" ") == "0c 00 12 00 06 00 01 00 61 62 00 00"

    def test_flag_bits_of_the_type_do_not_count(self) -> None:
        raw = struct.pack("=HH4s", 8, 0x8000 | 0x4000 | 2, b"abcd")
        assert parse_attributes(raw, 0, len(raw)) == {2: b"abcd"}

    @given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=40), max_size=8))
    def test_what_was_written_is_read(self, attributes: dict[int, bytes]) -> None:
        raw = b"".join(attribute(kind, value) for kind, value in attributes.items())
        assert parse_attributes(raw, 0, len(raw)) == attributes

    def test_what_stands_before_a_lie_is_returned(self) -> None:
        raw = attribute(1, b"good") + struct.pack("=HH", 400, 2) + b"bad!"
        assert parse_attributes(raw, 0, len(raw)) == {1: b"good"}
        assert parse_attributes(attribute(1, b"good") + b"\0\0\0\0", 0, 12) == {1: b"good"}

    def test_number_of_another_size_is_none(self) -> None:
        assert number_in({1: b"\1\0\0\0", 2: b"\1\0"}, 1) == 1
        assert number_in({1: b"\1\0\0\0", 2: b"\1\0"}, 2, 7) == 7
        assert number_in({}, 3) == 0


class TestMessages:
    def test_several_in_one_datagram(self) -> None:
        raw = datagram(16, bytes(16)) + datagram(24, bytes(13)) + datagram(DONE, bytes(4))
        assert [(one.kind, one.start, one.end) for one in parse_messages(raw)] == [(16, 16, 32), (24, 48, 61)]

    @pytest.mark.parametrize("length", [1, 15, 40, 0xFFFFFFFF])
    def test_one_whose_length_lies_ends_it(self, length: int) -> None:
        raw = datagram(16, bytes(16)) + datagram(16, bytes(16), length=length)
        assert [one.start for one in parse_messages(raw)] == [16]

    @pytest.mark.parametrize("kind", [16, 20, 24, 28, 104])
    def test_one_that_is_too_short_for_its_type_is_left_out(self, kind: int) -> None:
        raw = datagram(kind, bytes(4)) + datagram(kind, bytes(16))
        assert [one.start for one in parse_messages(raw)] == [36]


def parse_everything(raw: bytes) -> None:
    """All that reads messages, on every message of a datagram."""
    requests = Netlink()
    devices = Devices(requests)
    tables = (devices, *(table(requests, devices) for table in (NeighbourTable, FdbTable, RouteTable)))
    wanted: dict[object, Entry] = {}
    try:
        for one in parse_messages(raw):
            group = one.kind & ~3
            if group == 16:
                parse_link(one)
            elif group == 20:
                parse_host_address(one)
            elif group == 104:
                parse_nexthop(one)
            for table in tables:
                table.heard(one, wanted)  # type: ignore[arg-type]  # of any type: there are none
        list(netlink._parse_answers(raw, 0))
    finally:
        requests.close()


class TestRobustness:
    @given(st.binary(max_size=300))
    def test_noise_is_survived(self, raw: bytes) -> None:
        parse_everything(raw)

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(KINDS),
                st.binary(max_size=20),
                st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=20)), max_size=6),
                st.none() | st.integers(0, 200),
            ),
            max_size=4,
        ),
        st.integers(0, 60),
    )
    def test_messages_of_wrong_sizes_are_survived(
        self, messages: list[tuple[int, bytes, list[tuple[int, bytes]], int | None]], cut: int
    ) -> None:
        raw = b"".join(
            datagram(kind, body + b"".join(attribute(*one) for one in attributes), length=length)
            for kind, body, attributes, length in messages
        )
        parse_everything(raw[: len(raw) - cut])


class TestAnswers:
    def error(self, number: int, sequence: int, *, words: str = "", capped: bool = True) -> bytes:
        asked = bytes(16) if capped else struct.pack("=IHHII", 24, 24, 1, sequence, 0) + bytes(8)
        tlv = attribute(1, words.encode() + b"\0") if words else b""
        flags = (0x100 if capped else 0) | (0x200 if words else 0)
        return datagram(2, struct.pack("=i", -number) + asked + tlv, flags=flags, sequence=sequence)

    def test_refusals_by_place_with_the_kernels_words(self) -> None:
        requests = answered(
            self.error(errno.EEXIST, 2, words="File is there"),
            self.error(errno.EINVAL, 3, words="No", capped=False) + self.error(0, 4),
        )
        assert asyncio.run(requests.batch([datagram(24, bytes(12))] * 4)) == {
            1: Refusal(errno.EEXIST, "File is there"),
            2: Refusal(errno.EINVAL, "No"),
        }

    def test_answers_to_what_was_sent_before_are_passed_over(self) -> None:
        requests = answered(self.error(errno.EINVAL, 0), self.error(0, 1))
        assert asyncio.run(requests.batch([datagram(24, bytes(12))])) == {}

    def test_what_is_not_known_to_have_worked_has_failed(self) -> None:
        requests = answered(
            self.error(errno.EEXIST, 1),
            OSError(errno.ENOBUFS, ""),
            self.error(0, 3),
            OSError(errno.ENOBUFS, ""),
        )
        refused = asyncio.run(requests.batch([datagram(24, bytes(12))] * 3))
        assert [refused[place].errno for place in range(3)] == [errno.EEXIST, errno.ENOBUFS, errno.ENOBUFS]

    def test_messages_are_made_one_batch_at_a_time(self) -> None:
        made: list[int] = []

        def make() -> bytes:
            made.append(len(made))
            return datagram(24, bytes(12))

        requests = answered(*(self.error(0, last) for last in (256, 512, 600)))
        replies = requests._socket
        assert asyncio.run(requests.batch(make() for _ in range(600))) == {}
        assert isinstance(replies, Replies)
        assert (len(made), replies.sent) == (600, 3)

    def test_refusal_without_room_for_an_errno_is_one(self) -> None:
        assert netlink._refusal(datagram(2, b""), 0).errno == errno.EBADMSG
        assert netlink._refusal(datagram(DONE, b""), 0).errno == 0


class TestDump:
    def part(self, *, flags: int = 0) -> bytes:
        return datagram(16, bytes(16), flags=flags)

    def done(self, status: int = 0, *, flags: int = 0) -> bytes:
        return datagram(DONE, struct.pack("=i", status), flags=flags)

    def test_ends_with_done(self) -> None:
        requests = answered(self.part(), self.part() + self.done())
        assert len(asyncio.run(requests.dump(18, bytes(16)))) == 2

    @pytest.mark.parametrize("where", ["first", "behind", "done"])
    def test_interrupted_one_is_read_again_whole(self, where: str) -> None:
        """The mark can be on any message, also on one in the middle of a datagram, and on the last."""
        mark = netlink.NLM_F_DUMP_INTR
        bad = {
            "first": [self.part(flags=mark), self.part() + self.done()],
            "behind": [self.part() + self.part(flags=mark), self.done()],
            "done": [self.part(), self.part() + self.done(flags=mark)],
        }[where]
        good = [self.part() + self.done()]
        assert asyncio.run(answered(*bad, *good).dump(18, bytes(16))) == good

    def test_one_that_is_interrupted_for_ever_is_given_up(self) -> None:
        bad = [self.part(flags=netlink.NLM_F_DUMP_INTR) + self.done()] * 5
        with pytest.raises(KernelError, match="the table kept changing"):
            asyncio.run(answered(*bad).dump(18, bytes(16)))

    @pytest.mark.parametrize("end", [datagram(2, struct.pack("=i", -95) + bytes(16)), None])
    def test_refusal_names_what_was_asked(self, end: bytes | None) -> None:
        requests = answered(self.part(), end or self.done(-95))
        with pytest.raises(KernelError, match=r"dump rtnetlink type 106: Operation not supported") as caught:
            asyncio.run(requests.dump(106, bytes(8)))
        assert caught.value.errno == errno.EOPNOTSUPP

    def test_failing_socket_is_an_error_and_is_emptied(self) -> None:
        requests = answered(self.part(), OSError(errno.ENOBUFS, ""), self.part(), self.done())
        with pytest.raises(KernelError, match="No buffer space"):
            asyncio.run(requests.dump(18, bytes(16)))
        with pytest.raises(BlockingIOError):
            requests._socket.recv(1, socket.MSG_DONTWAIT)


class TestRunningKernel:
    """What an unprivileged process may ask."""

    def test_links_and_addresses_are_listed(self) -> None:
        async def read() -> None:
            requests = Netlink()
            host = await read_host(requests)
            assert "lo" in [link.name for link in host.links]
            assert next(link for link in host.links if link.name == "lo").is_loopback
            index = next(link.index for link in host.links if link.name == "lo")
            assert all(address.index == index for address in await read_addresses(requests, index))
            requests.close()

        asyncio.run(read())

    def test_routes_of_nobody_are_none(self) -> None:
        async def read() -> None:
            requests = Netlink()
            devices = Devices(requests)
            await devices.refresh()
            assert await RouteTable(requests, devices).read({}) == {}
            requests.close()

        asyncio.run(read())


def test_kernel_without_strict_checking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class OldKernel(socket.socket):
        def setsockopt(self, *arguments: object) -> None:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")

    monkeypatch.setattr(socket, "socket", OldKernel)
    with pytest.raises(KernelError, match="open rtnetlink") as caught:
        Netlink()
    assert "Linux 4.20" in caught.value.hint
