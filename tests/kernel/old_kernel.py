# SPDX-License-Identifier: Apache-2.0
"""Packets through two engines; ``test_engine_old_kernel.py`` runs it with ``old_kernel.c`` loaded."""

import random
import socket
from contextlib import ExitStack

from bench._tunnel import SIDES, engine_on, wire
from loden.address import Family
from tests.kernel.test_engine import ONE, TWO, UDP_SEGMENT, transfer, udp_pair
from tests.unit.test_engine_layouts import merged_come_apart


def main() -> None:
    """Send TCP and datagrams in rows, and compare what arrives."""
    merged_come_apart()
    with wire(), ExitStack() as stack:
        engines = [engine_on(side, stack) for side in SIDES]
        for family in Family:
            one, two = udp_pair(stack, family)
            one.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 777)
            data = random.Random(7).randbytes(777 * 40 - 300)
            for _ in range(3):
                one.send(data)
                rows = [two.recv(65536) for _ in range(40)]
                assert rows == [data[at : at + 777] for at in range(0, len(data), 777)]
        assert engines[1].counters()["merged"] == 0, "no UDP super-packet was taken"
        transfer(ONE, TWO, size=8 << 20)
        sent, received = (engine.counters() for engine in engines)
        assert sent["tx_packets"] > 5000
        assert sent["udp_sends"] == sent["tx_packets"], "none went with others in one message"
        assert received["refused"] == 0
        assert received["merged"] > 0, "TCP is merged all the same"


if __name__ == "__main__":
    main()
