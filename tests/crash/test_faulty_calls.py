"""EIO from the kernel, on writes and on fsync: what strace injects, and what it saw the agent do about it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.crash.judge import inspect
from tests.crash.world import JOB, PATIENCE_S, Running, World

_LINE = re.compile(r"^\d+ +(\w+)\((?:\d+<([^>]*)>)?.*?= (-?\d+)(?: (E\w+).*\(INJECTED\))?")


@contextmanager
def injected(pid: int, trace: Path, inject: str) -> Iterator[None]:
    """Have calls of a running agent fail, at the kernel's door, for as long as the block lasts."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace here")
    command = ["strace", "-f", "-y", "-s", "0", "-e", "trace=pwrite64,write,fsync,rename,link,unlink,openat"]
    tracer = subprocess.Popen(
        [*command, "-e", f"inject={inject}", "-o", str(trace), "-p", str(pid)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert tracer.stderr is not None
    first = tracer.stderr.readline()
    if "attached" not in first:
        tracer.wait()
        pytest.skip(f"tracing is not allowed here: {first}")
    try:
        yield
    finally:
        os.kill(tracer.pid, signal.SIGINT)
        tracer.wait(PATIENCE_S)
        tracer.stderr.close()


def _goes_on(world: World) -> None:
    found = inspect(world.job)
    assert found.problems == []
    steps = found.newest[1] + 30
    outcome = world.run(steps)
    assert outcome.code == 0, outcome.output[-4000:]
    assert f"restored ({steps - 30}, 'local')" in outcome.output
    assert world.ended_right(steps)
    found = inspect(world.job)
    assert (found.problems, found.garbage) == ([], [])
    assert world.ctl("verify", JOB, "--all", "--store", str(world.store)).code == 0


def test_a_failed_fsync_is_never_retried_as_if_it_had_worked(world: World, tmp_path: Path) -> None:
    """A file whose fsync failed is never fsynced again nor gets its name: it is dropped, and written anew."""
    job = Running(world)
    job.until("checkpoint committed", 2)
    trace = tmp_path / "trace"
    with injected(job.pid, trace, "fsync:error=EIO:when=1..3"):  # in each thread
        while not any(".tmp-" in line and "INJECTED" in line for line in trace.read_text().splitlines()):
            failed = job.until("flush failed")  # the first may be that of a folder
            assert "Input/output error" in failed["error"]
    job.until("checkpoint committed", 2)
    assert job.stop().code == 75
    _is_dropped(trace, world.job)
    _goes_on(world)


def _is_dropped(trace: Path, job: Path) -> None:
    """Look at what happened to every file whose fsync has failed."""
    later: dict[str, list[str]] = defaultdict(list)
    failed: set[str] = set()
    for line in trace.read_text(errors="replace").splitlines():
        match = _LINE.match(line)
        names = re.findall(rf"[<\"]({re.escape(str(job))}[^>\"]*)[>\"]", line)
        if not names:
            continue
        for name in set(names) & failed:
            later[name].append(line.split(maxsplit=1)[1].partition("(")[0])
        if "fsync" in line and "INJECTED" in line and ".tmp-" in names[0] and match:
            failed.add(names[0])
    assert failed, "no fsync of a file has failed"
    for name in failed:
        assert set(later[name]) <= {"unlink"}, f"{name}: {later[name]} after its fsync has failed"
        assert later[name], f"{name} stays"


@pytest.mark.chaos
def test_an_error_of_a_write_costs_one_flush(world: World, tmp_path: Path) -> None:
    """After EIO of a write nothing of that attempt is committed, training goes on, and the next flush commits."""
    job = Running(world)
    job.until("checkpoint committed", 2)
    before = job.look().newest
    with injected(job.pid, tmp_path / "trace", "pwrite64:error=EIO:when=1..2"):
        failed = job.until("flush failed")
        assert "Input/output error" in failed["error"]
        found = job.look()
        assert found.problems == []
        assert found.newest >= before
        job.until("checkpoint committed", 2)
    assert job.stop().code == 75
    _goes_on(world)


@pytest.mark.chaos
def test_a_slow_disk_delays_checkpoints_and_not_training(world: World, tmp_path: Path) -> None:
    """While every fsync takes a tenth of a second longer, steps go on and checkpoints are committed."""
    job = Running(world)
    job.until("checkpoint committed", 2)
    with injected(job.pid, tmp_path / "trace", "fsync:delay_enter=100000"):
        first = job.until("checkpoint committed")
        second = job.until("checkpoint committed", 2)
        assert second["step"] > first["step"]
    assert job.stop().code == 75
    _goes_on(world)
