"""Which jobs come back when the service starts, and when one that can't is tried again."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import structlog

from ckptd.core.events import End
from ckptd.core.handover import Handover
from ckptd.daemon import comeback
from ckptd.daemon.adopting import legacy_of
from ckptd.daemon.comeback import Comebacks, forget, judge, retry_s
from ckptd.daemon.fdstore import FdStore
from ckptd.daemon.living import boot_id, is_alive, signal_to, started
from ckptd.errors import CkptdError, ConfigError, DamagedError, JobFailedError, StoreError
from ckptd.journal import JobEntry, Journal, Life

HERE = "this boot"


def entry(job: str = "gpt", state: str = "running", **life: Any) -> JobEntry:
    """What the journal has of a job."""
    return JobEntry(
        job, {"name": job, "command": ["x"]}, {"state": state}, 7, "/run/c.sock", 1.0, Life(**{"boot_id": HERE, **life})
    )


@pytest.mark.parametrize(
    ("state", "life", "alive", "back", "reason"),
    [
        ("running", {"comes_back": True}, True, True, "its processes have gone on"),
        ("running", {"comes_back": True}, False, True, "its agent and its processes ended while it was running"),
        ("running", {"comes_back": True, "boot_id": "an older one"}, False, True, "the node has started anew"),
        ("stopped", {"comes_back": True}, False, True, "it was stopped with the service"),
        ("stopped", {}, False, False, "it is stopped"),
        ("finished", {}, False, False, "it is finished"),
        ("failed", {}, False, False, "it is failed"),
        ("running", {}, True, False, "nothing of it is left to do for a service"),
        ("stopping", {"comes_back": True, "stopped": True}, True, True, "its processes have gone on"),
        ("stopping", {"comes_back": True, "stopped": True}, False, False, "it was stopping on purpose"),
    ],
)
def test_which_jobs_come_back(state: str, life: dict[str, Any], alive: bool, back: bool, reason: str) -> None:
    """What was going on comes back, with its reason; what has ended, was stopped, or is somebody else's does not."""
    verdict = judge(entry(state=state, **life), boot=HERE, alive=alive)
    assert verdict.back is back
    assert reason in verdict.reason
    assert verdict.alive is (back and alive)


def test_how_often_it_is_tried_again() -> None:
    """The first time comes soon, then ever later, and there is no last one."""
    delays = [retry_s(failures) for failures in range(1, 9)]
    assert delays == sorted(delays)
    assert delays[0] == 2.0
    assert delays[-1] == delays[-2] == 60.0


def test_a_process_is_more_than_its_number() -> None:
    """A process is alive if number, start and boot are what they were; one that ended, or never was, is not."""
    mine = os.getpid()
    assert started(mine) > 0
    assert is_alive(mine, started(mine), boot_id())
    assert not is_alive(mine, started(mine) + 1, boot_id())
    assert not is_alive(mine, started(mine), "another boot")
    assert not is_alive(0, 0, boot_id())
    child = subprocess.Popen(["sleep", "60"])
    began = started(child.pid)
    assert is_alive(child.pid, began, boot_id())
    signal_to(child.pid, began + 1, boot_id(), signal.SIGKILL)
    signal_to(child.pid, began, "another boot", signal.SIGKILL)
    assert is_alive(child.pid, began, boot_id())
    signal_to(child.pid, began, boot_id(), signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid, began, boot_id()), "a zombie is nobody"
    assert child.wait() == -signal.SIGKILL
    assert started(child.pid) == 0
    signal_to(child.pid, began, boot_id(), signal.SIGKILL)


@pytest.mark.parametrize("alive", [True, False])
def test_ranks_of_another_launcher(alive: bool) -> None:
    """An attached job is taken over while its ranks live; once they have ended, their own launcher begins again."""
    attached = replace(entry(comes_back=True), config={"name": "gpt", "command": []})
    verdict = judge(attached, boot=HERE, alive=alive)
    assert verdict.back is alive
    assert "launcher" in verdict.reason or alive


# --- the shell --------------------------------------------------------------------------------------------------


class Job:
    """As much of a supervisor as coming back looks at."""

    def __init__(self, *, generation: object = None) -> None:
        self.ended: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self.machine = self
        self.generation = generation
        self.node_refused = False
        self.stopping = False
        self.left: object = None


class Agent:
    """Takes jobs, or refuses them as `refusals` says."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.refusals: dict[str, list[CkptdError]] = {}
        self.jobs: dict[str, Job] = {}
        self.asked: list[str] = []

    def adopt(self, found: JobEntry) -> Any:
        self.asked.append(found.job)
        if self.refusals.get(found.job):
            raise self.refusals[found.job].pop(0)
        self.jobs[found.job] = Job()
        return self.jobs[found.job]

    def runs(self, name: str) -> bool:
        return name in self.jobs and not self.jobs[name].ended.done()


Scene = Callable[[Agent, Comebacks], Any]


def play(tmp_path: Path, entries: list[JobEntry], scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a scene with an agent whose journal has some entries; waits are short."""
    monkeypatch.setattr(comeback, "_RETRY_S", (0.01,))
    journal = Journal(tmp_path)
    for item in entries:
        journal.write_job(item)

    async def run() -> None:
        agent = Agent(journal)
        comebacks = Comebacks(journal, agent.adopt, agent.runs, FdStore({}, 0), structlog.get_logger())
        await scene(agent, comebacks)
        comebacks.close()

    asyncio.run(run())
    journal.close()


async def soon(condition: Callable[[], object]) -> None:
    """Wait until something has happened."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for is the code under test
            await asyncio.sleep(0.005)


def test_one_that_can_not_come_back_keeps_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs with living processes come first; what is refused comes later, and why it did not is said once."""
    alive = {"launcher_pid": 1, "launcher_started": started(1), "boot_id": boot_id()}
    entries = [
        entry("dead", comes_back=True),
        entry("wrong", comes_back=True),
        entry("late", comes_back=True),
        entry("ended", "finished"),
        entry("alive", comes_back=True, **alive),
    ]

    async def scene(agent: Agent, comebacks: Comebacks) -> None:
        agent.refusals = {"wrong": [ConfigError("no such command")], "late": [StoreError("no network")] * 3}
        with structlog.testing.capture_logs() as logs:
            await come_back(agent, comebacks)
        said = [(item["event"], item["job"]) for item in logs]
        assert sorted(said) == [
            *(("job comes back", job) for job in ("alive", "dead", "late", "wrong")),
            ("job stays away", "late"),
            ("job stays away", "wrong"),
        ]

    async def come_back(agent: Agent, comebacks: Comebacks) -> None:
        calls: list[int] = []
        back = comebacks.begin(lambda: calls.append(1))
        assert agent.asked[0] == "alive"
        assert sorted(agent.asked) == ["alive", "dead", "late", "wrong"]
        assert back == [agent.jobs["alive"], agent.jobs["dead"]]
        assert len(calls) == 4
        await soon(lambda: agent.runs("late") and agent.runs("wrong"))
        assert agent.asked.count("late") == 4
        assert agent.asked.count("wrong") == 2

    play(tmp_path, entries, scene, monkeypatch)


@pytest.mark.parametrize("how", ["stopped", "run by somebody", "submitted here"])
def test_somebody_else_decides_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """A job that waits to be tried again is left alone once it was stopped, run elsewhere, or submitted anew."""

    async def scene(agent: Agent, comebacks: Comebacks) -> None:
        agent.refusals = {"gpt": [StoreError("no network")]}
        assert comebacks.begin() == []
        match how:
            case "stopped":
                assert forget(agent.journal, "gpt")
                assert not forget(agent.journal, "gpt")
            case "run by somebody":
                agent.journal.write_job(entry())
            case "submitted here":
                agent.jobs["gpt"] = Job()
        await asyncio.sleep(0.1)
        assert agent.asked == ["gpt"]

    play(tmp_path, [entry(comes_back=True)], scene, monkeypatch)


@pytest.mark.parametrize(
    ("error", "generation", "again"),
    [
        (StoreError("the bucket can't be read"), None, True),
        (StoreError("the bucket can't be read"), "g1", False),
        (DamagedError("nothing left"), None, False),
        (None, None, False),
    ],
)
def test_a_store_that_can_not_be_read_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: CkptdError | None, generation: object, again: bool
) -> None:
    """A job that ended before it began, since its store was not there yet, is tried again; every other end is one."""

    async def scene(agent: Agent, comebacks: Comebacks) -> None:
        comebacks.begin()
        job = agent.jobs["gpt"]
        job.generation = generation  # one that it had before coming back would be there already
        agent.journal.write_job(replace(entry(state="failed"), life=Life()))
        job.ended.set_result(End("finished" if error is None else "failed", error))
        if again:
            await soon(lambda: agent.runs("gpt"))
        else:
            await asyncio.sleep(0.1)
        assert agent.asked == ["gpt"] * (1 + again)

    play(tmp_path, [entry(comes_back=True)], scene, monkeypatch)


def test_a_node_that_is_not_fit_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a job which its node's checks refused after a reboot is tried again: what is wrong may be mended."""

    async def scene(agent: Agent, comebacks: Comebacks) -> None:
        comebacks.begin()
        job = agent.jobs["gpt"]
        job.node_refused = True
        agent.journal.write_job(replace(entry(state="failed"), life=Life()))
        job.ended.set_result(End("failed", JobFailedError("the node is not ready: disk: it is read-only")))
        await soon(lambda: agent.runs("gpt"))
        assert agent.asked == ["gpt", "gpt"]

    play(tmp_path, [entry(comes_back=True)], scene, monkeypatch)


def test_a_stop_that_was_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that an agent was stopping when it was killed is stopped to the end, and then goes on under this one."""
    alive = {"launcher_pid": 1, "launcher_started": started(1), "boot_id": boot_id()}

    async def scene(agent: Agent, comebacks: Comebacks) -> None:
        comebacks.begin()
        job = agent.jobs["gpt"]
        job.left = "running"
        agent.journal.write_job(entry(state="stopped", comes_back=True))
        job.ended.set_result(End("stopped"))
        await soon(lambda: len(agent.asked) == 2)
        agent.jobs["gpt"].ended.set_result(End("stopped"))
        await asyncio.sleep(0.05)
        assert len(agent.asked) == 2

    play(tmp_path, [entry(comes_back=True, **alive)], scene, monkeypatch)


@pytest.mark.parametrize("has_ranks", [True, False])
def test_a_job_that_was_being_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_ranks: bool) -> None:
    """Ranks of a job that somebody was stopping when its agent died are stopped; a launcher without any is ended."""
    launcher = subprocess.Popen(["sleep", "600"])
    mine = {"boot_id": boot_id(), "launcher_pid": launcher.pid, "launcher_started": started(launcher.pid)}
    handover = Handover("running" if has_ranks else "draining", 1, pids={0: launcher.pid}).to_json()
    life = {"incarnation": "a", "handover": handover, "ranks_started": {"0": started(launcher.pid)}, **mine}

    async def scene(agent: Agent, comebacks: Comebacks) -> None:
        comebacks.begin()
        assert agent.asked == (["gpt"] if has_ranks else [])
        found = agent.journal.read_job("gpt")
        assert found is not None
        legacy = legacy_of(found)
        assert legacy is not None
        assert legacy.handover.state == ("stopping" if has_ranks else "draining")
        assert found.life.comes_back is has_ranks
        if not has_ranks:
            assert await asyncio.to_thread(launcher.wait, 30) == -signal.SIGTERM

    try:
        play(tmp_path, [entry("gpt", "stopping", comes_back=True, stopped=True, **life)], scene, monkeypatch)
    finally:
        launcher.kill()
        launcher.wait()


@pytest.mark.parametrize(
    "strange",
    [
        {"offer": ["g1/s10"]},
        {"pids": [7]},
        {"halting": {"until_s": 7}},
        {"halting": {"began_s": 1.0, "limit_at_s": 2.0, "leave_by_s": None, "conditions": {"at_dawn": True}}},
        {"recovery": {"failures": [{"what": "it fell over"}]}},
        {"recovery": {"incident": {"number": 1}}},
    ],
)
def test_what_another_version_has_written(strange: dict[str, Any]) -> None:
    """A job that is not understood is none whose ranks can go on, and its launcher is there to be ended."""
    handover = {**Handover("running", 1, pids={0: 7}).to_json(), **strange}
    life = {"boot_id": boot_id(), "incarnation": "a", "launcher_pid": 7, "handover": handover}
    legacy = legacy_of(entry("gpt", comes_back=True, **life))
    assert legacy is not None
    assert (legacy.handover.has_ranks, legacy.has_living(), legacy.life.launcher_pid) == (False, False, 7)


@pytest.mark.parametrize("attempts", [4, 5, 50])
def test_a_job_that_takes_its_agent_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: int) -> None:
    """A job after which agent upon agent has died comes after the others, and counts until an agent has outlived it."""
    monkeypatch.setattr(comeback, "_PROVEN_S", 0.05)
    alive = {"launcher_pid": 1, "launcher_started": started(1), "boot_id": boot_id()}

    async def scene(agent: Agent, comebacks: Comebacks) -> None:
        agent.journal.write_attempts("bad", attempts)
        comebacks.begin()
        assert agent.asked == (["bad", "good"] if attempts < 5 else ["good"])
        await soon(lambda: agent.runs("bad"))
        assert agent.journal.read_attempts() == {"bad": attempts + 1, "good": 1}
        await soon(lambda: not any(agent.journal.read_attempts().values()))

    play(tmp_path, [entry("good", comes_back=True), entry("bad", comes_back=True, **alive)], scene, monkeypatch)


def test_an_agent_that_ends_tries_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the agent stops, what has not come back stays in the journal for the next one."""

    async def scene(agent: Agent, comebacks: Comebacks) -> None:
        agent.refusals = {"gpt": [StoreError("no network")]}
        comebacks.begin()
        comebacks.close()
        await asyncio.sleep(0.1)
        assert agent.asked == ["gpt"]
        found = agent.journal.read_job("gpt")
        assert found is not None
        assert found.life.comes_back
        assert agent.journal.read_attempts() == {"gpt": 0}

    play(tmp_path, [entry(comes_back=True)], scene, monkeypatch)
