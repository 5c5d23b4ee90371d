# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from loden.cli.lease import command
from loden.errors import ConfigError, LeaseError, LodenError, StoreUnusable
from loden.stores import open_store
from loden.stores.base import Record
from tests.contract.store import holder, lease, run


class Shell:
    """Types commands at one store."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.url = f"sqlite://{path}"

    def __call__(self, *arguments: str) -> str:
        result = CliRunner().invoke(command, [*arguments, "--store", self.url])
        if isinstance(result.exception, LodenError):
            raise result.exception
        assert result.exit_code == 0, result.output
        return result.stdout

    def hold(self, subnet: str, name: str, *, ipv6: str = "") -> Record:
        async def work() -> Record:
            store = open_store(self.url)
            try:
                return await store.create(lease(subnet, ipv6=ipv6), holder=holder(name))
            finally:
                await store.close()

        return run(work)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "loden.db")


def test_list_draws_a_line_for_each_lease(shell: Shell) -> None:
    shell.hold("10.5.9.0/24", "host[b]9")
    shell("reserve", "10.5.10.0/24", "--public-ip", "192.0.2.10")
    title, first, second = shell("list").splitlines()
    assert title.split() == ["subnet", "public", "address", "backend", "holder", "expires", "in"]
    assert first.split()[:4] == ["10.5.9.0/24", "192.0.2.1", "vxlan", "host[b]9"]
    assert second.split() == ["10.5.10.0/24", "192.0.2.10", "-", "-", "never", "(reserved)"]


def test_list_prints_json_for_programs(shell: Shell) -> None:
    record = shell.hold("10.5.9.0/24", "a", ipv6="fc00:0:0:9::/64")
    listed = json.loads(shell("list", "--json"))
    assert listed["revision"] == record.revision
    assert listed["malformed"] == {}
    (found,) = listed["leases"]
    assert found["subnets"] == ["10.5.9.0/24", "fc00:0:0:9::/64"]
    assert found["public"] == ["192.0.2.1", "fd00::1"]
    assert found["backend_data"] == [{"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}, None]
    assert found["holder"] == {"id": "boot/a", "name": "a"}
    assert 86_000 < found["expires_in_s"] <= 86_400
    assert found["reservation"] is False


def test_list_of_a_missing_store_makes_none(shell: Shell) -> None:
    with pytest.raises(StoreUnusable, match="no such file"):
        shell("list")
    assert not shell.path.exists()


@pytest.mark.parametrize(
    "name", ["10.5.9.0/24", "10.5.9.0-24&fc00:0:0:9::-64", "fc00:0:0:9::/64", "10.5.9.7/24"]
)
def test_show_takes_a_subnet_or_a_key(shell: Shell, name: str) -> None:
    record = shell.hold("10.5.9.0/24", "a", ipv6="fc00:0:0:9::/64")
    assert json.loads(shell("show", name, "--json"))["key"] == record.key
    assert f"key:             {record.key}\n" in shell("show", name)


def test_show_of_no_lease_says_where_to_look(shell: Shell) -> None:
    shell.hold("10.5.9.0/24", "a")
    with pytest.raises(LeaseError, match=r"show 10\.5\.8\.0/24: no such lease.*loden lease list"):
        shell("show", "10.5.8.0/24")


def test_reserve_makes_a_store_and_a_reservation(shell: Shell) -> None:
    assert shell("reserve", "10.5.9.0/24") == "reserved 10.5.9.0/24\n"
    assert json.loads(shell("show", "10.5.9.0/24", "--json"))["reservation"] is True


def test_reserve_turns_a_lease_into_a_reservation(shell: Shell) -> None:
    shell.hold("10.5.9.0/24", "a")
    found = json.loads(shell("reserve", "10.5.9.0/24", "--json"))
    assert found["reservation"] is True
    assert found["expires_in_s"] is None
    assert found["public"] == ["192.0.2.1"]
    assert found["holder"]["name"] == "a"


def test_reserve_of_an_overlap_says_what_is_there(shell: Shell) -> None:
    shell.hold("10.5.9.0/24", "a")
    with pytest.raises(LeaseError, match=r"reserve 10\.5\.8\.0/23.*overlaps lease 10\.5\.9\.0-24"):
        shell("reserve", "10.5.8.0/23")


@pytest.mark.parametrize(
    "arguments",
    [
        ("reserve", "10.5.9"),
        ("reserve", "10.5.9.0/33"),
        ("reserve", "10.5.9.0-24&"),
        ("reserve", "10.5.9.0/24", "--public-ip", "192.0.2"),
        ("reserve", "10.5.9.0/24", "--public-ip", "fd00::1"),
        ("reserve", "10.5.9.0/24", "--public-ipv6", "fd00::1"),
    ],
)
def test_reserve_refuses_bad_input(shell: Shell, arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        shell(*arguments)
    assert not shell.path.exists()


def test_release_frees_the_subnet(shell: Shell) -> None:
    shell.hold("10.5.9.0/24", "a")
    assert shell("release", "10.5.9.0/24") == "released 10.5.9.0/24\n"
    assert json.loads(shell("list", "--json"))["leases"] == []
    with pytest.raises(LeaseError, match="no such lease"):
        shell("release", "10.5.9.0/24")


def test_store_comes_from_the_environment(shell: Shell) -> None:
    shell.hold("10.5.9.0/24", "a")
    result = CliRunner(env={"LODEN_STORE": shell.url}).invoke(command, ["list"])
    assert "10.5.9.0/24" in result.stdout
