# SPDX-License-Identifier: Apache-2.0
"""Which interface carries the fabric, and under which address the host is reached (COMPAT §5).

The choice is a pure function of what the host has (:class:`HostFacts`) and what was asked for.
"""

import re
from collections.abc import Callable, Iterator, Mapping

import msgspec

from loden.address import Family, format_address, parse_address
from loden.errors import ConfigError, InterfaceError


class Link(msgspec.Struct, frozen=True):
    """One network interface, as the kernel lists it.

    Args:
        index: the interface index.
        name: such as ``eth0``.
        kind: the driver's name for virtual ones (``vxlan``, ``bridge``, ``veth``), else empty.
        mtu: bytes.
        mac: the link-layer address; empty where the link has none.
        is_up: administratively up (``IFF_UP``).
        is_loopback: ``IFF_LOOPBACK``.
        alias: ``IFLA_IFALIAS``, which says whose it is.
    """

    index: int
    name: str
    kind: str = ""
    mtu: int = 1500
    mac: bytes = b""
    is_up: bool = True
    is_loopback: bool = False
    alias: bytes = b""


#: Kinds of interface (``IFLA_INFO_KIND``) that lead out of the host; a network card has none.
_LEADING_OUT = frozenset(("", "bond", "team", "vlan"))


def leads_out(link: Link) -> bool:
    """Whether an interface is a network card, or stands on some; others end within the machine."""
    return link.kind in _LEADING_OUT


class HostAddress(msgspec.Struct, frozen=True):
    """One address of an interface.

    Args:
        index: the interface's index.
        address: packed.
        length: of the prefix that is on-link, in bits.
        scope: the kernel's ``RT_SCOPE_*`` (0 global, 253 link, 254 host).
        is_permanent: not from DHCP or router advertisements (``IFA_F_PERMANENT``).
        is_temporary: an IPv6 privacy address (``IFA_F_TEMPORARY``).
        is_deprecated: past its preferred lifetime (``IFA_F_DEPRECATED``).
    """

    index: int
    address: bytes
    length: int
    scope: int = 0
    is_permanent: bool = True
    is_temporary: bool = False
    is_deprecated: bool = False


class DefaultRoute(msgspec.Struct, frozen=True):
    """One nexthop of a default route of the main table, in the kernel's order of preference.

    Args:
        family: of the route.
        index: the interface's index; 0 where the route has no device.
        metric: the route's priority, lower first.
    """

    family: Family
    index: int
    metric: int = 0


class Hop(msgspec.Struct, frozen=True, gc=False):
    """Where the kernel would send a packet: the answer to a route lookup.

    Args:
        index: the outgoing interface.
        source: the preferred source address, packed; None where the kernel names none.
        via: the next router, packed; None where the destination is on-link.
        device: the outgoing interface's name.
        mtu: what a router on the way has said is the most it lets through, bytes; 0 where none has.
    """

    index: int
    source: bytes | None = None
    via: bytes | None = None
    device: str = ""
    mtu: int = 0


class HostFacts(msgspec.Struct, frozen=True):
    """What a host has, for the choice of an interface.

    Args:
        links: every interface, in the kernel's order.
        addresses: every address, in the kernel's order.
        default_routes: of the main table, in the order the kernel prefers them.
    """

    links: tuple[Link, ...]
    addresses: tuple[HostAddress, ...] = ()
    default_routes: tuple[DefaultRoute, ...] = ()


#: A route lookup: where the kernel would send a packet to this (packed) address; None where nowhere.
Lookup = Callable[[bytes], Hop | None]


class Underlay(msgspec.Struct, frozen=True):
    """The chosen interface: what lies below the fabric.

    Args:
        name, index, mtu: of the interface; MTU in bytes.
        addresses: the interface's own address by family, packed.
        public: the address that peers use, by family, packed; the interface's unless told otherwise.
        reason: why this one, for the log.
        public_port: the UDP port that peers use, where it is not the one all hosts have; else 0.
    """

    name: str
    index: int
    mtu: int
    addresses: Mapping[Family, bytes]
    public: Mapping[Family, bytes]
    reason: str = ""
    public_port: int = 0

    def differences(self, other: "Underlay") -> list[str]:
        """What is not the same in another, in words; the reason does not count."""
        found = []
        if (self.name, self.index) != (other.name, other.index):
            found.append(f"{self.name} (index {self.index}) is now {other.name} (index {other.index})")
        if self.mtu != other.mtu:
            found.append(f"MTU {self.mtu} is now {other.mtu}")
        for what, mine, theirs in (
            ("address", self.addresses, other.addresses),
            ("public address", self.public, other.public),
        ):
            found += [
                f"{what} {format_address(mine[family])} is now {format_address(theirs[family])}"
                for family in mine
                if family in theirs and mine[family] != theirs[family]
            ]
        return found


class Selection(msgspec.Struct, frozen=True):
    """What was asked for: the values of the flags, in their order.

    Args:
        iface: names or addresses, tried in order.
        iface_regex: patterns for addresses, then names, tried in order.
        can_reach: an address; the interface the kernel would use for it.
        public_ip, public_ipv6: the addresses to announce, as text.
        public_port: the UDP port to announce; 0 for the one that all hosts have.
    """

    iface: tuple[str, ...] = ()
    iface_regex: tuple[str, ...] = ()
    can_reach: str = ""
    public_ip: str = ""
    public_ipv6: str = ""
    public_port: int = 0


#: RFC 8200. The kernel takes its IPv6 addresses from an interface whose MTU falls below.
_LEAST_IPV6_MTU = 1280
#: Kinds of interface (``IFLA_INFO_KIND``) that lie above others.
_OVERLAYS = frozenset(
    (
        "bridge",
        "vxlan",
        "geneve",
        "wireguard",
        "tun",
        "ipip",
        "sit",
        "gre",
        "gretap",
        "ip6gre",
        "ip6tnl",
        "vti",
    )
)


class _Candidate(msgspec.Struct, frozen=True):
    """An interface that fits what was asked for.

    Args:
        link: the interface.
        reason: why it fits.
        fixed: addresses that the request itself named.
    """

    link: Link
    reason: str
    fixed: tuple[bytes, ...] = ()


def select(selection: Selection, families: tuple[Family, ...], facts: HostFacts, lookup: Lookup) -> Underlay:
    """The interface for the fabric and the addresses of the host, in the order of COMPAT §5.

    Args:
        selection: what was asked for.
        families: of the network; the interface needs an address in each.
        facts: what the host has.
        lookup: asks the kernel; used for ``--iface-can-reach`` alone.

    Raises:
        ConfigError: a flag's value is no address or no pattern.
        InterfaceError: nothing fits; the hint lists what there is.
    """
    asked_public = _public_addresses(selection)
    misses: list[str] = []
    for candidate in _candidates(selection, families, asked_public, facts, lookup):
        if isinstance(candidate, str):
            misses.append(candidate)
            continue
        try:
            found = _underlay(candidate, families, asked_public, facts)
            return msgspec.structs.replace(found, public_port=selection.public_port)
        except InterfaceError as error:
            misses.append(error.message)
    raise InterfaceError(f"choose an interface: {'; '.join(misses)}", hint=_what_there_is(facts))


def select_again(
    current: Underlay, selection: Selection, families: tuple[Family, ...], facts: HostFacts, lookup: Lookup
) -> Underlay:
    """The interface for a fabric that runs: the same for as long as it serves, whatever else comes up.

    A default route that moves to a VPN for an hour must not take the fabric along. An address that vanishes
    does not make way for a link-local one, under which no peer would reach this host.

    Args:
        current: what was chosen before.
        selection, families, facts, lookup: as for :func:`select`.

    Raises:
        InterfaceError: the current interface serves no more, and nothing else fits.
    """
    facts = _without_link_local(facts, current)
    wish: Underlay | InterfaceError
    try:
        wish = select(selection, families, facts, lookup)
    except InterfaceError as error:
        wish = error
    if isinstance(wish, Underlay) and wish.name == current.name:
        return wish
    same = msgspec.structs.replace(selection, iface=(current.name,), iface_regex=(), can_reach="")
    if any(link.name == current.name and link.is_up for link in facts.links):
        try:
            found = select(same, families, facts, lookup)
        except InterfaceError:
            pass  # it lost its address: another choice is better than none
        else:
            return msgspec.structs.replace(found, reason=current.reason)
    if isinstance(wish, InterfaceError):
        raise wish
    return wish


def _without_link_local(facts: HostFacts, current: Underlay) -> HostFacts:
    """The facts without link-local addresses, in the families that use another one now."""
    families = {
        family
        for family, address in current.addresses.items()
        if not _is_link_local(HostAddress(current.index, address, family.bits))
    }
    addresses = tuple(
        own for own in facts.addresses if Family.of(own.address) not in families or not _is_link_local(own)
    )
    return msgspec.structs.replace(facts, addresses=addresses)


def _candidates(
    selection: Selection,
    families: tuple[Family, ...],
    asked_public: Mapping[Family, bytes],
    facts: HostFacts,
    lookup: Lookup,
) -> Iterator[_Candidate | str]:
    """What fits, best first; where a request finds nothing, why."""
    if not (selection.iface or selection.iface_regex or selection.can_reach):
        having_public = list(_by_public_address(asked_public, facts))
        yield from having_public
        if not any(isinstance(found, _Candidate) for found in having_public):
            yield from _by_default_route(families, facts)
        return
    for asked in selection.iface:
        yield from _by_name_or_address(asked, facts)
    for pattern in selection.iface_regex:
        yield from _by_pattern(pattern, families, facts)
    if selection.can_reach:
        target = _parse_flag("--iface-can-reach", selection.can_reach)
        yield from _by_reach(target, facts, lookup)


def _by_public_address(asked_public: Mapping[Family, bytes], facts: HostFacts) -> Iterator[_Candidate | str]:
    """The interface that has the address to announce; an address that lies in front of a NAT is on none."""
    for address in asked_public.values():
        text = format_address(address)
        links = [link for link in _links_with(address, facts) if link.is_up and not link.is_loopback]
        yield from (_Candidate(link, f"it has the public address {text}", (address,)) for link in links)
        if not links:
            yield f"no interface that is up has the public address {text}"


def _by_default_route(families: tuple[Family, ...], facts: HostFacts) -> Iterator[_Candidate | str]:
    """Interfaces with a default route in every family, by the first family's preference.

    Each nexthop of a multipath route counts (W47).
    """
    found = False
    for route in facts.default_routes:
        link = _link(route.index, facts)
        shared = {other.family for other in facts.default_routes if other.index == route.index}
        if route.family is families[0] and shared.issuperset(families) and link and link.is_up:
            found = True
            yield _Candidate(link, "it has the default route")
    if not found:
        names = " and ".join(str(family) for family in families)
        yield f"no interface that is up has the default route of {names}"


def _by_name_or_address(asked: str, facts: HostFacts) -> Iterator[_Candidate | str]:
    try:
        address = parse_address(asked)
    except ValueError:
        links = [link for link in facts.links if link.name == asked]
        fixed: tuple[bytes, ...] = ()
    else:
        links = list(_links_with(address, facts))
        fixed = (address,)
    if links:
        yield _Candidate(links[0], f"--iface {asked}", fixed)
    else:
        yield f"--iface {asked}: no interface has this {'address' if fixed else 'name'}"


def _by_pattern(text: str, families: tuple[Family, ...], facts: HostFacts) -> Iterator[_Candidate | str]:
    """Interfaces with a matching address in every family, then those with a matching name."""
    pattern = _compile(text)
    # Tunnels and bridges last: a pattern that fits a VPN's or a container's address too means the real one.
    links = sorted((link for link in facts.links if not link.is_loopback), key=_is_overlay)
    found = False
    for link in links:
        matching = [
            next((own for own in _usable(link, family, facts) if pattern.search(format_address(own))), None)
            for family in families
        ]
        if None not in matching:
            found = True
            yield _Candidate(link, f"its address matches --iface-regex {text}", tuple(filter(None, matching)))
    for link in links:
        if pattern.search(link.name):
            found = True
            yield _Candidate(link, f"its name matches --iface-regex {text}")
    if not found:
        yield f"--iface-regex {text}: matches no address and no name"


def _is_overlay(link: Link) -> bool:
    """Whether an interface is itself made by a VPN, a container runtime or a fabric."""
    return link.kind in _OVERLAYS


def _by_reach(target: bytes, facts: HostFacts, lookup: Lookup) -> Iterator[_Candidate | str]:
    text = format_address(target)
    hop = lookup(target)
    link = _link(hop.index, facts) if hop else None
    if hop is None or link is None:
        yield f"--iface-can-reach {text}: the kernel has no route there"
    else:
        yield _Candidate(link, f"it reaches {text}", (hop.source,) if hop.source else ())


def _underlay(
    candidate: _Candidate,
    families: tuple[Family, ...],
    asked_public: Mapping[Family, bytes],
    facts: HostFacts,
) -> Underlay:
    """The candidate with its addresses.

    Raises:
        InterfaceError: it lacks something that the fabric needs.
    """
    link = candidate.link
    if link.mtu <= 0:
        raise InterfaceError(f"{link.name}: its MTU is {link.mtu}")
    own = {Family.of(address): address for address in candidate.fixed}
    for family, address in asked_public.items():
        # In dual stack the second address has to be on the interface that the first one chose (COMPAT §5).
        is_second = bool(own) and family not in own and family in families
        homes = list(_links_with(address, facts)) if is_second and len(families) > 1 else []
        if link in homes:
            own[family] = address
        elif homes:
            text = format_address(address)
            raise InterfaceError(f"{link.name}: the public address {text} is on {homes[0].name} instead")
    for family in families:
        usable = _usable(link, family, facts)
        if family not in own and not usable:
            raise InterfaceError(f"{link.name}: it has no usable {family} address{_why_none(link, family)}")
        own.setdefault(family, usable[0] if usable else b"")
    addresses = {family: own[family] for family in families}
    return Underlay(
        name=link.name,
        index=link.index,
        mtu=link.mtu,
        addresses=addresses,
        public={**addresses, **asked_public},
        reason=_reason(candidate, asked_public, facts),
    )


def _why_none(link: Link, family: Family) -> str:
    """Why an interface may have lost its addresses."""
    is_too_small = family is Family.IPV6 and link.mtu < _LEAST_IPV6_MTU
    return f": its MTU is {link.mtu}, and IPv6 needs {_LEAST_IPV6_MTU}" if is_too_small else ""


def _reason(candidate: _Candidate, asked_public: Mapping[Family, bytes], facts: HostFacts) -> str:
    """Why this interface, and what about it may surprise."""
    remarks = [
        f"the public address {format_address(address)} is on no interface of this host"
        for address in asked_public.values()
        if not any(_links_with(address, facts))
    ]
    if _is_overlay(candidate.link):
        remarks.append(f"{candidate.link.name} is a {candidate.link.kind} interface")
    if not candidate.link.is_up:
        remarks.append(f"{candidate.link.name} is down")
    return "; ".join([candidate.reason, *remarks])


def require_sound(selection: Selection) -> None:
    """Raise where a flag's value can never be used, on whatever host.

    Raises:
        ConfigError: names the flag, its value and what it takes.
    """
    _public_addresses(selection)
    if selection.can_reach:
        _parse_flag("--iface-can-reach", selection.can_reach)
    for text in selection.iface_regex:
        _compile(text)


def _compile(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ConfigError(
            "--iface-regex",
            f"{text!r} is no regular expression: {error}",
            hint="such as '^10\\.1\\.' or 'eth[0-9]'",
        ) from error


def _public_addresses(selection: Selection) -> dict[Family, bytes]:
    """The addresses that peers are to use instead of the interface's own, IPv4 first."""
    asked = {
        Family.IPV4: ("--public-ip", selection.public_ip),
        Family.IPV6: ("--public-ipv6", selection.public_ipv6),
    }
    return {family: _parse_flag(flag, text, family) for family, (flag, text) in asked.items() if text}


def _parse_flag(flag: str, text: str, family: Family | None = None) -> bytes:
    try:
        address = parse_address(text)
    except ValueError as error:
        raise ConfigError(flag, str(error), hint=f"an {family or 'IP'} address") from error
    if family is not None and Family.of(address) is not family:
        raise ConfigError(flag, f"{text} is not an {family} address", hint=f"an {family} address")
    return address


def _link(index: int, facts: HostFacts) -> Link | None:
    return next((link for link in facts.links if link.index == index), None)


def _links_with(address: bytes, facts: HostFacts) -> Iterator[Link]:
    indexes = {own.index for own in facts.addresses if own.address == address}
    return (link for link in facts.links if link.index in indexes)


_SCOPE_LINK, _SCOPE_HOST = 253, 254


def _usable(link: Link, family: Family, facts: HostFacts) -> list[bytes]:
    """The addresses under which others could reach the interface, best first, else as the kernel has them."""

    def demerits(own: HostAddress) -> tuple[bool, bool, bool]:
        return _is_link_local(own), not own.is_permanent, own.is_temporary

    found = [
        own
        for own in facts.addresses
        if own.index == link.index and len(own.address) == family.size and _is_reachable(own)
    ]
    return [own.address for own in sorted(found, key=demerits)]


def _is_reachable(own: HostAddress) -> bool:
    """A unicast address that is not this host's alone, and not about to go."""
    address = own.address
    if len(address) == 4:
        is_special = address[0] == 127 or 224 <= address[0] < 240 or address in (bytes(4), b"\xff" * 4)
    else:
        is_special = address[0] == 0xFF or address[:15] == bytes(15)
    return not (is_special or own.is_deprecated or own.scope == _SCOPE_HOST)


def _is_link_local(own: HostAddress) -> bool:
    first, second = own.address[:2]
    by_number = (
        (first, second) == (169, 254) if len(own.address) == 4 else (first, second & 0xC0) == (0xFE, 0x80)
    )
    return by_number or own.scope == _SCOPE_LINK


def _what_there_is(facts: HostFacts) -> str:
    """The host's interfaces and addresses, for a person who has to name one."""
    most = 12
    texts: dict[int, list[str]] = {}
    for own in facts.addresses:
        texts.setdefault(own.index, []).append(format_address(own.address))
    by_use = sorted(facts.links, key=lambda link: link.index not in texts)
    shown = [f"{link.name} ({', '.join(texts.get(link.index, ['no address']))})" for link in by_use[:most]]
    more = f" and {len(by_use) - most} more" if len(by_use) > most else ""
    return f"name one of them with --iface: {', '.join(shown) or 'there are none'}{more}"
