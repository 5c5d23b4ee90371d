# SPDX-License-Identifier: Apache-2.0
"""``loden config``: check the network configuration, put it into a store, and get it back."""

import asyncio
import json
from typing import Any, BinaryIO

import click

from loden.backend_options import decode_options, printable
from loden.backends import describe
from loden.cli._store import opened, store_options
from loden.errors import ConfigError, LodenError
from loden.network import Network, Range, check_network
from loden.options import StoreOptions

_file_argument = click.argument("file", type=click.File("rb"))


@click.group("config")
def command() -> None:
    """Check, put and get the network configuration."""


@command.command()
@_file_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(file: BinaryIO, as_json: bool) -> int:
    """Say what the configuration in FILE ("-": standard input) comes to, or all that is wrong with it."""
    network, errors = check_network(file.read(), describe)
    if network is None:
        report_errors(errors, as_json=as_json)
        return 1
    click.echo(json.dumps(to_json(network)) if as_json else "\n".join(to_text(network)))
    return 0


@command.command()
@_file_argument
@store_options
def put(file: BinaryIO, store: StoreOptions) -> int:
    """Check the configuration in FILE ("-": standard input) and write it into the store, for all hosts."""
    text = file.read()
    network, errors = check_network(text, describe)
    if network is None:
        report_errors(errors, as_json=False)
        return 1
    asyncio.run(_put(store, text))
    for note in network.notes:
        click.echo(f"note: {note}", err=True)
    return 0


@command.command()
@store_options
def get(store: StoreOptions) -> None:
    """Print the configuration in the store, as it was put there."""
    text = asyncio.run(_get(store))
    if text is None:
        raise LodenError(
            f"get the network from {store.url}: there is none",
            hint="put one there with 'loden config put FILE'",
        )
    click.echo(text.removesuffix(b"\n"))


async def _put(where: StoreOptions, text: bytes) -> None:
    store = opened(where, create=True)
    try:
        await store.put_network(text)
    finally:
        await store.close()


async def _get(where: StoreOptions) -> bytes | None:
    store = opened(where)
    try:
        return await store.get_network()
    finally:
        await store.close()


def report_errors(errors: tuple[ConfigError, ...], *, as_json: bool) -> None:
    """Print what is wrong: for programs to the standard output, for people to the standard error.

    Args:
        errors: all of them.
        as_json: for programs.
    """
    if as_json:
        found = [{"key": error.key, "reason": error.reason, "allowed": error.hint} for error in errors]
        click.echo(json.dumps({"valid": False, "errors": found}))
        return
    for error in errors:
        click.echo(f"loden: {error.message}", err=True)
        click.echo(f"hint: {error.hint}", err=True)


def to_json(network: Network) -> dict[str, Any]:
    """The configuration with everything derived, as JSON members.

    Args:
        network: checked.
    """
    return {
        "valid": True,
        "networks": [
            {
                "family": str(part.family),
                "network": str(part.network),
                "subnet_length": part.subnet_length,
                "first": str(part.first),
                "last": str(part.last),
                "subnets": part.subnet_count,
            }
            for part in network.ranges
        ],
        "backend": {"type": network.backend_type, "options": _options(network)},
        "enable_nftables": network.enable_nftables,
        "masquerade_exclude": [str(excluded) for excluded in network.masquerade_exclude],
        "notes": list(network.notes),
    }


def to_text(network: Network) -> list[str]:
    """The same as lines for people.

    Args:
        network: checked.
    """
    rows = [row for part in network.ranges for row in _range_rows(part)]
    rows.append(("backend", network.backend_type))
    rows += [(f"  {name}", json.dumps(value)) for name, value in _options(network).items()]
    rows.append(("firewall", "nftables" if network.enable_nftables else "iptables"))
    rows += [("  not masqueraded", str(excluded)) for excluded in network.masquerade_exclude]
    width = max(len(name) for name, _ in rows)
    return [
        *(f"{name:{width}}  {value}" for name, value in rows),
        *(f"note: {note}" for note in network.notes),
    ]


def _range_rows(part: Range) -> list[tuple[str, str]]:
    return [
        (f"{part.family} network", str(part.network)),
        ("  subnets", f"{part.subnet_count}, each a /{part.subnet_length}"),
        ("  first", str(part.first)),
        ("  last", str(part.last)),
    ]


def _options(network: Network) -> dict[str, Any]:
    """The backend's options, defaults filled in, under the names that users write."""
    options, _ = decode_options(network.backend, describe(network.backend_type))
    return printable(options)
