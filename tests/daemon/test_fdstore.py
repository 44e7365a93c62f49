"""What is told to systemd's descriptor store, and what is taken over from it, on real sockets and descriptors."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckptd.daemon.arena import Arena, Budget
from ckptd.daemon.fdstore import FdStore, page_name, slot_name
from ckptd.errors import StoreError
from tests.daemon.harness import AgentThread, Node, open_descriptors

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


def test_a_slot_that_the_journal_does_not_know_is_not_kept(manager: socket.socket) -> None:
    """While the journal can't be written, no slot that changes is left to the next agent; afterwards all are again."""
    arena = Arena("job", Budget(), 2, FdStore({"NOTIFY_SOCKET": "here"}, os.getpid()))
    arena.reserve(0, MIB, ())
    arena.keep([(0, 0)], known=True)
    assert [heard(manager)[0].split("/")[-1] for _ in range(2)] == ["slot0", "slot1"]
    arena.keep([(0, 1)], known=False)
    assert heard(manager) == ("FDSTOREREMOVE=1\nFDNAME=job/0/slot1", 0)
    arena.reserve(0, 3 * MIB, (0,))  # what lies in slot 0 is needed; slot 1 is made anew, and slot 2
    assert [heard(manager)[0] for _ in range(2)] == [
        "FDSTOREREMOVE=1\nFDNAME=job/0/slot1",
        "FDSTORE=1\nFDNAME=job/0/slot2",
    ]
    arena.keep([(0, 0)], known=True)
    assert heard(manager) == ("FDSTORE=1\nFDNAME=job/0/slot1", 1)
    arena.close()


def test_no_slot_changes_before_the_journal_knows(
    manager: socket.socket, start_agent: Callable[..., AgentThread], node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank may write a slot again when the next agent would not take it any more for what it has held."""
    agent = start_agent()
    agent.call(lambda: setattr(agent.agent.kept, "wanted", True))
    (rank,) = node.attach(1, every=0.05)
    job, before = agent.job(), agent.job().attendance.release
    let_go: list[bool] = []
    """Whether the journal says of a slot that is let go of that it holds something."""

    def release(number: int, slot: int) -> None:
        entry = agent.agent.journal.read_job("job")
        assert entry is not None
        let_go.append(slot in [shard[0] for shard in entry.life.handover["shards"].get("0", [])])
        before(number, slot)

    monkeypatch.setattr(job.attendance, "release", release)
    rank.train_until(lambda: len(let_go) >= 3, "slots that are used again")
    assert not any(let_go)

    def full(_: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(job.attendance, "release", before)
    monkeypatch.setattr(agent.agent.journal, "write_job", full)
    told: list[str] = []

    def removed() -> bool:
        manager.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            told.append(manager.recv(4096).decode())
        return any(text.startswith("FDSTOREREMOVE=1\nFDNAME=job/0/slot") for text in told)

    rank.train_until(removed, "a slot that is kept no more")
    rank.do("run.close()")
    agent.close()
    manager.setblocking(True)


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
