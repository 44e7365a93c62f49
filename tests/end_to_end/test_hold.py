"""Two agents that run one job on one store by mistake: the second is refused, until the first one is gone."""

from __future__ import annotations

import os
import signal
import subprocess

from tests.end_to_end.harness import LIGHT, World, until


def until_restored(world: World, process: subprocess.Popen[str]) -> None:
    """Wait until a job goes on from what the one before has left."""

    def restored() -> bool:
        output = world.output(process)
        assert process.poll() is None, output[-6000:]
        return '"restore_tier": "local"' in output

    until(restored, "a restore")


def test_a_second_agent_is_refused(light: World) -> None:
    """It ends with exit code 11 and says who has the job; after kill -9 of the first the same command runs."""
    world = light
    first = world.run(LIGHT, 100_000, 0.01)
    world.until_training("train", committed=True)
    homes = [world.folder / "home-2", world.folder / "home-3"]
    command = ["run", "--nproc", "2", "--every", "200ms", "--store", str(world.store), "--log-format", "json"]
    command += [*world.preload, "--", LIGHT, "100000", "0.01"]
    second = world.ctl_popen(*command, CKPTD_HOME=str(homes[0]))  # it waits for a while
    same_home = world.ctl(*command)
    assert same_home.returncode == 11
    assert f"train is held by agent {first.pid}" in same_home.stderr
    assert world.ctl("ls", "train").returncode == 0
    assert world.ctl("tag", "train", "kept").returncode == 0
    assert world.json("verify", "train")
    said = world.finish(second, 11)
    assert f"job train is held by process {first.pid} on " in said
    assert "hint: one agent runs a job on a store: stop that one" in said
    assert '"event": "store held"' in said
    assert "Traceback" not in said
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    until(lambda: len(world.processes()) == 0, "the end of the first job's processes")
    third = world.ctl_popen(*command, CKPTD_HOME=str(homes[1]))
    until_restored(world, third)
    third.terminate()
    assert "store held" not in world.finish(third, 75)
    spares = ".tmp-spares"  # of the killed one, until they are old enough to be nobody's
    assert [path.name for path in world.store.iterdir() if path.name != spares] == ["train"]
    world.until_empty()


def test_who_comes_while_an_agent_ends_waits(light: World) -> None:
    """A job that is stopped lets go, and one that was started before that goes on where it ended."""
    world = light
    first = world.run(LIGHT, 100_000, 0.01)
    world.until_training("train", committed=True)
    second = world.run(LIGHT, 100_000, 0.01, CKPTD_HOME=str(world.folder / "home-2"))
    until(lambda: '"event": "store held"' in world.output(second), "the second agent's wait")
    first.terminate()
    world.finish(first, 75)
    until_restored(world, second)
    second.terminate()
    world.finish(second, 75)
    world.until_empty()
