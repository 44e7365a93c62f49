"""Losses that go bad in a real training: stepping back, skipping, marking."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.end_to_end.harness import World, until

STEPS = 200
BAD = 120
STEP_BACK = ("--numbers", "step_back")


@pytest.fixture(scope="module")
def without_the_bad_batch(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, str]]:
    """The tensors of a run that skips the bad batch from the beginning."""
    world = World(tmp_path_factory.mktemp("skipped"))
    try:
        world.finish(world.run("goes_bad.py", STEPS, "--pause=0", f"--skip={BAD}-{BAD}"))
        return world.tensors("goes_bad")
    finally:
        world.close()


def finite(world: World, job: str) -> list[Path]:
    """Return the checkpoints of a job whose every tensor is finite."""
    found = []
    for manifest in sorted((world.store / job).glob("g*/s*/manifest.json")):
        good = True
        for shard in manifest.parent.glob("rank-*.safetensors"):
            with safe_open(shard, "pt") as file:
                tensors = [file.get_tensor(name) for name in file.keys() if name != "__ckptd__.values"]
            good = good and all(torch.isfinite(item.double()).all() for item in tensors if item.is_floating_point())
        if good:
            found.append(manifest)
    return found


@pytest.mark.parametrize(("kind", "rank"), [("nan", 0), ("spike", 1)])
def test_a_bad_batch_is_stepped_back_from_and_skipped(
    world: World, kind: str, rank: int, without_the_bad_batch: tuple[int, dict[str, str]]
) -> None:
    """A NaN or a spike on any rank fails the job, which ends bit-identical to one that never trained on that batch."""
    arguments = (STEPS, f"--bad={BAD}", f"--kind={kind}", f"--rank={rank}")
    output = world.finish(world.run("goes_bad.py", *arguments, options=STEP_BACK))
    assert f"skip {BAD} to {BAD}" in output
    assert world.tensors("goes_bad") == without_the_bad_batch
    (incident,) = world.incidents("goes_bad")
    assert (incident["kind"], incident["rank"], incident["generation"]) == (kind, rank, 1)
    assert f"at step {BAD}; step {BAD - 1} was the last healthy one" in incident["cause"]
    assert 0 < incident["restored"]["step"] < BAD
    assert world.json("status", "goes_bad")["numbers"]["skipped"] == [[BAD, BAD]]


def test_a_job_that_skips_nothing_is_given_up(world: World) -> None:
    """A script that trains on the same NaN again and again ends with a verdict, and its healthy checkpoint is there."""
    options = (*STEP_BACK, "--max-restarts", "2")
    run = world.run("goes_bad.py", STEPS, f"--bad={BAD}", "--deaf", "--pause=0.005", nproc=1, options=options)
    run.wait(120)
    assert run.returncode == 10, world.output(run)[-3000:]
    assert {incident["kind"] for incident in world.incidents("goes_bad")} == {"nan"}
    healthy = [item["step"] for item in world.json("ls", "goes_bad") if item["health"] == "healthy"]
    assert healthy
    assert max(healthy) < BAD
    assert len(finite(world, "goes_bad")) >= len(healthy)


def test_warn_only_marks(world: World) -> None:
    """With "warn" training goes on, what follows is marked, and the newest healthy one stays, by hand as well."""
    options = ("--keep-last", "1")
    output = world.finish(world.run("goes_bad.py", STEPS, f"--bad={BAD}", nproc=1, options=options))
    assert output.count('"numbers suspect"') == 1
    assert world.incidents("goes_bad") == []
    newest, *hopeful, healthy = listed = world.json("ls", "goes_bad")
    assert (newest["step"], newest["health"]) == (STEPS, "suspect")
    assert (healthy["step"] < BAD, healthy["health"]) == (True, "healthy")
    assert [(item["step"] < BAD - 1, item["health"]) for item in hopeful] in ([], [(True, None)])
    good = [f"s{item['step']:012d}" for item in (healthy, *hopeful)]
    assert [path.parent.name for path in finite(world, "goes_bad")] == good
    status = world.json("status", "goes_bad")
    assert status["numbers"]["bad"] == {"rank": 0, "step": BAD, "kind": "nan"}
    assert [item["kind"] for item in status["warnings"]] == ["nan"]
    assert "suspect" in world.ctl("show", "goes_bad").stdout
    stranger = {"CKPTD_HOME": str(world.folder / "elsewhere")}  # who has the store alone
    shown = world.ctl("ls", f"{world.store}/goes_bad", **stranger).stdout.splitlines()[1:]
    assert (shown[0].split()[-1], shown[-1].split()[-1]) == ("suspect", "healthy")
    for env in ({}, stranger):
        assert world.ctl("prune", f"{world.store}/goes_bad", "--keep-last", "1", **env).returncode == 0
        assert world.json("ls", "goes_bad") == listed


def test_suspicion_survives_the_agent(world: World) -> None:
    """An agent killed right after a NaN leaves a job whose next agent does not begin with what is suspect."""
    run = world.run("goes_bad.py", 100_000, f"--bad={BAD}", nproc=1)
    until(lambda: (world.status("goes_bad") or {}).get("step", 0) > BAD + 60, "steps after the NaN")
    suspect = until(lambda: world.status("goes_bad")["numbers"]["suspect"], "a suspect checkpoint")
    assert all(item["step"] >= BAD - 1 for item in suspect)
    run.kill()
    run.wait()
    world.until_empty()
    arguments = (STEPS, f"--bad={BAD}", f"--skip={BAD}-{BAD}")
    output = world.finish(world.run("goes_bad.py", *arguments, nproc=1, options=STEP_BACK))
    assert '"step back"' in output
    assert world.tensors("goes_bad")[0] == STEPS
    values = finite(world, "goes_bad")[-1]
    assert values.parent.name == f"s{STEPS:012d}"
    assert math.isfinite(world.json("show", "goes_bad")["values"]["loss"])
