# SPDX-License-Identifier: Apache-2.0
"""Stores, found by the scheme of their URL; each is a module of its own, imported when it is asked for."""

import importlib
from typing import Protocol

import msgspec

from loden.errors import ConfigError
from loden.stores.access import Access
from loden.stores.base import Store

#: Scheme of a store's URL → the module that has ``open_location``.
SCHEMES = {
    "etcd": "loden.stores.etcd.store",
    "etcds": "loden.stores.etcd.store",
    "memory": "loden.stores.memory",
    "sqlite": "loden.stores.sqlite",
}

#: Schemes that mean TLS.
_SECURE = frozenset(("etcds",))

#: Where ``loden run`` and ``loden lease`` look unless told otherwise.
DEFAULT_URL = "sqlite:////var/lib/loden/loden.db"

#: How long a lease lasts after a write, in seconds (COMPAT §2.4).
DEFAULT_TTL_S = 86_400.0

_NOBODY = Access()


class Opener(Protocol):
    """What a store's module brings as ``open_location``."""

    def __call__(self, location: str, *, ttl_s: float, create: bool, access: Access) -> Store:
        """A handle to a store. It touches nothing yet: I/O, and its errors, come with the first call.

        Args:
            location: what stands between ``://`` and ``?`` in the URL.
            ttl_s: how long a lease lasts after a write, in seconds.
            create: make the store where there is none.
            access: who we are, where the store asks.
        """
        ...


def open_store(url: str, *, create: bool = True, access: Access = _NOBODY) -> Store:
    """A handle to the store that a URL names, such as ``sqlite:///var/lib/loden/loden.db?ttl=86400``.

    It does not block and touches nothing yet: I/O, and its errors, come with the first call.

    Args:
        url: scheme, location, and the option ``ttl``: how long a lease lasts, in seconds.
        create: make the store where there is none; otherwise its first use raises StoreUnusable.
        access: who we are, where the store asks.

    Raises:
        ConfigError: the URL is not of that form.
    """
    scheme, mark, rest = url.partition("://")
    if not mark or scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in sorted(SCHEMES))
        raise ConfigError(
            "store",
            f"{_shown(url)} names no kind of store",
            hint=f"a store's URL begins with one of: {known}",
        )
    location, _, query = rest.partition("?")
    if scheme in _SECURE:
        access = msgspec.structs.replace(access, is_tls=True)
    opener: Opener = importlib.import_module(SCHEMES[scheme]).open_location
    return opener(location, ttl_s=_ttl_s(url, query), create=create, access=access)


def _shown(url: str) -> str:
    """A URL for messages: one with a user in it may hold a password."""
    return "a URL with a user in it" if "@" in url else repr(url)


def _ttl_s(url: str, query: str) -> float:
    ttl_s = DEFAULT_TTL_S
    for option in filter(None, query.split("&")):
        name, _, value = option.partition("=")
        if name != "ttl":
            raise ConfigError(
                "store", f"{_shown(url)} has the unknown option {name!r}", hint="there is only ttl"
            )
        try:
            ttl_s = float(value)
        except ValueError:
            ttl_s = 0.0
        if not 0 < ttl_s < float("inf"):
            raise ConfigError(
                "store", f"ttl {value!r} is no time", hint="ttl is a number of seconds, such as ttl=86400"
            )
    return ttl_s
