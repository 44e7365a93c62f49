"""The fault table: every way in which a job can fail, done to a real one, with what it took and what it cost.

All lines are of one job, which trains through all of them. `make faulttable` prints the table.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests.end_to_end.harness import until
from tests.faults.job import EVERY_S, NAME, Ends, Job
from tests.faults.surroundings import Clock, MemoryGroup, fill
from tests.faults.table import Outcome, Table

pytestmark = [pytest.mark.faulttable, pytest.mark.timeout(180)]

LIMIT_S = 10.0
"""Until anything is found, a hang too, with steps of 0.1 s or less; figures are in the table."""
HOUR_S = 3600
_ROOM_BYTES = 200 * 2**20


def kill(job: Job, rank: int, number: int) -> float:
    """Send a signal to a rank; return the wall time."""
    pid = job.pids()[rank]
    at = time.time()
    os.kill(pid, number)
    return at


def ordered(rank: int, word: str) -> Callable[[Job], float]:
    """Return what orders a rank to do something to itself."""
    return lambda job: job.order(rank, word)


def suffer(job: Job, table: Table, fault: str, act: Callable[[Job], float]) -> dict[str, Any]:
    """Do a fault, wait until the job trains again, add the line, and return the incident.

    What holds for each: one incident, at most an interval lost, and no rank of the failed generation left when the
    limit of detection and a second are over.
    """
    # Where a job has failed before, it gets more time: each fault is to be the first one at its step.
    beyond = max((item["failed_step"] for item in job.incidents()), default=0) + 1
    before = job.until_training(step=beyond, committed=True)
    job.until_commit(before["step"])
    time.sleep(random.random() * EVERY_S)  # or every fault would come just after a checkpoint
    known = {item["number"] for item in job.incidents()}
    ends = Ends(job.pids())
    at = act(job)

    def recovered() -> dict[str, Any] | None:
        new = [item for item in job.incidents() if item["number"] not in known]
        return new[0] if new and "total" in new[0]["seconds"] else None

    try:
        incident = until(recovered, f"the recovery from {fault}")
    except AssertionError as error:
        there = [(process.pid, process.status(), process.name()) for process in job.world.processes()]
        raise AssertionError(f"{error}; {there}; {job.status()}; {job.incidents()[-1:]}; {job.log()[-3000:]}") from None
    after = job.until_training(generation=before["generation"] + 1)
    until(lambda: ends.last_at, f"the end of the last rank after {fault}")
    found_s, gone_s = incident["failed_at"] - at, ends.last_at - at
    tier = "nothing" if incident["restored"] is None else incident["restored"]["tier"]
    again_s = found_s + incident["seconds"]["total"] - incident["seconds"]["detect"]
    verdict = f"{incident['kind']}: restarted from {tier}"
    table.add(Outcome(fault, found_s, incident["lost_steps"], gone_s, again_s, verdict))
    assert after["generation"] == before["generation"] + 1
    assert incident["generation"] == before["generation"]
    assert incident["lost_steps"] is not None
    assert incident["lost_steps"] <= job.interval_steps, incident
    assert found_s <= LIMIT_S, incident
    assert gone_s <= LIMIT_S + 1.0, incident
    return incident


# --- ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV", "SIGABRT", "SIGTERM"])
def test_a_signal(job: Job, table: Table, name: str) -> None:
    """A rank that a signal ends is found dead at once, whoever sent it, and named with the signal."""
    number = signal.Signals[name]
    incident = suffer(job, table, f"{name} from outside", lambda job: kill(job, 1, number))
    assert (incident["kind"], incident["rank"], incident["signal"]) == ("signal", 1, number)


def test_an_exit(job: Job, table: Table) -> None:
    """A rank that ends by sys.exit(3) is the cause, with its code; the rank that waits for it is not."""
    incident = suffer(job, table, "sys.exit(3)", ordered(0, "exit"))
    assert (incident["kind"], incident["rank"], incident["returncode"]) == ("exit", 0, 3)


def test_an_exception(job: Job, table: Table) -> None:
    """An exception in forward is the cause, with its traceback; the connection that it breaks is not."""
    incident = suffer(job, table, "exception in forward", ordered(1, "exception"))
    assert (incident["kind"], incident["rank"]) == ("exception", 1)
    assert incident["exception"]["type"] == "ArithmeticError"
    assert "in forward" in incident["exception"]["traceback"]


def test_an_oom_kill(job: Job, table: Table, group: MemoryGroup | None) -> None:
    """A rank that the kernel kills for its memory is told from any other SIGKILL."""
    if group is None:
        pytest.skip("limiting memory needs root and a memory cgroup")
    with group.tight(_ROOM_BYTES):
        incident = suffer(job, table, "OOM kill", ordered(1, "oom"))
    assert (incident["kind"], incident["rank"]) == ("oom", 1)


def test_three_kills_within_one_restart(job: Job, table: Table) -> None:
    """A rank of each generation is killed as soon as there is one, three times: nothing more is lost than once."""
    before = job.until_training(committed=True)
    step = job.until_commit(before["step"])
    known = {item["number"] for item in job.incidents()}
    ends = Ends(job.pids())
    first_step = job.status()["step"]
    at, killed = time.time(), set()
    while len(killed) < 3:
        now = job.status()
        pid = now["ranks"][len(killed) % 2]["pid"]
        if now["generation"] == before["generation"] + len(killed) and pid is not None and psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
    after = job.until_training(generation=before["generation"] + 3)
    new = [item for item in job.incidents() if item["number"] not in known]
    until(lambda: ends.last_at, "the end of the last rank")
    restored = new[-1]["restored"]
    lost = max(0, first_step - restored["step"])
    found_s = new[0]["failed_at"] - at
    verdict = f"{len(new)} incidents: restarted from {restored['tier']}"
    table.add(Outcome("3 kills within one restart", found_s, lost, ends.last_at - at, time.time() - at, verdict))
    assert len(new) == 3
    assert after["generation"] == before["generation"] + 3
    assert restored["step"] >= step
    assert lost <= job.interval_steps


# --- hangs ----------------------------------------------------------------------------------------------------


def test_a_stopped_rank(job: Job, table: Table) -> None:
    """SIGSTOP of one rank is found by its silence, and the stopped rank is named, not the one that waits for it."""
    act = lambda job: kill(job, 1, signal.SIGSTOP)  # noqa: E731
    incident = suffer(job, table, "SIGSTOP", act)
    assert incident["kind"] in ("stopped", "hang")
    assert incident["rank"] == 1


@pytest.mark.parametrize(
    ("fault", "word", "named"),
    [
        ("deadlocked collective", "deadlock", False),
        ("infinite Python loop", "python loop", True),
        ("infinite C loop holding the GIL", "c loop", True),
    ],
)
def test_a_hang(job: Job, table: Table, fault: str, word: str, named: bool) -> None:
    """A job whose steps have stopped is found by that; where one rank is to blame, it is the one that is named."""
    incident = suffer(job, table, fault, ordered(0, word))
    assert incident["kind"] == "hang"
    assert incident["rank"] == 0 or not named


# --- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "word"), [("NaN loss", "nan"), ("loss spike", "spike")])
def test_a_bad_number(job: Job, table: Table, fault: str, word: str) -> None:
    """A loss that is NaN, or jumps, is a failure of a job that says so, and it steps back to what was healthy."""
    incident = suffer(job, table, fault, ordered(0, word))
    assert incident["kind"] == word


# --- the agent and the launcher ---------------------------------------------------------------------------------


def test_the_agent_killed(job: Job, table: Table) -> None:
    """An agent that is killed costs nothing: ranks train on, the next agent takes over, and commits go on."""
    before = job.until_training(committed=True)
    pids, known = job.pids(), len(job.incidents())
    at = time.time()
    job.daemon.kill()
    job.restart_agent()
    found_s = time.time() - at
    job.until_commit(job.until_training(step=before["step"] + 1)["step"])
    after = job.status()
    table.add(Outcome("agent kill -9", found_s, 0, None, None, "taken over: the ranks have trained on"))
    assert job.pids() == pids
    assert after["generation"] == before["generation"]
    assert len(job.incidents()) == known


def test_agent_and_rank_killed_together(job: Job, table: Table) -> None:
    """A rank that dies with its agent is found dead by the next one, which restarts the job."""

    def act(job: Job) -> float:
        pid, at = job.pids()[1], time.time()
        job.daemon.kill()
        os.kill(pid, signal.SIGKILL)
        job.restart_agent()
        return at

    incident = suffer(job, table, "agent and rank together", act)
    assert (incident["kind"], incident["rank"], incident["signal"]) == ("signal", 1, signal.SIGKILL)


def test_the_launcher_killed(job: Job, table: Table) -> None:
    """A launcher that is killed takes its ranks along; the job restarts with another one."""

    def act(job: Job) -> float:
        parent, at = psutil.Process(job.pids()[0]).ppid(), time.time()
        os.kill(parent, signal.SIGKILL)
        return at

    incident = suffer(job, table, "launcher kill -9", act)
    assert incident["kind"] == "launcher"


# --- the disk ---------------------------------------------------------------------------------------------------


def test_a_full_disk_during_a_flush(job: Job, table: Table) -> None:
    """A disk that fills up costs commits while it is full, no step and no restart; then they go on."""
    if not os.path.ismount(job.world.store):
        pytest.skip("filling a disk needs root, to mount a small one")
    before = job.until_training(committed=True)
    known, failed = len(job.incidents()), len(job.events("flush failed"))
    filler = job.world.store / "filler"
    at = time.time()

    def noticed() -> bool:
        fill(filler)  # what old checkpoints have made room for as well
        return len(job.events("flush failed")) > failed

    until(noticed, "a flush that fails")
    found_s = time.time() - at
    step = job.until_training(step=job.status()["step"] + 1)["step"]
    filler.unlink()
    job.until_commit(step)
    table.add(Outcome("full disk during flush", found_s, 0, None, None, "trains on; committed again with room"))
    after = job.status()
    assert after["generation"] == before["generation"]
    assert len(job.incidents()) == known


def test_the_store_deleted(job: Job, table: Table) -> None:
    """A store that somebody deletes is filled again by the next checkpoint; a rank that dies then restarts."""
    before = job.until_training(committed=True)
    job.world.wipe(job.world.store / NAME)
    at = time.time()
    job.until_commit(before["last_committed"]["step"])
    again_s = time.time() - at
    assert job.status()["generation"] == before["generation"]
    table.add(Outcome("store deleted", None, 0, None, again_s, "trains on; the next checkpoint is whole"))
    assert all(item["intact"] for item in job.world.json("verify", NAME, "--all"))
    suffer(job, table, "store deleted, then SIGKILL", lambda job: kill(job, 0, signal.SIGKILL))
    assert all(item["intact"] for item in job.world.json("verify", NAME, "--all"))


# --- the clock --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hours", [1, -1])
def test_the_clock_jumps(job: Job, table: Table, clock: Clock, hours: int) -> None:
    """A wall clock that jumps by an hour, there and back, changes nothing: decisions go by the monotonic clock."""
    if not clock.env:
        pytest.skip("moving the clock of some programs needs a C compiler")
    before = job.until_training(committed=True)
    known = len(job.incidents())
    waits_s = []
    for to_s in (hours * HOUR_S, 0):
        clock.move(to_s)
        try:
            step = job.status()["step"]
            for _ in range(3):
                began_s = time.monotonic()
                step = job.until_commit(step, patience_s=30)
                waits_s.append(time.monotonic() - began_s)
            number = len(job.incidents())
        finally:
            clock.move(0)
        assert number == known
    after = job.status()
    assert after["generation"] == before["generation"]
    assert after["state"] == "running"
    verdict = f"nothing happens; longest wait for a commit {max(waits_s):.1f} s"
    table.add(Outcome(f"clock jump of {hours:+d} h and back", None, 0, None, None, verdict))
