# SPDX-License-Identifier: Apache-2.0
"""Google Compute Engine: one route resource for each subnet, under flannel's name for it (COMPAT §8.2).

A route cannot be changed, and any number of them may lead to one range. So a route is replaced by making the
new one under the second of its two names before the old one goes. The name says whose a route is: what is
called otherwise is somebody else's, wherever it leads.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from loden.address import Prefix, format_address
from loden.clouds.metadata import Metadata
from loden.clouds.words import quiet, shorten
from loden.errors import CloudDenied, CloudError, CloudUnavailable, RoutesFull
from loden.tables.cloud import Limits, Listed, Listing, Owner

T = TypeVar("T")

FORWARDING = "canIpForward"
SCOPE = "https://www.googleapis.com/auth/compute"
_API = "https://compute.googleapis.com/compute/v1/"
_METADATA = "http://169.254.169.254"
_METADATA_HINT = "this host is no Compute Engine instance, or its metadata service cannot be reached"
_PRIORITY = 1000
_PAGE = 500
_WAIT_S = 50.0
_TIMEOUT_S = (5.0, 20.0)  # to connect, to answer
_CREDENTIALS_HINT = (
    "give the instance a service account with the compute scope (--scopes compute-rw), or set "
    "GOOGLE_APPLICATION_CREDENTIALS; the role is in docs/backends/gce.md"
)
_THROTTLED = frozenset(("rateLimitExceeded", "userRateLimitExceeded", "RATE_LIMIT_EXCEEDED"))
_FULL = frozenset(("quotaExceeded", "QUOTA_EXCEEDED", "limitExceeded", "LIMIT_EXCEEDED"))


class Instance(msgspec.Struct, frozen=True):
    """Which instance this is.

    Args:
        project: where the instance lives.
        zone, name: of the instance.
        network: the name of the VPC network.
        network_project: where the network and its routes live: another one with a shared VPC.
    """

    project: str
    zone: str
    name: str
    network: str
    network_project: str

    @property
    def link(self) -> str:
        """The instance as other resources refer to it."""
        return f"projects/{self.project}/zones/{self.zone}/instances/{self.name}"


class Google:
    """One instance's access to its network; the methods are those of :class:`loden.tables.cloud.Cloud`.

    Args:
        address: the instance's address (packed) in the network that peers use.
    """

    name = "Google Cloud"
    limits = Limits(
        100,
        "raise the quota 'Routes' of the project under IAM & Admin > Quotas, or use fewer, larger subnets",
    )

    def __init__(self, *, address: bytes) -> None:
        self._address = address
        self._instance: Instance | None = None
        self._session: Any = None
        self._names: frozenset[str] = frozenset()

    def attach(self) -> str:
        if self._instance is None:
            self._instance = _read_instance(self._address)
        here = self._instance
        return f"instance {here.name} in {here.zone}, project {here.project}, network {here.network}"

    def list_routes(self) -> Listing:
        here = self._here
        found = list(self._describe_routes())
        # A name is taken in the whole project, whichever network its route is in.
        self._names = frozenset(str(route["name"]) for route in found)
        made = [route for route in found if _is_made(route)]
        listed = [self._listed(route) for route in made if _last(route.get("network")) == here.network]
        return Listing((here.network,), tuple(listed), {here.network: len(made)})

    def _describe_routes(self) -> Iterator[Mapping[str, Any]]:
        here, token = self._here, ""
        while True:
            page = self._ask(
                "list",
                f"routes of project {here.network_project}",
                "GET",
                f"{self._routes}?maxResults={_PAGE}" + (f"&pageToken={quote(token)}" if token else ""),
            )
            yield from page.get("items", ())
            token = page.get("nextPageToken", "")
            if not token:
                return

    def _listed(self, route: Mapping[str, Any]) -> Listed:
        dst, name = Prefix.parse(route["destRange"]), str(route["name"])
        target = _path(route.get("nextHopInstance")) or _other_target(route)
        if name not in route_names(dst):
            owner = Owner.FOREIGN
        else:
            owner = Owner.SELF if target == self._here.link else Owner.FABRIC
        is_usable = not route.get("warnings") and not route.get("tags") and route.get("priority") == _PRIORITY
        return Listed(self._here.network, dst, target, owner, handle=name, is_usable=is_usable)

    def identify(self, route: Listed, address: bytes | None) -> Listed:
        del address  # the name has said it
        return route

    def add(self, table: str, dst: Prefix) -> Listed:
        for name in route_names(dst):
            if name not in self._names:
                return self._insert(table, dst, name)
        names = " and ".join(route_names(dst))
        raise CloudError(
            "add",
            f"cloud route {dst} via {self._here.name}",
            f"the names {names} are taken in project {self._here.network_project}",
            hint="another network of the project has this range; use another here, or remove those routes",
        )

    def _insert(self, table: str, dst: Prefix, name: str) -> Listed:
        here = self._here
        body = {
            "name": name,
            "description": "made by loden",
            "network": f"projects/{here.network_project}/global/networks/{table}",
            "destRange": str(dst),
            "nextHopInstance": here.link,
            "priority": _PRIORITY,
            "tags": [],
        }
        doing = f"cloud route {dst} via {here.name} ({name})"
        self._finish("add", doing, self._ask("add", doing, "POST", self._routes, body))
        self._names |= {name}
        return Listed(table, dst, here.link, Owner.SELF, handle=name)

    def replace(self, route: Listed) -> Listed:
        made = self.add(route.table, route.dst)
        self._delete(route)  # the next look sees whether it went
        return made

    def remove(self, route: Listed) -> None:
        operation = self._delete(route)
        if operation is not None:
            self._finish("remove", f"cloud route {route} ({route.handle})", operation)

    def _delete(self, route: Listed) -> Mapping[str, Any] | None:
        """The operation that deletes a route; None where it is gone already."""
        try:
            operation = self._ask(
                "remove", f"cloud route {route} ({route.handle})", "DELETE", f"{self._routes}/{route.handle}"
            )
        except CloudError as error:
            if error.code != "notFound":
                raise
            operation = None
        self._names -= {route.handle}
        return operation

    def _finish(self, operation: str, subject: str, started: Mapping[str, Any]) -> None:
        """Wait until an operation is done; it may fail late."""
        deadline = time.monotonic() + _WAIT_S
        state = started
        while state.get("status") != "DONE":
            if time.monotonic() > deadline:
                raise CloudUnavailable(
                    operation, subject, f"operation {state.get('name')} not done after {_WAIT_S:g} s"
                )
            path = f"projects/{self._here.network_project}/global/operations/{state['name']}/wait"
            state = self._ask(operation, subject, "POST", path)
        errors = state.get("error", {}).get("errors", ())
        if errors:
            raise _refusal(
                operation,
                subject,
                int(state.get("httpErrorStatusCode", 0)),
                str(errors[0].get("code", "")),
                errors[0].get("message"),
            )

    def read_limit(self) -> int | None:
        project = self._here.network_project
        found = self._ask("read", f"quotas of project {project}", "GET", f"projects/{project}")
        limits = [one["limit"] for one in found.get("quotas", ()) if one.get("metric") == "ROUTES"]
        return int(limits[0]) if limits else None

    def read_settings(self) -> Mapping[str, str]:
        found = self._ask("read", f"instance {self._here.name}", "GET", self._here.link)
        return {FORWARDING: "true" if found.get("canIpForward") else "false"}

    def change_setting(self, name: str, value: str) -> None:
        here = self._here
        where = f"--project={here.project} --zone={here.zone}"
        file = f"{here.name}.yaml"
        raise CloudError(
            "check",
            f"instance {here.name}",
            f"{name} is not {value}: the network drops what its containers send",
            hint=f"gcloud compute instances export {here.name} {where} --destination={file} && "
            f"sed -i 's/^canIpForward: false/canIpForward: true/' {file} && "
            f"gcloud compute instances update-from-file {here.name} {where} --source={file} "
            "--most-disruptive-allowed-action=REFRESH",
        )

    @property
    def _here(self) -> Instance:
        assert self._instance is not None, "attach() comes first"
        return self._instance

    @property
    def _routes(self) -> str:
        return f"projects/{self._here.network_project}/global/routes"

    def _ask(
        self, operation: str, subject: str, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """The JSON that the API answers, where it is no error."""
        url = (os.environ.get("CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE") or _API).rstrip("/") + f"/{path}"
        answer = _translated(
            operation,
            subject,
            lambda: self._open().request(method, url, json=body, timeout=_TIMEOUT_S),
        )
        try:
            found = answer.json()
        except ValueError:
            found = None
        if answer.status_code < 300:
            if isinstance(found, dict):
                return found
            raise CloudUnavailable(operation, subject, "the answer is not the API's: no JSON object")
        said = found.get("error", {}) if isinstance(found, dict) else {}
        first = (said.get("errors") or [{}])[0]
        raise _refusal(
            operation,
            subject,
            answer.status_code,
            str(first.get("reason", "")),
            said.get("message") or answer.reason,
        )

    def _open(self) -> Any:
        if self._session is None:
            import google.auth  # noqa: PLC0415 - 30 MB that hosts elsewhere do not pay
            from google.auth.transport.requests import AuthorizedSession  # noqa: PLC0415

            quiet("google", "urllib3")
            credentials, _ = google.auth.default(scopes=[SCOPE])
            self._session = AuthorizedSession(credentials, max_refresh_attempts=1)
        return self._session


def route_names(dst: Prefix) -> tuple[str, str]:
    """The names that a route to a subnet may have: flannel's, and the one while it is replaced."""
    name = "flannel-" + str(dst).replace(".", "-").replace("/", "-").replace(":", "-")
    return name, f"{name}-2"


def _is_made(route: Mapping[str, Any]) -> bool:
    """Whether somebody made a route, and the network did not by itself."""
    return not any(
        route.get(key)
        for key in ("nextHopNetwork", "nextHopPeering", "nextHopHub", "nextHopInterconnectAttachment")
    )


def _other_target(route: Mapping[str, Any]) -> str:
    keys = ("nextHopIp", "nextHopGateway", "nextHopVpnTunnel", "nextHopIlb")
    return next((_path(route[key]) for key in keys if route.get(key)), "another next hop")


def _path(url: object) -> str:
    """A resource's URL from the project on: hosts and versions in front of it differ."""
    text = str(url or "")
    return text[text.index("projects/") :] if "projects/" in text else text


def _last(url: object) -> str:
    return str(url or "").rpartition("/")[2]


def _read_instance(address: bytes) -> Instance:
    base = os.environ.get("GCE_METADATA_HOST") or _METADATA
    metadata = Metadata("Google", base, headers={"Metadata-Flavor": "Google"}, hint=_METADATA_HINT)
    root = "/computeMetadata/v1"
    try:
        text = metadata.get(f"{root}/instance/network-interfaces/?recursive=true")
        project = metadata.get(f"{root}/project/project-id")
        number = metadata.get(f"{root}/project/numeric-project-id")
        zone = _last(metadata.get(f"{root}/instance/zone"))
        name = metadata.find(f"{root}/instance/name") or metadata.get(f"{root}/instance/hostname")
    finally:
        metadata.close()
    try:
        interfaces = {str(one["ip"]): str(one["network"]) for one in json.loads(text)}
    except (ValueError, KeyError, TypeError) as error:
        raise CloudError("read", f"Google metadata at {base}", "no list of network interfaces") from error
    network = interfaces.get(format_address(address))
    if network is None:
        raise CloudError(
            "find",
            f"network interface with address {format_address(address)}",
            f"the instance has {', '.join(interfaces) or 'none'}",
            hint="choose an interface of the instance with --iface",
        )
    owner = network.partition("projects/")[2].partition("/")[0]
    return Instance(
        project=project,
        zone=zone,
        name=name.partition(".")[0],
        network=_last(network),
        network_project=project if owner in ("", number, project) else owner,
    )


def _translated(operation: str, subject: str, call: Callable[[], T]) -> T:
    """What a call returns; the one place where the exceptions of Google's client become ours."""
    from google.auth import exceptions  # noqa: PLC0415
    from requests.exceptions import RequestException  # noqa: PLC0415 - what Google's client talks through

    try:
        return call()
    except (exceptions.TransportError, RequestException) as error:
        raise CloudUnavailable(operation, subject, shorten(error)) from error
    except exceptions.GoogleAuthError as error:
        raise CloudDenied(operation, subject, shorten(error), hint=_CREDENTIALS_HINT) from error


def _refusal(operation: str, subject: str, status: int, code: str, message: object) -> CloudError:
    """An error of the API: a reason in the answer to a call, a code in an operation that failed late."""
    reason = shorten(message)
    if code in _FULL:
        return RoutesFull(operation, subject, reason, code=code)
    if code in _THROTTLED or status in (408, 412, 429) or status >= 500:
        return CloudUnavailable(operation, subject, reason, code=code or str(status))
    if status in (401, 403):
        return CloudDenied(operation, subject, reason, code=code or str(status), hint=_CREDENTIALS_HINT)
    return CloudError(operation, subject, reason, code=code or str(status))
