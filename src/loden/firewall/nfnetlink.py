# SPDX-License-Identifier: Apache-2.0
"""What the kernel itself says about nftables: the number of the ruleset's state, who changed it, what tables.

The kernel counts every transaction in a network namespace, whichever program made it; iptables with nf_tables
makes them too. While the number stands still nothing can have changed, so a look that finds nothing to do
costs one message. Each transaction ends with one notification that carries the new number and the name of
the program; a filter inside the kernel keeps out the thousands that may come before it.

::

    struct nfgenmsg { u8 nfgen_family, version; be16 res_id; };
    NFTA_GEN_ID be32, NFTA_GEN_PROC_PID be32, NFTA_GEN_PROC_NAME string
    NFTA_TABLE_NAME string, NFTA_TABLE_USE be32
    NFTA_CHAIN_TABLE string, NFTA_CHAIN_NAME string, NFTA_CHAIN_POLICY be32
    NFTA_CHAIN_HOOK { NFTA_HOOK_HOOKNUM be32 }
    NFTA_RULE_TABLE string
"""

import struct
from collections.abc import Collection, Mapping, Sequence

import msgspec

from loden.errors import KernelError
from loden.tables import netlink
from loden.tables.netlink import NETLINK_NETFILTER, Message, Monitor, Netlink, parse_attributes

_NFNL_SUBSYS_NFTABLES = 10 << 8
_NFT_MSG_GETTABLE = _NFNL_SUBSYS_NFTABLES | 1
_NFT_MSG_GETCHAIN = _NFNL_SUBSYS_NFTABLES | 4
_NFT_MSG_GETRULE = _NFNL_SUBSYS_NFTABLES | 7
_NFT_MSG_NEWGEN = _NFNL_SUBSYS_NFTABLES | 15
_NFT_MSG_GETGEN = _NFNL_SUBSYS_NFTABLES | 16
_NFTA_GEN_ID, _NFTA_GEN_PROC_PID, _NFTA_GEN_PROC_NAME = 1, 2, 3
_NFTA_TABLE_NAME, _NFTA_TABLE_USE = 1, 3
_NFTA_CHAIN_TABLE, _NFTA_CHAIN_NAME, _NFTA_CHAIN_HOOK, _NFTA_CHAIN_POLICY = 1, 3, 4, 5
_NFTA_HOOK_HOOKNUM = 1
_NFTA_RULE_TABLE = 1
_NF_INET_FORWARD, _NF_DROP = 2, 0
_NFNLGRP_NFTABLES = 7
_ANY_FAMILY = struct.pack("=BBH", 0, 0, 0)

#: ``NFPROTO_*``, as nft prints them.
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_NUMBERS = {name: number for number, name in _FAMILIES.items()}


class Place(msgspec.Struct, frozen=True, order=True):
    """A chain, as nft names it: ``ip filter FORWARD``."""

    family: str
    table: str
    name: str

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.name}"


class Found(msgspec.Struct, frozen=True):
    """A chain that is there.

    Args:
        place: where.
        drops: its policy is DROP; only chains with a hook have one.
        forwards: its hook is forward.
    """

    place: Place
    drops: bool
    forwards: bool


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

    async def tables(self) -> dict[str, int]:
        """All tables, as nft names them (``ip nat``), each with how many chains and sets are in it.

        None where the kernel has no nftables.
        """
        found = await self._dump(_NFT_MSG_GETTABLE, _ANY_FAMILY)
        return dict(map(_table, found or ()))

    def find_chains(self, places: Sequence[Place]) -> dict[Place, Found]:
        """Those of these chains that are there. Does not block."""
        answers = self._requests.ask([_chain_request(place) for place in places])
        found = [_chain(answer) for answer in answers if isinstance(answer, Message)]
        return {one.place: one for one in found}

    async def forwarding_chains(self) -> list[Place] | None:
        """The base chains that packets pass which are passed on. Reads all chains; None where it cannot."""
        found = await self._dump(_NFT_MSG_GETCHAIN, _ANY_FAMILY)
        return None if found is None else sorted(one.place for one in map(_chain, found) if one.forwards)

    async def count_rules(self, table: str, *, without: Collection[bytes]) -> int:
        """How many rules a table has, but those with any of these texts in them."""
        family, _, name = table.partition(" ")
        body = _family(family) + netlink.attribute(_NFTA_RULE_TABLE, name.encode() + b"\0")
        rules = await self._dump(_NFT_MSG_GETRULE, body) or ()
        return sum(
            all(rule.buffer.find(text, rule.start, rule.end) < 0 for text in without) for rule in rules
        )

    async def _dump(self, kind: int, body: bytes) -> list[Message] | None:
        try:
            datagrams = await self._requests.dump(kind, body)
        except KernelError:
            return None
        return [message for datagram in datagrams for message in netlink.parse_messages(datagram)]


def _attributes(message: Message) -> dict[int, bytes]:
    return parse_attributes(message.buffer, message.start + len(_ANY_FAMILY), message.end)


def _culprit(message: Message) -> str:
    attributes = _attributes(message)
    name = attributes.get(_NFTA_GEN_PROC_NAME, b"?").rstrip(b"\0").decode(errors="replace")
    return f"{name}[{int.from_bytes(attributes.get(_NFTA_GEN_PROC_PID, b''), 'big')}]"


def _family(name: str) -> bytes:
    return struct.pack("=BBH", _NUMBERS[name], 0, 0)


def _chain_request(place: Place) -> bytes:
    body = _family(place.family)
    body += netlink.attribute(_NFTA_CHAIN_TABLE, place.table.encode() + b"\0")
    body += netlink.attribute(_NFTA_CHAIN_NAME, place.name.encode() + b"\0")
    return netlink.message(_NFT_MSG_GETCHAIN, 0, body)


def _chain(message: Message) -> Found:
    attributes = _attributes(message)
    hook = attributes.get(_NFTA_CHAIN_HOOK, b"")
    number = parse_attributes(hook, 0, len(hook)).get(_NFTA_HOOK_HOOKNUM)
    policy = attributes.get(_NFTA_CHAIN_POLICY)
    place = Place(
        _family_of(message), _text(attributes, _NFTA_CHAIN_TABLE), _text(attributes, _NFTA_CHAIN_NAME)
    )
    return Found(place, drops=policy == _be32(_NF_DROP), forwards=number == _be32(_NF_INET_FORWARD))


def _table(message: Message) -> tuple[str, int]:
    attributes = _attributes(message)
    used = int.from_bytes(attributes.get(_NFTA_TABLE_USE, b""), "big")
    return f"{_family_of(message)} {_text(attributes, _NFTA_TABLE_NAME)}", used


def _family_of(message: Message) -> str:
    return _FAMILIES.get(message.buffer[message.start], "?")


def _text(attributes: Mapping[int, bytes], kind: int) -> str:
    return attributes.get(kind, b"").rstrip(b"\0").decode(errors="replace")


def _be32(number: int) -> bytes:
    return number.to_bytes(4, "big")
