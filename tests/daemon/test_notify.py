"""systemd's readiness protocol, on a real datagram socket."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from ckptd.daemon.notify import notify
from tests.daemon.harness import open_descriptors


@pytest.fixture(autouse=True)
def _no_leak():
    """No call leaves a descriptor."""
    before = open_descriptors()
    yield
    assert open_descriptors() == before


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_gets_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool) -> None:
    """The state arrives as one datagram, at a path or an abstract name."""
    name = f"ckptd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}" if abstract else name)
        manager.settimeout(10)
        notify("READY=1\nSTATUS=serving")
        notify("STOPPING=1")
        assert manager.recv(1000) == b"READY=1\nSTATUS=serving"
        assert manager.recv(1000) == b"STOPPING=1"


@pytest.mark.parametrize("value", [None, "", "/nonexistent/notify", "@ckptd-nobody-listens"])
def test_nobody_who_listens_is_no_error(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """Without systemd, or with one that has gone, nothing happens."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    notify("READY=1")
