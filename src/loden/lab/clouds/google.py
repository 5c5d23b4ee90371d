# SPDX-License-Identifier: Apache-2.0
"""A double of Google Compute Engine: routes, instances and operations, as the REST API has them.

Requests and answers have the forms of the API's discovery document (compute v1). An operation is not done
when it is started.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from loden.address import Prefix
from loden.lab.clouds.http import Answer, Request, json_answer
from loden.lab.clouds.journal import Call, Fault, Journal
from loden.lab.clouds.machines import Machine, View

PROJECT, NUMBER = "lab-project", "123456789012"
ZONE, NETWORK = "europe-west1-b", "lab-network"
_ROOT = "https://www.googleapis.com/compute/v1"
_READS = ("get", "list", "wait")


class GoogleDouble:
    """A network with machines; the methods are those of :class:`loden.lab.clouds.machines.Double`.

    Args:
        machines: each becomes an instance.
        journal: of the calls.
        secret: the access token that the metadata service hands out.
        changed: told after each call that changed something.
    """

    def __init__(
        self,
        machines: Sequence[Machine],
        *,
        journal: Journal | None = None,
        secret: str = "lab-access-token",
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.journal = journal or Journal()
        self.secret = secret
        self.limit = 100
        self.polls = 1  # how often an operation is found running before it is done
        self.network_project = NUMBER
        self._changed = changed
        self._lock = threading.RLock()
        self._machines = {one.ip: one for one in machines}
        self._operations: dict[str, dict[str, Any]] = {}
        self._number = 0
        self.routes: dict[str, dict[str, Any]] = {}
        self.instances: dict[str, dict[str, Any]] = {
            one.name: {
                "kind": "compute#instance",
                "name": one.name,
                "zone": f"{_ROOT}/projects/{PROJECT}/zones/{ZONE}",
                "selfLink": f"{_ROOT}/{link(one.name)}",
                "canIpForward": True,
                "fingerprint": "lab",
                "networkInterfaces": [
                    {"name": "nic0", "network": f"{_ROOT}/{network_link()}", "networkIP": one.ip}
                ],
            }
            for one in machines
        }

    def put_route(self, name: str, destination: str, **members: Any) -> None:
        """Make a route as somebody else would, with a network of its own kind of next hop."""
        with self._lock:
            self.routes[name] = {
                "kind": "compute#route",
                "name": name,
                "network": f"{_ROOT}/{network_link()}",
                "destRange": destination,
                "priority": 1000,
                "selfLink": f"{_ROOT}/projects/{PROJECT}/global/routes/{name}",
                **members,
            }
        self._changed()

    def terminate(self, name: str) -> None:
        """End an instance: routes to it stay, with a warning."""
        with self._lock:
            del self.instances[name]
        self._changed()

    def answer(self, request: Request) -> Answer:
        with self._lock:
            action, names = _action(request)
            answer = self._work(action, names, request)
        is_write = action.rpartition(".")[2] not in _READS
        outcome = "ok" if answer.status < 300 else _reason(answer)
        members = msgspec.json.decode(request.body) if request.body else {}
        parameters = {**request.query, **{key: str(value) for key, value in members.items()}, **names}
        self.journal.note(Call(action, is_write, parameters, request.client, outcome))
        if answer.status < 300:
            self._changed()
        return answer

    def _work(self, action: str, names: Mapping[str, str], request: Request) -> Answer:
        fault = self.journal.take_fault(action)
        if fault is not None:
            return _error(fault.status, fault.code, fault.message)
        if request.headers.get("authorization") != f"Bearer {self.secret}":
            return _error(401, "authError", "Invalid Credentials")
        if names.get("project") not in (PROJECT, NUMBER):
            return _error(404, "notFound", f"The resource 'projects/{names.get('project')}' was not found")
        match action:
            case "routes.list":
                return self._list(request)
            case "routes.insert":
                return self._insert(msgspec.json.decode(request.body))
            case "routes.get" | "routes.delete":
                return self._one(action, names["name"])
            case "instances.get" | "instances.update":
                return self._instance(action, names["name"], request)
            case "globalOperations.get" | "globalOperations.wait":
                return self._operation(names["name"])
            case "projects.get":
                quotas = [{"metric": "ROUTES", "limit": float(self.limit), "usage": float(len(self.routes))}]
                return json_answer(200, {"kind": "compute#project", "name": PROJECT, "quotas": quotas})
        return _error(404, "notFound", f"no {request.method} {request.path}")

    def _list(self, request: Request) -> Answer:
        size, first = int(request.query.get("maxResults", 500)), int(request.query.get("pageToken") or 0)
        names = sorted(self.routes)
        page = {
            "kind": "compute#routeList",
            "items": [self._shown(self.routes[name]) for name in names[first : first + size]],
        }
        if first + size < len(names):
            page["nextPageToken"] = str(first + size)
        return json_answer(200, page)

    def _shown(self, route: dict[str, Any]) -> dict[str, Any]:
        target = _last(route.get("nextHopInstance", ""))
        if not target or target in self.instances:
            return route
        warning = {"code": "NEXT_HOP_INSTANCE_NOT_FOUND", "message": f"Next hop instance {target} not found"}
        return {**route, "warnings": [warning]}

    def _insert(self, members: dict[str, Any]) -> Answer:
        name = members["name"]
        if name in self.routes:
            return _error(409, "alreadyExists", f"The resource 'projects/{PROJECT}/{name}' already exists")
        if len(self.routes) >= self.limit:
            return _error(403, "quotaExceeded", f"Quota 'ROUTES' exceeded.  Limit: {self.limit}.0 globally.")
        late = self.journal.take_fault("routes.insert", late=True)
        if late is not None:
            return self._start("insert", name, lambda: None, late)
        hop = members.get("nextHopInstance", "")
        self.put_later(
            name, {**members, "nextHopInstance": hop if "//" in hop or not hop else f"{_ROOT}/{hop}"}
        )
        return self._start("insert", name, lambda: None)

    def put_later(self, name: str, members: dict[str, Any]) -> None:
        """The route of an insertion; it stands when the operation is done, and is listed before."""
        network = members["network"]
        self.routes[name] = {
            "kind": "compute#route",
            **members,
            "network": network if "//" in network else f"{_ROOT}/projects/{PROJECT}/global/{_tail(network)}",
            "selfLink": f"{_ROOT}/projects/{PROJECT}/global/routes/{name}",
        }

    def _one(self, action: str, name: str) -> Answer:
        if name not in self.routes:
            return _error(404, "notFound", f"The resource 'projects/{PROJECT}/{name}' was not found")
        if action == "routes.get":
            return json_answer(200, self._shown(self.routes[name]))
        late = self.journal.take_fault("routes.delete", late=True)
        if late is None:
            del self.routes[name]
        return self._start("delete", name, lambda: None, late)

    def _instance(self, action: str, name: str, request: Request) -> Answer:
        found = self.instances.get(name)
        if found is None:
            return _error(404, "notFound", f"The resource 'instances/{name}' was not found")
        if action == "instances.get":
            return json_answer(200, found)
        found["canIpForward"] = bool(msgspec.json.decode(request.body).get("canIpForward"))
        return self._start("update", name, lambda: None)

    def _start(self, kind: str, target: str, act: Callable[[], None], late: Fault | None = None) -> Answer:
        act()
        self._number += 1
        operation: dict[str, Any] = {
            "kind": "compute#operation",
            "name": f"operation-{self._number}",
            "operationType": kind,
            "targetLink": target,
            "status": "RUNNING",
            "progress": 0,
        }
        end: dict[str, Any] = {"status": "DONE", "progress": 100}
        if late is not None:
            end["error"] = {"errors": [{"code": late.code, "message": late.message}]}
            end["httpErrorStatusCode"] = late.status
            end["httpErrorMessage"] = late.message
        self._operations[operation["name"]] = {"now": operation, "end": end, "left": self.polls}
        return json_answer(200, operation)

    def _operation(self, name: str) -> Answer:
        kept = self._operations.get(name)
        if kept is None:
            return _error(404, "notFound", f"operation {name} was not found")
        kept["left"] -= 1
        return json_answer(200, {**kept["now"], **(kept["end"] if kept["left"] <= 0 else {})})

    def view(self) -> View:
        with self._lock:
            ips = {one.name: one.address for one in self._machines.values() if one.name in self.instances}
            routes = {
                Prefix.parse(route["destRange"]): ips[_last(route["nextHopInstance"])]
                for route in self.routes.values()
                if _last(route.get("nextHopInstance", "")) in ips
            }
            free = {ips[name] for name in ips if self.instances[name]["canIpForward"]}
        return View(routes, frozenset(free))

    @staticmethod
    def environment(api: str, metadata: str) -> dict[str, str]:
        return {
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{api}/compute/v1/",
            "GCE_METADATA_HOST": metadata.partition("//")[2].removesuffix(":80"),
            "GCE_METADATA_IP": metadata.partition("//")[2].removesuffix(":80"),
        }

    def metadata(self, request: Request) -> Answer:
        flavour = {"Metadata-Flavor": "Google", "Server": "Metadata Server for VM"}
        if request.path == "/":
            return Answer(200, b"computeMetadata/", headers=flavour)
        if request.headers.get("metadata-flavor") != "Google":
            return Answer(403, b"Missing Metadata-Flavor:Google header.")
        one = self._machines.get(request.client)
        path = request.path.removeprefix("/computeMetadata/v1/").rstrip("/").replace(_ACCOUNT, "default")
        if one is None:
            return Answer(404, b"no instance of ours asks")
        found = self._values(one).get(path)
        if found is None:
            return Answer(404, b"not found")
        if isinstance(found, str):
            return Answer(200, found.encode(), "application/text", flavour)
        answer = json_answer(200, found)
        return msgspec.structs.replace(answer, headers=flavour)

    def _values(self, one: Machine) -> dict[str, object]:
        account = {"aliases": ["default"], "email": _ACCOUNT}
        network = f"projects/{self.network_project}/networks/{NETWORK}"
        return {
            "project/project-id": PROJECT,
            "project/numeric-project-id": NUMBER,
            "instance/zone": f"projects/{NUMBER}/zones/{ZONE}",
            "instance/name": one.name,
            "instance/hostname": f"{one.name}.{ZONE}.c.{PROJECT}.internal",
            "instance/network-interfaces": [{"ip": one.ip, "mac": one.mac.hex(":"), "network": network}],
            "instance/service-accounts/default": {**account, "scopes": list(_SCOPES)},
            "instance/service-accounts/default/token": {
                "access_token": self.secret,
                "expires_in": 3600,
                "token_type": "Bearer",
            },
            "universe/universe-domain": "googleapis.com",
        }


_ACCOUNT = "lab@lab-project.iam.gserviceaccount.com"
_SCOPES = ("https://www.googleapis.com/auth/compute",)


def link(name: str) -> str:
    """An instance as routes refer to it."""
    return f"projects/{PROJECT}/zones/{ZONE}/instances/{name}"


def network_link() -> str:
    """The network as resources refer to it."""
    return f"projects/{PROJECT}/global/networks/{NETWORK}"


def _action(request: Request) -> tuple[str, dict[str, str]]:
    """What a request is called in the API's documents, and the names in its path."""
    parts = request.path.removeprefix("/compute/v1/").strip("/").split("/")
    verbs = {"GET": "get", "DELETE": "delete", "PUT": "update", "POST": "insert"}
    match parts:
        case ["projects", project]:
            return f"projects.{verbs[request.method]}", {"project": project}
        case ["projects", project, "global", "routes"]:
            return f"routes.{'list' if request.method == 'GET' else 'insert'}", {"project": project}
        case ["projects", project, "global", "routes", name]:
            return f"routes.{verbs[request.method]}", {"project": project, "name": name}
        case ["projects", project, "global", "operations", name]:
            return "globalOperations.get", {"project": project, "name": name}
        case ["projects", project, "global", "operations", name, "wait"]:
            return "globalOperations.wait", {"project": project, "name": name}
        case ["projects", project, "zones", zone, "instances", name]:
            names = {"project": project, "zone": zone, "name": name}
            return f"instances.{verbs[request.method]}", names
    return "unknown", {}


def _error(status: int, reason: str, message: str) -> Answer:
    one = {"domain": "global", "reason": reason, "message": message}
    return json_answer(status, {"error": {"code": status, "message": message, "errors": [one]}})


def _reason(answer: Answer) -> str:
    return str(msgspec.json.decode(answer.body)["error"]["errors"][0]["reason"])


def _last(url: str) -> str:
    return url.rpartition("/")[2]


def _tail(url: str) -> str:
    return url.partition("/global/")[2] or url
