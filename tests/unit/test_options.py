# SPDX-License-Identifier: Apache-2.0
import pytest

from loden.address import Prefix
from loden.errors import ConfigError
from loden.firewall.rules import FirewallOptions
from loden.interface import Selection
from loden.options import FLAGS, NOT_YET, StoreOptions, build, read_command_line, read_environment
from loden.secret import Secret
from loden.stores.access import Access


def test_defaults_are_flannels() -> None:
    options = build()
    assert options.selection == Selection()
    assert options.subnet_file == "/run/flannel/subnet.env"
    assert options.renew_margin_s == 3600
    assert (options.healthz_ip, options.healthz_port, options.verbosity) == ("0.0.0.0", 0, 0)
    assert options.store == StoreOptions("sqlite:////var/lib/loden/loden.db")


def test_defaults_of_the_firewall_are_flannels() -> None:
    options = build()
    assert options.firewall == FirewallOptions(
        masquerade=False, exclude=(), is_fully_random=True, forward=True, resync_s=5.0
    )
    assert not options.blackhole_route


def test_switches_and_ranges_become_values() -> None:
    options = build(
        {
            "ip-masq": ("true",),
            "ip-masq-exclude": ("192.0.2.9/24", "2001:db8::/32"),
            "ip-masq-fully-random-disable": ("T",),
            "iptables-forward-rules": ("0",),
            "ip-blackhole-route": ("1",),
        }
    )
    exclude = (Prefix.parse("192.0.2.0/24"), Prefix.parse("2001:db8::/32"))
    assert options.firewall == FirewallOptions(True, exclude, False, False)
    assert options.blackhole_route


@pytest.mark.parametrize(
    ("name", "text"), [("ip-masq", "yes"), ("ip-masq-exclude", "192.0.2.0"), ("iptables-resync", "0")]
)
def test_bad_values_of_the_firewall_are_refused(name: str, text: str) -> None:
    flag = next(flag for flag in FLAGS if flag.name == name)
    with pytest.raises(ConfigError, match=f"--{name}: '{text}'"):
        flag.require_valid(text)
    _, ignored = read_environment({f"FLANNELD_{name.upper().replace('-', '_')}": text})
    assert len(ignored) == 1


def test_every_default_is_a_valid_value() -> None:
    for flag in FLAGS:
        if flag.default:
            flag.require_valid(flag.default)


def test_strongest_source_wins_whole() -> None:
    options = build({"iface": ("eth0", "eth1")}, {"iface": ("eth9",), "v": ("2",)}, {"v": ("3",)})
    assert options.selection.iface == ("eth0", "eth1")
    assert options.verbosity == 2


def test_last_of_a_flag_that_comes_again_counts() -> None:
    assert build({"public-ip": ("10.0.0.1", "10.0.0.2")}).selection.public_ip == "10.0.0.2"


def test_margin_is_in_minutes() -> None:
    assert build({"subnet-lease-renew-margin": ("5",)}).renew_margin_s == 300


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["-iface", "eth0"], ["--iface=eth0"]),
        (["--iface", "eth0"], ["--iface=eth0"]),
        (["-iface=eth0", "--iface=eth1"], ["--iface=eth0", "--iface=eth1"]),
        (["--iface", "-eth0"], ["--iface=-eth0"]),
        (["--iface-regex=a=b"], ["--iface-regex=a=b"]),
        (["-v", "4"], ["--v=4"]),
        (["--iface"], ["--iface"]),
        (["-ip-masq", "-v=1"], ["--ip-masq=true", "--v=1"]),
        (["--ip-masq=false", "-iptables-resync", "9"], ["--ip-masq=false", "--iptables-resync=9"]),
        (["-version"], ["--version"]),
        (["--version=true", "-h"], ["--version", "--help"]),
        (["--version=F"], []),
        (["-unknown", "word", "---x", "-", "--"], ["--unknown", "word", "---x", "-", "--"]),
    ],
)
def test_command_line_is_read_as_go_does(words: list[str], flags: list[str]) -> None:
    assert list(read_command_line(words)) == flags


def test_switch_that_is_neither_true_nor_false_is_refused() -> None:
    with pytest.raises(ConfigError, match="--version: 'yes' is not a boolean"):
        list(read_command_line(["--version=yes"]))


FLANNELS_PLACE = "etcd://127.0.0.1:4001,127.0.0.1:2379/coreos.com/network"


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({"store": "etcd://h:2379/x"}, "etcd://h:2379/x"),
        ({"etcd-endpoints": "https://h:2379"}, "etcds://h:2379/coreos.com/network"),
        ({"etcd-prefix": "/my/net"}, "etcd://127.0.0.1:4001,127.0.0.1:2379/my/net"),
        ({"etcd-username": "u"}, FLANNELS_PLACE),
        ({"etcd-endpoints": "http://a,http://b:9", "etcd-prefix": "/x/"}, "etcd://a:2379,b:9/x"),
    ],
)
def test_flannels_etcd_flags_name_the_store(given: dict[str, str], url: str) -> None:
    assert build({name: (text,) for name, text in given.items()}).store.url == url


def test_who_we_are_in_etcd_is_kept_and_the_password_is_not_shown() -> None:
    given = {
        "etcd-endpoints": ("https://h:2379",),
        "etcd-cafile": ("/ca",),
        "etcd-certfile": ("/cert",),
        "etcd-keyfile": ("/key",),
        "etcd-username": ("flannel",),
        "etcd-password": ("geheim",),
    }
    access = build(given).store.access
    assert access == Access(
        ca_file="/ca", cert_file="/cert", key_file="/key", username="flannel", password=Secret("geheim")
    )
    assert access.password.reveal() == "geheim"
    assert "geheim" not in repr(build(given))


def test_etcd_comes_from_the_environment() -> None:
    found, ignored = read_environment(
        {
            "FLANNELD_ETCD_ENDPOINTS": "http://h:2379",
            "FLANNELD_ETCD_PASSWORD": "a",
            "LODEN_ETCD_PASSWORD": "b",
        }
    )
    assert not ignored
    store = build(found).store
    assert store.url == "etcd://h:2379/coreos.com/network"
    assert store.access.password == Secret("b")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"store": "etcd://h", "etcd-endpoints": "http://h"}, "--etcd-endpoints names another place"),
        ({"store": "etcd://h", "etcd-prefix": "/x"}, "--etcd-prefix names another place"),
        ({"store": "sqlite:///x", "etcd-username": "u"}, "it is not in etcd"),
        ({"etcd-endpoints": "http://h", "etcd-cafile": "/ca"}, "http:// does not go with certificates"),
        ({"etcd-endpoints": "https://h", "etcd-certfile": "/c"}, "only one of them is given"),
    ],
)
def test_store_flags_that_contradict_each_other_are_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build({name: (text,) for name, text in given.items()})


@pytest.mark.parametrize("name", sorted(NOT_YET))
def test_flags_of_later_versions_are_refused_wherever_they_come_from(name: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name}: .*does not have it yet"):
        list(read_command_line([f"-{name}=true"]))
    variable = f"FLANNELD_{name.upper().replace('-', '_')}"
    with pytest.raises(ConfigError, match=variable):
        read_environment({variable: "true"})
    assert read_environment({variable: ""}) == ({}, ())


def test_our_variable_wins_over_flannels() -> None:
    found, ignored = read_environment({"FLANNELD_IFACE": "eth1", "LODEN_IFACE": "eth0", "FLANNELD_V": "1"})
    assert found == {"iface": ("eth0",), "v": ("1",)}
    assert ignored == ()


def test_variable_of_a_repeatable_flag_is_one_value() -> None:
    found, _ = read_environment({"FLANNELD_IFACE": "eth0,eth1 eth2"})
    assert found == {"iface": ("eth0,eth1 eth2",)}


@pytest.mark.parametrize("text", ["0", "1440", "x", "-5", "1.5", "9" * 5000, "²"])
def test_bad_variable_is_named_and_ignored(text: str) -> None:
    found, ignored = read_environment({"FLANNELD_SUBNET_LEASE_RENEW_MARGIN": text, "LODEN_IFACE": ""})
    assert found == {}
    assert len(ignored) == 1
    assert ignored[0].startswith("FLANNELD_SUBNET_LEASE_RENEW_MARGIN: ")
    assert "from 1 to 1439" in ignored[0]


def test_bad_variable_of_ours_leaves_flannels_standing() -> None:
    found, ignored = read_environment({"LODEN_V": "x", "FLANNELD_V": "1"})
    assert found == {"v": ("1",)}
    assert len(ignored) == 1
