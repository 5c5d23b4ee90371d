# SPDX-License-Identifier: Apache-2.0
"""A double of Amazon's EC2: moto's server, with what the real one refuses and moto lets pass.

In front of moto stand: the journal and its faults; the refusal of a second route for one range, of more
routes than the quota, and of credentials that the metadata service did not give; pages; and blackholes.
"""

import io
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlencode
from xml.etree import ElementTree

from loden.address import Prefix
from loden.lab.clouds.http import Answer, Request, json_answer
from loden.lab.clouds.journal import Call, Fault, Journal
from loden.lab.clouds.machines import NETWORK, Machine, View

REGION = "us-west-2"
ZONE = "us-west-2-lax-1a"
KEY_ID = "AKIALODENLAB00000001"
#: What the lab itself signs with: its calls are neither written down nor made to fail.
OWN_KEY_ID = "AKIALODENLABITSELF00"
_IMAGE = "ami-12c6146b"
_XMLNS = re.compile(rb'\sxmlns="[^"]*"')
_READS = ("Describe", "Get", "List")
_CREDENTIAL = re.compile(r"Credential=([^/]+)/")


class AwsDouble:
    """A VPC with machines; the methods are those of :class:`loden.lab.clouds.machines.Double`.

    Args:
        machines: each becomes an instance in a subnet.
        journal: of calls that come over the wire.
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
        from moto.server import DomainDispatcherApplication, create_backend_app  # noqa: PLC0415 - seconds

        self.journal = journal or Journal()
        self.secret = secret
        self.limit = 50
        self.page_size = 0
        self.needs_token = True
        self.denied: set[str] = set()
        self._changed = changed
        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.RLock()  # moto is not made for threads
        self._machines = {one.ip: one for one in machines}
        self._known: dict[str, dict[str, str]] = {}
        self.vpc = self._ask("CreateVpc", "vpcId", CidrBlock=str(NETWORK))
        self.main_table = self._ask(
            "DescribeRouteTables",
            "routeTableId",
            **{"Filter.1.Name": "vpc-id", "Filter.1.Value.1": self.vpc},
        )
        self.subnets: dict[Prefix, str] = {}
        self.instances: dict[str, str] = {}
        self.interfaces: dict[str, str] = {}
        for one in machines:
            self._launch(one)

    def _launch(self, one: Machine) -> None:
        if one.subnet not in self.subnets:
            self.subnets[one.subnet] = self._ask(
                "CreateSubnet", "subnetId", VpcId=self.vpc, CidrBlock=str(one.subnet)
            )
        answer = self._request(
            "RunInstances",
            ImageId=_IMAGE,
            MinCount="1",
            MaxCount="1",
            SubnetId=self.subnets[one.subnet],
            PrivateIpAddress=one.ip,
        )
        self.instances[one.name] = _find(answer.body, "instanceId")
        self.interfaces[one.name] = _find(answer.body, "networkInterfaceId")

    def add_interface(self, name: str, address: str, subnet: Prefix) -> str:
        """A further network interface of a machine; its ID."""
        found = self._ask(
            "CreateNetworkInterface",
            "networkInterfaceId",
            SubnetId=self.subnets[subnet],
            PrivateIpAddress=address,
        )
        self._request(
            "AttachNetworkInterface",
            NetworkInterfaceId=found,
            InstanceId=self.instances[name],
            DeviceIndex="1",
        )
        self._known.clear()
        return found

    def call(self, action: str, **parameters: str) -> str:
        """Do something in the account, as its owner would: not written down; the answer's XML."""
        answer = self._request(action, **parameters)
        assert answer.status == 200, answer.body.decode()
        self._changed()
        return answer.body.decode()

    def terminate(self, name: str) -> None:
        """End an instance: routes to it become blackholes."""
        self.call("TerminateInstances", **{"InstanceId.1": self.instances[name]})

    def answer(self, request: Request) -> Answer:
        action = request.query.get("Action") or request.headers.get("x-amz-target", "").rpartition(".")[2]
        match = _CREDENTIAL.search(request.headers.get("authorization", ""))
        key_id = match[1] if match else ""
        if key_id == OWN_KEY_ID:
            answer = self._pass_on(request)
            self._changed()
            return answer
        answer = self._refuse(action, request, key_id) or self._pass_on(request)
        is_write = not action.startswith(_READS)
        outcome = "ok" if answer.status < 300 else _find(answer.body, "Code") or str(answer.status)
        parameters = {
            name: value for name, value in request.query.items() if name not in ("Action", "Version")
        }
        self.journal.note(Call(action, is_write, parameters, request.client, outcome))
        if is_write and answer.status < 300:
            self._changed()
        if action == "DescribeRouteTables" and answer.status == 200:
            return self._as_real(request, answer)
        return answer

    def _refuse(self, action: str, request: Request, key_id: str) -> Answer | None:
        fault = self.journal.take_fault(action)
        if fault is not None:
            return _error(fault)
        if key_id != KEY_ID:
            message = "The AWS Access Key Id you provided does not exist in our records."
            return _error(Fault(action, 401, "InvalidClientTokenId", message))
        if action in self.denied:
            message = (
                "You are not authorized to perform this operation. "
                "Encoded authorization failure message: 3DUsNk1LLLxr0"
            )
            return _error(Fault(action, 403, "UnauthorizedOperation", message))
        if action == "CreateRoute":
            return self._refuse_route(request)
        return None

    def _refuse_route(self, request: Request) -> Answer | None:
        table = request.query.get("RouteTableId", "")
        with self._lock:
            routes = [one for one in self._routes() if one["table"] == table]
        wanted = request.query.get("DestinationCidrBlock") or request.query.get("DestinationIpv6CidrBlock")
        if wanted in [one["dst"] for one in routes]:
            return _error(
                Fault("", 400, "RouteAlreadyExists", f"The route identified by {wanted} already exists.")
            )
        if sum(not one["is_local"] for one in routes) >= self.limit:
            return _error(
                Fault("", 400, "RouteLimitExceeded", "The maximum number of routes has been reached.")
            )
        return None

    def _as_real(self, request: Request, answer: Answer) -> Answer:
        """The listing with blackholes, and in pages."""
        root = _parse(answer.body)
        alive = self._attached()
        for item in root.iter("item"):
            interface = item.findtext("networkInterfaceId")
            state = item.find("state")
            if interface and state is not None and interface not in alive:
                state.text = "blackhole"
        tables = root.find("routeTableSet")
        if self.page_size and tables is not None:
            first = int(request.query.get("NextToken") or 0)
            items = list(tables)
            for place, item in enumerate(items):
                if not first <= place < first + self.page_size:
                    tables.remove(item)
            if first + self.page_size < len(items):
                ElementTree.SubElement(root, "nextToken").text = str(first + self.page_size)
        return Answer(200, ElementTree.tostring(root), answer.kind)

    def _attached(self) -> set[str]:
        """The interfaces that are there, of instances that are not terminated."""
        root = _parse(self._request("DescribeNetworkInterfaces").body)
        there = {str(item.text) for item in root.iter("networkInterfaceId")}
        # The first interface goes with its instance, which moto forgets.
        ours = {f"InstanceId.{number}": one for number, one in enumerate(self.instances.values(), start=1)}
        instances = _parse(self._request("DescribeInstances", **ours).body)
        for item in instances.iterfind("reservationSet/item/instancesSet/item"):
            if item.findtext("instanceState/name") == "terminated":
                name = item.findtext("instanceId")
                there -= {self.interfaces[one] for one, known in self.instances.items() if known == name}
        return there

    def _routes(self) -> list[dict[str, Any]]:
        root = _parse(self._request("DescribeRouteTables").body)
        found = []
        for table in root.iterfind("routeTableSet/item"):
            name = table.findtext("routeTableId")
            for route in table.iterfind("routeSet/item"):
                cidr = route.findtext("destinationCidrBlock")
                found.append(
                    {
                        "table": name,
                        "dst": cidr or route.findtext("destinationIpv6CidrBlock"),
                        "interface": route.findtext("networkInterfaceId"),
                        "is_local": route.findtext("gatewayId") == "local",
                    }
                )
        return found

    def routes(self, table: str | None = None) -> dict[str, str]:
        """Destination and interface of the routes of one table, the main one if none is named."""
        wanted = table or self.main_table
        return {
            one["dst"]: one["interface"] or ""
            for one in self._routes()
            if one["table"] == wanted and not one["is_local"]
        }

    def source_check(self, name: str) -> bool:
        """Whether a machine's packets must have its own address."""
        answer = self._request(
            "DescribeNetworkInterfaceAttribute",
            NetworkInterfaceId=self.interfaces[name],
            Attribute="sourceDestCheck",
        )
        return _find(answer.body, "value") == "true"

    def view(self) -> View:
        with self._lock:
            addresses = {self.interfaces[one.name]: one.address for one in self._machines.values()}
            alive = self._attached()
            routes = {
                Prefix.parse(dst): addresses[interface]
                for dst, interface in self.routes().items()
                if interface in addresses and interface in alive
            }
            free = {
                one.address
                for one in self._machines.values()
                if self.interfaces[one.name] in alive and not self.source_check(one.name)
            }
        return View(routes, frozenset(free))

    @staticmethod
    def environment(api: str, metadata: str) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": api, "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata}

    def metadata(self, request: Request) -> Answer:
        if request.path == "/latest/api/token":
            if request.method != "PUT" or "x-aws-ec2-metadata-token-ttl-seconds" not in request.headers:
                return Answer(400, b"Bad Request")
            return Answer(200, b"lab-token", headers={"X-aws-ec2-metadata-token-ttl-seconds": "300"})
        if self.needs_token and request.headers.get("x-aws-ec2-metadata-token") != "lab-token":
            return Answer(401, b"Unauthorized")
        one = self._machines.get(request.client)
        path = request.path.removeprefix("/latest/")
        if one is None:
            return Answer(404, b"no instance of ours asks")
        if path.startswith("meta-data/iam/security-credentials/"):
            return self._credentials(path.rpartition("/")[2])
        values = self._values(one)
        if path.rstrip("/") == "meta-data/network/interfaces/macs":
            macs = dict.fromkeys(
                name.split("/")[4] for name in values if name.startswith("meta-data/network/interfaces/macs/")
            )
            return Answer(200, "".join(f"{mac}/\n" for mac in macs).encode())
        found = values.get(path)
        return Answer(404, b"not found") if found is None else Answer(200, found.encode())

    def _values(self, one: Machine) -> dict[str, str]:
        """What the metadata service tells a machine; moto takes its time, so it is asked once."""
        if one.name not in self._known:
            self._known[one.name] = self._read_values(one)
        return self._known[one.name]

    def _read_values(self, one: Machine) -> dict[str, str]:
        values = {
            "meta-data/instance-id": self.instances[one.name],
            "meta-data/placement/region": REGION,
            "meta-data/placement/availability-zone": ZONE,
        }
        root = _parse(self._request("DescribeNetworkInterfaces").body)
        items = [
            item
            for item in root.iterfind("networkInterfaceSet/item")
            if item.findtext("attachment/instanceId") == self.instances[one.name]
        ]
        for place, item in enumerate(items):
            mac = one.mac.hex(":") if not place else item.findtext("macAddress")
            path = f"meta-data/network/interfaces/macs/{mac}"
            values[f"{path}/interface-id"] = str(item.findtext("networkInterfaceId"))
            values[f"{path}/local-ipv4s"] = str(item.findtext("privateIpAddress"))
            values[f"{path}/vpc-id"] = self.vpc
            values[f"{path}/subnet-id"] = str(item.findtext("subnetId"))
        return values

    def _credentials(self, role: str) -> Answer:
        if not role:
            return Answer(200, b"lab-role")
        return json_answer(
            200,
            {
                "Code": "Success",
                "Type": "AWS-HMAC",
                "AccessKeyId": KEY_ID,
                "SecretAccessKey": self.secret,
                "Token": f"token-of-{self.secret}",
                "LastUpdated": "2020-01-01T00:00:00Z",
                "Expiration": "2099-01-01T00:00:00Z",
            },
        )

    def _ask(self, action: str, wanted: str, **parameters: str) -> str:
        return _find(self._request(action, **parameters).body, wanted)

    def _request(self, action: str, **parameters: str) -> Answer:
        body = urlencode({"Action": action, "Version": "2016-11-15", **parameters}).encode()
        headers = {
            "content-type": "application/x-www-form-urlencoded; charset=utf-8",
            "host": f"ec2.{REGION}.amazonaws.com",
            "authorization": f"AWS4-HMAC-SHA256 Credential={OWN_KEY_ID}/20200101/{REGION}/ec2/aws4_request, "
            "SignedHeaders=host, Signature=0",
        }
        return self._pass_on(Request("POST", "/", {}, headers, body, "lab"))

    def _pass_on(self, request: Request) -> Answer:
        """What moto answers, as a WSGI application."""
        environ: dict[str, Any] = {
            "REQUEST_METHOD": request.method,
            "SCRIPT_NAME": "",
            "PATH_INFO": request.path,
            "QUERY_STRING": request.text,
            "SERVER_NAME": "lab",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "CONTENT_LENGTH": str(len(request.body)),
            "CONTENT_TYPE": request.headers.get("content-type", ""),
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(request.body),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in request.headers.items()},
        }
        started: list[tuple[str, list[tuple[str, str]]]] = []

        def start(status: str, headers: list[tuple[str, str]], *_: object) -> None:
            started.append((status, headers))

        with self._lock:
            parts: Iterable[bytes] = self._app(environ, start)
            body = b"".join(parts)
        status, headers = started[0]
        kind = next((value for name, value in headers if name.lower() == "content-type"), "text/xml")
        return Answer(int(status.split()[0]), body, kind)


def _parse(body: bytes) -> ElementTree.Element:
    """An answer's XML, without the namespace that it has or has not."""
    return ElementTree.fromstring(_XMLNS.sub(b"", body, count=1))


def _find(body: bytes, name: str) -> str:
    """The text of the first element of a name, whatever its namespace."""
    match = re.search(rb"<(?:\w+:)?%s>([^<]*)<" % name.encode(), body)
    return match[1].decode() if match else ""


def _error(fault: Fault) -> Answer:
    root = ElementTree.Element("Response")
    error = ElementTree.SubElement(ElementTree.SubElement(root, "Errors"), "Error")
    ElementTree.SubElement(error, "Code").text = fault.code
    ElementTree.SubElement(error, "Message").text = fault.message
    ElementTree.SubElement(root, "RequestID").text = "00000000-lab"
    return Answer(fault.status, ElementTree.tostring(root), "text/xml;charset=UTF-8")
