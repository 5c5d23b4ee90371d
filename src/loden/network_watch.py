# SPDX-License-Identifier: Apache-2.0
"""Follows the network configuration in the store while the agent runs (COMPAT W32)."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing

import msgspec

from loden.address import Family
from loden.errors import ConfigError, StoreError
from loden.network import Network, parse_network
from loden.retry import Backoff, Trouble
from loden.stores.base import Store

log = logging.getLogger(__name__)

_PATIENCE_S = 5.0


async def follow_network(store: Store, network: Network, use: Callable[[Network], None]) -> None:
    """Take every configuration that is put into the store, as far as that can be done while packets flow.

    Args:
        store: where it is put.
        network: what the agent goes by.
        use: told what it goes by from now on. Does not block.
    """
    trouble = Trouble(log, "watching the network configuration")
    backoff = Backoff(most_s=_PATIENCE_S)
    last: bytes | None = b""
    while True:
        try:
            async with aclosing(store.watch_network()) as texts:
                async for text in texts:
                    backoff.reset()
                    trouble.ended()
                    if text == last:  # the same again after a failure
                        continue
                    last = text
                    taken = take(network, text)
                    if taken != network:
                        network = taken
                        use(network)
        except StoreError as error:
            trouble.happened(error)
            await asyncio.sleep(backoff.next_s())


def take(network: Network, text: bytes | None) -> Network:
    """What the agent goes by after a configuration was put; the log says what it makes of it.

    Args:
        network: what it goes by.
        text: what was put; None where it was taken away.
    """
    if text is None:
        log.error("network configuration removed: this host goes on with the one that it has")
        return network
    try:
        put = parse_network(text)
    except ConfigError as error:
        log.error("network configuration unusable, the one before it counts: %s", error)
        return network
    taken, stays = running_network(network, put)
    for sentence in stays:
        log.error(
            "network configuration changed: %s, while this agent runs; for the new one start the agents "
            "again, one host after the other, then their containers",
            sentence,
        )
    if taken.ranges != network.ranges:
        ends = ", ".join(f"{part.first} to {part.last}" for part in taken.ranges)
        log.info("network configuration changed: new leases are from %s; the one that is held stays", ends)
    return taken


def running_network(current: Network, put: Network) -> tuple[Network, tuple[str, ...]]:
    """What of a configuration that was put in another's place counts while an agent runs; pure.

    SubnetMin and SubnetMax count for the next lease, IPMasqExclude at once. On the rest hang addresses that
    containers have already, or devices that carry their packets.

    Args:
        current: what the agent goes by.
        put: what stands in the store now.

    Returns:
        what it goes by from now on, and a sentence for each thing that stays what it was.
    """
    stays = []
    ranges = []
    for part in current.ranges:
        new = put.range_of(part.family)
        prefix = "IPv6" if part.family is Family.IPV6 else ""
        if new is None:
            stays.append(f"Enable{part.family} stays true")
        elif new.network != part.network:
            stays.append(f"{prefix}Network stays {part.network}, not {new.network}")
        elif new.subnet_length != part.subnet_length:
            stays.append(f"{prefix}SubnetLen stays {part.subnet_length}, not {new.subnet_length}")
        else:
            ranges.append(new)
            continue
        ranges.append(part)
    stays += [f"Enable{family} stays false" for family in put.families if family not in current.families]
    if (put.backend_type, put.backend) != (current.backend_type, current.backend):
        # Its options may hold keys of an account: what they are is in the store, for who may read it.
        which = "with its options" if put.backend_type == current.backend_type else f"not {put.backend_type}"
        stays.append(f"Backend stays {current.backend_type}, {which}")
    if put.enable_nftables != current.enable_nftables:
        stays.append(f"EnableNFTables stays {str(current.enable_nftables).lower()}")
    network = msgspec.structs.replace(
        current, ranges=tuple(ranges), masquerade_exclude=put.masquerade_exclude, notes=put.notes
    )
    return network, tuple(stays)
