# SPDX-License-Identifier: Apache-2.0
import sys
from types import ModuleType

import pytest

from loden.cli.main import main
from loden.options import AgentOptions, build


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[AgentOptions]:
    """What an agent in the place of the real one is told."""
    told: list[AgentOptions] = []
    agent = ModuleType("loden.agent")

    def run(options: AgentOptions) -> int:
        told.append(options)
        return 0

    agent.__dict__["run"] = run
    monkeypatch.setitem(sys.modules, "loden.agent", agent)
    return told


def test_flags_reach_the_agent(given: list[AgentOptions]) -> None:
    words = "run -iface eth0 --iface=eth1 -public-ip=10.0.0.1 --healthz-port 8081 --store sqlite:///x -v=1"
    assert main(words.split()) == 0
    assert given == [
        build(
            {
                "iface": ("eth0", "eth1"),
                "public-ip": ("10.0.0.1",),
                "healthz-port": ("8081",),
                "store": ("sqlite:///x",),
                "v": ("1",),
            }
        )
    ]


def test_environment_stands_in_for_flags_that_are_not_given(
    given: list[AgentOptions], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLANNELD_IFACE", "eth7")
    monkeypatch.setenv("LODEN_PUBLIC_IP", "10.0.0.7")
    assert main(["run", "--iface", "eth0"]) == 0
    assert given == [build({"iface": ("eth0",), "public-ip": ("10.0.0.7",)})]


def test_bad_variable_is_logged_with_its_name(
    given: list[AgentOptions], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FLANNELD_HEALTHZ_PORT", "eighty")
    assert main(["run"]) == 0
    assert given == [build()]
    assert "FLANNELD_HEALTHZ_PORT: 'eighty' is not allowed, ignored" in caplog.text


def test_unknown_flag_is_refused_with_the_likely_one(
    given: list[AgentOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    """COMPAT W35: flanneld exits with 0 here."""
    assert main(["run", "-subnet-fil", "x"]) == 2
    assert "'--subnet-file'?)" in capsys.readouterr().err
    assert given == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--kube-subnet-mgr", "--kube-subnet-mgr: this version of Loden does not have it yet"),
        ("--ip-masq=yes", "--ip-masq: 'yes' is not a boolean"),
        ("-etcd-endpoints=ftp://127.0.0.1:2379", "'ftp://127.0.0.1:2379': no such scheme"),
        ("--subnet-lease-renew-margin 1440", "a whole number from 1 to 1439"),
        ("--healthz-port=65536", "a whole number from 0 to 65535"),
    ],
)
def test_bad_flag_is_refused_with_the_reason(
    given: list[AgentOptions], capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    assert main(["run", *words.split()]) == 1
    assert said in capsys.readouterr().err
    assert given == []


def test_version_goes_to_the_standard_error_before_anything_else(
    given: list[AgentOptions], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLANNELD_IP_MASQ", "true")
    assert main(["run", "-version"]) == 0
    assert capsys.readouterr().err.startswith("loden ")
    assert given == []
