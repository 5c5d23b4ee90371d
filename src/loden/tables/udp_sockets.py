# SPDX-License-Identifier: Apache-2.0
"""The UDP socket of a tunnel, open for as long as the agent lives.

It is bound also where eBPF programs take every datagram before: without it the kernel would answer what the
programs pass on with "port unreachable", and would not note what routers say of the path's MTU.
"""

import errno as errnos
import socket

from loden.address import Family, format_address
from loden.errors import KernelError

_IP_MTU_DISCOVER, _IPV6_MTU_DISCOVER, _PMTUDISC_DO = 10, 23, 2
_SOL_UDP, _UDP_NO_CHECK6_RX, _UDP_GRO = 17, 102, 104
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER_BYTES = 4 << 20
_TAKEN = (
    "stop what has the port (ss -lunp shows it), flanneld perhaps, or set another Backend.Port for all hosts"
)


def merge(opened: socket.socket, *, is_on: bool) -> None:
    """Whether datagrams of one sender may come in as one (``UDP_GRO``, Linux 5.0)."""
    opened.setsockopt(_SOL_UDP, _UDP_GRO, is_on)


def open_bound(address: bytes, port: int) -> socket.socket:
    """A non-blocking socket of an address and a port.

    Args:
        address: of this host, packed.
        port: the UDP port.

    Raises:
        KernelError: it cannot be bound; EADDRINUSE where another program has the port.
    """
    family = Family.of(address)
    opened = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        _set_options(opened, family)
        opened.bind((format_address(address), port))
    except OSError as error:
        opened.close()
        raise KernelError(
            "bind",
            f"UDP port {port} of {format_address(address)}",
            error.errno or errnos.EIO,
            hint=_TAKEN if error.errno == errnos.EADDRINUSE else "",
        ) from error
    return opened


def _set_options(opened: socket.socket, family: Family) -> None:
    if family is Family.IPV4:
        opened.setsockopt(socket.IPPROTO_IP, _IP_MTU_DISCOVER, _PMTUDISC_DO)  # "don't fragment", always
    else:
        opened.setsockopt(socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER, _PMTUDISC_DO)
        opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # The fast path of peers sends without a checksum, as RFC 6935 allows for tunnels.
        opened.setsockopt(_SOL_UDP, _UDP_NO_CHECK6_RX, 1)
    for forced, usual in ((_SO_RCVBUFFORCE, socket.SO_RCVBUF), (_SO_SNDBUFFORCE, socket.SO_SNDBUF)):
        try:
            opened.setsockopt(socket.SOL_SOCKET, forced, _BUFFER_BYTES)
        except PermissionError:  # in a user namespace
            opened.setsockopt(socket.SOL_SOCKET, usual, _BUFFER_BYTES)
