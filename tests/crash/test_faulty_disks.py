"""Jobs on real disks that fail: full, read-only, with writes that take less than they were given."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from tests.crash.judge import inspect
from tests.crash.mounts import mount_again, mounted, remount, turn_read_only
from tests.crash.world import JOB, Running, World

_KINDS = (pytest.param("tmpfs", marks=pytest.mark.chaos), "ext4")


def _goes_on(world: World) -> None:
    """After whatever it was, the job goes on to the right end, and its store is whole and clean."""
    found = inspect(world.job)
    assert found.problems == []
    newest = found.newest
    assert newest > (0, 0)
    steps = newest[1] + 30
    outcome = world.run(steps)
    assert outcome.code == 0, outcome.output[-4000:]
    assert f"restored ({newest[1]}, 'local')" in outcome.output
    assert world.ended_right(steps)
    found = inspect(world.job)
    assert (found.problems, found.garbage, found.newest[1]) == ([], [], steps)
    seen = world.ctl("verify", JOB, "--all", "--store", str(world.store))
    assert seen.code == 0, seen.output


@pytest.mark.parametrize("kind", _KINDS)
def test_a_full_disk_costs_checkpoints_and_nothing_else(world: World, tmp_path: Path, kind: str) -> None:
    """While the disk is full training goes on and every failed flush is said; with room again the next one commits."""
    with mounted(kind, tmp_path / "disk", 24) as disk:
        world.use(disk / "runs")
        job = Running(world)
        job.until("checkpoint committed", 2)
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:  # down to the last block: writes come back short before they fail
                file.write(b"x" * 4096)
        failed = job.until("flush failed", 2)
        assert "No space left" in failed["error"]
        before = job.look()
        assert before.problems == []
        assert before.newest > (0, 0)
        ballast.unlink()
        job.until("checkpoint committed", 3)
        assert job.stop().code == 75
        _goes_on(world)


@pytest.mark.chaos
def test_a_disk_that_turns_read_only(world: World, tmp_path: Path) -> None:
    """A disk that turns read-only costs checkpoints, training goes on; mounted anew it has all that was committed."""
    with mounted("ext4", tmp_path / "disk", 24) as disk:
        world.use(disk / "runs")
        job = Running(world)
        job.until("checkpoint committed", 3)
        turn_read_only(disk)
        failed = job.until("flush failed", 2)
        assert "Read-only" in failed["error"]
        before = job.look()
        assert before.problems == []
        ended = job.stop(at_once=True)
        assert ended.code in (10, 75), ended.output[-2000:]
        world.until_empty()
        mount_again(disk)
        assert inspect(world.job).newest == before.newest
        _goes_on(world)


def test_a_read_only_store_is_refused_at_the_start(world: World, tmp_path: Path) -> None:
    """A job whose disk can't be written does not start, with exit code 14 and one line that says so."""
    with mounted("ext4", tmp_path / "disk", 8) as disk:
        world.use(disk / "runs")
        remount(disk, "ro")
        outcome = world.run(30)
        remount(disk, "rw")
        assert outcome.code == 14, outcome.output
        assert "Read-only" in outcome.output
        assert "Traceback" not in outcome.output


@pytest.mark.chaos
def test_files_may_not_grow(world: World) -> None:
    """Where the kernel bounds the size of files, writes come back short and then fail; the last whole one stays."""
    job = Running(world)
    job.until("checkpoint committed", 2)
    before = job.look().newest
    resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (1_200_000, resource.RLIM_INFINITY))
    failed = job.until("flush failed", 2)
    assert "File too large" in failed["error"]
    found = job.look()
    assert found.problems == []
    assert found.newest >= before
    resource.prlimit(job.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    job.until("checkpoint committed", 3)
    assert job.stop().code == 75
    _goes_on(world)
