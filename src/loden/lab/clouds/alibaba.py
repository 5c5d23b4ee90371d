# SPDX-License-Identifier: Apache-2.0
"""A double of Alibaba Cloud: the VPC, ECS and quota calls of its RPC-style API.

It checks what a request is signed with, in the form of today's clients (ACS3-HMAC-SHA256, in headers) and in
the older one (HMAC-SHA1, in parameters). A route entry that is made is first ``Creating``.
"""

import base64
import hashlib
import hmac
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import msgspec

from loden.address import Prefix
from loden.lab.clouds.http import Answer, Request, json_answer
from loden.lab.clouds.journal import Call, Journal
from loden.lab.clouds.machines import Machine, View

REGION, VPC, KEY_ID = "cn-hangzhou", "vpc-lab0000000001", "STS.LodenLab0001"
_READS = ("Describe", "Get", "List")
_PARTS = ("Format", "Signature", "SignatureMethod", "SignatureNonce", "SignatureVersion", "Timestamp")


class AlibabaDouble:
    """A VPC with machines; the methods are those of :class:`loden.lab.clouds.machines.Double`.

    Args:
        machines: each becomes an instance in a vSwitch.
        journal: of the calls.
        secret: of the role that the metadata service hands out.
        changed: told after each call that changed something.
    """

    def __init__(
        self,
        machines: Sequence[Machine],
        *,
        journal: Journal | None = None,
        secret: str = "lab-secret-of-the-role",
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.journal = journal or Journal()
        self.secret = secret
        self.limit = 200
        self.settle_s = 0.02  # how long an entry is in the making
        self.keys = {KEY_ID: secret}
        self.denied: set[str] = set()
        self.page_size = 0
        self._changed = changed
        self._lock = threading.RLock()
        self._machines = {one.ip: one for one in machines}
        self.instances = {one.name: f"i-lab{one.number:04}" for one in machines}
        self.interfaces = {one.name: f"eni-lab{one.number:04}" for one in machines}
        self.checks = {one.name: False for one in machines}
        self.tables: dict[str, dict[str, Any]] = {}
        self.main_table = self.add_table("System", ())

    def add_table(self, kind: str, switches: Sequence[str]) -> str:
        """A route table; its ID."""
        name = f"vtb-lab{len(self.tables):04}"
        self.tables[name] = {"kind": kind, "switches": list(switches), "entries": {}}
        return name

    def put_entry(self, destination: str, target: str, *, kind: str = "Instance", name: str = "") -> None:
        """Make a route entry in the main table as somebody else would."""
        self._put_entry(self.main_table, destination, kind, target, name, settle_s=0.0)
        self._changed()

    def _put_entry(
        self, table: str, destination: str, kind: str, target: str, name: str, *, settle_s: float
    ) -> dict[str, Any]:
        entry = {
            "id": f"rte-{uuid.uuid4().hex[:12]}",
            "destination": destination,
            "kind": kind,
            "target": target,
            "name": name,
            "ready": time.monotonic() + settle_s,
            "late": None,
        }
        self.tables[table]["entries"][destination] = entry
        return entry

    def terminate(self, name: str) -> None:
        """End an instance; its entries stay, and lead nowhere."""
        with self._lock:
            del self.instances[name]
        self._changed()

    def routes(self, table: str | None = None) -> dict[str, str]:
        """Destination and next hop of the entries of a table."""
        entries = self.tables[table or self.main_table]["entries"].values()
        return {entry["destination"]: entry["target"] for entry in entries}

    def answer(self, request: Request) -> Answer:
        action = request.headers.get("x-acs-action") or request.query.get("Action", "")
        with self._lock:
            answer = self._refuse(action, request) or self._work(action, request.query)
        is_write = not action.startswith(_READS)
        said = msgspec.json.decode(answer.body)
        outcome = "ok" if answer.status < 300 else said["Code"]
        parameters = {name: value for name, value in request.query.items() if name not in _PARTS}
        self.journal.note(Call(action, is_write, parameters, request.client, outcome))
        if is_write and answer.status < 300:
            self._changed()
        return answer

    def _refuse(self, action: str, request: Request) -> Answer | None:
        fault = self.journal.take_fault(action)
        if fault is not None:
            return _error(fault.status, fault.code, fault.message)
        code = check_signature(request, self.keys)
        if code:
            return _error(404 if "NotFound" in code else 400, code, f"server string to sign is:{self.secret}")
        if action in self.denied:
            return _error(403, "Forbidden.RAM", "User not authorized to operate on the specified resource.")
        return None

    def _work(self, action: str, query: Mapping[str, str]) -> Answer:
        known: dict[str, Callable[[Mapping[str, str]], Answer]] = {
            "DescribeRouteTableList": self._list_tables,
            "DescribeRouteEntryList": self._list_entries,
            "CreateRouteEntry": self._create,
            "ModifyRouteEntry": self._modify,
            "DeleteRouteEntry": self._delete,
            "DescribeNetworkInterfaces": self._list_interfaces,
            "ModifyNetworkInterfaceAttribute": self._modify_interface,
            "GetProductQuota": self._quota,
        }
        if action not in known:
            return _error(404, "InvalidAction.NotFound", "Specified api is not found.")
        return known[action](query)

    def _list_tables(self, query: Mapping[str, str]) -> Answer:
        size, number = int(query.get("PageSize", 10)), int(query.get("PageNumber", 1))
        found = [
            {
                "RouteTableId": name,
                "RouteTableType": table["kind"],
                "VSwitchIds": {"VSwitchId": table["switches"]},
                "VpcId": VPC,
            }
            for name, table in self.tables.items()
        ]
        page = found[(number - 1) * size : number * size]
        return _ok(
            RouterTableList={"RouterTableListType": page},
            TotalCount=len(found),
            PageNumber=number,
            PageSize=size,
        )

    def _list_entries(self, query: Mapping[str, str]) -> Answer:
        table = self.tables.get(query.get("RouteTableId", ""))
        if table is None:
            return _error(404, "InvalidRouteTableId.NotFound", "The specified route table does not exist.")
        found = []
        self._drop_late(table)
        for entry in table["entries"].values():
            wanted = (("DestinationCidrBlock", "destination"), ("RouteEntryId", "id"))
            if all(query.get(name, entry[key]) == entry[key] for name, key in wanted):
                found.append(self._shown(query["RouteTableId"], entry))
        size = min(int(query.get("MaxResult", 50)), self.page_size or 100)
        first = int(query.get("NextToken") or 0)
        more = {"NextToken": str(first + size)} if first + size < len(found) else {}
        return _ok(RouteEntrys={"RouteEntry": found[first : first + size]}, **more)

    def _shown(self, table: str, entry: Mapping[str, Any]) -> dict[str, object]:
        hop = {"NextHopType": entry["kind"], "NextHopId": entry["target"], "Enabled": 1, "Weight": 0}
        return {
            "RouteTableId": table,
            "RouteEntryId": entry["id"],
            "RouteEntryName": entry["name"],
            "DestinationCidrBlock": entry["destination"],
            "Type": "Custom",
            "Status": "Available" if _is_ready(entry) else "Creating",
            "NextHops": {"NextHop": [hop]},
        }

    def _drop_late(self, table: Mapping[str, Any]) -> None:
        """What was taken, and then did not work."""
        entries = table["entries"].values()
        for entry in [one for one in entries if one["late"] is not None and _is_ready(one)]:
            del table["entries"][entry["destination"]]

    def _create(self, query: Mapping[str, str]) -> Answer:
        table, destination = query.get("RouteTableId", ""), query.get("DestinationCidrBlock", "")
        if table not in self.tables:
            return _error(404, "InvalidRouteTableId.NotFound", "The specified route table does not exist.")
        entries = self.tables[table]["entries"]
        if destination in entries:
            return _error(400, "RouterEntryConflict.Duplicated", "The route entry already exists.")
        if len(entries) >= self.limit:
            return _error(400, "QuotaExceeded.RouteEntry", "The route entry quota is exceeded.")
        entry = self._put_entry(
            table,
            destination,
            query.get("NextHopType", ""),
            query.get("NextHopId", ""),
            query.get("RouteEntryName", ""),
            settle_s=self.settle_s,
        )
        entry["late"] = self.journal.take_fault("CreateRouteEntry", late=True)
        return _ok(RouteEntryId=entry["id"])

    def _modify(self, query: Mapping[str, str]) -> Answer:
        for table in self.tables.values():
            for entry in table["entries"].values():
                if entry["id"] == query.get("RouteEntryId"):
                    entry["target"] = query.get("NewNextHopId", entry["target"])
                    entry["kind"] = query.get("NewNextHopType", entry["kind"])
                    entry["name"] = query.get("RouteEntryName", entry["name"])
                    entry["ready"] = time.monotonic() + self.settle_s
                    return _ok()
        return _error(404, "InvalidRouteEntryId.NotFound", "The specified route entry does not exist.")

    def _delete(self, query: Mapping[str, str]) -> Answer:
        entries = self.tables.get(query.get("RouteTableId", ""), {"entries": {}})["entries"]
        for destination, entry in entries.items():
            if entry["id"] == query.get("RouteEntryId"):
                del entries[destination]
                return _ok()
        return _error(404, "InvalidRouteEntry.NotFound", "The specified route entry does not exist.")

    def _list_interfaces(self, query: Mapping[str, str]) -> Answer:
        found = [
            {
                "NetworkInterfaceId": self.interfaces[one.name],
                "InstanceId": self.instances[one.name],
                "PrivateIpAddress": one.ip,
                "MacAddress": one.mac.hex(":"),
                "VpcId": VPC,
                "SourceDestCheck": self.checks[one.name],
            }
            for one in self._machines.values()
            if one.name in self.instances
            and query.get("NetworkInterfaceId.1") in (None, self.interfaces[one.name])
            and query.get("PrimaryIpAddress") in (None, one.ip)
        ]
        return _ok(NetworkInterfaceSets={"NetworkInterfaceSet": found}, TotalCount=len(found))

    def _modify_interface(self, query: Mapping[str, str]) -> Answer:
        for name, interface in self.interfaces.items():
            if interface == query.get("NetworkInterfaceId"):
                self.checks[name] = query.get("SourceDestCheck") == "true"
                return _ok()
        return _error(404, "InvalidEniId.NotFound", "The specified network interface does not exist.")

    def _quota(self, query: Mapping[str, str]) -> Answer:
        if query.get("QuotaActionCode") != "vpc_quota_route_entrys_num":
            return _error(404, "QUOTA.NOT.EXISTED", "The quota does not exist.")
        return _ok(Quota={"ProductCode": "vpc", "TotalQuota": float(self.limit)})

    def view(self) -> View:
        with self._lock:
            ips = {
                where: one.address
                for one in self._machines.values()
                if one.name in self.instances
                for where in (self.instances[one.name], self.interfaces[one.name])
            }
            routes = {
                Prefix.parse(destination): ips[target]
                for destination, target in self.routes().items()
                if target in ips
            }
            free = {one.address for one in self._machines.values() if not self.checks[one.name]}
        return View(routes, frozenset(free))

    @staticmethod
    def environment(api: str, metadata: str) -> dict[str, str]:
        apis = {f"{name}_ENDPOINT": api for name in ("VPC", "ECS", "QUOTAS")}
        return {**apis, "ALIBABA_CLOUD_METADATA_ENDPOINT": metadata}

    def metadata(self, request: Request) -> Answer:
        if request.path == "/latest/api/token":
            if request.method != "PUT" or "x-aliyun-ecs-metadata-token-ttl-seconds" not in request.headers:
                return Answer(400, b"Bad Request")
            return Answer(200, b"lab-token")
        if request.headers.get("x-aliyun-ecs-metadata-token") != "lab-token":
            return Answer(403, b"Forbidden")
        one = self._machines.get(request.client)
        path = request.path.removeprefix("/latest/meta-data/")
        if one is None or one.name not in self.instances:
            return Answer(404, b"no instance of ours asks")
        if path.startswith("ram/security-credentials/"):
            return self._credentials(path.rpartition("/")[2])
        mac = one.mac.hex(":")
        card = f"network/interfaces/macs/{mac}"
        found = {
            "region-id": REGION,
            "instance-id": self.instances[one.name],
            "vpc-id": VPC,
            "mac": mac,
            "network/interfaces/macs/": f"{mac}/",
            f"{card}/network-interface-id": self.interfaces[one.name],
            f"{card}/primary-ip-address": one.ip,
            f"{card}/vpc-id": VPC,
            f"{card}/vswitch-id": switch_of(one),
        }.get(path)
        return Answer(404, b"not found") if found is None else Answer(200, found.encode())

    def _credentials(self, role: str) -> Answer:
        if not role:
            return Answer(200, b"lab-role")
        return json_answer(
            200,
            {
                "Code": "Success",
                "AccessKeyId": KEY_ID,
                "AccessKeySecret": self.secret,
                "SecurityToken": f"token-of-{self.secret}",
                "LastUpdated": "2020-01-01T00:00:00Z",
                "Expiration": "2037-01-01T00:00:00Z",
            },
        )


def _is_ready(entry: Mapping[str, Any]) -> bool:
    return bool(time.monotonic() >= entry["ready"])


def switch_of(one: Machine) -> str:
    """The vSwitch that a machine is in."""
    return f"vsw-lab{one.number:04}"


def check_signature(request: Request, keys: Mapping[str, str]) -> str:
    """The code of what is wrong with a request's signature; empty where nothing is.

    Args:
        request: as it came.
        keys: secrets by the key's ID.
    """
    authorization = request.headers.get("authorization", "")
    if not authorization.startswith("ACS3-HMAC-SHA256 "):
        return _check_older(request, keys)
    parts = dict(part.strip().split("=", 1) for part in authorization.partition(" ")[2].split(","))
    secret = keys.get(parts.get("Credential", ""))
    if secret is None:
        return "InvalidAccessKeyId.NotFound"
    if hashlib.sha256(request.body).hexdigest() != request.headers.get("x-acs-content-sha256"):
        return "SignatureDoesNotMatch"
    names = parts["SignedHeaders"]
    headers = "".join(f"{name}:{request.headers.get(name, '').strip()}\n" for name in names.split(";"))
    query = "&".join(f"{_quote(name)}={_quote(value)}" for name, value in sorted(request.query.items()))
    digest = request.headers["x-acs-content-sha256"]
    canonical = "\n".join((request.method, request.path, query, headers, names, digest))
    text = f"ACS3-HMAC-SHA256\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    right = hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()
    return "" if hmac.compare_digest(right, parts.get("Signature", "")) else "SignatureDoesNotMatch"


def _check_older(request: Request, keys: Mapping[str, str]) -> str:
    secret = keys.get(request.query.get("AccessKeyId", ""))
    if secret is None:
        return "InvalidAccessKeyId.NotFound"
    signed = sorted((name, value) for name, value in request.query.items() if name != "Signature")
    query = "&".join(f"{_quote(name)}={_quote(value)}" for name, value in signed)
    text = f"{request.method}&{_quote('/')}&{_quote(query)}"
    right = base64.b64encode(hmac.new(f"{secret}&".encode(), text.encode(), hashlib.sha1).digest()).decode()
    return "" if hmac.compare_digest(right, request.query.get("Signature", "")) else "SignatureDoesNotMatch"


def _quote(text: str) -> str:
    return quote(text, safe="~")


def _ok(**members: object) -> Answer:
    return json_answer(200, {"RequestId": str(uuid.uuid4()), **members})


def _error(status: int, code: str, message: str) -> Answer:
    return json_answer(status, {"RequestId": str(uuid.uuid4()), "Code": code, "Message": message})
