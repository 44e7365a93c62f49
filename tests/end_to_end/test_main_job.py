"""The main job on one node: two ranks train, ranks and agents are killed, the run ends bit-identical."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys

import pytest

from tests.end_to_end.harness import LIGHT, World, until

STEPS = 150
PAUSE = "--pause=0.01"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """The tensors that a run without any fault ends with."""
    world = World(tmp_path_factory.mktemp("uninterrupted"))
    try:
        world.finish(world.run("train.py", STEPS))
        return world.tensors("train")
    finally:
        world.close()


def test_a_run_checkpoints_and_every_verb_answers_after_it(world: World) -> None:
    """A clean run commits by itself, and every reading verb answers from store and journal after it."""
    output = world.finish(world.run("train.py", 60, PAUSE))
    assert "[0] trained" in output
    assert "[1] trained" in output
    listed = world.json("ls", "train")
    assert {key for item in listed for key in item} == {
        "generation", "step", "tier", "committed_at", "size_bytes", "shards", "world_size", "health",
    }  # fmt: skip
    assert listed[0]["step"] == 60
    assert 1 <= len(listed) <= 3
    status = world.json("status", "train")
    assert status["state"] == "finished"
    assert status["step"] == 60
    assert status["last_committed"] == {"step": 60, "tier": "local"}
    assert set(status) == {
        "job", "state", "generation", "step", "ranks", "last_committed", "restarts", "scrub", "numbers", "hang",
        "warnings", "halt", "error",
    }  # fmt: skip
    assert [set(rank) for rank in status["ranks"]] == [{"rank", "pid", "state", "step", "section"}] * 2
    assert world.json("incidents", "train") == []
    manifest = world.json("show", "train")
    assert (manifest["format"], manifest["step"], manifest["complete"]) == (1, 60, True)
    assert manifest["values"]["loss"] > 0
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))
    for verb in (["ls"], ["show"], ["verify"], ["status"], ["incidents"]):
        shown = world.ctl(*verb, "train")
        assert shown.returncode == 0
        assert "train" in shown.stdout or "60" in shown.stdout
    committed = [json.loads(line) for line in output.splitlines() if '"checkpoint committed"' in line]
    assert [line["step"] for line in committed][-1] == 60  # one canonical line each


def test_a_killed_rank_costs_at_most_an_interval(world: World, uninterrupted: tuple[int, dict[str, str]]) -> None:
    """After kill -9 of a rank the job restarts from memory and ends bit-identical to the uninterrupted run."""
    run = world.run("train.py", STEPS, PAUSE)
    world.until_training("train", 40, committed=True)
    world.kill_rank("train", 0)
    world.finish(run)
    assert world.tensors("train") == uninterrupted
    (incident,) = world.incidents("train")
    assert incident["cause"] == "rank 0 was killed by SIGKILL"
    assert (incident["rank"], incident["signal"], incident["closed"]) == (0, signal.SIGKILL, True)
    assert incident["restored"]["tier"] == "memory"
    assert incident["lost_steps"] == incident["failed_step"] - incident["restored"]["step"]
    assert incident["lost_steps"] <= 40  # an interval of 200 ms at 10 ms a step, and the lead of an announcement
    assert {"detect", "kill", "start", "restore", "total"} <= set(incident["seconds"])
    assert world.json("status", "train")["restarts"] == 1
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))


def test_a_rank_killed_while_it_captures(world: World, uninterrupted: tuple[int, dict[str, str]]) -> None:
    """A rank that dies while it writes a slot leaves no torn snapshot: the older one is restored, bit-identical."""
    world.finish(world.run("train.py", STEPS, PAUSE, "--die-in-capture=60"))
    (incident,) = world.incidents("train")
    assert incident["rank"] == 1
    assert incident["restored"]["tier"] == "memory"
    step, digests = world.tensors("train")
    assert (step, digests) == uninterrupted


def test_a_killed_agent_takes_its_ranks_along_and_nothing_is_lost(
    world: World, uninterrupted: tuple[int, dict[str, str]]
) -> None:
    """kill -9 of the embedded agent leaves no orphan and no damage; the same command goes on from the last commit."""
    run = world.run("train.py", STEPS, PAUSE)
    before = world.until_training("train", 40, committed=True)
    run.send_signal(signal.SIGKILL)
    run.wait()
    world.until_empty(patience_s=10)
    assert world.status("train")["state"] == "interrupted"
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))
    output = world.finish(world.run("train.py", STEPS, PAUSE))
    assert "'local')" in output
    restored = int(output.split("restored (")[1].split(",")[0])
    assert restored >= before["last_committed"]["step"]
    assert world.tensors("train") == uninterrupted
    assert world.json("status", "train")["generation"] == 2


def test_a_killed_launcher_restarts_the_job(world: World, uninterrupted: tuple[int, dict[str, str]]) -> None:
    """kill -9 of the launcher ends its ranks and restarts the whole job from memory."""
    run = world.run("train.py", STEPS, PAUSE)
    world.until_training("train", 40, committed=True)
    (launcher,) = [item for item in world.launchers() if item.ppid() == run.pid]
    launcher.kill()
    world.finish(run)
    (incident,) = world.incidents("train")
    assert incident["cause"] == "the launcher ended with SIGKILL"
    assert incident["restored"]["tier"] == "memory"
    assert world.tensors("train") == uninterrupted


def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_resumes(
    world: World, uninterrupted: tuple[int, dict[str, str]]
) -> None:
    """SIGINT captures at the next boundary, exits with 75 (resumable), and a second run ends bit-identical."""
    run = world.run("train.py", STEPS, PAUSE, every="1h")
    world.until_training("train", 30)
    run.send_signal(signal.SIGINT)
    world.finish(run, code=75)
    stopped = world.json("status", "train")
    assert stopped["state"] == "stopped"
    assert stopped["last_committed"]["step"] >= 30
    world.finish(world.run("train.py", STEPS, PAUSE))
    assert world.tensors("train") == uninterrupted


def test_a_second_ctrl_c_stops_at_once(world: World) -> None:
    """A second SIGINT does not wait for a boundary that never comes."""
    run = world.run("stuck.py", nproc=1)
    until(lambda: "[0] stuck" in world.output(run), "the first line")
    run.send_signal(signal.SIGINT)
    until(lambda: "stops at once" in world.output(run), "the answer to Ctrl-C")
    run.send_signal(signal.SIGINT)
    world.finish(run, code=75)


def test_the_running_job_answers_too(light: World) -> None:
    """`status`, `checkpoint`, `restart` and `stop` reach the agent that runs the job, from another process."""
    world = light
    run = world.run(LIGHT, 100_000, 0.01, every="1h")
    world.until_training("train", 5)
    assert world.json("status", "train")["state"] == "running"
    assert world.json("status")[0]["job"] == "train"
    asked = world.ctl("checkpoint", "train")
    assert "is committed" in asked.stdout, asked.stderr
    step = world.json("ls", "train")[0]["step"]
    assert f"step {step} is committed" in asked.stdout
    assert world.ctl("restart", "train").returncode == 0
    world.until_training("train", step + 1, generation=2)
    (incident,) = world.incidents("train")
    assert incident["cause"] == "a restart was asked for"
    assert "is committed" in world.ctl("checkpoint", "train").stdout
    refused = world.ctl("restart", "train", "--from", "1")
    assert (refused.returncode, refused.stderr.count("\n")) == (3, 2)
    assert f"restarting from step {step};" in world.ctl("restart", "train", "--from", str(step)).stdout
    world.until_training("train", step + 1, generation=3)
    assert world.incidents("train")[-1]["restored"]["step"] == step
    assert world.ctl("stop", "train").stdout.startswith("job train: stopped; its newest checkpoint is step ")
    world.finish(run, code=75)


def test_two_commands_can_not_run_one_job(light: World) -> None:
    """A second `ckptctl run` of the same job is refused while the first runs, and harms nothing."""
    world = light
    run = world.run(LIGHT, 100_000, 0.01)
    world.until_training("train", 3)
    second = world.run(LIGHT, 100_000, 0.01)
    output = world.finish(second, code=11)
    assert f"train is held by agent {run.pid}" in output
    assert world.status("train")["state"] == "running"
    os.kill(run.pid, signal.SIGINT)
    world.finish(run, code=75)


def test_a_bug_in_the_agent_ends_it_at_once_and_loses_nothing(world: World) -> None:
    """A broken assumption crashes the agent with 70 and a traceback; ranks end, and the same command goes on."""
    broken = world.folder / "sitecustomize.py"
    broken.write_text(
        "from ckptd.core import keeper\n"
        "def on_committed(*_, **__):\n"
        "    raise AssertionError('a bug')\n"
        "keeper.Keeper.on_committed = on_committed\n"
    )
    run = world.run("train.py", 80, PAUSE, PYTHONPATH=str(world.folder))
    output = world.finish(run, code=70)
    assert "AssertionError: a bug" in output
    assert "agent crashed" in output
    world.until_empty(patience_s=10)
    assert "'local')" in world.finish(world.run("train.py", 80, PAUSE))


def test_a_closed_terminal_does_not_end_the_job(light: World) -> None:
    """When nobody reads its output any more, the job trains on to its end."""
    world = light
    command = ["run", "--nproc", "2", "--every", "200ms", "--store", str(world.store), *world.preload]
    command += ["--", LIGHT, "60", "0.01"]
    quoted = shlex.join([sys.executable, "-m", "ckptd.cli.main", *command])
    shell = world.popen(["/bin/bash", "-c", f"({quoted}; echo ended with $? > code) 2>&1 | head -n 1"])
    world.finish(shell)
    until((world.folder / "code").exists, "the end of the run")
    assert (world.folder / "code").read_text() == "ended with 0\n"
    assert world.json("ls", "train")[0]["step"] == 60
