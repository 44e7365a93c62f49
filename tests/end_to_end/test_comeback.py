"""The service without systemd: jobs come back when it starts again, whatever has ended it and them."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from ckptd.daemon.output import output_paths
from tests.end_to_end.harness import LIGHT, World
from tests.waiting import PATIENCE_S, until


def serve(world: World) -> subprocess.Popen[str]:
    """Start the agent of the service."""
    agent = world.popen([sys.executable, "-m", "ckptd.daemon"], CKPTD_LOG_FORMAT="json")
    until(lambda: "agent started" in world.output(agent), "an agent")
    return agent


def submit(world: World, steps: int, pause_s: float = 0.01, *, more: str = "") -> None:
    """Hand it a job."""
    file = world.folder / "job.toml"
    file.write_text(
        f'command = ["{LIGHT}", "{steps}", "{pause_s}"]\nnproc = 2\nevery = "100ms"\nstore = "{world.store}"\n'
        f'python = "{sys.executable}"\npreload = ["ckptd"]\n{more}'
    )
    done = world.ctl("submit", str(file))
    assert done.returncode == 0, done.stderr


def power_cut(world: World) -> None:
    """End every process of this world at once, and all memory with them."""
    for process in world.processes():
        process.send_signal(signal.SIGSTOP)
    for process in world.processes():
        process.kill()
    world.until_empty()


def test_everything_is_killed_and_the_job_comes_back(light: World) -> None:
    """All processes and all memory gone, the next start of the service goes on from the newest committed checkpoint."""
    serve(light)
    submit(light, 300)
    before = light.until_training("job", 20, committed=True)
    power_cut(light)
    serve(light)
    after = light.until_training("job", before["last_committed"]["step"] + 1, generation=2)
    assert after["generation"] == 2
    until(lambda: (light.status("job") or {})["state"] == "finished", "the end of the job")
    first = output_paths(light.home / "jobs" / "job" / "logs" / "g000002", 0)[0].read_text()
    assert "generation 2 restored (" in first
    assert "'local'" in first
    last = serve_again_and_nothing_comes(light)
    assert light.finish(last) is not None


def serve_again_and_nothing_comes(world: World) -> subprocess.Popen[str]:
    """Stop the agent, start another, and see that a finished job is left alone."""
    for process in world._started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(PATIENCE_S)
    agent = serve(world)
    assert "job comes back" not in world.output(agent)
    assert len(world.processes()) == 1
    agent.send_signal(signal.SIGTERM)
    return agent


@pytest.mark.parametrize("way", ["service", "job"])
def test_who_is_stopped_decides(light: World, way: str) -> None:
    """A stopped service brings its job back, behind its last step; a stopped job stays so."""
    agent = serve(light)
    submit(light, 100_000)
    light.until_training("job", 20)
    if way == "job":
        assert light.ctl("stop", "job").returncode == 0
    agent.send_signal(signal.SIGTERM)
    light.finish(agent)
    light.until_empty()
    entry = light.status("job")
    assert entry is not None
    assert entry["state"] == "stopped"
    last = entry["last_committed"]["step"]
    again = serve(light)
    if way == "service":
        light.until_training("job", last + 1, generation=2)
        assert "it was stopped with the service" in light.output(again)
        assert light.ctl("stop", "job").returncode == 0
    assert ("job comes back" in light.output(again)) is (way == "service")
    again.send_signal(signal.SIGTERM)
    light.finish(again)


@pytest.mark.parametrize("kept", [True, False])
def test_handing_over(light: World, kept: bool) -> None:
    """SIGUSR2 ends the agent alone and its job trains on; one that ends with its agent leaves with a checkpoint."""
    agent = serve(light)
    submit(light, 100_000, more="" if kept else 'on_agent_loss = "end"\n')
    before = light.until_training("job", 20)
    agent.send_signal(signal.SIGUSR2)
    light.finish(agent)
    again = serve(light)
    after = light.until_training("job", before["step"] + 20, generation=1 if kept else 2)
    pids = [[rank["pid"] for rank in status["ranks"]] for status in (before, after)]
    assert (pids[0] == pids[1]) is kept
    assert after["generation"] == (1 if kept else 2)
    last = [item for item in map(json.loads, light.output(agent).splitlines()) if item["event"] == "job ended"]
    assert [item["outcome"] for item in last] == ([] if kept else ["stopped"])
    again.send_signal(signal.SIGTERM)
    light.finish(again)


@pytest.mark.parametrize("alive", [True, False])
def test_one_that_can_not_come_back_is_said_and_can_be_stopped(light: World, alive: bool) -> None:
    """A job whose command is gone keeps the service from nothing; its reason is logged, and it can be given up."""
    first = serve(light)
    submit(light, 100_000)
    light.until_training("job", 5, committed=True)
    if alive:
        first.kill()
        first.wait()
    else:
        power_cut(light)
    with closing(sqlite3.connect(light.home / "journal.sqlite")) as database:
        database.execute("UPDATE jobs SET config = replace(config, ?, ?)", (LIGHT, str(light.folder / "gone.py")))
        database.commit()
    agent = serve(light)
    until(lambda: "job stays away" in light.output(agent), "the reason")
    assert "gone.py" in light.output(agent)
    stopped = light.ctl("stop", "job")
    assert stopped.returncode == 0
    assert stopped.stdout.startswith("job job: stopped")
    until(lambda: len(light.processes()) == 1, "the end of its launcher and ranks")
    assert (light.status("job") or {})["state"] == "stopped"
    agent.send_signal(signal.SIGTERM)
    light.finish(agent)
    last = serve_again_and_nothing_comes(light)
    light.finish(last)
