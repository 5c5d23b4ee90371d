# SPDX-License-Identifier: Apache-2.0
"""What the kernel itself says about nftables: the number of the ruleset's state, who changed it, what tables.

The kernel counts every transaction in a network namespace, whichever program made it; iptables with nf_tables
makes them too. While the number stands still nothing can have changed, so a look that finds nothing to do
costs one message. Each transaction ends with one notification that carries the new number and the name of
the program; a filter inside the kernel keeps out the thousands that may come before it.

::

    struct nfgenmsg { u8 nfgen_family, version; be16 res_id; };
    NFTA_GEN_ID be32, NFTA_GEN_PROC_PID be32, NFTA_GEN_PROC_NAME string
"""

import struct

from loden.errors import KernelError
from loden.tables import netlink
from loden.tables.netlink import NETLINK_NETFILTER, Message, Monitor, Netlink, parse_attributes

_NFNL_SUBSYS_NFTABLES = 10 << 8
_NFT_MSG_GETTABLE = _NFNL_SUBSYS_NFTABLES | 1
_NFT_MSG_NEWGEN = _NFNL_SUBSYS_NFTABLES | 15
_NFT_MSG_GETGEN = _NFNL_SUBSYS_NFTABLES | 16
_NFTA_GEN_ID, _NFTA_GEN_PROC_PID, _NFTA_GEN_PROC_NAME = 1, 2, 3
_NFTA_TABLE_NAME = 1
_NFNLGRP_NFTABLES = 7
_ANY_FAMILY = struct.pack("=BBH", 0, 0, 0)

#: ``NFPROTO_*``, as nft prints them.
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}


class Nftables:
    """The kernel's nftables, in the network namespace of the thread that makes it.

    Raises:
        OSError: this kernel has none, or we may not ask.
    """

    def __init__(self) -> None:
        self._requests = Netlink(NETLINK_NETFILTER)
        try:
            self._monitor = Monitor(
                [_NFNLGRP_NFTABLES], protocol=NETLINK_NETFILTER, only_kind=_NFT_MSG_NEWGEN
            )
        except BaseException:
            self._requests.close()
            raise

    def close(self) -> None:
        """Close the sockets; idempotent."""
        self._requests.close()
        self._monitor.close()

    def fileno(self) -> int:
        """Readable when somebody changed something; :meth:`take_culprits` empties it."""
        return self._monitor.fileno()

    def generation(self) -> int | None:
        """The number of the ruleset's state; None where the kernel has no nftables. Does not block."""
        (answer,) = self._requests.ask([netlink.message(_NFT_MSG_GETGEN, 0, _ANY_FAMILY)])
        if not isinstance(answer, Message):
            return None
        return int.from_bytes(_attributes(answer).get(_NFTA_GEN_ID, b""), "big")

    def take_culprits(self) -> tuple[str, ...]:
        """Who changed anything since the last call, as ``nft[1234]``; the same program is named once."""
        heard: list[Message] = []
        while (messages := self._monitor.receive()) is None or messages:
            heard += messages or ()
        return tuple(dict.fromkeys(map(_culprit, heard)))

    async def tables(self) -> frozenset[str]:
        """All tables, as nft names them: ``ip nat``; none where the kernel has no nftables."""
        try:
            datagrams = await self._requests.dump(_NFT_MSG_GETTABLE, _ANY_FAMILY)
        except KernelError:
            return frozenset()
        return frozenset(
            _table(message) for datagram in datagrams for message in netlink.parse_messages(datagram)
        )


def _attributes(message: Message) -> dict[int, bytes]:
    return parse_attributes(message.buffer, message.start + len(_ANY_FAMILY), message.end)


def _culprit(message: Message) -> str:
    attributes = _attributes(message)
    name = attributes.get(_NFTA_GEN_PROC_NAME, b"?").rstrip(b"\0").decode(errors="replace")
    return f"{name}[{int.from_bytes(attributes.get(_NFTA_GEN_PROC_PID, b''), 'big')}]"


def _table(message: Message) -> str:
    family = _FAMILIES.get(message.buffer[message.start], "?")
    name = _attributes(message).get(_NFTA_TABLE_NAME, b"").rstrip(b"\0").decode(errors="replace")
    return f"{family} {name}"
