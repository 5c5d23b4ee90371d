# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest

from loden.cli.main import main

GOOD = '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan", "vni": 7}}'
BAD = '{"Network": "10.5.0.0/33", "SubnetLen": "x", "Backend": {"Type": "vxlan", "VNI": "1"}}'


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


def test_check_prints_what_is_derived_for_people(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(GOOD)
    assert main(["config", "check", str(file)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["IPv4", "network", "10.5.0.0/16"] in lines
    assert ["subnets", "255,", "each", "a", "/24"] in lines
    assert ["first", "10.5.1.0/24"] in lines
    assert ["last", "10.5.255.0/24"] in lines
    assert ["backend", "vxlan"] in lines
    assert ["VNI", "7"] in lines
    assert ["Port", "0"] in lines


def test_check_prints_one_object_for_programs(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(GOOD)
    assert main(["config", "check", "--json", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["valid"] is True
    assert found["networks"] == [
        {
            "family": "IPv4",
            "network": "10.5.0.0/16",
            "subnet_length": 24,
            "first": "10.5.1.0/24",
            "last": "10.5.255.0/24",
            "subnets": 255,
        }
    ]
    assert found["backend"]["type"] == "vxlan"
    assert found["backend"]["options"]["VNI"] == 7


def test_check_names_every_error_with_key_value_and_what_is_allowed(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(BAD)
    assert main(["config", "check", str(file)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if line.startswith("loden")] == [
        'loden: Network: "10.5.0.0/33" is not an IPv4 range',
        'loden: SubnetLen: "x" is not a whole number',
        'loden: Backend.VNI: "1" is not allowed',
    ]
    assert err.count("hint: ") == 3


def test_check_gives_programs_the_same_errors(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(BAD)
    assert main(["config", "check", "--json", str(file)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["valid"] is False
    assert [error["key"] for error in found["errors"]] == ["Network", "SubnetLen", "Backend.VNI"]
    assert all(error["reason"] and error["allowed"] for error in found["errors"])


def test_check_of_an_unknown_backend_lists_the_known(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text('{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlam"}}')
    assert main(["config", "check", str(file)]) == 1
    err = capsys.readouterr().err
    assert "Backend.Type" in err
    assert "vxlam" in err
    assert "vxlan" in err


def test_check_of_no_file_is_a_wrong_question() -> None:
    assert main(["config", "check", "/nonexistent"]) == 2


def test_put_then_get_gives_the_same_text(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("loden.stores.sqlite")
    file.write_text(GOOD)
    store = f"sqlite:///{tmp_path}/loden.db"
    assert main(["config", "put", str(file), "--store", store]) == 0
    assert main(["config", "get", "--store", store]) == 0
    assert capsys.readouterr().out == GOOD + "\n"


def test_put_of_a_bad_file_leaves_what_is_there(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("loden.stores.sqlite")
    monkeypatch.setenv("LODEN_STORE", f"sqlite:///{tmp_path}/loden.db")
    file.write_text(GOOD)
    assert main(["config", "put", str(file)]) == 0
    file.write_text(BAD)
    assert main(["config", "put", str(file)]) == 1
    capsys.readouterr()
    assert main(["config", "get"]) == 0
    assert capsys.readouterr().out == GOOD + "\n"


def test_get_where_nothing_was_put_says_how_to_put(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("loden.stores.sqlite")
    assert main(["config", "get", "--store", f"sqlite:///{tmp_path}/loden.db"]) == 1
    assert "hint: " in capsys.readouterr().err
