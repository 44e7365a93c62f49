"""Leaving on purpose: signals, notices, limits and conditions; what is on which tier then, and how it goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.harness import LIGHT, SCRIPTS, World, until
from tests.object_store import server
from tests.object_store.faults import Drip
from tests.object_store.proxied import proxy_of

STEPS, PAUSE = 150, 0.01
FOREVER = 1_000_000


def said(world: World, run: subprocess.Popen[str], event: str) -> list[dict[str, Any]]:
    """What a run has logged under a name."""
    lines = [line for line in world.output(run).splitlines() if line.startswith("{")]
    return [item for item in map(json.loads, lines) if item["event"] == event]


def newest(world: World, job: str = "train") -> dict[str, int]:
    """The newest step that each tier has."""
    found: dict[str, int] = {}
    for item in world.json("ls", job):
        found.setdefault(item["tier"], item["step"])
    return found


def ends(world: World) -> list[dict[str, str]]:
    """The digests of what both ranks have trained."""
    return [json.loads((world.folder / f"end-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def quiet(light: World) -> list[dict[str, str]]:
    """What a run ends with that nobody disturbs."""
    light.finish(light.run(LIGHT, STEPS, 0, options=("--name", "quiet")))
    found = ends(light)
    for rank in range(2):
        (light.folder / f"end-{rank}.json").unlink()
    return found


@pytest.mark.xdist_group("object store")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_brings_the_last_step_to_the_bucket(
    light: World, quiet: list[dict[str, str]], s3_process: server.Server, number: signal.Signals
) -> None:
    """The step of the stop is in the bucket when the command ends with 75; another node goes on, bit-identical."""
    world = light
    world.env.update(s3_process.environ)
    options = ("--store", f"s3://{s3_process.make_bucket()}/runs")
    run = world.run(LIGHT, STEPS, PAUSE, every="1h", options=options)
    world.until_training("train", 30)
    run.send_signal(number)
    world.finish(run, code=75)
    (leaving,) = said(world, run, "leaving")
    assert newest(world) == {"local": leaving["step"], "s3": leaving["step"]}
    assert not said(world, run, "upload skipped")
    assert not list(world.folder.glob("end-*"))
    assert world.incidents("train") == []
    stopped = world.json("status", "train")
    assert stopped["halt"]["stopping"] == f"{number.name} came"
    shutil.rmtree(world.store)
    shutil.rmtree(world.home)
    again = world.run(LIGHT, STEPS, PAUSE, every="1h", options=options)
    world.finish(again)
    (began,) = said(world, again, "generation started")
    assert (began["restore_step"], began["restore_tier"]) == (leaving["step"], "s3")
    assert ends(world) == quiet


@pytest.mark.xdist_group("object store")
def test_what_can_not_be_uploaded_in_time_is_said(light: World, s3_process: server.Server) -> None:
    """A bucket that is too slow for the grace lacks the last step, which is said; the next start uploads it."""
    world, proxy = light, proxy_of(s3_process)
    world.env.update({**s3_process.environ, "AWS_ENDPOINT_URL": proxy.endpoint})
    options = ("--store", f"s3://{s3_process.make_bucket()}/runs", "--grace", "4s", "--plain-files")
    try:
        run = world.run(LIGHT, FOREVER, PAUSE, every="1h", options=options)
        world.until_training("train", 5)
        asked = world.ctl("checkpoint", "train")
        assert asked.returncode == 0, asked.stderr
        first = int(asked.stdout.split("step ")[1].split()[0])
        until(lambda: newest(world).get("s3") == first, "the first upload")
        slow = proxy.add(Drip(20_000), "put", "part")
        run.terminate()
        world.finish(run, code=75)  # though a thread still waits for the bucket's answer
        assert slow.hits
        (skipped,) = said(world, run, "upload skipped")
        (leaving,) = said(world, run, "leaving")
        assert (skipped["step"], skipped["newest_there"]) == (leaving["step"], first)
        assert skipped["reason"] == "the grace is over"
        assert newest(world) == {"local": leaving["step"], "s3": first}
        slow.end()
        again = world.run(LIGHT, FOREVER, PAUSE, every="1h", options=options)
        until(lambda: newest(world)["s3"] >= leaving["step"], "the upload of what was left behind")
        again.terminate()
        world.finish(again, code=75)
    finally:
        proxy.close()


def test_user_code_cleans_up(light: World) -> None:
    """A script with a loop of its own is told, leaves its blocks in order, and is not taken for finished."""
    world = light
    run = world.run(str(SCRIPTS / "cleans.py"), PAUSE, every="1h")
    world.until_training("cleans", 20)
    run.terminate()
    world.finish(run, code=75)
    assert (world.folder / "cleaned").exists()
    assert not (world.folder / "taken-for-finished").exists()
    (leaving,) = said(world, run, "leaving")
    assert newest(world, "cleans")["local"] == leaving["step"]


def test_a_time_limit_stops_in_time(light: World) -> None:
    """A run with a limit stops by itself before it, says of what its margin is made, and is resumable."""
    world = light
    options = ("--time-limit", "6s", "--time-margin", "500ms")
    run = world.run(LIGHT, FOREVER, 0.1, every="500ms", options=options)
    world.until_training("train", 5)
    assert "before its time is over" in world.ctl("halt", "train").stdout
    world.finish(run, code=75)
    (over,) = said(world, run, "time is over")
    assert over["limit"] == "the time limit"
    assert over["left_s"] > 0
    assert any(reason.startswith("flush ") for reason in over["reasons"])
    (leaving,) = said(world, run, "leaving")
    assert newest(world)["local"] == leaving["step"]


def test_the_end_of_a_slurm_job_is_a_limit(light: World) -> None:
    """In a SLURM job the command stops before that ends, as the environment or `squeue` says."""
    world = light
    end = int(time.time()) + 6
    run = world.run(LIGHT, FOREVER, 0.1, options=("--time-margin", "1s"), SLURM_JOB_ID="7", SLURM_JOB_END_TIME=str(end))
    world.finish(run, code=75)
    assert [item["limit"] for item in said(world, run, "time is over")] == ["the end of the batch job"]
    tools = world.folder / "tools"
    tools.mkdir()
    (tools / "squeue").write_text("#!/bin/sh\ndate -d '+6 seconds' +%Y-%m-%dT%H:%M:%S\n")
    (tools / "squeue").chmod(0o755)
    path = f"{tools}:{world.env['PATH']}"
    again = world.run(LIGHT, FOREVER, 0.1, options=("--time-margin", "1s"), SLURM_JOB_ID="7", PATH=path)
    world.finish(again, code=75)
    assert [item["limit"] for item in said(world, again, "time is over")] == ["the end of the batch job"]


def test_two_ranks_halt_after_the_same_step(light: World, quiet: list[dict[str, str]]) -> None:
    """Two ranks stop at exactly the step that was named; run again it trains nothing, and without it to the end."""
    world = light
    options = ("--halt-after-step", "77")
    run = world.run(LIGHT, STEPS, PAUSE, every="100ms", options=options)
    world.finish(run, code=75)
    assert newest(world)["local"] == 77
    assert [item["step"] for item in said(world, run, "leaving")] == [77]
    again = world.run(LIGHT, STEPS, PAUSE, options=options)
    world.finish(again, code=75)
    assert newest(world)["local"] == 77
    assert [item["reason"] for item in said(world, again, "stopping")] == ["step 77 is done"]
    world.finish(world.run(LIGHT, STEPS, PAUSE))
    assert ends(world) == quiet


def test_conditions_of_a_running_job(light: World) -> None:
    """`ckptctl halt` sets, shows and clears conditions; with the next checkpoint the job is stopped there."""
    world = light
    run = world.run(LIGHT, FOREVER, PAUSE, every="1s")
    world.until_training("train", 5)
    assert "only when somebody asks" in world.ctl("halt", "train").stdout
    assert "after step 999999" in world.ctl("halt", "train", "--after-step", "999999").stdout
    both = world.json("halt", "train", "--at", "2199-01-01T00:00")
    assert (both["after_step"], both["at"] > 7e9) == (999999, True)
    assert "2199-01-01" in world.ctl("status", "train").stdout
    assert "only when" in world.ctl("halt", "train", "--clear").stdout
    refused = world.ctl("halt", "train", "--at", "noon")
    assert (refused.returncode, "2026-12-01T06:00" in refused.stderr) == (2, True)
    over = world.ctl("halt", "train", "--at", "2020-01-01")
    assert (over.returncode, "2020-01-01 00:00:00, which is over" in over.stderr) == (2, True)
    assert world.ctl("halt", "train", "--at-next-checkpoint").returncode == 0
    world.finish(run, code=75)
    (leaving,) = said(world, run, "leaving")
    assert newest(world)["local"] == leaving["step"]
    assert [item["reason"] for item in said(world, run, "stopping")] == ["a checkpoint was to be the last"]


@pytest.mark.parametrize("kind", ["file", "command"])
def test_a_notice_stops_the_job(light: World, kind: str) -> None:
    """A file that appears, or a command that begins to end with 0, stops the job as a signal does."""
    world = light
    place = world.folder / "preempted"
    notice = f"file:{place}" if kind == "file" else f"test -e {place}"
    run = world.run(LIGHT, FOREVER, PAUSE, every="1h", options=("--preempt-notice", notice))
    world.until_training("train", 10)
    place.touch()
    world.finish(run, code=75)
    (stopping,) = said(world, run, "stopping")
    assert str(place) in stopping["reason"]
    assert newest(world)["local"] == said(world, run, "leaving")[0]["step"]


def test_a_stop_with_a_grace_and_one_without_checkpoint(light: World) -> None:
    """`ckptctl stop --grace` is within that time for all of it; `--no-checkpoint` ends the ranks where they are."""
    world = light
    run = world.run(LIGHT, FOREVER, PAUSE, every="1h")
    world.until_training("train", 5)
    stopped = "job train: stopped; its newest checkpoint is step "
    assert world.ctl("stop", "train", "--grace", "20s").stdout.startswith(stopped)
    world.finish(run, code=75)
    assert [item["grace_s"] for item in said(world, run, "stopping")] == [20]
    before = newest(world)
    run = world.run(LIGHT, FOREVER, PAUSE, every="1h")
    world.until_training("train", before["local"] + 5, generation=2)
    assert world.ctl("stop", "train", "--no-checkpoint").stdout == f"{stopped}{before['local']} on local\n"
    world.finish(run, code=75)
    assert newest(world) == before
    refused = world.ctl("stop", "train", "--grace", "soon")
    assert refused.returncode != 0


def test_ranks_that_never_come_to_a_boundary_are_ended_with_the_grace(light: World) -> None:
    """A rank that is stuck, and deaf to SIGTERM, keeps a job no longer than its grace and five seconds."""
    world = light
    run = world.run("stuck.py", nproc=1, options=("--grace", "1s"))
    until(lambda: "[0] stuck" in world.output(run), "the first line")
    run.terminate()
    world.finish(run, code=75)


def test_unusable_settings_are_refused(world: World) -> None:
    """What no clock and no signal can do is refused before anything starts, in one line with a hint."""
    for flags in (
        ("--grace", "soon"),
        ("--time-limit", "0s"),
        ("--halt-at", "noon"),
        ("--halt-after-step", "0"),
        ("--stop-on", "KILL"),
        ("--stop-on", "nothing"),
        ("--preempt-notice", "file:"),
    ):
        refused = world.ctl("run", *flags, "--", LIGHT)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 2), (flags, refused.stderr)
    assert not Path(world.store).exists()
