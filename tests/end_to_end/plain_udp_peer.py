# SPDX-License-Identifier: Apache-2.0
"""A peer that knows of no offload: one packet a datagram, as a flannel node with the udp backend has it
(COMPAT §7.5).

    plain_udp_peer.py ADDRESS NETWORK SUBNET PEER_SUBNET=PEER_ADDRESS...

It runs inside its host's namespace until it is killed.
"""

import fcntl
import ipaddress
import os
import select
import socket
import struct
import subprocess
import sys

PORT = 8285


def open_tun() -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"flannel0", 0x1001))  # IFF_TUN | IFF_NO_PI
    return tun


def older(packet: bytes) -> bytes:
    """The packet one hop further; empty where that was its last."""
    if packet[8] <= 1:
        return b""
    head = bytearray(packet[: (packet[0] & 15) * 4])
    head[8] -= 1
    head[10:12] = b"\0\0"
    total = sum(struct.unpack(f"!{len(head) // 2}H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    head[10:12] = (~total & 0xFFFF).to_bytes(2, "big")
    return bytes(head) + packet[len(head) :]


def main(address: str, network: str, subnet: str, *peers: str) -> None:
    tun = open_tun()
    base = subnet.partition("/")[0]
    for command in (
        f"ip address add {base}/32 dev flannel0",
        "ip link set flannel0 mtu 1472 up",
        f"ip route add {network} dev flannel0",
    ):
        subprocess.run(command.split(), check=True)
    table = [
        (ipaddress.ip_network(prefix), hop) for prefix, _, hop in (peer.partition("=") for peer in peers)
    ]
    wire = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    wire.bind((address, PORT))
    print("ready", flush=True)
    poll = select.poll()
    poll.register(tun, select.POLLIN)
    poll.register(wire, select.POLLIN)
    while True:
        for number, _ in poll.poll():
            if number == tun:
                packet = os.read(tun, 2000)
                packet = older(packet) if packet[0] >> 4 == 4 else b""
                to = ipaddress.ip_address(packet[16:20]) if packet else None
                hop = next((hop for prefix, hop in table if to in prefix), "") if to else ""
                if hop:
                    wire.sendto(packet, (hop, PORT))
            else:
                packet = wire.recv(1472)  # what is longer loses its end, as there
                if len(packet) >= 20 and (packet := older(packet)):
                    os.write(tun, packet)


if __name__ == "__main__":
    main(*sys.argv[1:])
