"""systemd's readiness protocol, on a real datagram socket."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from pathlib import Path

import pytest

from ckptd.daemon.notify import Watchdog, notify, watchdog_s
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


@pytest.mark.parametrize(
    ("environ", "every_s"),
    [
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "7"}, 1.0),
        ({"WATCHDOG_USEC": "3000000"}, 1.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "often"}, None),
        ({}, None),
    ],
)
def test_how_often_the_watchdog_is_fed(environ: dict[str, str], every_s: float | None) -> None:
    """It is fed three times in its limit, if it is for this process."""
    assert watchdog_s(environ, 7) == every_s


def test_a_loop_that_hangs_feeds_no_watchdog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The watchdog is fed for as long as the loop goes round, not while it hangs, and not after the end."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)

        def heard() -> int:
            count = 0
            while True:
                try:
                    assert manager.recv(1000) == b"WATCHDOG=1"
                except BlockingIOError:
                    return count
                count += 1

        async def run() -> None:
            watchdog = Watchdog(0.01)
            watchdog.start()
            fed = 0
            while fed < 5:
                await asyncio.sleep(0.01)
                fed += heard()
            time.sleep(0.2)  # noqa: ASYNC251 - that is what a loop that hangs does
            assert heard() == 0
            await asyncio.sleep(0.1)
            assert heard()
            watchdog.stop()
            await asyncio.sleep(0.1)
            assert heard() == 0

        asyncio.run(run())


def test_descriptors_are_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Descriptors travel with the message, and stay open here."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        reader, writer = os.pipe()
        notify("FDSTORE=1\nFDNAME=pipe", (writer,))
        text, (copy,), _, _ = socket.recv_fds(manager, 100, 4)
        assert text == b"FDSTORE=1\nFDNAME=pipe"
        for descriptor, said in ((writer, b"mine"), (copy, b"yours")):
            os.write(descriptor, said)
            assert os.read(reader, 10) == said
        for descriptor in (reader, writer, copy):
            os.close(descriptor)


def test_a_manager_that_does_not_read_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the manager's queue stays full, a message is given up after a moment."""
    monkeypatch.setattr("ckptd.daemon.notify._SEND_DEADLINE_S", 0.05)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        for _ in range(40):
            notify("WATCHDOG=1" + " " * 20_000)


@pytest.mark.parametrize("value", [None, "", "/nonexistent/notify", "@ckptd-nobody-listens"])
def test_nobody_who_listens_is_no_error(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """Without systemd, or with one that has gone, nothing happens."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if value is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", value)
    notify("READY=1")
