# SPDX-License-Identifier: Apache-2.0
"""The backends of clouds: options, what they want, what they refuse, and what they load."""

import subprocess
import sys

import msgspec
import pytest

from loden.address import Family, Prefix, parse_address
from loden.backend_options import check_options, decode_options
from loden.backends import find
from loden.backends.base import Backend, Host
from loden.backends.cloud import CloudBackend
from loden.clouds.aws import Aws
from loden.errors import ConfigError
from loden.interface import Hop, HostFacts, Underlay
from loden.lease import Lease, Leg, encode_value
from loden.network import parse_network
from loden.tables.entries import HERE, CloudRoute, CloudSetting

CLOUDS = ("aws-vpc", "gce", "ali-vpc")
OWN = {Family.IPV4: parse_address("198.18.0.1")}
BOTH = {**OWN, Family.IPV6: parse_address("2001:db8::1")}
LEG = Leg(Prefix.parse("10.5.1.0/24"), OWN[Family.IPV4])
LEG6 = Leg(Prefix.parse("fd00:5:0:1::/64"), BOTH[Family.IPV6])


def make(kind: str, *, members: str = "", both: bool = False) -> Backend:
    own = BOTH if both else OWN
    text: dict[str, object] = {
        "Network": "10.5.0.0/16",
        "Backend": {"Type": kind, **msgspec.json.decode(members or "{}")},
    }
    if both:
        text |= {"EnableIPv6": True, "IPv6Network": "fd00:5::/48"}
    network = parse_network(msgspec.json.encode(text))
    found = find(kind)
    host = Host(network, Underlay("eth0", 2, 9001, own, own), HostFacts(()))
    return found(host, decode_options(network.backend, found.Options)[0])


@pytest.mark.parametrize("kind", CLOUDS)
class TestEveryCloud:
    def test_own_lease_is_a_route_and_what_it_needs_of_the_instance(self, kind: str) -> None:
        *settings, route = make(kind).own_entries(LEG)
        assert route == CloudRoute(LEG.subnet, HERE)
        assert settings
        assert all(isinstance(setting, CloudSetting) for setting in settings)
        assert str(route) == "cloud route 10.5.1.0/24 via this host"

    def test_peers_are_nothing(self, kind: str) -> None:
        made = make(kind)
        assert made.entries(LEG, Hop(2)) == ()
        assert not made.needs_hops

    def test_containers_have_the_interfaces_mtu(self, kind: str) -> None:
        assert make(kind).mtu == 9001

    def test_lease_names_no_backend(self, kind: str) -> None:
        """COMPAT §2.3: type and data are left out, and hosts of flannel read it."""
        made = make(kind)
        lease = Lease.make(
            {Family.IPV4: Leg(LEG.subnet, LEG.public, made.data(Family.IPV4))}, made.lease_type
        )
        assert encode_value(lease) == b'{"PublicIP":"198.18.0.1","PublicIPv6":null}'

    def test_common_options(self, kind: str) -> None:
        made = make(kind, members='{"RouteLimit": 80, "CheckInterval": 60, "GracePeriod": 900}')
        assert isinstance(made, CloudBackend)
        found = made.options
        assert (found.route_limit, found.check_interval, found.grace_period) == (80, 60, 900)
        assert isinstance(made, CloudBackend)

    def test_defaults(self, kind: str) -> None:
        made = make(kind)
        assert isinstance(made, CloudBackend)
        found = made.options
        assert (found.route_limit, found.check_interval, found.grace_period) == (None, 300, 600)

    @pytest.mark.parametrize(
        ("members", "said"),
        [
            (b'{"RouteLimit": 0}', "Backend.RouteLimit: 0 is not allowed (a whole number from 1 to 100000"),
            (b'{"CheckInterval": "5m"}', "Backend.CheckInterval: '5m' is not allowed (a whole number from 1"),
        ],
    )
    def test_bad_option_is_named_with_what_is_allowed(self, kind: str, members: bytes, said: str) -> None:
        _, errors, _ = check_options(members, find(kind).Options)
        assert str(errors[0]).replace('"', "'").startswith(said)

    def test_missing_client_says_how_to_install_it(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("loden.backends.cloud.find_spec", lambda _: None)
        with pytest.raises(ConfigError, match=f"{kind} needs the Python package") as caught:
            make(kind)
        assert caught.value.hint.startswith("pip install 'loden[")

    def test_opening_it_loads_no_client(self, kind: str) -> None:
        script = (
            "import sys, loden.agent\n"
            "from tests.unit.test_cloud_backends import make\n"
            f"make({kind!r}).open()\n"
            "print(*sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert not {"boto3", "google", "alibabacloud_tea_openapi", "requests"} & set(done.stdout.split())


@pytest.mark.parametrize("kind", ["gce", "ali-vpc"])
def test_ipv6_is_refused_where_it_is_not_routed(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"Backend.Type: {kind} does not route IPv6"):
        make(kind, both=True)


class TestAws:
    def test_both_families_have_a_route_and_the_instance_its_settings_once(self) -> None:
        made = make("aws-vpc", both=True)
        first, second = made.own_entries(LEG), made.own_entries(LEG6)
        assert second == (CloudRoute(LEG6.subnet),)
        assert [str(entry) for entry in first] == [
            "cloud setting source/destination check=off",
            "cloud setting tag loden:network=10.5.0.0/16 fd00:5::/48",
            "cloud route 10.5.1.0/24 via this host",
        ]

    @pytest.mark.parametrize(
        ("members", "tables"),
        [
            ("{}", ()),
            ('{"RouteTableID": null}', ()),
            ('{"RouteTableID": "rtb-1"}', ("rtb-1",)),
            ('{"RouteTableID": ["rtb-1", "rtb-2"]}', ("rtb-1", "rtb-2")),
            ('{"routetableid": []}', ()),
        ],
    )
    def test_route_tables_are_one_several_or_found(self, members: str, tables: tuple[str, ...]) -> None:
        made = make("aws-vpc", members=members)
        assert isinstance(made, CloudBackend)
        cloud = made.open()
        assert isinstance(cloud, Aws)
        assert cloud._given == tables

    @pytest.mark.parametrize("value", [b"7", b'{"a": "b"}', b"[7]", b'""', b'["rtb-1", ""]'])
    def test_other_types_are_refused(self, value: bytes) -> None:
        found, errors, _ = check_options(b'{"RouteTableID": %s}' % value, find("aws-vpc").Options)
        assert found is None
        assert "RouteTableID" in str(errors[0])


def test_other_backends_load_nothing_of_clouds() -> None:
    script = (
        "import sys, loden.agent, loden.backends\n"
        "for kind in ('vxlan', 'host-gw', 'alloc'):\n"
        "    loden.backends.find(kind)\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    heavy = {
        "boto3",
        "botocore",
        "google",
        "requests",
        "urllib3",
        "alibabacloud_tea_openapi",
        "aiohttp",
        "Tea",
    }
    assert not loaded & heavy
    assert not [name for name in loaded if name.startswith(("loden.cloud", "loden.tables.cloud"))]
