# SPDX-License-Identifier: Apache-2.0
"""Backends, by the name that ``Backend.Type`` gives.

A backend is imported when it is chosen, and no other but those that leave in the kernel what only they find.
Third parties register theirs in the entry-point group ``loden.backends``: the entry's name is the type, its
object the class.
"""

from importlib import import_module
from typing import Any

import msgspec

from loden.backends.base import Backend, Kernel
from loden.errors import ConfigError
from loden.tables.base import Table

_BUILT_IN = {
    "ali-vpc": ("loden.backends.ali_vpc", "AliVpc"),
    "alloc": ("loden.backends.alloc", "Alloc"),
    "aws-vpc": ("loden.backends.aws_vpc", "AwsVpc"),
    "gce": ("loden.backends.gce", "Gce"),
    "host-gw": ("loden.backends.host_gw", "HostGw"),
    "udp": ("loden.backends.udp", "Udp"),
    "vxlan": ("loden.backends.vxlan", "Vxlan"),
}
_GROUP = "loden.backends"
#: Backends that leave things in the kernel which only tables of their own find and remove.
_LEAVING = ("udp",)


def find(name: str) -> type[Backend]:
    """The class of a backend.

    Args:
        name: ``Backend.Type``, in lower case.

    Raises:
        ConfigError: no such backend, and the hint names those there are; or a third party's cannot be loaded.
    """
    if name in _BUILT_IN:
        module, attribute = _BUILT_IN[name]
        found: type[Backend] = getattr(import_module(module), attribute)
        return found
    from importlib.metadata import entry_points  # noqa: PLC0415  # 15 ms that the built-in ones do not pay

    for entry_point in entry_points(group=_GROUP, name=name):
        try:
            loaded: type[Backend] = entry_point.load()
        except (ImportError, AttributeError) as error:
            reason = f"backend {name!r} cannot be loaded from {entry_point.value}: {error}"
            raise ConfigError(
                "Backend.Type", reason, hint="install its package anew, or what it needs"
            ) from error
        return loaded
    others = {entry_point.name for entry_point in entry_points(group=_GROUP)}
    known = ", ".join(sorted(_BUILT_IN.keys() | others))
    raise ConfigError("Backend.Type", f"unknown backend {name!r}", hint=f"one of: {known}")


def open_tables(name: str, kernel: Kernel) -> list[Table[Any]]:
    """The tables that a backend brings, and those that find what another one may have left on this host.

    Args:
        name: ``Backend.Type``, in lower case.
        kernel: what they work with.
    """
    return [table for each in dict.fromkeys((name, *_LEAVING)) for table in find(each).tables(kernel)]


def describe(name: str) -> type[msgspec.Struct]:
    """The options of a backend, as the struct that decodes them.

    Raises:
        ConfigError: no such backend.
    """
    return find(name).Options
