# SPDX-License-Identifier: Apache-2.0
"""``loden firewall``: what the agent writes into the host's firewall, without writing it."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import click

from loden.address import Family, Prefix
from loden.cli.run import GoFlags, make_option, read_given
from loden.errors import ConfigError, LodenError
from loden.firewall.rules import Purpose, RuleSet, make_rules
from loden.network import Network, parse_network
from loden.options import FLAGS, STORE_FLAGS, AgentOptions, StoreOptions, build, read_environment
from loden.stores import open_store
from loden.subnet_file import read_previous

_FLAGS = tuple(
    flag
    for flag in FLAGS
    if flag in STORE_FLAGS
    or flag.name.startswith("ip-masq")
    or flag.name in ("iptables-forward-rules", "subnet-file")
)
_FAMILIES = {"ipv4": Family.IPV4, "ipv6": Family.IPV6}
_TITLES = {Purpose.MASQUERADE: "masquerade", Purpose.FORWARD: "forward"}


@click.group("firewall")
def command() -> None:
    """Show the rules that the agent keeps in the host's firewall."""


def _show(
    *,
    config: BinaryIO | None,
    subnet: tuple[str, ...],
    family: str | None,
    form: str,
    **given: tuple[str, ...],
) -> None:
    environment, _ = read_environment(os.environ)
    options = build(read_given(_FLAGS, given), environment)
    network = parse_network(config.read() if config is not None else _read_store(options.store))
    subnets = _parse_subnets(subnet) or read_previous(options.subnet_file).subnets
    _require_subnets(options, network, subnets)
    wanted = make_rules(options.firewall, network, subnets)
    chosen = _FAMILIES.get(family or "")
    click.echo(_FORMS[form]([one for one in wanted if chosen in (None, one.family)]), nl=False)


command.add_command(
    GoFlags(
        "show",
        callback=_show,
        help="Print the rules that 'loden run' keeps with the same options. Nothing is changed.\n\n"
        "For iptables the families have payloads of their own: name one with --family.",
        params=[
            *map(make_option, _FLAGS),
            click.Option(
                ["--config"],
                type=click.File("rb"),
                help="The network configuration, - for the standard input; else the store's.",
            ),
            click.Option(
                ["--subnet"],
                multiple=True,
                metavar="CIDR",
                help="The host's subnet, one a family; else those in the subnet file.",
            ),
            click.Option(["--family"], type=click.Choice([*_FAMILIES]), help="One family alone."),
            click.Option(
                ["--format", "form"],
                type=click.Choice(["text", "nft", "iptables"]),
                default="text",
                show_default=True,
                help="For people, for 'nft -f', or for 'iptables-restore --noflush'.",
            ),
        ],
    )
)


def _parse_subnets(texts: Sequence[str]) -> dict[Family, Prefix]:
    try:
        return {prefix.family: prefix for prefix in map(Prefix.parse, texts)}
    except ValueError as error:
        raise ConfigError("--subnet", str(error), hint="a range such as 10.5.1.0/24") from error


def _read_store(where: StoreOptions) -> bytes:
    async def read() -> bytes | None:
        store = open_store(where.url, access=where.access, create=False)
        try:
            return await store.get_network()
        finally:
            await store.close()

    text = asyncio.run(read())
    if text is None:
        raise LodenError(
            f"get the network from {where.url}: there is none",
            hint="put one there with 'loden config put FILE', or give one with --config",
        )
    return text


def _require_subnets(options: AgentOptions, network: Network, subnets: Mapping[Family, Prefix]) -> None:
    """Raise where rules need a subnet of the host's that nobody has told."""
    for part in network.ranges if options.firewall.masquerade else ():
        own = subnets.get(part.family)
        if own is None:
            raise ConfigError(
                "--subnet",
                f"the host's {part.family} subnet is neither given nor in {options.subnet_file}",
                hint=f"a subnet in {part.network}, such as --subnet {part.first}",
            )
        if not part.network.contains(own):
            raise ConfigError("--subnet", f"{own} is not in {part.network}", hint=f"such as {part.first}")


def _as_text(wanted: Sequence[RuleSet]) -> str:
    lines = []
    for one in wanted:
        if one.rules:
            lines.append(f"{one.family} {_TITLES[one.purpose]}")
            lines += [f"  {number}. {rule}" for number, rule in enumerate(one.rules, start=1)]
    return "".join(f"{line}\n" for line in lines) or "no rules\n"


def _as_nft(wanted: Sequence[RuleSet]) -> str:
    from loden.firewall.nftables import render

    families = dict.fromkeys(one.family for one in wanted)
    return "".join(render(family, [one for one in wanted if one.family is family]) for family in families)


def _as_iptables(wanted: Sequence[RuleSet]) -> str:
    from loden.firewall.iptables import render

    programs = {Family.IPV4: "iptables-restore", Family.IPV6: "ip6tables-restore"}
    texts = []
    for family in dict.fromkeys(one.family for one in wanted if one.rules):
        texts.append(f"# {programs[family]} --noflush\n")
        texts += [render(one) for one in wanted if one.family is family]
    return "".join(texts)


_FORMS = {"text": _as_text, "nft": _as_nft, "iptables": _as_iptables}
