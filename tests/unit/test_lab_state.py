# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path

import pytest

from loden.errors import LabError
from loden.lab import state as state_module
from loden.lab.processes import Process
from loden.lab.state import State, names
from loden.lab.topology import Spec, plan


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    monkeypatch.setenv("LODEN_LAB_DIR", str(tmp_path / "labs"))
    monkeypatch.setattr(state_module, "_BUSY_S", 0.0)
    return State("x")


def test_state_keeps_what_was_saved(state: State) -> None:
    planned = plan(Spec(name="x", hosts=2))
    with state.locked_new():
        state.save(planned)
        state.save_agent("h1", Process(1, 2))
    assert state.load() == planned
    assert state.agent("h1") == Process(1, 2)
    assert state.agent("h2") is None
    assert names() == ("x",)


def test_second_lab_of_the_name_is_refused(state: State) -> None:
    with (
        state.locked_new(),
        pytest.raises(LabError, match=r"it exists .*down --name x"),
        State("x").locked_new(),
    ):
        pass


def test_lab_in_use_is_refused(state: State) -> None:
    with (
        state.locked_new(),
        pytest.raises(LabError, match="another command works on it"),
        State("x").locked(),
    ):
        pass


def test_lock_of_a_lab_that_is_not_there_is_none(state: State) -> None:
    with state.locked() as lock:
        assert lock is None


def test_lock_of_a_lab_that_was_removed_meanwhile_is_none(state: State) -> None:
    with state.locked_new():
        pass
    handle = os.open(state.path, os.O_RDONLY)
    try:
        state.remove()
        assert not state._is_current(handle)
        state.path.mkdir()
        assert not state._is_current(handle)
    finally:
        os.close(handle)


def test_half_made_lab_has_no_plan_and_is_removed(state: State) -> None:
    with state.locked_new():
        assert state.find() is None
        with pytest.raises(LabError, match="no such lab"):
            state.load()
        state.remove()
    assert names() == ()


def test_plan_that_cannot_be_read_is_named(state: State) -> None:
    with state.locked_new():
        (state.path / "lab.json").write_text("{}")
        with pytest.raises(LabError, match=r"lab\.json"):
            state.find()


def test_directory_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LODEN_LAB_DIR", str(tmp_path / "file"))
    with pytest.raises(LabError, match=r"make .*file: File exists"), State("x").locked_new():
        pass
