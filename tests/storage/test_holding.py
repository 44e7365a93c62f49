"""Holds between real processes, and on places that don't want any."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import FencedError, RefusedError
from ckptd.storage.local import LocalTier
from ckptd.testing import race
from tests.storage import test_tiers

_FILE = ".ckptd-hold-job"


def test_one_of_many_processes_has_it(tmp_path: Path) -> None:
    """However many processes take and let go in turn, never do two have the job, and nothing is left."""
    code = """
import os
from pathlib import Path
from ckptd.storage.local import LocalTier
root = Path(sys.argv[2])
ready()
for _ in range(25):
    tier = LocalTier(root)
    tier.hold("job", 60)
    inside = os.open(root / "inside", os.O_CREAT | os.O_EXCL)
    os.close(inside)
    (root / "inside").unlink()
    tier.close()
    print("had it")
"""
    assert [said.count("had it") for said in race(code, 4, str(tmp_path))] == [25] * 4
    assert list(tmp_path.iterdir()) == []


def test_the_error_says_who(tmp_path: Path) -> None:
    """Process, host and time of the holder are named, and what to do."""
    tier, other = LocalTier(tmp_path), LocalTier(tmp_path)
    tier.hold("job", 0)
    with pytest.raises(FencedError) as caught:
        other.hold("job", 0)
    named = rf"job job is held by process {os.getpid()} on {re.escape(os.uname().nodename)} since \d{{4}}-\d\d-\d\d "
    assert re.match(named, caught.value.message)
    assert "stop that one" in str(caught.value.hint)
    for text in (b"", b"{}", b"\xff\0", b"[1]"):
        (tmp_path / _FILE).write_bytes(text)
        with pytest.raises(FencedError, match="another process"):
            other.hold("job", 0)
    tier.close()


def test_what_a_killed_holder_left_is_taken_over(tmp_path: Path) -> None:
    """A file that nobody has locked is no hold, whatever it says and whoever wrote it."""
    (tmp_path / _FILE).write_text('{"pid": 1, "host": "elsewhere", "since": "long ago"}' + " " * 100)
    tier = LocalTier(tmp_path)
    tier.hold("job", 0)
    assert f'"pid": {os.getpid()}' in (tmp_path / _FILE).read_text()
    assert "elsewhere" not in (tmp_path / _FILE).read_text()
    tier.close()
    assert list(tmp_path.iterdir()) == []


def test_programs_that_are_started_do_not_share_it(tmp_path: Path) -> None:
    """A rank outlives its agent without keeping the job: nothing that is started inherits the lock."""
    tier = LocalTier(tmp_path)
    tier.hold("job", 0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False) as child:
        tier.close()
        other = LocalTier(tmp_path)
        other.hold("job", 0)
        other.close()
        assert child.poll() is None
        child.communicate(b"\n")


def test_a_forked_process_ends_no_hold(tmp_path: Path) -> None:
    """The end of a process that was forked from the holder leaves the hold as it is."""
    tier = LocalTier(tmp_path)
    tier.hold("job", 0)
    child = os.fork()
    if child == 0:
        tier.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(FencedError):
        LocalTier(tmp_path).hold("job", 0)
    tier.close()


def test_a_process_that_just_ends_leaves_no_file(tmp_path: Path) -> None:
    """The end of the interpreter lets go like `close`."""
    code = "import sys, pathlib; from ckptd.storage.local import LocalTier\n"
    code += "tier = LocalTier(pathlib.Path(sys.argv[1])); tier.hold('job', 0)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_deleted_meanwhile(tmp_path: Path) -> None:
    """Somebody deletes the holder's file and another takes the job: closing the first leaves the other's hold alone."""
    first, second = LocalTier(tmp_path), LocalTier(tmp_path)
    first.hold("job", 0)
    (tmp_path / _FILE).unlink()
    second.hold("job", 0)
    first.close()
    with pytest.raises(FencedError):
        LocalTier(tmp_path).hold("job", 0)
    second.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_what_another_user_left(tmp_path: Path) -> None:
    """A file that may only be read, left by another user's killed agent, can be locked all the same."""
    (tmp_path / _FILE).write_text("theirs")
    (tmp_path / _FILE).chmod(0o644)
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    code = """
import os
from pathlib import Path
from ckptd.errors import FencedError
from ckptd.storage.local import LocalTier
ready()
os.setresuid(65534, 65534, 65534)
tier, other = LocalTier(Path(sys.argv[2])), LocalTier(Path(sys.argv[2]))
tier.hold("job", 0)
try:
    other.hold("job", 0)
except FencedError:
    print("held")
"""
    assert race(code, 1, str(tmp_path)) == ["held"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """It is a refusal, which no retry changes, and not another holder."""

    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    begin_s = time.monotonic()
    with pytest.raises(RefusedError, match="can't lock"):
        LocalTier(tmp_path).hold("job", 60)
    assert time.monotonic() - begin_s < 60


# --- what the suite of tiers catches ------------------------------------------------------------------------------


class _NeverHolding(LocalTier):
    def hold(self, job: str, deadline_s: float) -> None:
        pass


class _HoldingEverything(LocalTier):
    def hold(self, job: str, deadline_s: float) -> None:
        super().hold("all", deadline_s)


class _ShowingHolds(LocalTier):
    def hold(self, job: str, deadline_s: float) -> None:
        super().hold(job, deadline_s)
        self.put(f"{job}/held", b"")


class _PretendingToHold(LocalTier):
    capabilities = replace(LocalTier.capabilities, exclusive_hold=False)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (_NeverHolding, "test_a_job_is_held_once"),
        (_NeverHolding, "test_a_killed_holder_lets_go"),
        (_HoldingEverything, "test_a_job_is_held_once"),
        (_ShowingHolds, "test_a_hold_leaves_nothing"),
        (_PretendingToHold, "test_does_not_pretend_to_hold"),
    ],
)
def test_suite_catches(broken: type[LocalTier], test: str, tmp_path: Path) -> None:
    """The suite fails a tier that keeps nobody out, too many, or that pretends."""
    with pytest.raises((AssertionError, FencedError)):
        getattr(test_tiers.TestLocalTier(), test)(broken(tmp_path))
