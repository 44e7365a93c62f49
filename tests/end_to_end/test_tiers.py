"""Jobs with more than one tier: what is on the second brings a job back whose first is gone; names keep checkpoints."""

from __future__ import annotations

import shutil

import pytest

from tests.end_to_end.harness import LIGHT, SCRIPTS, World, until
from tests.object_store import server


def steps(world: World, *arguments: str) -> dict[str, list[int]]:
    """The steps that `ls` shows, by tier."""
    found: dict[str, list[int]] = {}
    for item in world.json("ls", *arguments):
        found.setdefault(item["tier"], []).append(item["step"])
    return found


def test_a_lost_disk_comes_back_from_the_second_tier(light: World) -> None:
    """After the first tier is deleted, the same command goes on from the second; a name keeps a checkpoint on both."""
    world = light
    far = world.folder / "far"
    options = ("--store", str(far), "--keep-last", "2")
    world.finish(world.run(LIGHT, 60, 0.01, options=options))
    found = steps(world, "train")
    assert found["local"][0] == found["local-2"][0] == 60
    assert world.ctl("tag", "train", "half").returncode == 0
    shutil.rmtree(world.store)
    output = world.finish(world.run(LIGHT, 200, 0.01, options=options))
    assert '"restore_tier": "local-2"' in output
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))
    found = steps(world, "train")
    assert found["local"][0] == found["local-2"][0] == 200
    assert 60 in found["local-2"], "a tagged checkpoint was pruned"
    assert [item["tier"] for item in world.json("tag", "train")] == ["local-2"]
    world.until_empty()


@pytest.mark.xdist_group("object store")
def test_a_bucket_alone(world: World, s3_process: server.Server) -> None:
    """A job whose only store is a bucket flushes to this node first, and is restored on a node that never saw it."""
    place = f"s3://{s3_process.make_bucket()}/runs"
    command = ["run", "--nproc", "2", "--every", "200ms", "--store", place, "--", str(SCRIPTS / "train.py")]
    world.env.update(s3_process.environ)
    world.finish(world.ctl_popen(*command, "60", "--pause=0.01"))
    assert steps(world, "train")["s3"][0] == 60
    assert steps(world, f"{place}/train") == {"s3": steps(world, "train")["s3"]}
    shutil.rmtree(world.home)
    output = world.finish(world.ctl_popen(*command, "90", "--pause=0.01"))
    assert '"restore_tier": "s3"' in output
    assert all(item["intact"] for item in world.json("verify", "train", "--all"))
    refused = world.ctl(*command, "95", AWS_SECRET_ACCESS_KEY="wrong")
    assert refused.returncode == 14
    assert "credentials" in refused.stderr
    assert "Traceback" not in refused.stderr
    world.until_empty()


@pytest.mark.xdist_group("object store")
def test_a_bucket_that_dies_stops_nobody(light: World) -> None:
    """When the bucket's server is killed, training commits to the disk; a second signal ends the waiting."""
    world = light
    running = server.start(world.folder)
    try:
        place = f"s3://{running.make_bucket()}/runs"
        world.env.update(running.environ)
        run = world.run(LIGHT, 400, 0.01, options=("--store", place))
        world.until_training("train", committed=True)
        running.process.kill()
        running.process.wait()
        before = world.status("train")
        until(lambda: world.status("train")["last_committed"]["step"] > before["step"] + 20, "commits without bucket")
        run.terminate()
        until(lambda: world.status("train")["state"] == "draining", "the end of training")
        run.terminate()
        world.finish(run, code=75)
        assert "tier retries" in world.output(run)
    finally:
        running.stop()
    world.until_empty()
