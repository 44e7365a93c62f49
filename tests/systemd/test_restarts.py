"""The service ends in every way that systemd knows while a job trains: restarts, kills, hangs, stops and reboots."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from itertools import pairwise

import pytest

from tests.systemd.service import Service
from tests.waiting import until

pytestmark = pytest.mark.systemd
Serve = Callable[..., Service]
_MANY = 1_000_000


def assert_whole(service: Service, *, generation: int = 1) -> None:
    """No step was done twice or left out, and no generation but the first was ever begun."""
    for rank in (0, 1):
        steps = service.steps(rank)
        assert steps == [(generation, step) for step in range(1, len(steps) + 1)]


def assert_resumed(service: Service, *, lost_at_most: int | None = None) -> None:
    """Each generation goes on from a step that the one before it had done, and loses no more than it may."""
    for rank in (0, 1):
        steps = service.steps(rank)
        for (before, last), (after, first) in pairwise(steps):
            assert first == last + 1 or (after > before and 1 < first <= last), (before, last, after, first)
            if after > before and lost_at_most is not None:
                assert last + 1 - first <= lost_at_most, (before, last, after, first)


def until_restarted(service: Service, agent: int) -> int:
    """Wait until another agent than `agent` is ready; return its process."""

    def other() -> int:
        return service.agent if service.agent not in (0, agent) and service.show("ActiveState") == "active" else 0

    found: int = until(other, "another agent")
    return found


@pytest.mark.timeout(600)
def test_twenty_restarts_cost_no_step(serve: Serve) -> None:
    """Twenty restarts, half by kill -9, at random moments: ranks go on, no step is lost, checkpoints are made."""
    service = serve()
    service.submit("job", _MANY, 0.01)
    service.until_step(20)
    ways = ["restart", "kill"] * 10
    chance = random.Random(5)
    chance.shuffle(ways)
    for way in ways:
        agent, done, committed = service.agent, service.steps()[-1][1], service.committed("job")[-1:]
        if way == "kill":
            service.container.kill(agent)
            until_restarted(service, agent)
        else:
            service.systemctl("restart")
            assert service.agent != agent
        assert service.show("ActiveState") == "active"
        service.until_step(done + 10)
        until(lambda before=committed: service.committed("job")[-1:] > before, "a checkpoint by the new agent")
        service.until_step(service.steps()[-1][1] + chance.randrange(1, 60))
        assert int(service.show("NFileDescriptorStore")) == 6
    assert_whole(service)
    service.ctl("stop", "job")
    assert_whole(service)
    last = service.steps()[-1][1]
    assert service.committed("job")[-1] == last


@pytest.mark.timeout(300)
def test_an_agent_that_hangs_is_restarted(serve: Serve) -> None:
    """A stopped agent feeds no watchdog: systemd replaces it, and training has gone on all the time."""
    service = serve("WatchdogSec=2")
    service.submit("job", _MANY, 0.01)
    service.until_step(20)
    for _ in range(2):
        agent = service.agent
        service.container.kill(agent, signal.SIGSTOP)
        done = service.steps()[-1][1]
        until_restarted(service, agent)
        service.until_step(done + 50)
    assert int(service.show("NRestarts")) == 2
    said = service.said()
    assert said.count("Watchdog timeout") == 2
    assert said.count("Fatal Python error: Aborted") == 2
    assert_whole(service)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_memory_outlives_agent_and_ranks(serve: Serve, ranks: tuple[int, ...]) -> None:
    """Agent and ranks are killed at once, the launcher too: the job goes on from the snapshot that systemd holds."""
    service = serve()
    service.submit("job", _MANY, 0.01, flush_max="100kB/s")
    service.until_step(100)
    entry = service.entry("job")
    assert entry is not None
    agent = service.agent
    pids = [entry.status["ranks"][rank]["pid"] for rank in ranks]
    if len(ranks) == 2:
        pids.append(entry.life.launcher_pid)
    service.container.run("kill", "-KILL", *map(str, (agent, *pids)))
    until_restarted(service, agent)
    done = service.steps()[-1][1]
    service.until_step(done + 30)
    started = [item for item in service.log() if item["event"] == "generation started"]
    assert [item["generation"] for item in started] == [1, 2]
    assert started[1]["restore_tier"] == "memory"
    assert_resumed(service)


@pytest.mark.timeout(300)
def test_a_stop_leaves_on_purpose(serve: Serve) -> None:
    """`systemctl stop` ends everything with a last checkpoint; the next start goes on behind it, of itself."""
    service = serve()
    service.submit("job", _MANY, 0.01)
    service.until_step(20)
    service.systemctl("stop")
    assert service.show("TasksCurrent") in ("[not set]", "0")
    last = service.steps()[-1][1]
    assert service.committed("job")[-1] == last
    entry = service.entry("job")
    assert entry is not None
    assert (entry.status["state"], entry.life.comes_back) == ("stopped", True)
    assert "comes back by itself" in service.ctl("status", "job")
    service.systemctl("start")
    service.until_step(last + 50)
    assert_resumed(service, lost_at_most=0)
    assert [step for _, step in service.steps()] == list(range(1, len(service.steps()) + 1))


@pytest.mark.timeout(300)
def test_what_was_stopped_stays_so(serve: Serve) -> None:
    """A job that `ckptctl stop` has ended does not come back, by a restart of the service or of the machine."""
    service = serve()
    service.submit("job", _MANY, 0.01)
    service.until_step(20)
    service.ctl("stop", "job")
    before = service.steps()
    service.systemctl("restart")
    service.container.reboot()
    assert service.show("ActiveState") == "active"
    assert service.steps() == before
    assert not service.container.run("pgrep", "-f", "steps.py", check=False)


@pytest.mark.timeout(300)
def test_a_reboot_brings_the_job_back(serve: Serve) -> None:
    """A machine that shuts down leaves with a last checkpoint and goes on behind it once it is up; twice."""
    service = serve()
    service.submit("job", _MANY, 0.01)
    service.until_step(20)
    for _ in range(2):
        done = service.steps()[-1][1]
        service.container.reboot()
        service.until_step(done + 50)
    assert_resumed(service, lost_at_most=0)
    assert service.steps()[-1][0] == 3


@pytest.mark.timeout(300)
def test_a_power_cut_costs_what_was_not_committed(serve: Serve) -> None:
    """Everything ends at once and all memory is gone: the job goes on from its newest committed checkpoint."""
    service = serve()
    service.submit("job", _MANY, 0.01)
    for _ in range(2):
        done = (service.steps() or [(0, 0)])[-1][1]
        service.until_step(done + 50)
        until(lambda done=done: [step for step in service.committed("job") if step > done], "a checkpoint")
        committed = service.committed("job")[-1]
        service.container.lose_power()
        last = service.steps()[-1][1]
        service.until_step(last + 50)
        first = next(step for generation, step in service.steps() if generation == service.steps()[-1][0])
        assert committed < first <= last + 1
    assert_resumed(service)
