# SPDX-License-Identifier: Apache-2.0
"""Amazon VPC: routes to this instance's network interface (COMPAT §8.1).

A route in a VPC has neither name nor tag. Whose it is follows from its next hop: one of this instance's
interfaces; or an interface that carries the fabric's tag, or the address that the subnet's last lease named;
or an interface that is gone, which leaves a *blackhole*. Whatever leads to a gateway is somebody else's.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from loden.address import Family, Prefix, format_address
from loden.clouds.metadata import Metadata
from loden.clouds.words import quiet, shorten
from loden.errors import CloudDenied, CloudError, CloudUnavailable, RoutesFull
from loden.tables.cloud import Limits, Listed, Listing, Owner

log = logging.getLogger(__name__)

T = TypeVar("T")

CHECK = "source/destination check"
MARK = "tag loden:network"
_TAG = "loden:network"

_METADATA = "http://169.254.169.254"
_METADATA_HINT = (
    "this host is no EC2 instance, or its metadata service is off; in a container the answer may need "
    "another hop: aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2"
)
#: Service Quotas: "Routes per route table".
_QUOTA = ("vpc", "L-93826ACB")

_THROTTLED = frozenset(
    (
        *("Throttling", "ThrottlingException", "RequestLimitExceeded", "RequestThrottled", "SlowDown"),
        *("TooManyRequestsException", "EC2ThrottledException", "PriorRequestNotComplete"),
        *("InternalError", "InternalFailure", "Unavailable", "ServiceUnavailable"),
    )
)
_DENIED = frozenset(
    (
        *("UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "OptInRequired"),
        *("AuthFailure", "InvalidClientTokenId", "SignatureDoesNotMatch", "UnrecognizedClientException"),
    )
)
_EXPIRED = frozenset(("ExpiredToken", "ExpiredTokenException", "RequestExpired"))
_CREDENTIALS_HINT = (
    "give the instance a role, or set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, for temporary ones, "
    "AWS_SESSION_TOKEN; the policy is in docs/backends/aws-vpc.md"
)
_OTHER_TARGETS = (
    *("GatewayId", "NatGatewayId", "TransitGatewayId", "VpcPeeringConnectionId", "LocalGatewayId"),
    *("CarrierGatewayId", "EgressOnlyInternetGatewayId", "CoreNetworkArn"),
)
_HINTS = {
    "InvalidRouteTableID.NotFound": "RouteTableID names a table that is not there, or in another region",
    "InvalidRouteTableId.Malformed": "RouteTableID is a table's ID such as rtb-0123456789abcdef0",
    "UnauthorizedOperation": "allow it in the policy; docs/backends/aws-vpc.md has one to paste",
}


class Instance(msgspec.Struct, frozen=True):
    """Which instance this is.

    Args:
        id: such as ``i-0123456789abcdef0``.
        interface: the network interface with the address that peers use.
        interfaces: all that the instance has.
        region, vpc, subnet: where it is.
    """

    id: str
    interface: str
    interfaces: frozenset[str]
    region: str
    vpc: str
    subnet: str


class Aws:
    """One instance's access to its VPC; the methods are those of :class:`loden.tables.cloud.Cloud`.

    Args:
        address: the instance's private address (packed) that peers use.
        network: what marks an interface as one of this fabric's.
        tables: IDs of route tables; none to find the one that serves the interface's subnet.
    """

    name = "AWS"
    limits = Limits(
        50, "raise 'Routes per route table' in Service Quotas, or use the backend vxlan, which needs none"
    )

    def __init__(self, *, address: bytes, network: str, tables: Sequence[str] = ()) -> None:
        self._address = address
        self._network = network
        self._given = tuple(tables)
        self._instance: Instance | None = None
        self._clients: dict[str, Any] = {}
        self._assumed: dict[str, str] = {}
        self._can_see_interfaces = True

    def attach(self) -> str:
        if self._instance is None:
            self._instance = _read_instance(self._address)
        here = self._instance
        return f"instance {here.id}, interface {here.interface}, {here.vpc} in {here.region}"

    def list_routes(self) -> Listing:
        found = list(self._describe_tables())
        listed = [route for table in found for route in self._read_table(table)]
        counts = {table["RouteTableId"]: _count(table.get("Routes", ())) for table in found}
        return Listing(tuple(counts), tuple(listed), counts)

    def _describe_tables(self) -> Iterator[Mapping[str, Any]]:
        if self._given:
            arguments: dict[str, Any] = {"RouteTableIds": list(self._given)}
            subject = f"route tables {', '.join(self._given)}"
        else:
            vpc = self._here.vpc
            arguments = {"Filters": [{"Name": "vpc-id", "Values": [vpc]}]}
            subject = f"route tables of {vpc}"
        pages = self._ec2.get_paginator("describe_route_tables")
        tables = _ask("list", subject, lambda: [*pages.paginate(**arguments).search("RouteTables[]")])
        if self._given:
            yield from tables
            return
        chosen = _serving(tables, self._here.subnet)
        if chosen is None:
            raise CloudError(
                "list", subject, f"none serves {self._here.subnet}", hint="name one with RouteTableID"
            )
        yield chosen

    def _read_table(self, table: Mapping[str, Any]) -> Iterator[Listed]:
        for route in table.get("Routes", ()):
            text = route.get("DestinationCidrBlock") or route.get("DestinationIpv6CidrBlock")
            if not text or route.get("Origin") == "CreateRouteTable":
                continue
            yield self._listed(table["RouteTableId"], Prefix.parse(text), route)

    def _listed(self, table: str, dst: Prefix, route: Mapping[str, Any]) -> Listed:
        is_active = route.get("State") == "active"
        interface = route.get("NetworkInterfaceId", "")
        if interface in self._here.interfaces:
            is_right = is_active and interface == self._here.interface
            return Listed(table, dst, interface, Owner.SELF, is_usable=is_right)
        if interface:
            owner = Owner.UNKNOWN if is_active else Owner.FABRIC
            return Listed(table, dst, interface, owner, is_usable=is_active)
        target = next((str(route[key]) for key in _OTHER_TARGETS if route.get(key)), "another next hop")
        return Listed(table, dst, target, Owner.FOREIGN, is_usable=is_active)

    def identify(self, route: Listed, address: bytes | None) -> Listed:
        if route.owner is not Owner.UNKNOWN:
            return route
        try:
            found = self._describe_interface(route.target)
        except CloudError as error:
            if error.code.startswith("InvalidNetworkInterfaceID"):
                return msgspec.structs.replace(route, owner=Owner.FABRIC, is_usable=False)
            raise
        addresses = {one["PrivateIpAddress"] for one in found.get("PrivateIpAddresses", ())}
        addresses |= {one["Ipv6Address"] for one in found.get("Ipv6Addresses", ())}
        is_known = address is not None and format_address(address) in addresses
        is_ours = is_known or _tags(found).get(_TAG) == self._network
        return msgspec.structs.replace(route, owner=Owner.FABRIC if is_ours else Owner.FOREIGN)

    def add(self, table: str, dst: Prefix) -> Listed:
        _ask(
            "add",
            f"cloud route {dst} via {self._here.interface} in {table}",
            lambda: self._ec2.create_route(**self._route(table, dst, interface=self._here.interface)),
        )
        return self._own(table, dst)

    def replace(self, route: Listed) -> Listed:
        table, dst = route.table, route.dst
        arguments = self._route(table, dst, interface=self._here.interface)
        try:
            _ask("replace", f"cloud route {route}", lambda: self._ec2.replace_route(**arguments))
        except CloudDenied as error:
            if error.code != "UnauthorizedOperation":
                raise
            # flannel's policy has no ec2:ReplaceRoute; what it has does the same with a gap.
            log.info("not allowed to replace a route, deleting and adding it instead: %s", error.reason)
            self.remove(route)
            return self.add(table, dst)
        return self._own(table, dst)

    def remove(self, route: Listed) -> None:
        try:
            _ask(
                "remove",
                f"cloud route {route}",
                lambda: self._ec2.delete_route(**self._route(route.table, route.dst)),
            )
        except CloudError as error:
            if error.code != "InvalidRoute.NotFound":
                raise

    def read_limit(self) -> int | None:
        service, quota = _QUOTA
        quotas = self._client("service-quotas")
        found = _ask(
            "read",
            f"quota {quota} of {service}",
            lambda: quotas.get_service_quota(ServiceCode=service, QuotaCode=quota),
        )
        return int(found["Quota"]["Value"])

    def read_settings(self) -> Mapping[str, str]:
        if self._can_see_interfaces:
            try:
                found = self._describe_interface(self._here.interface)
            except CloudDenied as error:
                if error.code != "UnauthorizedOperation":
                    raise
                self._can_see_interfaces = False
            else:
                mark = {MARK: _tags(found).get(_TAG, "")}
                return {**mark, **self._assumed, CHECK: "on" if found["SourceDestCheck"] else "off"}
        return {MARK: self._network, **self._assumed, **self._read_check()}

    def _read_check(self) -> Mapping[str, str]:
        """As far as flannel's own, smaller policy lets us see."""
        here = self._here
        try:
            found = _ask(
                "read", f"instance {here.id}", lambda: self._ec2.describe_instances(InstanceIds=[here.id])
            )
        except CloudDenied as error:
            if error.code != "UnauthorizedOperation":
                raise
            return {}
        interfaces = [
            one
            for reservation in found["Reservations"]
            for instance in reservation["Instances"]
            for one in instance.get("NetworkInterfaces", ())
        ]
        checks = {one["NetworkInterfaceId"]: one["SourceDestCheck"] for one in interfaces}
        return {CHECK: "on" if checks.get(here.interface, True) else "off"}

    def change_setting(self, name: str, value: str) -> None:
        if name == MARK:
            self._mark(value)
        else:
            self._switch_check_off()
            if not self._can_see_interfaces:
                self._assumed[name] = value  # until somebody lets us see it

    def _mark(self, value: str) -> None:
        interface = self._here.interface
        try:
            _ask(
                "tag",
                interface,
                lambda: self._ec2.create_tags(Resources=[interface], Tags=[{"Key": _TAG, "Value": value}]),
            )
        except CloudDenied as error:
            # It helps others to tell this host's routes once it is gone. Nothing that works needs it.
            log.info("interface not tagged: %s", error)
            self._assumed[MARK] = value

    def _switch_check_off(self) -> None:
        here, off = self._here, {"Value": False}
        try:
            _ask(
                "switch off",
                f"{CHECK} of {here.interface}",
                lambda: self._ec2.modify_network_interface_attribute(
                    NetworkInterfaceId=here.interface, SourceDestCheck=off
                ),
            )
        except CloudDenied as error:
            if error.code != "UnauthorizedOperation":
                raise
            _ask(
                "switch off",
                f"{CHECK} of {here.id}",
                lambda: self._ec2.modify_instance_attribute(InstanceId=here.id, SourceDestCheck=off),
            )

    def _describe_interface(self, interface: str) -> Mapping[str, Any]:
        found = _ask(
            "read",
            f"network interface {interface}",
            lambda: self._ec2.describe_network_interfaces(NetworkInterfaceIds=[interface]),
        )
        first: Mapping[str, Any] = found["NetworkInterfaces"][0]
        return first

    def _own(self, table: str, dst: Prefix) -> Listed:
        return Listed(table, dst, self._here.interface, Owner.SELF)

    def _route(self, table: str, dst: Prefix, *, interface: str = "") -> dict[str, str]:
        key = "DestinationCidrBlock" if dst.family is Family.IPV4 else "DestinationIpv6CidrBlock"
        arguments = {"RouteTableId": table, key: str(dst)}
        return {**arguments, "NetworkInterfaceId": interface} if interface else arguments

    @property
    def _here(self) -> Instance:
        assert self._instance is not None, "attach() comes first"
        return self._instance

    @property
    def _ec2(self) -> Any:
        return self._client("ec2")

    def _client(self, service: str) -> Any:
        if service not in self._clients:
            import boto3  # noqa: PLC0415 - 35 MB that hosts outside of AWS do not pay
            from botocore.config import Config  # noqa: PLC0415

            quiet("boto3", "botocore", "urllib3")
            # One try: when to try again is the reconciler's to say, for all clouds alike.
            settings = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=20)
            session = boto3.Session(region_name=self._here.region)
            self._clients[service] = _ask(
                "open", f"AWS {service}", lambda: session.client(service, config=settings)
            )
        return self._clients[service]


def _read_instance(address: bytes) -> Instance:
    """Ask the metadata service, with a session token (IMDSv2) where it has them."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise CloudError(
            "read", "AWS metadata", "AWS_EC2_METADATA_DISABLED is true", hint="unset it for this backend"
        )
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _METADATA
    metadata = Metadata("AWS", base, headers={}, hint=_METADATA_HINT)
    try:
        metadata.begin_session("X-aws-ec2-metadata-token")
        interfaces = dict(_read_interfaces(metadata))
        region = metadata.find("/latest/meta-data/placement/region") or region_of_zone(
            metadata.get("/latest/meta-data/placement/availability-zone")
        )
        wanted = format_address(address)
        for interface, (path, addresses) in interfaces.items():
            if wanted in addresses:
                return Instance(
                    id=metadata.get("/latest/meta-data/instance-id"),
                    interface=interface,
                    interfaces=frozenset(interfaces),
                    region=region,
                    vpc=metadata.get(f"{path}vpc-id"),
                    subnet=metadata.get(f"{path}subnet-id"),
                )
    finally:
        metadata.close()
    has = "; ".join(f"{name}: {', '.join(its)}" for name, (_, its) in interfaces.items()) or "none"
    raise CloudError(
        "find",
        f"network interface with address {wanted}",
        f"the instance has {has}",
        hint="choose an interface of the instance with --iface",
    )


def _read_interfaces(metadata: Metadata) -> Iterator[tuple[str, tuple[str, frozenset[str]]]]:
    """Each network interface's ID, with its path and its addresses."""
    base = "/latest/meta-data/network/interfaces/macs/"
    for mac in metadata.get(base).split():
        path = f"{base}{mac.rstrip('/')}/"
        addresses = f"{metadata.find(f'{path}local-ipv4s') or ''} {metadata.find(f'{path}ipv6s') or ''}"
        yield metadata.get(f"{path}interface-id"), (path, frozenset(addresses.split()))


def region_of_zone(zone: str) -> str:
    """The region of an availability zone, local zones (``us-west-2-lax-1a``) included.

    Raises:
        CloudError: it has another form.
    """
    match = re.match(r"[a-z]+(?:-[a-z]+)+-\d+", zone)
    if match is None:
        raise CloudError("find", f"region of availability zone {zone!r}", "not of the form us-east-1a")
    return match[0]


def _serving(tables: Iterable[Mapping[str, Any]], subnet: str) -> Mapping[str, Any] | None:
    """The table that a subnet uses: its own, else the VPC's main one."""
    main = None
    for table in tables:
        for association in table.get("Associations", ()):
            if association.get("SubnetId") == subnet:
                return table
            if association.get("Main"):
                main = table
    return main


def _count(routes: Iterable[Mapping[str, Any]]) -> int:
    """How many count against the quota, which is one for each address family."""
    made = [route for route in routes if route.get("Origin") == "CreateRoute"]
    newer = sum("DestinationIpv6CidrBlock" in route for route in made)
    return max(newer, len(made) - newer)


def _tags(found: Mapping[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in found.get("TagSet", ())}


def _ask(operation: str, subject: str, call: Callable[[], T]) -> T:
    """What a call returns; the one place where botocore's exceptions become ours."""
    from botocore import exceptions  # noqa: PLC0415
    from botocore.parsers import ResponseParserError  # noqa: PLC0415

    try:
        return call()
    except exceptions.ClientError as error:
        raise _refusal(operation, subject, error.response.get("Error", {})) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError) as error:
        raise CloudDenied(operation, subject, shorten(error), hint=_CREDENTIALS_HINT) from error
    except (exceptions.CredentialRetrievalError, exceptions.MetadataRetrievalError) as error:
        raise CloudDenied(operation, subject, shorten(error), hint=_CREDENTIALS_HINT) from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError, ResponseParserError) as error:
        raise CloudUnavailable(operation, subject, shorten(error)) from error
    except exceptions.BotoCoreError as error:
        raise CloudError(operation, subject, shorten(error)) from error


def _refusal(operation: str, subject: str, said: Mapping[str, Any]) -> CloudError:
    code, reason = str(said.get("Code", "")), shorten(said.get("Message"))
    hint = _HINTS.get(code, "")
    if code in _THROTTLED or code.startswith("5"):
        return CloudUnavailable(operation, subject, reason, code=code)
    if code in _DENIED or code in _EXPIRED:
        return CloudDenied(operation, subject, reason, code=code, hint=hint or _CREDENTIALS_HINT)
    if code == "RouteLimitExceeded":
        return RoutesFull(operation, subject, reason, code=code)
    return CloudError(operation, subject, reason, code=code, hint=hint)
