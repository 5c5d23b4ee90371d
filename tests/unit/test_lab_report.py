# SPDX-License-Identifier: Apache-2.0
import msgspec

from loden.lab.report import HostReport, Pair, Report, complaints
from loden.lab.throughput import Throughput

_BARE = Report("vxlan", (HostReport("h1", "198.18.0.1", "10.5.1.0/24"),), (Pair("a", "b"),), False)


def _as_json(report: Report) -> dict[str, object]:
    return msgspec.json.decode(msgspec.json.encode(report), type=dict[str, object])


def test_report_has_the_promised_members() -> None:
    assert _as_json(_BARE) == {
        "backend": "vxlan",
        "hosts": [{"name": "h1", "public_ip": "198.18.0.1", "subnet": "10.5.1.0/24"}],
        "pairs": [{"from": "a", "to": "b", "ok": False, "rtt_ms": None}],
        "reachable": False,
    }


def test_report_has_throughput_where_it_was_measured() -> None:
    measured = msgspec.structs.replace(_BARE, throughput=Throughput(10.0, 9.0, 0.9, 8.0))
    assert _as_json(measured)["throughput"] == {
        "underlay_gbps": 10.0,
        "overlay_gbps": 9.0,
        "ratio": 0.9,
        "container_gbps": 8.0,
    }


def test_report_names_the_second_family_where_there_is_one() -> None:
    dual = Report(
        "vxlan",
        (HostReport("h1", "198.18.0.1", "10.5.1.0/24", "2001:db8::1", "fd00:5:0:1::/64"),),
        (Pair("a", "b", True, 0.1, "ipv6"),),
        True,
        Throughput(10.0, 9.0, 0.9, 8.0, "ipv6"),
    )
    assert _as_json(dual) == {
        "backend": "vxlan",
        "hosts": [
            {
                "name": "h1",
                "public_ip": "198.18.0.1",
                "subnet": "10.5.1.0/24",
                "public_ipv6": "2001:db8::1",
                "ipv6_subnet": "fd00:5:0:1::/64",
            }
        ],
        "pairs": [{"from": "a", "to": "b", "ok": True, "rtt_ms": 0.1, "family": "ipv6"}],
        "reachable": True,
        "throughput": {
            "underlay_gbps": 10.0,
            "overlay_gbps": 9.0,
            "ratio": 0.9,
            "container_gbps": 8.0,
            "family": "ipv6",
        },
    }


def test_complaints_are_the_newest_that_name_the_subnet() -> None:
    log = [
        "INFO lease 10.5.2.0/24",
        "WARNING route 10.5.2.0/24: first",
        "WARNING route 10.5.2.0/24: second",
        "ERROR route 10.5.3.0/24: another",
        "ERROR route 10.5.2.0/24: third",
    ]
    assert complaints(log, ["10.5.2.0/24"]) == (log[2], log[4])
    assert complaints(log, ["fd00::/64", "10.5.3.0/24"]) == (log[3],)
    assert complaints(log, ["10.5.4.0/24"]) == ()
