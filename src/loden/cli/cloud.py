# SPDX-License-Identifier: Apache-2.0
"""``loden cloud``: what the agent would do about a cloud's routes, without doing it."""

import asyncio
import json
import os
import random
from collections.abc import Sequence

import click

from loden.cli._store import opened
from loden.cli.run import GoFlags, make_option, read_given
from loden.errors import ConfigError, LodenError
from loden.options import FLAGS, STORE_FLAGS, AgentOptions, build, read_environment

_FLAGS = tuple(
    flag
    for flag in FLAGS
    if flag in STORE_FLAGS or flag.name == "subnet-file" or flag.name.startswith(("iface", "public-ip"))
)


@click.group("cloud")
def command() -> None:
    """Look at the routes of the cloud that this host is in."""


def _plan(*, as_json: bool, **given: tuple[str, ...]) -> None:
    environment, _ = read_environment(os.environ)
    steps = asyncio.run(_make_plan(build(read_given(_FLAGS, given), environment)))
    if as_json:
        click.echo(json.dumps({"changes": list(steps)}))
    else:
        click.echo("\n".join(steps) or "nothing to do: everything is as it should be")


command.add_command(
    GoFlags(
        "plan",
        callback=_plan,
        help="Print the routes that 'loden run' would add, replace and remove on this host, and the settings "
        "that it would change. Nothing is written, in the cloud or in the store.",
        params=[
            *map(make_option, _FLAGS),
            click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object."),
        ],
    )
)


async def _make_plan(options: AgentOptions) -> Sequence[str]:
    from loden.backends.cloud import CloudBackend
    from loden.cloud_routes import CloudRoutes
    from loden.plan import make_plan, read_network
    from loden.stores.acquire import Ask, Reuse, decide
    from loden.subnet_file import read_previous
    from loden.tables.netlink import Netlink

    store = opened(options.store)
    requests = Netlink()
    try:
        plan = await make_plan(options.selection, await read_network(store), requests)
        backend = plan.backend
        if not isinstance(backend, CloudBackend):
            raise ConfigError(
                "Backend.Type",
                f"{plan.host.network.backend_type} has no routes in a cloud",
                hint="the clouds' backends are aws-vpc, gce and ali-vpc",
            )
        previous = tuple(read_previous(options.subnet_file).subnets.values())
        decision = decide(await store.snapshot(), plan.claim(previous), random.Random())
        if not isinstance(decision, Reuse | Ask):
            raise LodenError(
                "plan routes: this host has no lease",
                hint="it gets one from 'loden run', and its route with it",
            )
        lease = decision.record.lease
        routes = CloudRoutes(backend, plan.host.network, store)
        routes.stand(decision.record, [it for leg in lease.legs for it in backend.own_entries(leg)])
        return await routes.preview()
    finally:
        requests.close()
        await store.close()
