# SPDX-License-Identifier: Apache-2.0
"""What ``loden run`` can be told: one table of flags, for command line and environment (COMPAT §4.1).

Names and defaults are flannel's. The command line wins over ``LODEN_NAME``, which wins over
``FLANNELD_NAME``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from loden.address import Prefix
from loden.errors import ConfigError
from loden.firewall.rules import FirewallOptions
from loden.interface import Selection
from loden.secret import Secret
from loden.stores import DEFAULT_URL
from loden.stores.access import Access
from loden.stores.etcd.place import DEFAULT_ENDPOINTS, DEFAULT_PREFIX, url_of


class StoreOptions(msgspec.Struct, frozen=True):
    """Where the store is, and who we are there.

    Args:
        url: of the store.
        access: what the URL does not say.
    """

    url: str
    access: Access = Access()


class AgentOptions(msgspec.Struct, frozen=True):
    """What the agent was told.

    Args:
        store: the store, and who we are there.
        selection: which interface and which addresses.
        subnet_file: where subnet.env goes.
        renew_margin_s: how long before its end a lease is renewed, in seconds.
        healthz_ip: the address that answers health checks.
        healthz_port: its port; 0 for none.
        verbosity: how much goes to the log; 0 is the usual.
        firewall: what to masquerade and to forward.
        blackhole_route: whether the own subnet gets a blackhole route.
        manage_sysctls: whether forwarding is switched on, or only reported where it is off.
        release_on_exit: whether the subnet is given back at the end.
    """

    store: StoreOptions
    selection: Selection
    subnet_file: str
    renew_margin_s: float
    healthz_ip: str
    healthz_port: int
    verbosity: int
    firewall: FirewallOptions
    blackhole_route: bool
    manage_sysctls: bool
    release_on_exit: bool


class Flag(msgspec.Struct, frozen=True):
    """One flag.

    Args:
        name: without dashes.
        help: one sentence for a person.
        default: shown and used where nobody says otherwise, as text.
        metavar: what its value is, for the help.
        is_repeatable: may be given again, for more values.
        least, most: bounds of a number; both None where the value is something else.
        is_switch: its value is true or false, and true where the flag stands alone.
        is_range: its value is a range of addresses.
    """

    name: str
    help: str
    default: str = ""
    metavar: str = "TEXT"
    is_repeatable: bool = False
    least: int | None = None
    most: int | None = None
    is_switch: bool = False
    is_range: bool = False

    @property
    def variables(self) -> tuple[str, str]:
        """The environment variables that set it, the stronger first."""
        stem = self.name.upper().replace("-", "_")
        return f"LODEN_{stem}", f"FLANNELD_{stem}"

    def require_valid(self, text: str) -> None:
        """Raise where the flag cannot have this value.

        Raises:
            ConfigError: with what is allowed.
        """
        if self.is_switch:
            _is_true(self.name, text)
        if self.is_range:
            _parse_range(self.name, text)
        if self.least is None or self.most is None:
            return
        if not re.fullmatch("[0-9]{1,9}", text) or not self.least <= int(text) <= self.most:
            raise ConfigError(
                f"--{self.name}",
                f"{text!r} is not allowed",
                hint=f"a whole number from {self.least} to {self.most}",
            )


#: The flags that say where the store is; commands beside ``loden run`` have them too.
STORE_FLAGS = (
    Flag("store", "The store of network and leases, as a URL.", default=DEFAULT_URL, metavar="URL"),
    Flag("etcd-endpoints", "etcd's members, instead of --store; separated by commas.", metavar="URL,..."),
    Flag("etcd-prefix", "Before every key in etcd, instead of --store.", metavar="PATH"),
    Flag("etcd-cafile", "Whom to trust with TLS; else those whom the host trusts.", metavar="FILE"),
    Flag("etcd-certfile", "The certificate that etcd is shown.", metavar="FILE"),
    Flag("etcd-keyfile", "The certificate's key.", metavar="FILE"),
    Flag("etcd-username", "The user in etcd.", metavar="NAME"),
    Flag("etcd-password", "The user's password; rather in the variable LODEN_ETCD_PASSWORD.", metavar="TEXT"),
)

FLAGS = (
    *STORE_FLAGS,
    Flag(
        "iface",
        "The interface to use, by name or address; the first that fits of several.",
        metavar="NAME|IP",
        is_repeatable=True,
    ),
    Flag(
        "iface-regex", "The same by a pattern for its address or name.", metavar="REGEX", is_repeatable=True
    ),
    Flag("iface-can-reach", "The interface that the kernel would use for this address.", metavar="IP"),
    Flag("public-ip", "The IPv4 address that other hosts use; else the interface's own.", metavar="IP"),
    Flag("public-ipv6", "The IPv6 address that other hosts use; else the interface's own.", metavar="IP"),
    Flag(
        "public-port",
        "The UDP port that other hosts use, where it is not the one in the network configuration (udp).",
        default="0",
        metavar="PORT",
        least=0,
        most=65535,
    ),
    Flag(
        "subnet-file",
        "Where the host's subnet is written for container runtimes.",
        default="/run/flannel/subnet.env",
        metavar="FILE",
    ),
    Flag(
        "subnet-lease-renew-margin",
        "How many minutes before its end the lease is renewed.",
        default="60",
        metavar="MINUTES",
        least=1,
        most=1439,
    ),
    Flag("ip-masq", "Masquerade what leaves the network.", "false", "BOOL", is_switch=True),
    Flag(
        "ip-masq-exclude",
        "Destinations that see the containers' own addresses, as a range.",
        metavar="CIDR",
        is_repeatable=True,
        is_range=True,
    ),
    Flag(
        "ip-masq-fully-random-disable",
        "Masquerade without choosing ports at random.",
        "false",
        "BOOL",
        is_switch=True,
    ),
    Flag(
        "iptables-forward-rules",
        "Let the network's packets pass the FORWARD chain.",
        "true",
        "BOOL",
        is_switch=True,
    ),
    Flag(
        "iptables-resync", "How often to look at the firewall's rules.", "5", "SECONDS", least=1, most=86400
    ),
    Flag("ip-blackhole-route", "A blackhole route for the own subnet.", "false", "BOOL", is_switch=True),
    Flag("manage-sysctls", "Switch forwarding on.", "true", "BOOL", is_switch=True),
    Flag("release-on-exit", "Give the subnet back at the end.", "false", "BOOL", is_switch=True),
    Flag("healthz-ip", "The address that answers /healthz and /readyz.", default="0.0.0.0", metavar="IP"),
    Flag("healthz-port", "Its port; 0 for none.", default="0", metavar="PORT", least=0, most=65535),
    Flag("v", "How much goes to the log.", default="0", metavar="LEVEL", least=0, most=10),
)

#: Flags of flannel's that this version has not got. They are refused: no host runs otherwise than told.
NOT_YET = frozenset(
    (
        *("kube-subnet-mgr", "kube-api-url", "kubeconfig-file"),
        *("kube-annotation-prefix", "net-config-path", "set-node-network-unavailable"),
        *("vmodule", "log_backtrace_at"),
    )
)

_BY_NAME = {flag.name: flag for flag in FLAGS}
#: Flags without a value, beside the table: what they do is not an option of the agent.
_SWITCHES = {"version": "--version", "help": "--help", "h": "--help"}


def read_command_line(words: Sequence[str]) -> Iterator[str]:
    """The words of a command line as ``--name=value``, one word a flag, from what Go's flag package takes.

    ``-iface eth0``, ``--iface eth0``, ``-iface=eth0`` and ``-version=false`` all work there. A word that
    is no known flag passes, with two dashes, for the command line's own parser to judge.

    Raises:
        ConfigError: a flag that this version has not got, or a switch that is neither true nor false.
    """
    rest = iter(words)
    for word in rest:
        dashes = len(word) - len(word.lstrip("-"))
        name, equals, value = word[dashes:].partition("=")
        if dashes not in (1, 2) or not name:
            yield word
        elif name in NOT_YET:
            raise _not_yet(f"--{name}")
        elif name in _BY_NAME:
            given: str | None = value
            if not equals:
                given = "true" if _BY_NAME[name].is_switch else next(rest, None)
            yield f"--{name}" if given is None else f"--{name}={given}"
        elif name in _SWITCHES:
            if not equals or _is_true(name, value):
                yield _SWITCHES[name]
        else:
            yield f"--{word[dashes:]}"


def read_environment(environment: Mapping[str, str]) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """The flags that the environment sets, and one sentence for each variable that had to be ignored.

    An empty variable counts as absent. A repeatable flag gets one value: there is no splitting.

    Raises:
        ConfigError: a variable sets a flag that this version has not got.
    """
    for name in NOT_YET:
        for variable in Flag(name, "").variables:
            if environment.get(variable):
                raise _not_yet(variable)
    return _read_variables(environment, FLAGS)


def read_store_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """As :func:`read_environment`, for :data:`STORE_FLAGS` alone."""
    return _read_variables(environment, STORE_FLAGS)[0]


def _read_variables(
    environment: Mapping[str, str], flags: Sequence[Flag]
) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    ignored = []
    for flag in flags:
        for variable in reversed(flag.variables):
            text = environment.get(variable, "")
            try:
                if text:
                    flag.require_valid(text)
                    found[flag.name] = (text,)
            except ConfigError as error:
                ignored.append(f"{variable}: {error.reason}, ignored: it takes {error.hint}")
    return found, tuple(ignored)


def build(*sources: Mapping[str, Sequence[str]]) -> AgentOptions:
    """The options from several sources, the strongest first; what none of them has stands at its default.

    Args:
        sources: valid values by the flag's name.
    """

    def values(name: str) -> tuple[str, ...]:
        return next((tuple(source[name]) for source in sources if source.get(name)), ())

    def value(name: str) -> str:
        return next(reversed(values(name)), _BY_NAME[name].default)

    def switch(name: str) -> bool:
        return _is_true(name, value(name))

    return AgentOptions(
        store=build_store(*sources),
        selection=Selection(
            iface=values("iface"),
            iface_regex=values("iface-regex"),
            can_reach=value("iface-can-reach"),
            public_ip=value("public-ip"),
            public_ipv6=value("public-ipv6"),
            public_port=int(value("public-port")),
        ),
        subnet_file=value("subnet-file"),
        renew_margin_s=60.0 * int(value("subnet-lease-renew-margin")),
        healthz_ip=value("healthz-ip"),
        healthz_port=int(value("healthz-port")),
        verbosity=int(value("v")),
        firewall=FirewallOptions(
            masquerade=switch("ip-masq"),
            exclude=tuple(_parse_range("ip-masq-exclude", text) for text in values("ip-masq-exclude")),
            is_fully_random=not switch("ip-masq-fully-random-disable"),
            forward=switch("iptables-forward-rules"),
            resync_s=float(value("iptables-resync")),
        ),
        blackhole_route=switch("ip-blackhole-route"),
        manage_sysctls=switch("manage-sysctls"),
        release_on_exit=switch("release-on-exit"),
    )


def build_store(*sources: Mapping[str, Sequence[str]]) -> StoreOptions:
    """Which store, from several sources, the strongest first.

    Any of flannel's etcd flags means etcd, at flannel's own place where nothing else is said.

    Args:
        sources: valid values by the flag's name.

    Raises:
        ConfigError: the flags contradict each other.
    """

    def value(name: str) -> str:
        return next((source[name][-1] for source in sources if source.get(name)), "")

    url, endpoints, prefix = value("store"), value("etcd-endpoints"), value("etcd-prefix")
    access = Access(
        ca_file=value("etcd-cafile"),
        cert_file=value("etcd-certfile"),
        key_file=value("etcd-keyfile"),
        username=value("etcd-username"),
        password=Secret(value("etcd-password")),
    )
    if bool(access.cert_file) != bool(access.key_file):
        raise ConfigError(
            "--etcd-certfile, --etcd-keyfile", "only one of them is given", hint="give both or none"
        )
    if url and (endpoints or prefix):
        raise ConfigError(
            "--store",
            f"{'--etcd-endpoints' if endpoints else '--etcd-prefix'} names another place",
            hint="leave one out; FLANNELD_ETCD_ENDPOINTS and FLANNELD_ETCD_PREFIX in the environment count",
        )
    if access == Access() and not endpoints and not prefix:
        return StoreOptions(url or DEFAULT_URL)
    if not url:
        url = url_of(endpoints or DEFAULT_ENDPOINTS, prefix or DEFAULT_PREFIX)
        if url.startswith("etcd:") and (access.ca_file or access.cert_file):
            raise ConfigError(
                "--etcd-endpoints", "http:// does not go with certificates", hint="write https://host:2379"
            )
    if url.partition("://")[0] not in ("etcd", "etcds"):
        raise ConfigError(
            "--store",
            "it is not in etcd, and an --etcd flag is given",
            hint="leave that out; the environment counts, FLANNELD_ETCD_CAFILE and its like",
        )
    return StoreOptions(url, access)


def _is_true(name: str, text: str) -> bool:
    """What Go's strconv.ParseBool makes of a text."""
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise ConfigError(f"--{name}", f"{text!r} is not a boolean", hint="true or false")


def _parse_range(name: str, text: str) -> Prefix:
    try:
        return Prefix.parse(text)
    except ValueError as error:
        raise ConfigError(f"--{name}", str(error), hint="a range such as 192.0.2.0/24") from error


def _not_yet(what: str) -> ConfigError:
    return ConfigError(
        what,
        "this version of Loden does not have it yet",
        hint="leave it out; see 'loden run --help' for what there is",
    )
