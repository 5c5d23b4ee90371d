# SPDX-License-Identifier: Apache-2.0
"""The cluster-wide network configuration (COMPAT §1): parse, check, derive, print.

Both address families take the same steps; what differs between them is the table :data:`_FAMILIES`.
"""

from collections.abc import Callable

import msgspec

from loden.address import Family, Prefix, format_address, parse_address
from loden.backend_options import check_options
from loden.errors import ConfigError
from loden.members import Reader, folded, read_object, show, write_object


class Range(msgspec.Struct, frozen=True):
    """One address family of the network.

    Args:
        network: all container addresses of the cluster.
        subnet_length: the prefix length of one host's subnet.
        first, last: the lowest and the highest subnet to hand out (SubnetMin, SubnetMax).
    """

    network: Prefix
    subnet_length: int
    first: Prefix
    last: Prefix

    @property
    def family(self) -> Family:
        return self.network.family

    @property
    def subnet_count(self) -> int:
        """How many subnets there are to hand out."""
        return (self.last.first - self.first.first) // self.first.size + 1


class Network(msgspec.Struct, frozen=True):
    """The network configuration, checked and with every default filled in.

    Args:
        ranges: one for each enabled family, IPv4 first.
        backend_type: lower case, as backends are looked up.
        backend: the backend's own members as compact JSON text, keys as written.
        enable_nftables: which firewall tool to use.
        masquerade_exclude: destinations that see containers' own addresses.
        notes: what a reader should know: unknown keys, values without effect; one sentence each.
    """

    ranges: tuple[Range, ...]
    backend_type: str = "vxlan"
    backend: bytes = b"{}"
    enable_nftables: bool = False
    masquerade_exclude: tuple[Prefix, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        # A backend's own members may hold its keys to a cloud.
        ranges = " ".join(str(part.network) for part in self.ranges)
        return f"Network({ranges}, backend_type={self.backend_type!r})"

    def range_of(self, family: Family) -> Range | None:
        """The range of one family, if it is enabled."""
        return next((found for found in self.ranges if found.family is family), None)

    @property
    def families(self) -> tuple[Family, ...]:
        """The enabled families, IPv4 first."""
        return tuple(found.family for found in self.ranges)

    def only(self, family: Family) -> "Network":
        """The same network with one of its families."""
        return msgspec.structs.replace(
            self, ranges=tuple(found for found in self.ranges if found.family is family)
        )


class _FamilyKeys(msgspec.Struct, frozen=True):
    """What the configuration calls things in one family, and the lengths that subnets have.

    Args:
        enable, network, length, first, last: names of keys.
        is_default: whether the family is on where *enable* is absent.
        usual_length: a subnet's, in networks that are wide enough for it.
        longest: a subnet must hold at least base, gateway and a container.
        example: of a network.
    """

    family: Family
    enable: str
    network: str
    length: str
    first: str
    last: str
    is_default: bool
    usual_length: int
    longest: int
    example: str


_FAMILIES = (
    _FamilyKeys(
        family=Family.IPV4,
        enable="EnableIPv4",
        network="Network",
        length="SubnetLen",
        first="SubnetMin",
        last="SubnetMax",
        is_default=True,
        usual_length=24,
        longest=30,
        example="10.5.0.0/16",
    ),
    _FamilyKeys(
        family=Family.IPV6,
        enable="EnableIPv6",
        network="IPv6Network",
        length="IPv6SubnetLen",
        first="IPv6SubnetMin",
        last="IPv6SubnetMax",
        is_default=False,
        usual_length=64,
        longest=126,
        example="fd00:5::/48",
    ),
)

#: A network is cut into four subnets at least.
_LEAST_SUBNET_BITS = 2

#: Lists that flannel 0.20 to 0.24 read beside the single network.
_RETIRED = {"Networks": "Network", "IPv6Networks": "IPv6Network"}
_MAPPED = bytes(10) + b"\xff\xff"
_BACKEND_HINT = 'the name of a backend, such as "vxlan", "host-gw" or "alloc"; without Backend it is vxlan'


def parse_network(text: bytes) -> Network:
    """The network configuration that a JSON text describes.

    Args:
        text: the JSON, as a person wrote it into a file or a store.

    Raises:
        ConfigError: the first of what :func:`check_network` finds.
    """
    network, errors = check_network(text)
    if network is None:
        raise errors[0]
    return network


def check_network(
    text: bytes, describe: Callable[[str], type[msgspec.Struct]] | None = None
) -> tuple[Network | None, tuple[ConfigError, ...]]:
    """The network configuration, or everything that is wrong with the text.

    Args:
        text: as :func:`parse_network` takes it.
        describe: gives a backend's options by the backend's type (:func:`loden.backends.describe`); without
            it nothing is said about the backend's own members.
    """
    try:
        reader = Reader(read_object(text))
    except ConfigError as error:
        return None, (error,)
    ranges = tuple(found for keys in _FAMILIES if (found := _read_family(reader, keys)) is not None)
    backend_type, backend = _read_backend(reader)
    if backend_type and describe is not None:
        _check_backend(reader, backend, backend_type, describe)
    enable_nftables = reader.flag("EnableNFTables", default=False)
    exclude = _read_exclude(reader)
    if not ranges and not reader.errors:
        reader.fail("EnableIPv4", "EnableIPv4 and EnableIPv6 are both false", hint="enable one of them")
    for retired, current in _RETIRED.items():
        if reader.take(retired)[0]:
            reader.notes.append(f"{retired}: no longer read, {current} is")
    reader.note_unread()
    if reader.errors:
        return None, tuple(reader.errors)
    return Network(ranges, backend_type, backend, enable_nftables, exclude, tuple(reader.notes)), ()


def _read_family(reader: Reader, keys: _FamilyKeys) -> Range | None:
    """One family's range; None where the family is off or something is wrong with it."""
    errors_before = len(reader.errors)
    is_enabled = reader.flag(keys.enable, default=keys.is_default)
    network = _read_prefix(reader, keys)
    length = reader.number(keys.length, hint=f"a number up to {keys.longest}, or none for the default")
    first = _read_address(reader, keys, keys.first)
    last = _read_address(reader, keys, keys.last)
    if not is_enabled:
        if network is not None:
            reader.notes.append(f"{keys.network}: without effect, {keys.enable} is false")
        return None
    if len(reader.errors) > errors_before:
        return None
    if network is None:
        reader.fail(
            keys.network,
            f"missing, and {keys.enable} is true",
            hint=f"an address range such as {keys.example}",
        )
        return None
    return _derive_range(reader, keys, network, length, (first, last))


def _read_prefix(reader: Reader, keys: _FamilyKeys) -> Prefix | None:
    """A network; the one that holds every address (0.0.0.0/0) stands for none."""

    def parse(text: str) -> Prefix:
        prefix = Prefix.parse(text)
        if prefix.family is not keys.family:
            raise ValueError(text)
        return prefix

    prefix = reader.text(
        keys.network, parse, kind=f"an {keys.family} range", hint=f"a range such as {keys.example}"
    )
    return None if prefix is None or prefix.length == 0 else prefix


def _read_address(reader: Reader, keys: _FamilyKeys, key: str) -> int | None:
    """An address as a number; the zero address, and null where flannel takes it, stand for none."""

    def parse(text: str) -> bytes:
        address = parse_address(text)
        if keys.family is Family.IPV4 and address.startswith(_MAPPED):
            address = address[len(_MAPPED) :]
        if len(address) != keys.family.size:
            raise ValueError(text)
        return address

    address = reader.text(
        key,
        parse,
        kind=f"an {keys.family} address",
        hint=f"where a subnet begins, inside {keys.network}",
        takes_null=keys.family is Family.IPV6,
    )
    return None if address is None else int.from_bytes(address, "big") or None


def _derive_range(
    reader: Reader, keys: _FamilyKeys, network: Prefix, length: int, bounds: tuple[int | None, int | None]
) -> Range | None:
    """The steps 2 to 6 of COMPAT §1.2."""
    shortest = network.length + _LEAST_SUBNET_BITS
    if shortest > keys.longest:
        limit = keys.longest - _LEAST_SUBNET_BITS
        reader.fail(
            keys.network, f"{network} is too small for four subnets", hint=f"a range of /{limit} or shorter"
        )
        return None
    if length == 0:
        length = keys.usual_length if shortest <= keys.usual_length else shortest
    elif not shortest <= length <= keys.longest:
        reader.fail(
            keys.length,
            f"{length} does not cut {network} into four subnets or more"
            if length < shortest
            else f"{length} leaves no room for containers",
            hint=f"a number from {shortest} to {keys.longest}",
        )
        return None
    size = 1 << (keys.family.bits - length)
    defaults = (network.first + size, network.last + 1 - size)
    first, last = (
        _bound(reader, keys, key, network, length, given) if given is not None else default
        for key, given, default in zip((keys.first, keys.last), bounds, defaults, strict=True)
    )
    if first is None or last is None:
        return None
    if first > last:
        low, high = (
            format_address(Prefix.from_int(keys.family, end, length).address) for end in (first, last)
        )
        key = keys.first if bounds[0] is not None else keys.last
        reader.fail(
            key, f"{keys.first} {low} lies behind {keys.last} {high}", hint="the lower address goes first"
        )
        return None
    return Range(
        network,
        length,
        Prefix.from_int(keys.family, first, length),
        Prefix.from_int(keys.family, last, length),
    )


def _bound(
    reader: Reader, keys: _FamilyKeys, key: str, network: Prefix, length: int, given: int
) -> int | None:
    """SubnetMin or SubnetMax as given, where it is a subnet of the network."""
    packed = given.to_bytes(keys.family.size, "big")
    nearest = Prefix.of(packed, length)
    if not network.holds(packed):
        reader.fail(key, f"{format_address(packed)} is outside {network}", hint=f"an address in {network}")
        return None
    if nearest.address != packed:
        reader.fail(
            key,
            f"{format_address(packed)} is not where a /{length} begins",
            hint=f"such as {format_address(nearest.address)}",
        )
        return None
    return given


def _read_exclude(reader: Reader) -> tuple[Prefix, ...]:
    """``IPMasqExclude``, a list of ranges of either family; flannel has no such key and ignores it."""
    _, given = reader.take("IPMasqExclude")
    hint = 'a list of ranges such as ["192.0.2.0/24", "2001:db8::/32"]'
    if given is not None and not isinstance(given, list):
        reader.fail("IPMasqExclude", f"{show(given)} is not a list", hint=hint)
        return ()
    found = []
    for text in given or ():
        try:
            found.append(Prefix.parse(str(text)))
        except ValueError:
            reader.fail("IPMasqExclude", f"{show(text)} is not a range", hint=hint)
    return tuple(found)


def _read_backend(reader: Reader) -> tuple[str, bytes]:
    """The backend's type and its own members."""
    is_there, members = reader.take("Backend")
    if not is_there:
        reader.notes.append("Backend: absent, so it is vxlan; flanneld itself would run udp here")
        return "vxlan", b"{}"
    if not isinstance(members, dict | None):
        reader.fail(
            "Backend", f"{show(members)} is not an object", hint='an object such as {"Type": "vxlan"}'
        )
        return "", b"{}"
    own = dict(members or {})
    name, kind = folded(own).get("type", ("Type", None))
    own.pop(name, None)
    if not isinstance(kind, str) or not kind:
        said = "missing" if kind is None else f"{show(kind)} is not a name"
        reader.fail("Backend.Type", said, hint=_BACKEND_HINT)
        return "", b"{}"
    return kind.lower(), write_object(own)


def _check_backend(
    reader: Reader, members: bytes, backend_type: str, describe: Callable[[str], type[msgspec.Struct]]
) -> None:
    try:
        _, errors, notes = check_options(members, describe(backend_type))
    except ConfigError as error:
        errors, notes = (error,), ()
    reader.errors.extend(errors)
    reader.notes.extend(notes)
