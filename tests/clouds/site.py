# SPDX-License-Identifier: Apache-2.0
"""A cloud with some hosts, for tests: the double, and our access to it from each host.

What differs between the clouds is in here, so that one test can say it for all three.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from loden.address import Prefix
from loden.clouds.alibaba import Alibaba
from loden.clouds.aws import Aws
from loden.clouds.google import Google, route_names
from loden.lab.clouds.alibaba import KEY_ID, AlibabaDouble
from loden.lab.clouds.aws import AwsDouble
from loden.lab.clouds.google import GoogleDouble, link
from loden.lab.clouds.http import Answer, Request, serving
from loden.lab.clouds.journal import Call, Fault, Journal
from loden.lab.clouds.machines import Machine, machine
from loden.network import parse_network
from loden.secret import Secret
from loden.tables.cloud import Cloud

CANARY = "canary-7f3a9c-never-to-be-seen"
NETWORK = parse_network(b'{"Network": "10.5.0.0/16"}')
RANGES = NETWORK.ranges


def subnet(number: int) -> Prefix:
    """One of the network's subnets."""
    return Prefix.parse(f"10.5.{number}.0/24")


class Site:
    """Base of the three; each test gets one of its own."""

    #: In the words of the API.
    LIST = ADD = REMOVE = REPLACE = ""
    #: What the double says when the vendor's client may not.
    DENIED: tuple[int, str] = (403, "")
    THROTTLED: tuple[int, str] = (400, "")
    FULL = ""

    def __init__(self, count: int) -> None:
        self.machines = [machine(number) for number in range(1, count + 1)]
        self.double: Any = self.make()
        self._stack = contextlib.ExitStack()
        self.api = self._stack.enter_context(serving(self.double.answer))
        self._metadata = {
            one.number: self._stack.enter_context(serving(self._to(one))) for one in self.machines
        }

    def close(self) -> None:
        self._stack.close()

    def make(self) -> Any:
        raise NotImplementedError

    def open(self, one: Machine, **options: Any) -> Cloud:
        """Our side of it."""
        raise NotImplementedError

    def put_foreign(self, dst: Prefix) -> str:
        """Somebody else's route; what must be in the error that names it."""
        raise NotImplementedError

    def routes(self) -> dict[str, str]:
        """Destination and next hop of every route."""
        raise NotImplementedError

    def target(self, number: int) -> str:
        """What a route to a host has as its next hop."""
        raise NotImplementedError

    def put_fabric(self, dst: Prefix, number: int) -> None:
        """A route as another host of the fabric makes it."""
        raise NotImplementedError

    def switch_check(self, number: int, *, on: bool) -> None:
        """What the cloud checks of a host's packets, as somebody else switches it."""
        raise NotImplementedError

    def _to(self, one: Machine) -> Callable[[Request], Answer]:
        return lambda request: self.double.metadata(msgspec.structs.replace(request, client=one.ip))

    @property
    def journal(self) -> Journal:
        journal: Journal = self.double.journal
        return journal

    def fail(self, action: str, status: int, code: str, **more: Any) -> None:
        self.journal.fail(Fault(action, status, code, **more))

    def environment(self, number: int = 1) -> Mapping[str, str]:
        """What brings a host's client to the double."""
        found: dict[str, str] = self.double.environment(self.api, self._metadata[number])
        return found

    @contextlib.contextmanager
    def on(self, number: int) -> Iterator[None]:
        """The environment is that of a host."""
        before = dict(os.environ)
        os.environ.update(self.environment(number))
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def cloud(self, number: int = 1, **options: Any) -> Cloud:
        """Our access from a host, attached, with its clients made; nothing of it is in the journal."""
        made = self.open(self.machines[number - 1], **options)
        with self.on(number):
            made.attach()
            with contextlib.suppress(Exception):
                made.list_routes()
        self.journal.clear()
        return made

    def calls(self, action: str) -> list[Call]:
        return [call for call in self.journal.calls if call.action == action]


class AwsSite(Site):
    LIST, ADD, REMOVE, REPLACE = "DescribeRouteTables", "CreateRoute", "DeleteRoute", "ReplaceRoute"
    DENIED = (403, "UnauthorizedOperation")
    THROTTLED = (503, "RequestLimitExceeded")
    FULL = "RouteLimitExceeded"

    def make(self) -> AwsDouble:
        return AwsDouble(self.machines, secret=CANARY)

    def open(self, one: Machine, **options: Any) -> Cloud:
        return Aws(address=one.address, network="10.5.0.0/16", **options)

    def put_foreign(self, dst: Prefix) -> str:
        gateway = self.double.call("CreateInternetGateway")
        name = gateway.partition("<internetGatewayId>")[2].partition("<")[0]
        self.double.call("AttachInternetGateway", InternetGatewayId=name, VpcId=self.double.vpc)
        self._create(dst, GatewayId=name)
        return str(name)

    def _create(self, dst: Prefix, **target: str) -> None:
        table = self.double.main_table
        self.double.call("CreateRoute", RouteTableId=table, DestinationCidrBlock=str(dst), **target)

    def routes(self) -> dict[str, str]:
        found: dict[str, str] = self.double.routes()
        return found

    def target(self, number: int) -> str:
        return str(self.double.interfaces[f"h{number}"])

    def put_fabric(self, dst: Prefix, number: int) -> None:
        self._create(dst, NetworkInterfaceId=self.target(number))
        self.tag(number)

    def tag(self, number: int) -> None:
        """As the host's own agent does."""
        self.double.call(
            "CreateTags",
            **{
                "ResourceId.1": self.target(number),
                "Tag.1.Key": "loden:network",
                "Tag.1.Value": "10.5.0.0/16",
            },
        )

    def switch_check(self, number: int, *, on: bool) -> None:
        self.double.call(
            "ModifyNetworkInterfaceAttribute",
            **{"NetworkInterfaceId": self.target(number), "SourceDestCheck.Value": str(on).lower()},
        )


class GoogleSite(Site):
    LIST, ADD, REMOVE, REPLACE = "routes.list", "routes.insert", "routes.delete", "routes.insert"
    DENIED = (403, "forbidden")
    THROTTLED = (403, "rateLimitExceeded")
    FULL = "quotaExceeded"

    def make(self) -> GoogleDouble:
        return GoogleDouble(self.machines, secret=CANARY)

    def open(self, one: Machine, **options: Any) -> Cloud:
        return Google(address=one.address, **options)

    def put_foreign(self, dst: Prefix) -> str:
        self.double.put_route("made-by-a-person", str(dst), nextHopIp="198.18.9.9")
        return "made-by-a-person"

    def routes(self) -> dict[str, str]:
        return {
            str(route["destRange"]): "projects/" + str(route["nextHopInstance"]).partition("projects/")[2]
            for route in self.double.routes.values()
            if "nextHopInstance" in route
        }

    def target(self, number: int) -> str:
        return link(f"h{number}")

    def put_fabric(self, dst: Prefix, number: int) -> None:
        hop = f"https://www.googleapis.com/compute/v1/{self.target(number)}"
        self.double.put_route(route_names(dst)[0], str(dst), nextHopInstance=hop)

    def switch_check(self, number: int, *, on: bool) -> None:
        self.double.instances[f"h{number}"]["canIpForward"] = not on


class AlibabaSite(Site):
    LIST, ADD, REMOVE, REPLACE = (
        "DescribeRouteEntryList",
        "CreateRouteEntry",
        "DeleteRouteEntry",
        "ModifyRouteEntry",
    )
    DENIED = (403, "Forbidden.RAM")
    THROTTLED = (400, "Throttling.User")
    FULL = "QuotaExceeded.RouteEntry"

    def make(self) -> AlibabaDouble:
        return AlibabaDouble(self.machines, secret=CANARY)

    def open(self, one: Machine, **options: Any) -> Cloud:
        made = Alibaba(address=one.address, key_id=Secret(KEY_ID), key_secret=Secret(CANARY), **options)
        made.poll_s = 0.03
        return made

    def put_foreign(self, dst: Prefix) -> str:
        self.double.put_entry(str(dst), "ngw-somebody", kind="NatGateway")
        return "ngw-somebody"

    def routes(self) -> dict[str, str]:
        found: dict[str, str] = self.double.routes()
        return found

    def target(self, number: int) -> str:
        return str(self.double.instances[f"h{number}"])

    def put_fabric(self, dst: Prefix, number: int) -> None:
        name = f"loden-{str(dst).replace('.', '-').replace('/', '-')}"
        self.double.put_entry(str(dst), self.target(number), name=name)

    def switch_check(self, number: int, *, on: bool) -> None:
        self.double.checks[f"h{number}"] = on


SITES: Mapping[str, type[Site]] = {"aws": AwsSite, "google": GoogleSite, "alibaba": AlibabaSite}
