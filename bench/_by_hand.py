# SPDX-License-Identifier: Apache-2.0
"""Stands in for a lab's agent: the devices and entries that a person would type with ip and bridge.

Usage: python -m bench._by_hand BACKEND HOSTS SUBNET_FILE
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_VXLAN_OVERHEAD = 50


def main() -> None:
    backend, hosts, subnet_file = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    own = int(subnet_file.parent.name.removeprefix("h"))
    peers = [number for number in range(1, hosts + 1) if number != own]
    {"vxlan": _vxlan, "host-gw": _host_gw}[backend](own, peers)
    mtu = 1500 - (_VXLAN_OVERHEAD if backend == "vxlan" else 0)
    subnet_file.write_text(f"FLANNEL_SUBNET=10.5.{own}.1/24\nFLANNEL_MTU={mtu}\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
        notify.send(b"READY=1")
    signal.sigwait({signal.SIGTERM})


def _vxlan(own: int, peers: Sequence[int]) -> None:
    _batch(
        "ip",
        f"link add flannel.1 address {_mac(own)} mtu {1500 - _VXLAN_OVERHEAD} type vxlan id 1 "
        f"local 198.18.0.{own} dev eth0 dstport 8472 nolearning",
        f"addr add 10.5.{own}.0/32 dev flannel.1",
        "link set flannel.1 up",
        *(f"neigh add 10.5.{peer}.0 lladdr {_mac(peer)} dev flannel.1 nud permanent" for peer in peers),
        *(f"route add 10.5.{peer}.0/24 via 10.5.{peer}.0 dev flannel.1 onlink" for peer in peers),
    )
    _batch("bridge", *(f"fdb add {_mac(peer)} dst 198.18.0.{peer} dev flannel.1 self" for peer in peers))


def _host_gw(own: int, peers: Sequence[int]) -> None:
    del own
    _batch("ip", *(f"route add 10.5.{peer}.0/24 via 198.18.0.{peer} dev eth0" for peer in peers))


def _mac(number: int) -> str:
    return f"02:00:00:00:00:{number:02x}"


def _batch(tool: str, *lines: str) -> None:
    subprocess.run([tool, "-batch", "-"], input="\n".join(lines), text=True, check=True)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main()
