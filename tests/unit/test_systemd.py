# SPDX-License-Identifier: Apache-2.0
import os
import socket
from pathlib import Path

import pytest

from loden.status.systemd import notify


def test_nobody_listens_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify(READY=1)


@pytest.mark.parametrize("is_abstract", [False, True])
def test_fields_arrive_one_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_abstract: bool) -> None:
    name = f"@loden-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name.replace("@", "\0", 1))
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert notify(READY=1, STATUS="3 hosts\nREADY=0")
        assert listener.recv(1000) == b"READY=1\nSTATUS=3 hosts READY=0"


@pytest.mark.parametrize("name", ["/nonexistent/socket", "@nobody-is-here", "x" * 200, "/tmp"])
def test_listener_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    assert not notify(READY=1)


def test_listener_that_does_not_read_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(name)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert not all(notify(STATUS="x" * 1000) for _ in range(10_000))
