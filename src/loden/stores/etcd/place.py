# SPDX-License-Identifier: Apache-2.0
"""Where an etcd is: what URLs and flannel's flags say, parsed; pure."""

import re

import msgspec

from loden.errors import ConfigError

DEFAULT_PREFIX = "/coreos.com/network"
DEFAULT_ENDPOINTS = "http://127.0.0.1:4001,http://127.0.0.1:2379"
_DEFAULT_PORT = 2379


class Endpoint(msgspec.Struct, frozen=True):
    """A member's client address: a name or an address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Place(msgspec.Struct, frozen=True):
    """Where an etcd is, and what of it is ours.

    Args:
        endpoints: at least one.
        prefix: before every key, without a slash at its end.
    """

    endpoints: tuple[Endpoint, ...]
    prefix: str

    def __str__(self) -> str:
        return f"{','.join(map(str, self.endpoints))}{self.prefix}"


def parse_location(location: str) -> Place:
    """A store's location, ``host:2379,host2:2379/coreos.com/network``; without a path flannel's own prefix.

    Raises:
        ConfigError: it is not of that form. A password in it is not repeated.
    """
    hosts, slash, path = location.partition("/")
    if "@" in hosts:
        raise ConfigError(
            "store",
            "a URL with a user in it is not taken: command lines and logs are read by many",
            hint="name the user with --etcd-username, and give the password in LODEN_ETCD_PASSWORD",
        )
    endpoints = tuple(_endpoint(text, text) for text in hosts.split(",") if text)
    if not endpoints:
        raise ConfigError(
            "store", f"'etcd://{location}' names no host", hint="for example etcd://192.0.2.7:2379"
        )
    return Place(endpoints, clean(f"/{path}") if slash and path.strip("/") else DEFAULT_PREFIX)


def url_of(endpoints: str, prefix: str) -> str:
    """A store's URL from flannel's ``--etcd-endpoints`` and ``--etcd-prefix``.

    Raises:
        ConfigError: not a list of endpoints of one scheme, or a prefix that a URL cannot hold.
    """
    schemes, hosts = set(), []
    for text in filter(None, (part.strip() for part in endpoints.split(","))):
        scheme, mark, rest = text.partition("://")
        if not mark:
            scheme, rest = "http", text
        if scheme not in ("http", "https"):
            raise ConfigError(
                "--etcd-endpoints", f"{text!r}: no such scheme", hint="http://host:2379 or https://host:2379"
            )
        schemes.add(scheme)
        hosts.append(str(_endpoint(rest.rstrip("/"), text, key="--etcd-endpoints")))
    if len(schemes) != 1:
        reason = f"{endpoints!r} mixes http and https" if schemes else f"{endpoints!r} names none"
        raise ConfigError("--etcd-endpoints", reason, hint="http://h1:2379,http://h2:2379 or all https")
    prefix = clean(prefix)
    if "?" in prefix or not prefix.startswith("/"):
        raise ConfigError(
            "--etcd-prefix", f"{prefix!r} is not allowed", hint="a path such as /coreos.com/network"
        )
    return f"{'etcds' if schemes == {'https'} else 'etcd'}://{','.join(hosts)}{prefix}"


def clean(path: str) -> str:
    """A path without empty parts, ``.`` and ``..``, as Go's ``path.Clean`` leaves it (COMPAT §2.1); / is
    empty."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    rooted = path.startswith("/")
    return ("/" if rooted and parts else "") + "/".join(parts)


def _endpoint(text: str, whole: str, *, key: str = "store") -> Endpoint:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s\[\]:/@]+))(?::([0-9]{1,5}))?", text)
    port = int(match[3]) if match and match[3] else _DEFAULT_PORT
    if match is None or not 0 < port < 1 << 16:
        shown = "an endpoint with a user in it" if "@" in whole else repr(whole)
        raise ConfigError(
            key, f"{shown} is no host and port", hint="for example 192.0.2.7:2379, [2001:db8::7]:2379"
        )
    return Endpoint(match[1] or match[2], port)
