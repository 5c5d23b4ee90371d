# SPDX-License-Identifier: Apache-2.0
"""What a cloud costs: memory of an agent with the vendor's client in it, and calls of the API.

Real agents in labs, each against a double of its cloud; beside them, an agent of the backend host-gw.
"""

import argparse
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from bench._common import Arguments, Figure, figure, median, run
from loden.errors import LabError
from loden.lab.agents import READY_S, Agents
from loden.lab.clouds.catalogue import CLOUDS
from loden.lab.clouds.journal import Call, read_calls
from loden.lab.lab import Lab, running
from loden.lab.topology import Host, Spec

_SDKS = ("boto3", "botocore", "google/auth", "requests", "alibabacloud", "Tea", "aiohttp")
_LISTINGS = ("DescribeRouteTables", "routes.list", "DescribeRouteEntryList")


def measure(arguments: Arguments) -> Iterator[Figure]:
    with running(Spec(name="bench", hosts=2, backend="host-gw")) as lab:
        beside = _memory_mb(lab)
        loaded = sum(_has_loaded(lab, host) for host in lab.plan.hosts)
        yield figure("host-gw, memory at rest", beside, "MB")
        yield figure("host-gw, agents with compiled parts of a client mapped", loaded, "", "0")
    for backend in CLOUDS:
        config = f'{{"CheckInterval": {arguments.interval}}}'
        spec = Spec(name="bench", hosts=2, backend=backend, backend_config=config)
        with running(spec, ready_s=3 * READY_S) as lab:
            yield from _measure_cloud(lab, arguments, beside)


def _measure_cloud(lab: Lab, arguments: Arguments, beside: float) -> Iterator[Figure]:
    backend, first = lab.plan.spec.backend, lab.plan.hosts[0]
    host_gw = ("host-gw", beside)
    yield figure(f"{backend}, memory with the client loaded", _memory_mb(lab), "MB", "<= 90", anchor=host_gw)
    yield figure(f"{backend}, calls of a first start", len(_first_look(_calls(lab, first, 0))), "")
    since = len(read_calls(lab.state.cloud_calls))
    _start_again(lab, first)
    calls = _first_look(_calls(lab, first, since))
    yield figure(f"{backend}, calls of a start with all in place", len(calls), "", "<= 4")
    yield figure(f"{backend}, of these that write", sum(call.is_write for call in calls), "", "0")
    time.sleep(arguments.interval)  # what a start left to do is over
    since, started = len(read_calls(lab.state.cloud_calls)), time.monotonic()
    time.sleep(arguments.interval * arguments.intervals)
    intervals = (time.monotonic() - started) / arguments.interval
    calls = _calls(lab, first, since)
    listings = sum(call.action in _LISTINGS for call in calls)
    yield figure(f"{backend}, listings an interval", listings / intervals, "", "<= 1")
    yield figure(f"{backend}, all calls an interval", len(calls) / intervals, "")


def _first_look(calls: list[Call]) -> list[Call]:
    """The calls until the routes are listed for the second time."""
    listings = [place for place, call in enumerate(calls) if call.action in _LISTINGS]
    waits = ("CreateRouteEntry", "ModifyRouteEntry")
    waited = sum(call.action in waits for call in calls)  # each is followed by listings of that one entry
    return calls if len(listings) <= 1 + waited else calls[: listings[1 + waited]]


def _calls(lab: Lab, host: Host, since: int) -> list[Call]:
    address = ".".join(map(str, next(iter(host.addresses.values()))))
    return [call for call in read_calls(lab.state.cloud_calls)[since:] if call.client == address]


def _start_again(lab: Lab, host: Host) -> None:
    os.kill(_pid(lab, host), signal.SIGKILL)
    with Agents(lab.state, backend=lab.plan.spec.backend) as agents:
        agents.start(host)
        agents.wait_ready(timeout_s=READY_S, on_ready=lambda _: None)
        time.sleep(0.5)  # what is asked about the instance follows the routes


def _memory_mb(lab: Lab) -> float:
    """Resident, the median of the hosts' agents."""
    return median([_status_kb(_pid(lab, host), "VmRSS") / 1024 for host in lab.plan.hosts])


def _has_loaded(lab: Lab, host: Host) -> bool:
    """Whether a compiled part of a client is mapped; a unit test looks at the rest."""
    maps = Path(f"/proc/{_pid(lab, host)}/maps").read_text()
    return any(f"site-packages/{name}" in maps for name in (*_SDKS, "cryptography", "multidict"))


def _status_kb(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def _pid(lab: Lab, host: Host) -> int:
    agent = lab.state.agent(host.name)
    if agent is None or not agent.is_alive:
        raise LabError(f"find agent of {host.name}: it does not run")
    return agent.pid


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interval", type=int, default=2, help="CheckInterval of the hosts, seconds [2]")
    parser.add_argument("--intervals", type=int, default=5, help="how many are watched [5]")


if __name__ == "__main__":
    run(measure, about=__doc__, options=_options)
