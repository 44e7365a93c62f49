"""The other doors: training code without supervisor, another launcher, the daemon, and commands that are not Python."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import sys
from pathlib import Path

from ckptd.protocol.channel import open_channel
from tests.end_to_end.harness import LIGHT, SCRIPTS, World, until

TRAIN = str(SCRIPTS / "train.py")


def python(world: World, script: str, *arguments: object, **env: str):
    """Start a script with plain Python."""
    return world.popen([sys.executable, str(SCRIPTS / script), *map(str, arguments)], **env)


def test_a_decorated_function_resumes_by_itself(world: World) -> None:
    """`python script.py` with `@resumable` starts an embedded agent, which ends with it; a killed run goes on."""
    whole = world.finish(python(world, "counts.py", 60, 0.0))
    total = whole[whole.index("total ") :]
    os.rename(world.folder / "runs", world.folder / "first")
    run = python(world, "counts.py", 60, 0.02)
    until(lambda: list((world.folder / "runs").glob("count/g*/s*/manifest.json")), "the first commit")
    run.kill()
    run.wait()
    world.until_empty(patience_s=20)
    output = world.finish(python(world, "counts.py", 60, 0.0))
    assert "started an embedded agent" in output
    assert "from None" not in output
    assert output[output.index("total ") :] == total
    world.until_empty(patience_s=20)
    assert world.json("status", "count")["state"] == "finished"


def test_a_final_checkpoint_is_there_when_the_block_ends(world: World) -> None:
    """Leaving the block waits for the last commit, so the next command can rely on it."""
    world.finish(python(world, "counts.py", 7, 0.0))
    (manifest,) = (world.folder / "runs" / "count").glob("g000001/s000000000007/manifest.json")
    assert json.loads(manifest.read_text())["world_size"] == 1


def test_ranks_of_torchrun(world: World) -> None:
    """A killed rank, one that hangs, and a NaN: each time torchrun starts its ranks anew, and they are restored."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    bounds = ["--hang=floor=2s,ceiling=30s,first=60s", "--numbers=step_back"]
    script = [str(SCRIPTS / "goes_bad.py"), "520", "--bad=500", "--job=attached", f"--store={world.store}", *bounds]
    env = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # without it torchrun's own restart may stall
    run = world.popen([*torchrun, "--monitor-interval=0.05", *script], **env)
    world.env["CKPTD_SOCKET"] = str(world.home / "ckptd.sock")
    world.until_training("attached", 30, committed=True)
    world.kill_rank("attached", 1)
    world.until_training("attached", 130, generation=2)  # so that it is known how long a step takes
    world.kill_rank("attached", 1, signal.SIGSTOP)
    output = world.finish(run)
    lives = re.findall(r"generation (\d) restored \d", output)
    assert sorted(lives) == ["2", "2", "3", "3", "4", "4"]
    assert output.count("skip 500 to 500") == 2
    assert world.tensors("attached")[0] == 520
    assert all(item["intact"] for item in world.json("verify", "attached", "--all"))
    incidents = [(item["kind"], item["rank"]) for item in world.incidents("attached")]
    assert incidents == [("signal", 1), ("stopped", 1), ("nan", 0)]
    world.until_empty(patience_s=20)


def test_the_daemon_runs_a_submitted_job(light: World) -> None:
    """`ckptd` serves a socket of mode 0600, runs a submitted job through a kill, and stops it when it is stopped."""
    world = light
    daemon = world.popen([sys.executable, "-m", "ckptd.daemon"])
    path = world.home / "ckptd.sock"
    until(path.exists, "the socket")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (world.folder / "job.toml").write_text(
        f'command = ["{LIGHT}", "100000", "0.01"]\nname = "nightly"\nnproc = 2\npreload = ["ckptd"]\n'
        'every = "200ms"\nstore = "runs"\n'
    )
    assert "job nightly started" in world.ctl("submit", "job.toml").stdout
    world.until_training("nightly", 20, committed=True)
    assert world.ctl("submit", "job.toml").returncode == 11
    world.kill_rank("nightly", 0)
    world.until_training("nightly", 30, generation=2)
    daemon.send_signal(signal.SIGTERM)
    world.finish(daemon)
    status = world.json("status", "nightly")
    assert status["state"] == "stopped"
    assert status["restarts"] == 1
    newest = world.json("ls", "nightly")[0]
    assert newest["step"] == status["last_committed"]["step"]
    assert not path.exists()


def test_a_second_daemon_on_one_socket_is_refused(world: World) -> None:
    """Two agents never share a socket: the second says so and ends, the first serves on."""
    first = world.popen([sys.executable, "-m", "ckptd.daemon"])
    path = str(world.home / "ckptd.sock")
    until(lambda: os.path.exists(path), "the socket")
    second = world.popen([sys.executable, "-m", "ckptd.daemon"])
    assert "another agent listens" in world.finish(second, code=8)
    channel, _ = open_channel(path, "ctl", 5.0)
    channel.close()
    first.send_signal(signal.SIGTERM)
    world.finish(first)


def test_a_script_that_knows_nothing_of_ckptd(world: World) -> None:
    """Any script is supervised: it runs with torchrun's environment and is restarted when a rank fails."""
    output = world.finish(world.run("plain.py", "fail"))
    assert "[1] life 1 rank 1 of 2" in output
    assert "[0] life 2 rank 0 of 2" in output
    (incident,) = world.incidents("plain")
    assert incident["cause"] == "rank 0 ended with exit code 3"
    assert world.json("ls", "plain") == []


def test_a_command_that_is_not_python(world: World) -> None:
    """A program is started by plain exec, once for each rank."""
    command = ["run", "--nproc", "2", "--name", "shell", "--store", str(world.store), "--", "/bin/sh", "-c"]
    output = world.finish(world.ctl_popen(*command, 'echo "rank $RANK port ${MASTER_PORT:+set}"'))
    assert "[0] rank 0 port set" in output
    assert "[1] rank 1 port set" in output


def test_without_preload_the_same_training_ends_the_same(light: World) -> None:
    """`--no-preload` and the forking launcher give the same tensors, through a kill."""
    light.finish(light.run(LIGHT, 200, 0, options=("--name", "forked")))
    run = light.run(LIGHT, 200, 0.02, options=("--name", "executed", "--no-preload"))
    light.until_training("executed", 20, committed=True)
    light.kill_rank("executed", 1)
    light.finish(run)
    assert light.tensors("executed") == light.tensors("forked")


def test_an_exception_is_reported_without_preload_too(light: World) -> None:
    """In a rank started by plain exec, the block of `attach` reports the exception."""
    world = light
    run = world.run("raises.py", 10, options=("--no-preload",))
    assert "ValueError: no good at step 10" in world.finish(run, code=10).splitlines()[-2]


def test_an_agent_that_is_gone_costs_protection_not_training(world: World) -> None:
    """When its daemon dies for good, an attached training runs on to its end, waits a little, and exits with 0."""
    daemon = world.popen([sys.executable, "-m", "ckptd.daemon"])
    path = world.home / "ckptd.sock"
    until(path.exists, "the socket")
    run = python(world, "train.py", 200, "--pause=0.02", "--job=lonely", f"--store={world.store}", "--every=100ms")
    world.until_training("lonely", 10, committed=True)
    daemon.kill()
    daemon.wait()
    output = world.finish(run)
    assert output.count("UNPROTECTED") <= 1
    assert "trained" in output
    assert all(item["intact"] for item in world.json("verify", "lonely", "--all", "--store", str(world.store)))


def test_logs_of_ranks_are_kept(world: World) -> None:
    """What a rank prints stands in a file of its own, by generation, after the run."""
    world.finish(world.run("plain.py", nproc=1))
    log = world.home / "jobs" / "plain" / "logs" / "g000001" / "rank-00000.out"
    assert Path(log).read_text() == "life 1 rank 0 of 1\n"
