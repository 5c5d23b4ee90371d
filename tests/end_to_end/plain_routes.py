# SPDX-License-Identifier: Apache-2.0
"""Stands in for the agent, so that the lab is tested apart from it: plain routes, or one way to fail.

Usage: plain_routes.py SUBNET_FILE HOSTS [ends | hangs | strays]

    ends    logs an error and ends before it is ready
    hangs   says what it waits for, and is never ready
    strays  has no route to the last host, and warns about it
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

_SUBNET_ENV = """\
FLANNEL_NETWORK=10.5.0.0/16
FLANNEL_SUBNET=10.5.{own}.1/24
FLANNEL_MTU=1450
FLANNEL_IPMASQ=false
"""


def main(subnet_file: Path, hosts: int, fault: str = "") -> None:
    own = int(subnet_file.parent.name.removeprefix("h"))
    if fault == "ends":
        sys.exit("ERROR no backend for today")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
        if fault == "hangs":
            notify.send(b"STATUS=waiting for better weather")
            signal.pause()
        peers = [peer for peer in range(1, hosts + 1) if peer != own]
        if fault == "strays" and hosts in peers:
            peers.remove(hosts)
            print(f"WARNING route 10.5.{hosts}.0/24: not on-link", file=sys.stderr, flush=True)
        _route(peers)
        subnet_file.write_text(_SUBNET_ENV.format(own=own))
        notify.send(b"READY=1\nSTATUS=programmed")
    signal.pause()


def _route(peers: list[int]) -> None:
    lines = "".join(f"route add 10.5.{peer}.0/24 via 198.18.0.{peer}\n" for peer in peers)
    subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
