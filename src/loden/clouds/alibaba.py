# SPDX-License-Identifier: Apache-2.0
"""Alibaba Cloud VPC: route entries that lead to this instance (COMPAT §8.3).

Entries carry a name of ours. Those that flannel made have none: they are recognised by their next hop, which
is this instance, or the one that has the address in the last lease of the subnet.

The calls go through the vendor's OpenAPI client without its generated classes, of which there are thousands
(docs/adr/0002-alibaba-client.md).
"""

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from loden.address import Prefix, format_address
from loden.clouds.metadata import Metadata
from loden.clouds.words import quiet, shorten
from loden.errors import CloudDenied, CloudError, CloudUnavailable, RoutesFull
from loden.secret import Secret
from loden.tables.cloud import Limits, Listed, Listing, Owner

T = TypeVar("T")

CHECK = "source/destination check"
_METADATA = "http://100.100.100.200"
_METADATA_HINT = (
    "this host is no ECS instance in a VPC, or its metadata service is off; in a container, more hops: "
    "aliyun ecs ModifyInstanceMetadataOptions --HttpPutResponseHopLimit 2"
)
_VPC, _ECS, _QUOTAS = ("vpc", "2016-04-28"), ("ecs", "2014-05-26"), ("quotas", "2020-05-10")
_SETTLED = frozenset(("Available", "Created"))
_WAIT_S = 45.0
_TABLE_AGE_S = 3600.0
_INSTANCES = frozenset(("Instance", "NetworkInterface"))
_CREDENTIALS_HINT = (
    "set AccessKeyID and AccessKeySecret, or ACCESS_KEY_ID and ACCESS_KEY_SECRET, or give the instance a RAM "
    "role; the policy is in docs/backends/ali-vpc.md"
)
_GONE = frozenset(("InvalidRouteEntry.NotFound", "InvalidRouteEntryId.NotFound", "InvalidRouteEntryNotFound"))
_BUSY = frozenset(
    (
        *("IncorrectRouteEntryStatus", "IncorrectVpcStatus", "TaskConflict", "OperationConflict"),
        *(
            "LastTokenProcessing",
            "OperationFailed.LastTokenProcessing",
            "ServiceUnavailable",
            "InternalError",
        ),
        *("SystemBusy", "UnknownError"),
    )
)
_DENIED_PREFIXES = (
    "InvalidAccessKey",
    "InvalidSecurityToken",
    "SignatureDoesNotMatch",
    "Forbidden",
    "NoPermission",
)


class Instance(msgspec.Struct, frozen=True):
    """Which instance this is.

    Args:
        id: such as ``i-bp1abcdefghijklmnopq``.
        interface: the network interface with the address that peers use.
        is_primary: whether that is the instance's first one, which a route to the instance leads to.
        region, vpc, vswitch: where it is.
    """

    id: str
    interface: str
    is_primary: bool
    region: str
    vpc: str
    vswitch: str

    @property
    def hop(self) -> tuple[str, str]:
        """The next hop of its routes: type and ID."""
        return ("Instance", self.id) if self.is_primary else ("NetworkInterface", self.interface)


class Alibaba:
    """One instance's access to its VPC; the methods are those of :class:`loden.tables.cloud.Cloud`.

    Args:
        address: the instance's private address (packed) that peers use.
        key_id, key_secret: of the account; both empty for the instance's role.
        tables: IDs of route tables; none to find the one that serves the instance's vSwitch.
    """

    name = "Alibaba Cloud"
    #: Between two looks at an entry in the making, and before the first, seconds.
    poll_s = 1.0
    limits = Limits(200, "raise 'custom route entries in a route table' for VPC in the Quota Center")

    def __init__(
        self, *, address: bytes, key_id: Secret, key_secret: Secret, tables: Sequence[str] = ()
    ) -> None:
        self._address = address
        self._given = tuple(tables)
        self._key_id = key_id
        self._key_secret = key_secret
        self._instance: Instance | None = None
        self._clients: dict[str, Any] = {}
        self._credentials: Any = None
        self._table = ""
        self._table_at = 0.0

    def attach(self) -> str:
        if self._instance is None:
            self._instance = _read_instance(self._address)
        here = self._instance
        return f"instance {here.id}, interface {here.interface}, {here.vpc} in {here.region}"

    def list_routes(self) -> Listing:
        tables = self._given or (self._find_table(),)
        try:
            entries = {table: list(self._describe_entries(table)) for table in tables}
        except CloudError as error:
            if error.code.startswith("InvalidRouteTableId"):
                self._table = ""  # it went, and the next look finds another
            raise
        listed = tuple(self._listed(entry) for found in entries.values() for entry in found)
        return Listing(tables, listed, {table: len(found) for table, found in entries.items()})

    def _find_table(self) -> str:
        """The route table that serves this instance's vSwitch: its own, else the VPC's first one."""
        if not self._table or time.monotonic() - self._table_at > _TABLE_AGE_S:
            here, own, system = self._here, "", ""
            for table in self._describe_tables():
                if here.vswitch in table.get("VSwitchIds", {}).get("VSwitchId", ()):
                    own = table["RouteTableId"]
                elif table.get("RouteTableType") == "System":
                    system = system or table["RouteTableId"]
            self._table = own or system
            self._table_at = time.monotonic()
            if not self._table:
                raise CloudError("find", f"route table of {here.vswitch} in {here.vpc}", "the VPC has none")
        return self._table

    def _describe_tables(self) -> Iterator[Mapping[str, Any]]:
        here, number = self._here, 1
        while True:
            page = self._ask(
                f"list route tables of {here.vpc}",
                _VPC,
                "DescribeRouteTableList",
                {"VpcId": here.vpc, "PageNumber": number, "PageSize": 50},
            )
            found = page.get("RouterTableList", {}).get("RouterTableListType", ())
            yield from found
            if not found or number * 50 >= int(page.get("TotalCount", 0)):
                return
            number += 1

    def _describe_entries(self, table: str, **filters: str) -> Iterator[Mapping[str, Any]]:
        token = ""
        while True:
            arguments = {"RouteTableId": table, "RouteEntryType": "Custom", "MaxResult": 100, **filters}
            if token:
                arguments["NextToken"] = token
            page = self._ask(f"list routes of {table}", _VPC, "DescribeRouteEntryList", arguments)
            yield from page.get("RouteEntrys", {}).get("RouteEntry", ())
            token = str(page.get("NextToken") or "")
            if not token:
                return

    def _listed(self, entry: Mapping[str, Any]) -> Listed:
        dst = Prefix.parse(str(entry["DestinationCidrBlock"]))
        hops = entry.get("NextHops", {}).get("NextHop") or [{}]
        kind, target = str(hops[0].get("NextHopType", "")), str(hops[0].get("NextHopId", ""))
        if len(hops) > 1:
            owner = Owner.FOREIGN
        elif (kind, target) == self._here.hop:
            owner = Owner.SELF
        elif target in (self._here.id, self._here.interface) or entry.get("RouteEntryName") == entry_name(
            dst
        ):
            owner = Owner.FABRIC
        else:
            owner = Owner.UNKNOWN if kind in _INSTANCES else Owner.FOREIGN
        return Listed(
            str(entry.get("RouteTableId") or self._table),
            dst,
            target or kind or "nothing",
            owner,
            handle=str(entry.get("RouteEntryId", "")),
            is_usable=str(hops[0].get("Enabled", 1)) != "0",
            is_settled=entry.get("Status") in _SETTLED,
        )

    def identify(self, route: Listed, address: bytes | None) -> Listed:
        if route.owner is not Owner.UNKNOWN:
            return route
        owner = Owner.FOREIGN
        if address is not None:
            found = self._describe_interfaces({"PrimaryIpAddress": format_address(address)})
            ids = {str(one.get(key)) for one in found for key in ("InstanceId", "NetworkInterfaceId")}
            owner = Owner.FABRIC if route.target in ids else Owner.FOREIGN
        return msgspec.structs.replace(route, owner=owner)

    def add(self, table: str, dst: Prefix) -> Listed:
        kind, target = self._here.hop
        doing = f"add cloud route {dst} via {target} in {table}"
        answer = self._ask(
            doing,
            _VPC,
            "CreateRouteEntry",
            {
                "RouteTableId": table,
                "DestinationCidrBlock": str(dst),
                "NextHopType": kind,
                "NextHopId": target,
                "RouteEntryName": entry_name(dst),
                "Description": "made by loden",
                "ClientToken": str(uuid.uuid4()),
            },
        )
        return self._wait(doing, table, dst, str(answer.get("RouteEntryId", "")))

    def replace(self, route: Listed) -> Listed:
        kind, target = self._here.hop
        doing = f"replace cloud route {route}"
        self._ask(
            doing,
            _VPC,
            "ModifyRouteEntry",
            {
                "RouteEntryId": route.handle,
                "NewNextHopType": kind,
                "NewNextHopId": target,
                "RouteEntryName": entry_name(route.dst),
            },
        )
        return self._wait(doing, route.table, route.dst, route.handle)

    def _wait(self, doing: str, table: str, dst: Prefix, handle: str) -> Listed:
        """Wait for this one entry, not for others', until it carries packets."""
        operation, _, subject = doing.partition(" ")
        deadline = time.monotonic() + _WAIT_S
        filters = {"DestinationCidrBlock": str(dst)}
        if handle:
            filters["RouteEntryId"] = handle
        while True:
            time.sleep(self.poll_s)
            entries = list(self._describe_entries(table, **filters))
            found = [one for one in map(self._listed, entries) if one.owner is Owner.SELF]
            if found and found[0].is_settled:
                return found[0]
            if not entries:
                raise CloudError(operation, subject, "the cloud took it and dropped it again")
            if time.monotonic() > deadline:
                status = entries[0].get("Status", "unknown")
                raise CloudUnavailable(operation, subject, f"still {status} after {_WAIT_S:g} s")

    def remove(self, route: Listed) -> None:
        try:
            self._ask(
                f"remove cloud route {route}",
                _VPC,
                "DeleteRouteEntry",
                {"RouteTableId": route.table, "RouteEntryId": route.handle},
            )
        except CloudError as error:
            if error.code not in _GONE:
                raise

    def read_limit(self) -> int | None:
        found = self._ask(
            "read quota vpc_quota_route_entrys_num",
            _QUOTAS,
            "GetProductQuota",
            {"ProductCode": "vpc", "QuotaActionCode": "vpc_quota_route_entrys_num"},
        )
        total = found.get("Quota", {}).get("TotalQuota")
        return int(total) if total else None

    def read_settings(self) -> Mapping[str, str]:
        try:
            found = self._describe_interfaces({"NetworkInterfaceId.1": self._here.interface})
        except CloudDenied as error:
            if not error.code.startswith(("Forbidden", "NoPermission")):
                raise
            return {CHECK: "off"}  # as it is unless somebody switched it on, which this host may not see
        return {CHECK: "on" if found and found[0].get("SourceDestCheck") else "off"}

    def _describe_interfaces(self, which: Mapping[str, str]) -> list[Mapping[str, Any]]:
        page = self._ask(
            f"read network interface {next(iter(which.values()))}",
            _ECS,
            "DescribeNetworkInterfaces",
            {"VpcId": self._here.vpc, **which},
        )
        return list(page.get("NetworkInterfaceSets", {}).get("NetworkInterfaceSet", ()))

    def change_setting(self, name: str, value: str) -> None:
        del value  # it has to be off, and nothing else is asked for
        interface = self._here.interface
        self._ask(
            f"change {name} of {interface}",
            _ECS,
            "ModifyNetworkInterfaceAttribute",
            {"NetworkInterfaceId": interface, "SourceDestCheck": "false"},
        )

    @property
    def _here(self) -> Instance:
        assert self._instance is not None, "attach() comes first"
        return self._instance

    def _ask(
        self, doing: str, service: tuple[str, str], action: str, arguments: Mapping[str, object]
    ) -> Mapping[str, Any]:
        """The JSON that one call of an RPC-style API answers."""
        operation, _, subject = doing.partition(" ")
        return _translated(
            operation,
            subject,
            lambda: self._call(service, action, {"RegionId": self._here.region, **arguments}),
        )

    def _call(self, service: tuple[str, str], action: str, query: Mapping[str, object]) -> Mapping[str, Any]:
        from alibabacloud_tea_openapi import utils_models as models  # noqa: PLC0415
        from darabonba.runtime import RuntimeOptions  # noqa: PLC0415

        product, version = service
        params = models.Params(
            action=action,
            version=version,
            protocol="HTTPS",
            pathname="/",
            method="POST",
            auth_type="AK",
            style="RPC",
            req_body_type="formData",
            body_type="json",
        )
        request = models.OpenApiRequest(query={key: str(value) for key, value in query.items()})
        patience = RuntimeOptions(connect_timeout=5_000, read_timeout=20_000)
        body = self._client(product).call_api(params, request, patience)["body"]
        if not isinstance(body, dict):
            raise CloudUnavailable(action, product, "the answer is not the API's: no JSON object")
        return body

    def _client(self, product: str) -> Any:
        if product not in self._clients:
            from alibabacloud_tea_openapi import utils_models as models  # noqa: PLC0415
            from alibabacloud_tea_openapi.client import Client  # noqa: PLC0415 - 40 MB

            scheme, endpoint = _endpoint(product, self._here.region)
            self._clients[product] = Client(
                models.Config(
                    credential=self._open_credentials(),
                    region_id=self._here.region,
                    protocol=scheme,
                    endpoint=endpoint,
                )
            )
        return self._clients[product]

    def _open_credentials(self) -> Any:
        if self._credentials is None:
            from alibabacloud_credentials import provider  # noqa: PLC0415
            from alibabacloud_credentials.client import Client  # noqa: PLC0415

            quiet("credentials", "alibabacloud", "Tea", "darabonba", "urllib3")
            # It brings a handler of its own, which would print everything twice.
            logging.getLogger("credentials").handlers.clear()
            if self._key_id:
                source = provider.StaticAKCredentialsProvider(
                    access_key_id=self._key_id.reveal(), access_key_secret=self._key_secret.reveal()
                )
            else:
                # Fetched when they are about to expire, by whoever needs them: no thread of their own.
                source = provider.EcsRamRoleCredentialsProvider(async_update_enabled=False)
            self._credentials = Client(provider=source)
        return self._credentials


def entry_name(dst: Prefix) -> str:
    """The name of an entry of ours."""
    return f"loden-{str(dst).replace('.', '-').replace('/', '-')}"


def _endpoint(product: str, region: str) -> tuple[str, str]:
    """Scheme and host of an API; the environment overrides it, as ``ECS_ENDPOINT`` always did."""
    usual = "quotas.aliyuncs.com" if product == "quotas" else f"{product}.{region}.aliyuncs.com"
    given = (os.environ.get(f"{product.upper()}_ENDPOINT") or usual).rstrip("/")
    scheme, mark, host = given.partition("://")
    return (scheme.upper(), host) if mark else ("HTTPS", given)


def _read_instance(address: bytes) -> Instance:
    """Ask the metadata service, with a session token where it has them."""
    base = os.environ.get("ALIBABA_CLOUD_METADATA_ENDPOINT") or _METADATA
    metadata = Metadata("Alibaba Cloud", base, headers={}, hint=_METADATA_HINT)
    try:
        metadata.begin_session("X-aliyun-ecs-metadata-token")
        root, wanted, seen = "/latest/meta-data/", format_address(address), []
        first = metadata.get(f"{root}mac")
        for mac in metadata.get(f"{root}network/interfaces/macs/").split():
            path = f"{root}network/interfaces/macs/{mac.rstrip('/')}/"
            own = metadata.get(f"{path}primary-ip-address")
            seen.append(own)
            if own == wanted:
                return Instance(
                    id=metadata.get(f"{root}instance-id"),
                    interface=metadata.get(f"{path}network-interface-id"),
                    is_primary=mac.rstrip("/") == first,
                    region=metadata.get(f"{root}region-id"),
                    vpc=metadata.get(f"{path}vpc-id"),
                    vswitch=metadata.get(f"{path}vswitch-id"),
                )
    finally:
        metadata.close()
    raise CloudError(
        "find",
        f"network interface with address {wanted}",
        f"the instance has {', '.join(seen) or 'none'}",
        hint="choose an interface of the instance with --iface",
    )


def _translated(operation: str, subject: str, call: Callable[[], T]) -> T:
    """What a call returns; the one place where the exceptions of the vendor's client become ours."""
    from alibabacloud_credentials.exceptions import CredentialException  # noqa: PLC0415
    from darabonba.exceptions import DaraException, RetryError, UnretryableException  # noqa: PLC0415
    from Tea.exceptions import TeaException  # noqa: PLC0415
    from Tea.exceptions import UnretryableException as TeaUnretryable  # noqa: PLC0415

    refusal: CloudError
    try:
        return call()
    except (DaraException, TeaException) as error:
        code = str(getattr(error, "code", "") or "")
        status = getattr(error, "status_code", None) or getattr(error, "statusCode", None) or 0
        refusal = _refusal(operation, subject, code, int(status), error.message)
    except CredentialException as error:
        refusal = CloudDenied(operation, subject, shorten(error), hint=_CREDENTIALS_HINT)
    except (RetryError, UnretryableException, TeaUnretryable, OSError) as error:
        refusal = CloudUnavailable(operation, subject, shorten(_without_url(error)))
    # Not chained: their exceptions keep the request and what it was signed by, and the answer that quotes it.
    raise refusal


def _without_url(error: Exception) -> str:
    """A transport's error without the request, which it quotes."""
    text = str(error)
    return text.rpartition("(Caused by ")[2] or text if "url:" in text else text


def _refusal(operation: str, subject: str, code: str, status: int, message: object) -> CloudError:
    reason = shorten(message)
    if "QuotaExceeded" in code or "LimitExceeded" in code:
        return RoutesFull(operation, subject, reason, code=code)
    if code.startswith("Throttling") or code in _BUSY or status >= 500 or status == 429:
        return CloudUnavailable(operation, subject, reason, code=code)
    if code.startswith(_DENIED_PREFIXES) or "Expired" in code or status in (401, 403):
        return CloudDenied(operation, subject, reason, code=code, hint=_CREDENTIALS_HINT)
    return CloudError(operation, subject, reason, code=code)
