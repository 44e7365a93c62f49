"""What is told to systemd's descriptor store, and what is taken over from it, on real sockets and descriptors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.daemon.arena import Arena, Budget
from ckptd.daemon.fdstore import FdStore, page_name, slot_name
from tests.daemon.harness import open_descriptors

MIB = 2**20


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket that a service manager listens on."""
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(10)
        yield listening


def heard(manager: socket.socket) -> tuple[str, int]:
    """The next message's text, and how many descriptors came with it."""
    text, descriptors, _, _ = socket.recv_fds(manager, 4096, 8)
    for descriptor in descriptors:
        os.close(descriptor)
    return text.decode(), len(descriptors)


def test_slots_are_kept_while_they_are_there(manager: socket.socket) -> None:
    """Each slot is put into the store under a name of its own when it is made, and removed when it is given back."""
    before = open_descriptors()
    arena = Arena("job", Budget(), 2, FdStore({"NOTIFY_SOCKET": "here"}, os.getpid()))
    arena.reserve(1, MIB, ())
    assert [heard(manager) for _ in range(2)] == [(f"FDSTORE=1\nFDNAME=job/1/slot{n}", 1) for n in range(2)]
    arena.close()
    assert [heard(manager) for _ in range(2)] == [(f"FDSTOREREMOVE=1\nFDNAME=job/1/slot{n}", 0) for n in range(2)]
    assert open_descriptors() == before


def test_without_systemd_nothing_is_told(manager: socket.socket) -> None:
    """A foreground or embedded agent tells nobody of its slots, even where a service manager listens."""
    arena = Arena("job", Budget(), 2)
    arena.reserve(0, MIB, ())
    arena.close()
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(1000)


def test_what_was_left_is_taken_over_once(manager: socket.socket) -> None:
    """A new agent takes what it needs by name; the rest is closed and removed, and no child inherits any of it."""
    code = """
import os, subprocess, sys
from ckptd.daemon.fdstore import FdStore
os.environ["LISTEN_PID"] = str(os.getpid())
store = FdStore(os.environ, os.getpid())
assert store.inherited == ("job/0/slot0", "job/0/slot1", "job/0/page"), store.inherited
assert not [name for name in os.environ if name.startswith("LISTEN_")]
mine = store.take("job/0/slot1")
assert os.pread(mine, 10, 0) == b"one"
assert store.take("job/0/slot1") is None and store.take("other/0/page") is None
store.put("job/0/page", mine)
store.remove_rest(but=("job",))
assert store.inherited == ("job/0/slot0",)
store.remove_rest()
assert store.inherited == ()
assert [number for number in range(3, 7) if os.path.exists(f"/proc/self/fd/{number}")] == [mine]
assert subprocess.run(["ls", f"/proc/self/fd/{mine}"], capture_output=True).returncode
"""
    files = []
    for number, text in enumerate((b"zero", b"one", b"page", b"again")):
        files.append(os.memfd_create(f"{number}"))
        os.write(files[-1], text)
    names = "job/0/slot0:job/0/slot1:job/0/page:job/0/slot1"
    env = {**os.environ, "LISTEN_FDS": "4", "LISTEN_FDNAMES": names, "PYTHONPATH": str(Path(__file__).parents[2])}

    def arrange() -> None:
        high = [os.dup(file) for file in files]
        for number, file in enumerate(high):
            os.dup2(file, 3 + number)

    done = subprocess.run(
        [sys.executable, "-c", code], env=env, pass_fds=range(3, 7), preexec_fn=arrange, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    for file in files:
        os.close(file)
    assert done.returncode == 0, done.stderr
    assert [heard(manager) for _ in range(3)] == [
        ("FDSTOREREMOVE=1\nFDNAME=job/0/page", 0),
        ("FDSTORE=1\nFDNAME=job/0/page", 1),
        ("FDSTOREREMOVE=1\nFDNAME=job/0/slot0", 0),
    ]


@pytest.mark.parametrize(
    "environ",
    [
        {"LISTEN_FDS": "2", "LISTEN_PID": "1", "LISTEN_FDNAMES": "a:b"},
        {"LISTEN_FDS": "2"},
        {"LISTEN_FDS": "many", "LISTEN_PID": str(os.getpid())},
        {"LISTEN_FDS": "0", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": ""},
        {},
    ],
)
def test_what_is_not_meant_for_it_is_left_alone(environ: dict[str, str]) -> None:
    """Descriptors that were passed to another process, or in an unreadable way, are not touched."""
    before = open_descriptors()
    assert FdStore(environ, os.getpid()).inherited == ()
    assert open_descriptors() == before
    assert not environ


def test_names_fit() -> None:
    """The longest name that a job may have makes names that systemd takes: up to 255 characters, no colon."""
    for name in (slot_name("j" * 128, 1023, 7), page_name("j" * 128, 1023)):
        assert len(name) <= 255
        assert ":" not in name
