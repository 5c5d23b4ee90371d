# SPDX-License-Identifier: Apache-2.0
"""``loden lease``: look at the leases in a store, reserve one, release one."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import click
import msgspec

from loden.address import Family, Prefix, format_address, parse_address
from loden.cli._store import Command, opened, store_options
from loden.errors import ConfigError, Conflict, LeaseError
from loden.lease import Lease, Leg, parse_key
from loden.network import parse_network
from loden.options import StoreOptions
from loden.stores.base import Record, Snapshot, Store

T = TypeVar("T")

Subnets = dict[Family, Prefix]


@click.group("lease")
def command() -> None:
    """Look at leases, reserve and release them."""


def _common(function: Command) -> Command:
    """The options that each subcommand has."""
    as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
    return as_json(store_options(function))


@command.command("list")
@_common
def list_leases(*, store: StoreOptions, as_json: bool) -> None:
    """List every lease."""
    snapshot = _with_store(store, _read)
    if as_json:
        _print_json(
            {
                "revision": snapshot.revision,
                "leases": [_facts(record) for record in _sorted(snapshot)],
                "malformed": snapshot.malformed,
            }
        )
        return
    _print_table(_sorted(snapshot))
    for reason in snapshot.malformed.values():
        click.echo(f"malformed: {reason}", err=True)


@command.command("show")
@click.argument("subnet")
@_common
def show(subnet: str, *, store: StoreOptions, as_json: bool) -> None:
    """Show the lease of SUBNET, such as 10.5.34.0/24 or 10.5.34.0-24."""
    subnets = _parse_subnets(subnet)
    record = _with_store(store, lambda it: _find(it, subnets, f"show {subnet}", with_ends=True))
    if as_json:
        _print_json(_facts(record))
        return
    for name, value in _facts(record).items():
        click.echo(f"{name + ':':<17}{_as_text(value)}")


@command.command("reserve")
@click.argument("subnet")
@click.option("--public-ip", default="", metavar="IP", help="Give it to the host with this IPv4 address.")
@click.option("--public-ipv6", default="", metavar="IP", help="Give it to the host with this IPv6 address.")
@_common
def reserve(subnet: str, public_ip: str, public_ipv6: str, *, store: StoreOptions, as_json: bool) -> None:
    """Reserve SUBNET without an end, or let the lease that is there never expire."""
    subnets = _parse_subnets(subnet)
    public = _parse_public(public_ip, public_ipv6, subnets)
    record = _with_store(store, lambda it: _reserve(it, subnets, public), create=True)
    if as_json:
        _print_json(_facts(record))
    else:
        click.echo(f"reserved {record.lease}")


@command.command("release")
@click.argument("subnet")
@_common
def release(subnet: str, *, store: StoreOptions, as_json: bool) -> None:
    """Release the lease or reservation of SUBNET. A host that still runs takes another lease."""
    subnets = _parse_subnets(subnet)

    async def do(it: Store) -> Record:
        record = await _find(it, subnets, f"release {subnet}", with_ends=True)
        await it.delete(record)
        return record

    record = _with_store(store, do)
    if as_json:
        _print_json(_facts(record))
    else:
        click.echo(f"released {record.lease}")


def _with_store(where: StoreOptions, work: Callable[[Store], Awaitable[T]], *, create: bool = False) -> T:
    async def run() -> T:
        store = opened(where, create=create)
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def _reserve(store: Store, subnets: Subnets, public: dict[Family, bytes]) -> Record:
    snapshot = await store.snapshot()
    found = _holding(snapshot, subnets)
    _require_sense(await store.get_network(), snapshot, subnets, public)
    try:
        if found is None:
            legs = {family: Leg(subnet, public.get(family)) for family, subnet in subnets.items()}
            return await store.create(Lease.make(legs), holder=None, reserve=True)
        return await store.replace(
            msgspec.structs.replace(found, lease=_readdressed(found.lease, public), expires=None)
        )
    except Conflict as conflict:
        raise LeaseError(
            f"reserve {_names(subnets)}: {conflict.message}",
            hint="loden lease list shows what is taken; release it first, or reserve exactly what is there",
        ) from conflict


def _require_sense(
    network: bytes | None, snapshot: Snapshot, subnets: Subnets, public: dict[Family, bytes]
) -> None:
    """Refuse what no host could ever make use of."""
    for part in parse_network(network).ranges if network is not None else ():
        subnet = subnets.get(part.family)
        if subnet is not None and not part.network.contains(subnet):
            raise LeaseError(
                f"reserve {subnet}: it lies outside the network {part.network}",
                hint="no host would get it; loden config get shows the configuration",
            )
    for record in snapshot.records.values():
        # Leases of flannel's nodes claim nothing that the store could keep apart itself.
        if any(
            leg.subnet.overlaps(subnet) and leg.subnet != subnet
            for leg in record.lease.legs
            for subnet in subnets.values()
        ):
            raise LeaseError(
                f"reserve {_names(subnets)}: it overlaps lease {record.key}",
                hint="release that first, or reserve exactly what is there; see loden lease list",
            )
        for leg in record.lease.legs:
            same = public.get(leg.subnet.family)
            if same is not None and leg.public == same and leg.subnet != subnets.get(leg.subnet.family):
                raise LeaseError(
                    f"reserve {_names(subnets)}: {format_address(same)} has {record.lease} already",
                    hint=f"release that first: loden lease release {leg.subnet}",
                )


def _readdressed(lease: Lease, public: dict[Family, bytes]) -> Lease:
    legs = {
        leg.subnet.family: msgspec.structs.replace(leg, public=public.get(leg.subnet.family, leg.public))
        for leg in lease.legs
    }
    return Lease.make(legs, lease.backend_type)


async def _read(store: Store) -> Snapshot:
    return await store.with_ends(await store.snapshot())


async def _find(store: Store, subnets: Subnets, doing: str, *, with_ends: bool = False) -> Record:
    snapshot = await store.snapshot()
    found = _holding(snapshot, subnets)
    if found is None:
        raise LeaseError(f"{doing}: no such lease", hint="loden lease list shows those there are")
    if not with_ends:
        return found
    alone = msgspec.structs.replace(snapshot, records={found.key: found})
    return (await store.with_ends(alone)).records[found.key]


def _holding(snapshot: Snapshot, subnets: Subnets) -> Record | None:
    """The record that has all of these subnets."""
    for record in snapshot.records.values():
        has = {leg.subnet for leg in record.lease.legs}
        if has.issuperset(subnets.values()):
            return record
    return None


def _parse_subnets(text: str) -> Subnets:
    try:
        found = (Prefix.parse(text),) if "/" in text else parse_key(text)
    except (ValueError, LeaseError) as error:
        raise ConfigError(
            "SUBNET",
            f"{text!r} is no subnet",
            hint="write 10.5.34.0/24, or a lease's key such as 10.5.34.0-24&fc00:0:0:1::-64",
        ) from error
    return {subnet.family: subnet for subnet in found if subnet is not None}


def _parse_public(public_ip: str, public_ipv6: str, subnets: Subnets) -> dict[Family, bytes]:
    found = {}
    for family, option, text in (
        (Family.IPV4, "--public-ip", public_ip),
        (Family.IPV6, "--public-ipv6", public_ipv6),
    ):
        if not text:
            continue
        try:
            found[family] = parse_address(text)
        except ValueError as error:
            raise ConfigError(option, str(error)) from error
        if len(found[family]) != family.size:
            raise ConfigError(option, f"{text} is not an {family} address")
        if family not in subnets:
            raise ConfigError(
                option,
                f"{_names(subnets)} has no {family} subnet",
                hint="name both subnets of a dual-stack lease by its key: 10.5.34.0-24&fc00:0:0:1::-64",
            )
    return found


def _names(subnets: Subnets) -> str:
    return " ".join(str(subnet) for subnet in subnets.values())


def _sorted(snapshot: Snapshot) -> list[Record]:
    return sorted(snapshot.records.values(), key=lambda record: [leg.subnet for leg in record.lease.legs])


def _facts(record: Record) -> dict[str, object]:
    """What a record says, for programs."""
    return {
        "key": record.key,
        "subnets": [str(leg.subnet) for leg in record.lease.legs],
        "public": [_public(leg) for leg in record.lease.legs],
        "backend": record.lease.backend_type,
        "backend_data": [leg.data and msgspec.Raw(leg.data) for leg in record.lease.legs],
        "holder": record.holder,
        "contender": record.contender,
        "expires_in_s": _expires_in_s(record),
        "reservation": record.is_reservation,
        "revision": record.revision,
    }


def _public(leg: Leg) -> str | None:
    return None if leg.public is None else format_address(leg.public)


def _expires_in_s(record: Record) -> float | None:
    if record.expires is None:
        return None
    return round(record.expires - time.clock_gettime(time.CLOCK_BOOTTIME), 1)


def _print_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def _as_text(value: object) -> str:
    return "-" if value is None else msgspec.json.encode(value).decode().strip('"')


def _print_table(records: list[Record]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("subnet", "public address", "backend", "holder", "expires in"):
        table.add_column(title, no_wrap=True)
    for record in records:
        left_s = _expires_in_s(record)
        table.add_row(
            str(record.lease),
            " ".join(_public(leg) or "-" for leg in record.lease.legs),
            record.lease.backend_type or "-",
            (record.holder and record.holder.name) or "-",
            "never (reserved)" if left_s is None else _duration(left_s),
        )
    Console(soft_wrap=True, markup=False, highlight=False).print(table)


def _duration(seconds: float) -> str:
    minutes, second = divmod(max(0, int(seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}h {minute:02}m" if hour else f"{minute}m {second:02}s"
