# SPDX-License-Identifier: Apache-2.0
"""The rtnetlink socket and the monitor against the running kernel."""

import asyncio
import errno
import socket

import pytest

from loden.errors import KernelError
from loden.tables import netlink
from loden.tables.neighbours import encode_fdb
from loden.tables.netlink import Monitor, Netlink, Refusal, parse_messages
from tests.kernel.kernel import BOTH, Kernel, leave_fdb, leave_route, run

IPV4 = BOTH[0]
SMALL_BYTES = 4096


def fdb_messages(kernel: Kernel, count: int) -> list[bytes]:
    index = kernel.devices.index("flannel.1")
    assert index is not None
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE
    entries = [IPV4.peer(2 + number)[1] for number in range(count)]
    return [encode_fdb(netlink.RTM_NEWNEIGH, flags, index, entry) for entry in entries]


@pytest.fixture
def standing(kernel: Kernel) -> Kernel:
    assert run(kernel.devices.put([IPV4.link()])) == {}
    return kernel


def test_own_changes_are_not_heard_and_those_of_others_are(standing: Kernel) -> None:
    run(standing.routes.read({}))
    while standing.monitor.receive():
        pass
    neighbour, _, route = IPV4.peer(9)
    assert run(standing.neighbours.put([neighbour])) == {}
    assert run(standing.routes.put([route])) == {}
    assert standing.monitor.receive() == []
    leave_fdb(IPV4.peer(10)[1])
    leave_route(IPV4.direct(11))
    heard = standing.monitor.receive() or []
    assert {message.kind for message in heard} == {netlink.RTM_NEWNEIGH, netlink.RTM_NEWROUTE}


def test_what_overflows_is_noticed(standing: Kernel, witness: Monitor) -> None:
    witness._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
    run(standing.requests.batch(fdb_messages(standing, 500)))
    answers = [witness.receive()]
    while answers[-1] != []:
        answers.append(witness.receive())
    assert None in answers
    assert any(answers)  # what came before is read all the same
    leave_fdb(IPV4.peer(900)[1])
    assert witness.receive()


def test_answers_that_are_lost_count_as_refused_and_the_next_batch_works(standing: Kernel) -> None:
    """A small buffer, as in a user namespace, and more refusals than it holds."""
    standing.requests._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BYTES)
    good = fdb_messages(standing, 1)
    bad = [netlink.message(netlink.RTM_DELLINK, 0, bytes(16))] * 200
    refused = run(standing.requests.batch([*good, *bad, *good]))
    assert set(range(1, 201)) <= refused.keys()
    assert errno.ENOBUFS in {refusal.errno for refusal in refused.values()}
    assert run(standing.requests.batch(good)) == {}
    assert run(standing.fdb.read({})).keys() == {IPV4.peer(2)[1].slot}


def test_a_dump_that_was_cancelled_leaves_the_socket_usable(standing: Kernel) -> None:
    run(standing.requests.batch(fdb_messages(standing, 2000)))

    async def cancel_one_and_read_another() -> int:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await standing.fdb.read({})
        return len(await standing.fdb.read({}))

    assert run(cancel_one_and_read_another()) == 2000


def test_refusals_name_their_place_and_the_kernels_words(standing: Kernel) -> None:
    good = fdb_messages(standing, 600)
    bad = netlink.message(netlink.RTM_NEWROUTE, netlink.NLM_F_CREATE, bytes(12))
    refused = run(standing.requests.batch([bad, *good[:300], bad, *good[300:], bad]))
    assert list(refused) == [0, 301, 602]
    assert all(refusal.errno for refusal in refused.values())
    assert len(run(standing.fdb.read({}))) == 600


def test_questions_are_answered_in_order(standing: Kernel) -> None:
    eth0 = standing.devices.index("eth0")
    assert eth0 is not None
    questions = [
        netlink.message(netlink.RTM_GETLINK, 0, bytes(4) + index.to_bytes(4, "little") + bytes(8))
        for index in (eth0, 9999, 1) * 200
    ]
    answers = standing.requests.ask(questions)
    assert [answer.errno if isinstance(answer, Refusal) else 0 for answer in answers] == [
        0, errno.ENODEV, 0
    ] * 200  # fmt: skip


def test_two_sockets_have_ports_of_their_own(kernel: Kernel) -> None:
    other = Netlink()
    assert other.port != kernel.requests.port
    other.close()
    other.close()


def test_dump_of_a_table_that_nobody_has_is_refused(kernel: Kernel) -> None:
    with pytest.raises(KernelError, match="dump rtnetlink type 250"):
        run(kernel.requests.dump(250, bytes(16)))
    found = run(kernel.requests.dump(netlink.RTM_GETLINK, bytes(16)))
    assert list(parse_messages(found[0]))


def test_monitor_reads_so_much_at_a_time(standing: Kernel, witness: Monitor) -> None:
    while witness.receive():
        pass
    run(standing.requests.batch(fdb_messages(standing, 100)))
    assert len(witness.receive(most=30) or []) == 30
    assert len(witness.receive(most=300) or []) >= 70  # and what the kernel says by itself
