"""What the kernel says of an end: cgroups of every kind, its log, core files, and children of somebody else."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.daemon.exits import (
    KernelLog,
    MemoryGroup,
    OomWatch,
    Tally,
    core_place,
    killed_in,
    memory_group,
    wait_status,
)

PID = 4242
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 {shown} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
)
HYBRID_MOUNTS = V1_MOUNTS + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V2_MOUNTS = "29 23 0:26 {shown} /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw\n"
V1_CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"
V2_EVENTS = "low 0\nhigh 0\nmax 1532\noom 3\noom_kill {kills}\noom_group_kill 0\n"
UNLIMITED = "9223372036854771712\n"


def kernel(
    root: Path, *, mounts: str, cgroup: str, shown: str = "/", pid: int = PID, files: dict[str, str] | None = None
) -> Path:
    """Lay out a kernel's files below `root`, with the contents that real ones have."""
    contents = {"proc/self/mountinfo": mounts.format(shown=shown), f"proc/{pid}/cgroup": cgroup, **(files or {})}
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMORY = "sys/fs/cgroup/memory"
UNIFIED = "sys/fs/cgroup"
SLICE = f"{UNIFIED}/user.slice/job.scope"


@pytest.mark.parametrize(
    ("layout", "where", "limit"),
    [
        (
            {
                "mounts": V1_MOUNTS,
                "cgroup": "9:name=systemd:/\n4:memory:/slurm/uid_0/job_7\n1:cpu,cpuacct:/\n",
                "files": {
                    f"{MEMORY}/memory.oom_control": V1_CONTROL.format(kills=9),
                    f"{MEMORY}/memory.limit_in_bytes": UNLIMITED,
                    f"{MEMORY}/slurm/uid_0/job_7/memory.oom_control": V1_CONTROL.format(kills=2),
                    f"{MEMORY}/slurm/uid_0/job_7/memory.limit_in_bytes": UNLIMITED,
                    f"{MEMORY}/slurm/memory.limit_in_bytes": "67108864\n",
                },
            },
            f"{MEMORY}/slurm/uid_0/job_7",
            67108864,
        ),
        (
            {
                "mounts": HYBRID_MOUNTS,
                "cgroup": "4:memory:/job\n0::/user.slice\n",
                "files": {
                    f"{MEMORY}/job/memory.oom_control": V1_CONTROL.format(kills=2),
                    f"{MEMORY}/job/memory.limit_in_bytes": UNLIMITED,
                    f"{UNIFIED}/unified/user.slice/cgroup.events": "populated 1\nfrozen 0\n",
                },
            },
            f"{MEMORY}/job",
            None,
        ),
        (
            {
                "mounts": V2_MOUNTS,
                "cgroup": "0::/user.slice/job.scope\n",
                "files": {
                    f"{SLICE}/memory.events": V2_EVENTS.format(kills=2),
                    f"{SLICE}/memory.max": "max\n",
                    f"{UNIFIED}/user.slice/memory.max": "1073741824\n",
                },
            },
            SLICE,
            1073741824,
        ),
        (
            {  # a cgroup without the memory controller is counted in the one above
                "mounts": V2_MOUNTS,
                "cgroup": "0::/user.slice/job.scope\n",
                "files": {
                    f"{SLICE}/cgroup.events": "populated 1\n",
                    f"{UNIFIED}/user.slice/memory.events": V2_EVENTS.format(kills=2),
                    f"{UNIFIED}/user.slice/memory.max": "2048\n",
                },
            },
            f"{UNIFIED}/user.slice",
            2048,
        ),
        (
            {  # a container that is shown its own part of the hierarchy, without a namespace for it
                "mounts": V1_MOUNTS,
                "cgroup": "4:memory:/docker/0a1b/inner\n",
                "shown": "/docker/0a1b",
                "files": {f"{MEMORY}/inner/memory.oom_control": V1_CONTROL.format(kills=2)},
            },
            f"{MEMORY}/inner",
            None,
        ),
        (
            {  # a process outside what is shown: the nearest that can be seen
                "mounts": V2_MOUNTS,
                "cgroup": "0::/../other\n",
                "shown": "/docker/0a1b",
                "files": {f"{UNIFIED}/memory.events": V2_EVENTS.format(kills=2)},
            },
            UNIFIED,
            None,
        ),
    ],
    ids=["v1", "hybrid", "v2", "v2 controller above", "container", "outside"],
)
def test_the_cgroup_that_counts_memory(tmp_path: Path, layout, where: str, limit: int | None) -> None:
    """On each kind of hierarchy the right counter is found, and the tightest limit above it."""
    group = memory_group(PID, kernel(tmp_path, **layout))
    assert group is not None
    assert group.path == tmp_path / where
    assert group.kills() == 2
    assert group.limit_bytes() == limit


@pytest.mark.parametrize(
    "layout",
    [
        {"mounts": "", "cgroup": "4:memory:/job\n"},
        {"mounts": V2_MOUNTS, "cgroup": "0::/job\n"},
        {"mounts": V2_MOUNTS, "cgroup": ""},
        {
            "mounts": V1_MOUNTS,
            "cgroup": "4:memory:/\n",
            "files": {f"{MEMORY}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"},  # before Linux 4.13
        },
    ],
    ids=["no cgroups", "no controller", "no process", "no counter"],
)
def test_where_nothing_counts_nothing_is_known(tmp_path: Path, layout) -> None:
    """A kernel that does not count, or does not show it, gives no cgroup and no error."""
    assert memory_group(PID, kernel(tmp_path, **layout)) is None


# --- counting ---------------------------------------------------------------------------------------------------


def test_a_kill_explains_one_death() -> None:
    """Of two deaths after one kill in their cgroup one is explained; kills from before the start explain none."""
    tally = Tally()
    tally.note(5, 0.0)
    assert not tally.claim(0.0)
    tally.note(6, 10.0)
    assert tally.claim(10.5)
    assert not tally.claim(10.6)


def test_an_old_kill_explains_nothing() -> None:
    """A kill that hit some helper long ago is not laid at the door of a rank that somebody kills now."""
    tally = Tally()
    tally.note(5, 0.0)
    tally.note(6, 10.0)
    assert not tally.claim(100.0)


@pytest.mark.parametrize("count", [None, 4, 0])
def test_a_counter_that_vanishes_or_begins_anew(count: int | None) -> None:
    """A cgroup that is gone, or was made anew under the same name, explains no death."""
    tally = Tally()
    tally.note(5, 0.0)
    tally.note(count, 1.0)
    assert not tally.claim(1.0)


class SilentLog(KernelLog):
    """A kernel's log that this process may not read, as in most containers."""

    def __init__(self) -> None:
        super().__init__(Path("/nowhere/kmsg"))


def test_counters_are_compared_before_and_after(tmp_path: Path) -> None:
    """Without the kernel's log a SIGKILL is a lack of memory if its cgroup has counted one since, and only then."""
    files = {f"{SLICE}/memory.events": V2_EVENTS.format(kills=7), f"{SLICE}/memory.max": "1024\n"}
    root = kernel(tmp_path, mounts=V2_MOUNTS, cgroup="0::/user.slice/job.scope\n", files=files)
    for pid in (1, 2, 3):
        kernel(tmp_path, mounts=V2_MOUNTS, cgroup="0::/user.slice/job.scope\n", pid=pid)
    watch = OomWatch(root, SilentLog())
    for pid in (PID, 1, 2, 3):
        watch.begin(pid, 0.0)
    assert watch.ended(1, 1.0, by_sigkill=True) is None
    (root / SLICE / "memory.events").write_text(V2_EVENTS.format(kills=8))
    assert watch.ended(2, 2.0, by_sigkill=False) is None
    found = watch.ended(PID, 2.0, by_sigkill=True)
    assert found is not None
    assert (found.certain, found.cgroup, found.limit_bytes) == (False, "/user.slice/job.scope", 1024)
    assert watch.ended(3, 2.0, by_sigkill=True) is None


def test_a_rank_that_was_moved_is_counted_where_it_is(tmp_path: Path) -> None:
    """A rank that a scheduler puts into its cgroup after the start is compared with that cgroup's counter."""
    root = kernel(tmp_path, mounts=V2_MOUNTS, cgroup="0::/\n", files={
        f"{UNIFIED}/memory.events": V2_EVENTS.format(kills=0), f"{SLICE}/memory.events": V2_EVENTS.format(kills=3),
    })  # fmt: skip
    watch = OomWatch(root, SilentLog())
    watch.begin(PID, 100.0)
    (root / f"proc/{PID}/cgroup").write_text("0::/user.slice/job.scope\n")
    watch.look(102.0)
    (root / SLICE / "memory.events").write_text(V2_EVENTS.format(kills=4))
    found = watch.ended(PID, 103.0, by_sigkill=True)
    assert found is not None
    assert found.cgroup == "/user.slice/job.scope"


# --- the kernel's log -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "pids"),
    [
        ("3,339,51409,-;Memory cgroup out of memory: Killed process 4242 (python3) total-vm:7kB\n", [4242]),
        ("3,340,5140900,-;Out of memory: Killed process 17 (python) total-vm:7kB\n SUBSYSTEM=x\n", [17]),
        ("3,341,5140900,-;Out of memory: Kill process 18 (python) score 900 or sacrifice child\n", [18]),
        (
            "6,338,51,-;oom-kill:constraint=CONSTRAINT_MEMCG,oom_memcg=/j,task_memcg=/j,task=python3,pid=4242,uid=0\n",
            [4242],
        ),
        ("6,337,5140,-;python3 invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0\n", []),
        ("6,336,5140,-;[   4242]     0  4242     3000     1000    61440        0             0 python3\n", []),
        ("5,0,0,-;Linux version 6.18\n", []),
        ("garbage", []),
        ("", []),
    ],
)  # fmt: skip
def test_whom_a_record_names(record: str, pids: list[int]) -> None:
    """Records as kernels of several ages write them are understood, and those around them are not mistaken."""
    assert list(killed_in(record)) == pids


def test_a_log_that_may_not_be_read(tmp_path: Path) -> None:
    """Without a readable log nobody is named, and it does not count as complete."""
    log = KernelLog(tmp_path / "none")
    assert (log.killed(PID), log.complete) == (None, False)


# --- this very machine ------------------------------------------------------------------------------------------


def test_the_group_of_a_real_process() -> None:
    """The cgroup of this very process is found where the kernel counts memory, and its counter is a number."""
    group = memory_group(os.getpid())
    if group is None:
        pytest.skip("no cgroup counts the memory of this process")
    assert isinstance(group, MemoryGroup)
    assert str(os.getpid()) in (group.path / "cgroup.procs").read_text().split()


# --- children of somebody else ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [("raise SystemExit(3)", 3 << 8), ("pass", 0), ("import os; os.kill(os.getpid(), 9)", 9)],
)
def test_the_end_of_a_process_before_it_is_reaped(code: str, status: int) -> None:
    """The wait status of a zombie is known though it is somebody else's child."""
    process = subprocess.Popen([sys.executable, "-c", code])
    pidfd = os.pidfd_open(process.pid)
    try:
        select.select([pidfd], [], [])
        assert wait_status(process.pid, pidfd) == status
    finally:
        process.wait()
        os.close(pidfd)


def test_the_end_of_a_process_after_it_is_reaped() -> None:
    """After its parent has reaped it the kernel still tells, or says that it can't: never something wrong."""
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    pidfd = os.pidfd_open(process.pid)
    try:
        process.wait()
        assert wait_status(process.pid, pidfd) in (3 << 8, None)  # from Linux 6.15 on it tells
    finally:
        os.close(pidfd)


def test_a_process_that_lives_has_no_end() -> None:
    """Nothing is said of the end of a process that has not ended."""
    pidfd = os.pidfd_open(os.getpid())
    try:
        assert wait_status(os.getpid(), pidfd) is None
    finally:
        os.close(pidfd)


# --- core files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("core\n", "core files are named core, seen from"),
        ("/var/cores/%e.%p\n", "core files are named /var/cores/%e.%p"),
        ("|/usr/lib/systemd/systemd-coredump %P %u\n", "core files go to /usr/lib/systemd/systemd-coredump; "),
        ("|\n", "core files are named |"),
        ("", "core files are named core"),
    ],
)
def test_where_core_files_are(tmp_path: Path, pattern: str, says: str) -> None:
    """What the kernel is told to do with core files is said in words that help to find one."""
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "proc/sys/kernel/core_pattern").write_text(pattern)
    assert core_place(tmp_path).startswith(says)
