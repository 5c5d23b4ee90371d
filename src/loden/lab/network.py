# SPDX-License-Identifier: Apache-2.0
"""The network configuration that a lab's agents live by; pure."""

import msgspec

from loden.address import Family, Prefix
from loden.errors import LabError
from loden.lab.topology import UNDERLAY, Spec
from loden.network import Network


def network_text(spec: Spec) -> bytes:
    """The network configuration (COMPAT §1) that a lab's agents find in their store.

    Raises:
        LabError: a range or the backend's configuration is not usable.
    """
    ranges = container_ranges(spec)
    members: dict[str, object] = {}
    if Family.IPV4 in ranges:
        members["Network"] = str(ranges[Family.IPV4])
    else:
        members["EnableIPv4"] = False
    if Family.IPV6 in ranges:
        members |= {"EnableIPv6": True, "IPv6Network": str(ranges[Family.IPV6])}
    return msgspec.json.encode({**members, "Backend": _backend(spec)})


def container_ranges(spec: Spec) -> dict[Family, Prefix]:
    """All container addresses, by family, IPv4 first.

    Raises:
        LabError: an option is no range of its family, or holds hosts' addresses.
    """
    options = {Family.IPV4: ("--network", spec.network), Family.IPV6: ("--network6", spec.network6)}
    return {family: _container_range(spec, family, *options[family]) for family in spec.family.families}


def _container_range(spec: Spec, family: Family, option: str, text: str) -> Prefix:
    try:
        network = Prefix.parse(text)
    except ValueError as error:
        raise LabError(f"make lab {spec.name}: {option} {error}") from error
    if network.family is not family:
        raise LabError(f"make lab {spec.name}: {option} {network} is not an {family} range")
    if network.overlaps(UNDERLAY[family]):
        raise LabError(
            f"make lab {spec.name}: {option} {network} overlaps {UNDERLAY[family]}, the hosts' own addresses",
            hint="choose another range, such as 10.5.0.0/16 or fd00:5::/48",
        )
    return network


def require_room(spec: Spec, network: Network) -> None:
    """Refuse a network without a subnet for each host, or with subnets too small for the containers.

    Raises:
        LabError: with what there is room for.
    """
    for part in network.ranges:
        subnets = (part.last.first - part.first.first) // part.first.size + 1
        if subnets < spec.hosts:
            raise LabError(
                f"make lab {spec.name}: {part.network} has {subnets} subnets of /{part.subnet_length}, "
                f"too few for {spec.hosts} hosts",
                hint="a larger range, or fewer --hosts",
            )
        # The first address names the subnet, the second is the gateway's, the last one is for broadcasts.
        room = part.first.size - 3
        if room < spec.containers:
            raise LabError(
                f"make lab {spec.name}: a subnet of /{part.subnet_length} has room for {room} containers, "
                f"too few for {spec.containers}",
                hint="a larger range, or fewer --containers",
            )


def _backend(spec: Spec) -> dict[str, object]:
    try:
        config = msgspec.json.decode(spec.backend_config, type=dict[str, object])
    except msgspec.DecodeError as error:
        raise LabError(
            f"make lab {spec.name}: --backend-config {spec.backend_config!r}: {error}",
            hint='a JSON object such as {"DirectRouting": true}',
        ) from error
    if any(key.lower() == "type" for key in config):
        raise LabError(
            f"make lab {spec.name}: --backend-config names a Type", hint="--backend TYPE chooses the backend"
        )
    return {"Type": spec.backend, **config}
