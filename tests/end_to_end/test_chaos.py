"""`ckptctl chaos`: harm on purpose, said and summed up, and never to a job that does not allow it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.end_to_end.harness import LIGHT, World, until


def start(world: World, name: str, *options: str, steps: int = 100000):
    """Start a job of two ranks and wait until it has a checkpoint."""
    run = world.run(LIGHT, steps, 0.005, options=("--name", name, *options), every="100ms")
    world.until_training(name, 5, committed=True)
    return run


def test_a_job_that_does_not_allow_it_is_not_hurt(light: World) -> None:
    """Without --allow-chaos a fault is refused with a hint, and the job trains on in its first generation."""
    start(light, "production")
    for kind in ("kill", "full-disk"):
        refused = light.ctl("chaos", "production", "--fault", kind)
        assert refused.returncode == 2, refused.stderr
        assert "job production does not allow chaos" in refused.stderr
        assert "--allow-chaos" in refused.stderr
    assert light.status("production")["generation"] == 1
    assert light.incidents_now("production") == []
    light.ctl("stop", "production")


def test_faults_at_a_rank_and_a_step(light: World) -> None:
    """A kill by a chosen signal and an exception hit the named rank after the named step; each becomes an incident."""
    start(light, "job", "--allow-chaos")
    here = light.status("job")["step"]
    killed = light.ctl("chaos", "job", "--at", f"1:{here + 20}", "--signal", "SEGV")
    assert killed.returncode == 0, killed.stderr
    assert "SIGSEGV to rank 1" in killed.stdout
    there = light.status("job")["step"]
    raised = light.ctl("chaos", "job", "--fault", "exception", "--at", f"0:{there + 20}")
    assert "faults: 1, incidents: 1," in raised.stdout, raised.stdout
    first, second = light.incidents("job")
    assert (first["rank"], first["signal"]) == (1, 11)
    assert first["failed_step"] >= here + 20
    assert second["rank"] == 0
    assert second["exception"]["type"].endswith("ChaosError")
    assert second["failed_step"] >= there + 20
    refused = light.ctl("chaos", "job", "--at", "7:1")
    assert "job job has no rank 7" in refused.stderr
    refused = light.ctl("chaos", "job", "--fault", "agent")
    assert "the agent of job job is `ckptctl run` itself" in refused.stderr
    light.ctl("stop", "job")


def test_random_faults_are_summed_up(light: World) -> None:
    """A seeded campaign with correlated kills prints every fault and the incidents; the job ends as if undisturbed."""
    light.finish(light.run(LIGHT, 1500, 0, options=("--name", "quiet"), every="100ms"))
    whole = Path(light.folder / "end-0.json").read_text()
    run = start(light, "job", "--allow-chaos", steps=1500)
    options = ("--mtbf", "300ms", "--count", "6", "--seed", "5", "--correlated", "0.5")
    done = light.ctl("chaos", "job", *options, "--signal", "KILL", "--signal", "TERM", "--fault", "kill")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("seed 5:")
    assert len(re.findall(r" to ranks? \d", done.stdout)) == 6
    assert "faults: 6, incidents: " in done.stdout
    assert len(light.incidents("job")) >= 3
    light.finish(run)
    assert json.loads(Path(light.folder / "end-0.json").read_text()) == json.loads(whole)


def test_a_slow_rank_a_full_disk_and_a_dead_launcher(light: World) -> None:
    """A slow rank slows the job, a full disk delays its commits and neither is a failure; a dead launcher is one."""
    start(light, "job", "--allow-chaos")
    begin = light.status("job")
    done = light.ctl("chaos", "job", "--fault", "full-disk", "--for", "700ms")
    assert "says for 0.7 s that it is full" in done.stdout, done.stderr
    until(lambda: light.status("job")["last_committed"]["step"] > begin["last_committed"]["step"] + 200, "new commits")
    done = light.ctl("chaos", "job", "--fault", "slow", "--rank", "1", "--for", "500ms", "--pause", "100ms")
    assert "slow in rank 1, 0.1 s more for each step for 0.5 s" in done.stdout, done.stderr
    assert light.incidents_now("job") == []
    done = light.ctl("chaos", "job", "--fault", "launcher")
    assert "SIGKILL to the launcher" in done.stdout, done.stderr
    (incident,) = light.incidents("job")
    assert "launcher" in incident["cause"]
    assert light.status("job")["state"] == "running"
    light.ctl("stop", "job")
