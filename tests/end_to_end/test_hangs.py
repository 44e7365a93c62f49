"""Ranks that live and make no progress: each is found, looked at, ended and restarted, and the job goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import psutil
import pytest

from ckptd.launcher.environment import free_port
from tests.end_to_end.harness import SCRIPTS, World, until

BOUNDS = ("--hang", "floor=2s,ceiling=30s,first=60s")


def incident_of(world: World, job: str) -> dict[str, Any]:
    """Return the only incident of a job, which tells a hang and where its evidence is."""
    (incident,) = world.incidents(job)
    assert incident["kind"] in ("hang", "stopped")
    assert incident["signal"] is None
    assert incident["evidence_path"] is not None
    assert os.listdir(incident["evidence_path"])
    assert incident["closed"]
    return incident


@pytest.mark.parametrize("kind", ["loop", "pause"])
def test_a_rank_that_hangs(light: World, kind: str) -> None:
    """Stuck in Python, or in C with the GIL: the job is restarted and finishes."""
    light.finish(light.run("hangs.py", 60, kind, 30, 1, options=BOUNDS))
    assert incident_of(light, "hangs")["failed_step"] in (29, 30)
    assert light.json("status", "hangs")["step"] == 60


@pytest.mark.parametrize("kind", ["gil", "sleep"])
def test_a_rank_that_keeps_others_waiting(world: World, kind: str) -> None:
    """Where the others wait in a collective, the rank that does something else is named."""
    world.finish(world.run("collective.py", 60, kind, 30, options=BOUNDS))
    incident = incident_of(world, "collective")
    assert incident["rank"] == 1, incident["cause"]
    assert world.json("status", "collective")["step"] == 60


def test_a_stopped_rank(light: World) -> None:
    """A rank that SIGSTOP keeps from running is found, named as stopped, and killed though it can't run."""
    run = light.run("hangs.py", 10**6, "none", 0, 0, options=BOUNDS)
    light.until_training("hangs", 20, committed=True)
    assert "hung after 2.00 s without one (the floor)" in light.ctl("status", "hangs").stdout
    light.kill_rank("hangs", 1, signal.SIGSTOP)
    light.until_training("hangs", 20, generation=2)
    incidents = light.incidents_now("hangs")
    assert [(item["kind"], item["rank"]) for item in incidents] == [("stopped", 1)]
    run.terminate()
    light.finish(run, code=75)


def test_a_stopped_rank_can_go_on(light: World) -> None:
    """A rank that is stopped for less than the limit costs nothing."""
    run = light.run("hangs.py", 10**6, "none", 0, 0, options=("--hang", "floor=60s"))
    now = light.until_training("hangs", 20, committed=True)
    light.kill_rank("hangs", 1, signal.SIGSTOP)
    process = psutil.Process(now["ranks"][1]["pid"])
    until(lambda: process.status() == psutil.STATUS_STOPPED, "the stop")
    stood = light.status("hangs")["step"]
    process.resume()
    light.until_training("hangs", stood + 20)
    assert light.incidents_now("hangs") == []
    run.terminate()
    light.finish(run, code=75)


def test_a_rank_that_raised_and_does_not_end(light: World) -> None:
    """Where nobody waits for it in a collective it is found all the same, though it has left its block."""
    bounds = ("--hang", "floor=1s,ceiling=3s,first=3s")
    light.finish(light.run("lingers.py", 60, 30, nproc=1, options=bounds))
    (incident,) = light.incidents("lingers")
    assert "it has raised an exception and has not ended" in incident["cause"]
    assert incident["consequences"] == ["rank 0 raised ValueError: no good"]


def test_a_deadlocked_collective(world: World) -> None:
    """Two ranks that wait for each other in different collectives are ended together, and do not meet that again."""
    world.finish(world.run("collective.py", 60, "deadlock", 30, options=BOUNDS))
    incident_of(world, "collective")
    assert world.json("status", "collective")["step"] == 60


def test_a_section_is_no_hang(light: World) -> None:
    """An evaluation that is declared takes longer than the limit, and nobody is called hung for it."""
    light.finish(light.run("hangs.py", 60, "eval", 30, 1, options=BOUNDS))
    assert light.incidents("hangs") == []


def test_an_evaluation_that_nobody_declared(light: World) -> None:
    """It is ended once, given more time at that step, and the job finishes."""
    light.finish(light.run("hangs.py", 60, "undeclared", 30, 1, options=BOUNDS))
    incident_of(light, "hangs")


def test_a_stopped_agent_blames_nobody(light: World) -> None:
    """Ranks that stood still as long as their agent did are not hung: it did not look."""
    run = light.run("hangs.py", 10**6, "none", 0, 0, options=BOUNDS)
    light.until_training("hangs", 20, committed=True)
    everybody = light.processes()
    for process in everybody:
        process.suspend()
    until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in everybody), "the stop")
    time.sleep(3)  # longer than the limit
    for process in everybody:
        process.resume()
    step = light.status("hangs")["step"]
    light.until_training("hangs", step + 100)
    assert light.incidents_now("hangs") == []
    run.terminate()
    light.finish(run, code=75)


def test_turned_off(light: World) -> None:
    """With `--hang off` a rank may stand still for as long as it likes."""
    run = light.run("hangs.py", 10**6, "none", 0, 0, options=("--hang", "off"))
    light.until_training("hangs", 20, committed=True)
    assert light.status("hangs")["hang"] is None
    run.terminate()
    light.finish(run, code=75)


def test_survivors_of_an_attached_job(light: World) -> None:
    """Where no launcher ends the survivor of a dead rank, ckptd does."""
    env = {"CKPTD_SOCKET": str(light.home / "ckptd.sock"), "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        light.popen([sys.executable, str(SCRIPTS / "survivor.py"), str(light.store)], **env, RANK=str(rank))
        for rank in range(2)
    ]
    light.env["CKPTD_SOCKET"] = env["CKPTD_SOCKET"]
    light.until_training("survivor", 20, committed=True)
    ranks[1].kill()
    until(lambda: ranks[0].poll() is not None, "the end of the survivor")
    assert ranks[0].returncode == -signal.SIGKILL
    ended = ["ckptd ended rank 0"]
    until(
        lambda: [item["consequences"] for item in light.incidents_now("survivor")] == [ended], "the agent's word of it"
    )
    assert light.incidents_now("survivor")[0]["rank"] == 1
