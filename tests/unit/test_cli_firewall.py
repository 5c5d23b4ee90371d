# SPDX-License-Identifier: Apache-2.0
"""``loden firewall show``: what the agent would write with the same options."""

import asyncio
import json
from pathlib import Path

import pytest

from loden.cli.main import main
from loden.stores import open_store

CONFIG = {
    "Network": "10.5.0.0/16",
    "EnableIPv6": True,
    "IPv6Network": "fd00:5::/48",
    "IPMasqExclude": ["192.0.2.0/24"],
}
SUBNETS = ("--subnet", "10.5.1.0/24", "--subnet", "fd00:5:0:1::/64")
FORWARD = """IPv4 forward
  1. from 10.5.0.0/16: accept
  2. to 10.5.0.0/16: accept
IPv6 forward
  1. from fd00:5::/48: accept
  2. to fd00:5::/48: accept
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "net.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def show(*arguments: str) -> int:
    return main(["firewall", "show", *arguments])


def test_people_get_numbered_rules(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show("--config", config, "-ip-masq", *SUBNETS, "--family", "ipv4") == 0
    assert capsys.readouterr().out == (
        "IPv4 masquerade\n"
        "  1. with mark 0x4000: return\n"
        "  2. from 10.5.1.0/24 to 10.5.0.0/16: return\n"
        "  3. from 10.5.0.0/16 to 10.5.1.0/24: return\n"
        "  4. from not 10.5.0.0/16 to 10.5.1.0/24: return\n"
        "  5. from 10.5.0.0/16 to 192.0.2.0/24: return\n"
        "  6. from 10.5.0.0/16 to not 224.0.0.0/4: masquerade, any port\n"
        "  7. from not 10.5.0.0/16 to 10.5.0.0/16: masquerade, any port\n"
        + "".join(FORWARD.splitlines(keepends=True)[:3])
    )


def test_flags_and_environment_mean_what_they_mean_to_the_agent(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert show("--config", config) == 0
    assert capsys.readouterr().out == FORWARD
    assert show("--config", config, "--iptables-forward-rules=false") == 0
    assert capsys.readouterr().out == "no rules\n"
    monkeypatch.setenv("FLANNELD_IPTABLES_FORWARD_RULES", "F")
    assert show("--config", config) == 0
    assert capsys.readouterr().out == "no rules\n"


def test_configuration_comes_from_the_store_and_subnets_from_the_subnet_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/store.db"

    async def put() -> None:
        store = open_store(url)
        await store.put_network(b'{"Network": "10.5.0.0/16"}')
        await store.close()

    asyncio.run(put())
    file = tmp_path / "subnet.env"
    file.write_text("FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.77.1/24\n")
    assert show("--store", url, "--subnet-file", str(file), "--ip-masq") == 0
    assert "from 10.5.77.0/24 to 10.5.0.0/16: return" in capsys.readouterr().out


def test_programs_get_what_they_read(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert show("--config", config, "--format", "nft") == 0
    assert capsys.readouterr().out.count("\ntable ip") == 2
    assert show("--config", config, "--format", "iptables") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line[0] in "#*C"] == [
        *("# iptables-restore --noflush", "*filter", "COMMIT"),
        *("# ip6tables-restore --noflush", "*filter", "COMMIT"),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ip-masq",), "the host's IPv4 subnet is neither given nor in"),
        (("--ip-masq", "--subnet", "10.6.1.0/24"), "10.6.1.0/24 is not in 10.5.0.0/16"),
        (("--subnet", "10.5.1.0"), "'10.5.1.0' is not an address range"),
        (("--ip-masq-exclude", "x"), "--ip-masq-exclude: 'x' is not an address range"),
        (("--ip-masq=yes",), "--ip-masq: 'yes' is not a boolean"),
    ],
)
def test_what_is_missing_or_wrong_is_said(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert show("--config", config, "--subnet-file", str(tmp_path / "none"), *arguments) == 1
    assert said in capsys.readouterr().err


def test_store_without_a_configuration_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"sqlite:///{tmp_path}/store.db"

    async def make() -> None:
        store = open_store(url)
        await store.snapshot()
        await store.close()

    asyncio.run(make())
    assert show("--store", url) == 1
    assert "there is none" in capsys.readouterr().err
