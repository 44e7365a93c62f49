"""A real lack of memory, in a real cgroup: who was killed for it, and who was not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.daemon.exits import Exits, KernelLog, OomWatch
from ckptd.plugin.manager import PluginManager
from ckptd.types import RankExit
from tests.daemon.test_exits import SilentLog
from tests.waiting import until


def _may_read_the_log() -> bool:
    log = KernelLog()
    try:
        return log.complete
    finally:
        log.close()


# --- a real lack of memory --------------------------------------------------------------------------------------

EATER = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
print("here", flush=True)
sys.stdin.readline()
eaten = []
while True:
    eaten.append(bytearray(os.urandom(4096)) * 256)
"""
LIMIT_BYTES = 64 * 2**20


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A real cgroup of 64 MiB with the memory controller of version 1, removed at the end."""
    top = Path("/sys/fs/cgroup/memory")
    path = top / f"ckptd-test-{os.getpid()}"
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
    except OSError as error:
        pytest.skip(f"no cgroup of version 1 can be made here: {error}")
    yield path

    def removed() -> bool:
        with contextlib.suppress(OSError):
            path.rmdir()
        return not path.exists()

    until(removed, "the removal of the cgroup")


def eater(cgroup: Path) -> subprocess.Popen[str]:
    """Start a process in a cgroup that will use all the memory that it gets, once it is told to."""
    process = subprocess.Popen(
        [sys.executable, "-c", EATER, str(cgroup / "cgroup.procs")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize("how", ["named by the log", "counted"])
def test_a_real_lack_of_memory(small_cgroup: Path, how: str) -> None:
    """A process that the kernel kills in a cgroup of 64 MiB is known as such, and one killed by hand is not."""
    named = how == "named by the log"
    if named and not _may_read_the_log():
        pytest.skip("the kernel's log can't be read here, or has other process numbers")
    watch = OomWatch(log=None if named else SilentLog())
    victim, other = eater(small_cgroup), eater(small_cgroup)
    try:
        for process in (victim, other):
            watch.begin(process.pid, time.monotonic())
        assert victim.stdin is not None
        victim.stdin.write("\n")
        victim.stdin.flush()
        assert victim.wait(60) == -signal.SIGKILL
        found = watch.ended(victim.pid, time.monotonic(), by_sigkill=True)
        assert found is not None
        assert found.certain is named
        assert (str(victim.pid) in found.said) is named
        assert (found.cgroup, found.limit_bytes) == (f"/{small_cgroup.name}", LIMIT_BYTES)
        other.kill()
        other.wait(60)
        assert watch.ended(other.pid, time.monotonic(), by_sigkill=True) is None
    finally:
        watch.close()
        for process in (victim, other):
            process.kill()
            process.communicate()


def test_a_look_at_a_dying_process_loses_no_kill(small_cgroup: Path) -> None:
    """What is dying, which takes long with much memory, is in no cgroup of version 1: its kill counts where it was."""
    watch = OomWatch(log=SilentLog())
    victim = eater(small_cgroup)
    try:
        watch.begin(victim.pid, time.monotonic())
        assert victim.stdin is not None
        victim.stdin.write("\n")
        victim.stdin.flush()
        os.waitid(os.P_PID, victim.pid, os.WEXITED | os.WNOWAIT)
        watch.look(time.monotonic())
        found = watch.ended(victim.pid, time.monotonic(), by_sigkill=True)
        assert found is not None
        assert found.cgroup == f"/{small_cgroup.name}"
    finally:
        victim.kill()
        victim.communicate()


def test_a_real_lack_of_memory_is_evidence_of_its_kind(small_cgroup: Path) -> None:
    """The detectors that ship make of a real OOM kill evidence that says so, with the limit."""
    exits = Exits(PluginManager(lambda *_: None).evidence)
    process = eater(small_cgroup)
    try:
        exits.begin(process.pid, time.monotonic())
        process.communicate("\n", timeout=60)
        claim = exits.evidence(RankExit(1, process.pid, process.returncode, time.monotonic()), time.monotonic())
        assert claim is not None
        assert (claim.kind, claim.signal) == ("oom", 9)
        assert claim.summary == "rank 1 was killed by the kernel: out of memory; its cgroup may use 64.0 MiB"
    finally:
        exits.close()
        process.kill()
        process.wait()
