"""The embedded coordinator: compare-and-set and leases that hold between real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ckptd.coordination.coordinator import next_generation
from ckptd.coordination.embedded import EmbeddedCoordinator
from ckptd.errors import FencedError, StoreError
from ckptd.testing import race

PROCESSES = 5
_HOLD = """
import sys
from pathlib import Path
from ckptd.coordination.embedded import EmbeddedCoordinator
lease = EmbeddedCoordinator(Path(sys.argv[1])).lease(sys.argv[2], sys.argv[3])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def coordinator(tmp_path: Path) -> EmbeddedCoordinator:
    """A coordinator in a state folder that does not exist yet."""
    return EmbeddedCoordinator(tmp_path / "state")


@contextmanager
def holder(home: Path, name: str, text: str) -> Iterator[subprocess.Popen[str]]:
    """A real process that holds a lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(home), name, text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


# --- compare and set --------------------------------------------------------------------------------------------


def test_versions_grow_by_one(coordinator: EmbeddedCoordinator) -> None:
    """A key begins at version 1, and only who names its present version can set it."""
    assert coordinator.get("key") is None
    assert not coordinator.put_if_version("key", "x", 1)
    assert coordinator.put_if_version("key", "one", 0)
    assert coordinator.get("key") == ("one", 1)
    assert not coordinator.put_if_version("key", "again", 0)
    assert not coordinator.put_if_version("key", "ahead", 2)
    assert coordinator.put_if_version("key", "two", 1)
    assert not coordinator.put_if_version("key", "late", 1)
    assert coordinator.get("key") == ("two", 2)
    assert coordinator.get("other") is None


def test_values_are_kept_as_they_are(coordinator: EmbeddedCoordinator, tmp_path: Path) -> None:
    """Any text is a key and a value, and another coordinator at the same place sees it."""
    for number, text in enumerate(["", "ä☃", "a'b\"c; DROP TABLE items", "x" * 100_000, "a/b\n"]):
        assert coordinator.put_if_version(f"key {number} {text}", text, 0)
        assert EmbeddedCoordinator(tmp_path / "state").get(f"key {number} {text}") == (text, 1)


def test_a_race_has_one_winner(coordinator: EmbeddedCoordinator, tmp_path: Path) -> None:
    """Of several processes that set the same version of a key at once one wins, and the value is its own."""
    code = """
from pathlib import Path
from ckptd.coordination.embedded import EmbeddedCoordinator
number, home = sys.argv[1:]
coordinator = EmbeddedCoordinator(Path(home))
ready()
for version in range(30):
    while (current := coordinator.get("key")) is not None and current.version < version:
        pass
    if coordinator.put_if_version("key", f"{version} {number}", version):
        print(version)
"""
    won = [said.split() for said in race(code, PROCESSES, str(tmp_path / "state"))]
    assert sorted(int(version) for mine in won for version in mine) == list(range(30))
    last = coordinator.get("key")
    assert last is not None
    assert last.version == 30
    assert "29" in won[int(last.value.split()[1])]


def test_generations_never_repeat(tmp_path: Path) -> None:
    """However many processes take generations at once, each number is taken once, and for each they only grow."""
    code = """
from pathlib import Path
from ckptd.coordination.coordinator import next_generation
from ckptd.coordination.embedded import EmbeddedCoordinator
ready()
coordinator = EmbeddedCoordinator(Path(sys.argv[2]))  # the first use of the folder is part of the race
print(*[next_generation(coordinator, "gpt", 1) for _ in range(20)])
"""
    taken = [[int(number) for number in said.split()] for said in race(code, PROCESSES, str(tmp_path / "state"))]
    assert all(mine == sorted(mine) for mine in taken)
    assert sorted(number for mine in taken for number in mine) == list(range(1, 20 * PROCESSES + 1))


def test_a_generation_is_above_what_the_store_knows(coordinator: EmbeddedCoordinator) -> None:
    """A lost state folder does not bring a generation back: the store's newest is the least that is taken."""
    assert next_generation(coordinator, "gpt", 7) == 7
    assert next_generation(coordinator, "gpt", 3) == 8
    assert next_generation(coordinator, "gpt", 8) == 9
    assert next_generation(coordinator, "other", 1) == 1


# --- leases -----------------------------------------------------------------------------------------------------


def test_a_lease_excludes_and_names_its_holder(coordinator: EmbeddedCoordinator, tmp_path: Path) -> None:
    """While one process holds a name, another is refused with the holder's words."""
    with holder(tmp_path / "state", "gpt", "agent 4711"), pytest.raises(FencedError, match="gpt is held by agent 4711"):
        coordinator.lease("gpt", "agent 1")


def test_a_lease_excludes_within_a_process(coordinator: EmbeddedCoordinator) -> None:
    """The same process can't hold a name twice either, and after a release the next holder's words count."""
    first = coordinator.lease("gpt", "the first, with a long name")
    with pytest.raises(FencedError, match="the first, with a long name"):
        coordinator.lease("gpt", "the second")
    other = coordinator.lease("another job", "the second")
    first.release()
    first.release()  # twice is no harm
    second = coordinator.lease("gpt", "short")
    with pytest.raises(FencedError, match=r"gpt is held by short \(hint: .*stop that one"):
        coordinator.lease("gpt", "the third")
    second.release()
    other.release()


def test_a_lease_ends_with_kill_9(coordinator: EmbeddedCoordinator, tmp_path: Path) -> None:
    """A holder that is killed holds nothing any more: no timeout has to pass, nothing has to be cleaned up."""
    with holder(tmp_path / "state", "gpt", "agent 4711") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        coordinator.lease("gpt", "agent 1").release()


def test_a_lease_is_not_inherited_by_programs(coordinator: EmbeddedCoordinator, tmp_path: Path) -> None:
    """A program that the holder started does not keep the lease when the holder has died: launchers outlive agents."""
    code = _HOLD.replace("sys.stdin.read()", "") + (
        "import os, signal, subprocess\n"
        "null = subprocess.DEVNULL\n"
        "child = subprocess.Popen(['sleep', '60'], close_fds=False, stdout=null, stderr=null)\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "state"), "gpt", "agent 7"],
        check=False,
        capture_output=True,
        text=True,
    )
    child = int(done.stdout.split()[1])
    try:
        assert Path(f"/proc/{child}").exists()
        coordinator.lease("gpt", "agent 1").release()
    finally:
        subprocess.run(["kill", "-9", str(child)], check=True)


def test_a_race_for_a_lease_has_one_winner(tmp_path: Path) -> None:
    """Of several processes that want a name at once one holds it, and the others are fenced off."""
    code = """
import time
from pathlib import Path
from ckptd.coordination.embedded import EmbeddedCoordinator
from ckptd.errors import FencedError
number, home = sys.argv[1:]
coordinator = EmbeddedCoordinator(Path(home))
ready()
try:
    lease = coordinator.lease("gpt", f"agent {number}")
    print("held")
    time.sleep(1.0)
except FencedError:
    print("fenced")
"""
    assert sorted(race(code, PROCESSES, str(tmp_path / "state"))) == ["fenced"] * (PROCESSES - 1) + ["held"]


# --- trouble ----------------------------------------------------------------------------------------------------


def test_a_state_folder_that_can_not_be_used(tmp_path: Path) -> None:
    """A state folder that is a file is a `StoreError` with a hint."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="can't use the state folder") as caught:
        EmbeddedCoordinator(tmp_path / "file")
    assert "CKPTD_HOME" in (caught.value.hint or "")


def test_a_damaged_table_is_a_store_error(coordinator: EmbeddedCoordinator, tmp_path: Path) -> None:
    """A file that is no database any more is a `StoreError`, when it is opened and when it is used."""
    for path in (tmp_path / "state").glob("coordinator.sqlite*"):
        path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(StoreError, match="coordinator"):
        coordinator.get("key")
    with pytest.raises(StoreError, match="coordinator"):
        coordinator.put_if_version("key", "x", 0)
    with pytest.raises(StoreError, match="can't use the state folder"):
        EmbeddedCoordinator(tmp_path / "state")


def test_a_lease_that_can_not_be_written_is_a_store_error(coordinator: EmbeddedCoordinator, tmp_path: Path) -> None:
    """Trouble with the lock file itself is a `StoreError`, not "somebody else holds it"."""
    (tmp_path / "state/leases/gpt.lock").mkdir()
    with pytest.raises(StoreError, match="can't use the lease"):
        coordinator.lease("gpt", "agent 1")


@pytest.mark.parametrize("call", ["ftruncate", "pwrite"])
def test_a_full_disk_keeps_nobody_from_a_lease(
    coordinator: EmbeddedCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Who holds a lease is written down for people alone: where there is no room for that, it is held all the same."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    lease = coordinator.lease("gpt", "agent 1")
    with pytest.raises(FencedError):
        EmbeddedCoordinator(tmp_path / "state").lease("gpt", "agent 2")
    lease.release()


def test_a_lock_that_fails_is_a_store_error(coordinator: EmbeddedCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the lock itself is said in one line, and leaves no descriptor."""

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", broken)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(StoreError, match="Input/output error"):
        coordinator.lease("gpt", "agent 1")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_no_descriptor_is_left(coordinator: EmbeddedCoordinator) -> None:
    """Reading, setting and being refused a lease leave no file open."""
    held = coordinator.lease("gpt", "me")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for number in range(20):
        coordinator.get("key")
        coordinator.put_if_version(f"key {number}", "x", 0)
        with pytest.raises(FencedError):
            coordinator.lease("gpt", "you")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    held.release()


def test_a_stuck_writer_is_waited_for(coordinator: EmbeddedCoordinator, tmp_path: Path) -> None:
    """Another process in the middle of a write makes a put wait, not fail."""
    code = """
import sqlite3, time
database = sqlite3.connect(sys.argv[2], isolation_level=None)
database.execute("BEGIN IMMEDIATE")
ready()
time.sleep(0.4)
database.execute("COMMIT")
"""
    import threading

    path = tmp_path / "state/coordinator.sqlite"
    writer = threading.Thread(target=race, args=(code, 1, str(path)))
    writer.start()
    end_s = time.monotonic() + 30
    while writer.is_alive() and time.monotonic() < end_s:
        coordinator.put_if_version("key", "x", 0)
    writer.join()
    assert coordinator.get("key") == ("x", 1)
