"""A job on a GPU with NCCL: killed, hung on the device, gone bad, and looked at before it starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.end_to_end.harness import World, until

torch = pytest.importorskip("torch", reason="needs torch")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS = 4000
NONE = ("none", 0)


def test_a_killed_rank_goes_on_where_it_was(world: World, tmp_path: Path) -> None:
    """After kill -9 the job restarts from memory and ends with the very bytes of an undisturbed one."""
    alone = World(tmp_path / "undisturbed")
    alone.folder.mkdir()
    try:
        alone.finish(alone.run("device.py", STEPS, *NONE, nproc=1))
        expected = alone.tensors("device")
    finally:
        alone.close()
    run = world.run("device.py", STEPS, *NONE, nproc=1)
    world.until_training("device", 300, committed=True)
    world.kill_rank("device", 0)
    world.finish(run)
    step, found = world.tensors("device")
    assert step == expected[0]
    assert {name for name, digest in expected[1].items() if found.get(name) != digest} == set()
    (incident,) = world.incidents("device")
    assert incident["restored"]["tier"] == "memory"


def test_a_device_that_never_ends(world: World) -> None:
    """A rank that waits for its GPU is found and ended; stacks, collectives and GPU are in the evidence."""
    options = ("--hang", "floor=2s,ceiling=30s,first=60s")
    world.finish(world.run("device.py", 600, "collective", 300, nproc=1, options=options))
    (incident,) = world.incidents("device")
    assert incident["kind"] == "hang"
    found = Path(incident["evidence_path"])
    shown = (found / "summary.txt").read_text()
    assert {"stacks.txt", "nvidia-smi.txt", "flight-recorder-0"} <= set(os.listdir(found)), shown
    assert "device.py" in (found / "stacks.txt").read_text()
    assert "GPU UUID" in (found / "nvidia-smi.txt").read_text()
    assert world.json("status", "device")["step"] == 600


def test_a_loss_that_is_no_number(world: World) -> None:
    """A loss on the GPU that becomes NaN has the job step back, and it finishes."""
    world.finish(world.run("device.py", 1200, "nan", 600, nproc=1, options=("--numbers", "step_back")))
    (incident,) = world.incidents("device")
    assert incident["kind"] == "nan", incident


def test_a_gpu_that_is_not_there(world: World) -> None:
    """A job that names a GPU which the node lacks is held back with that reason, and starts on one that is there."""
    run = world.run("device.py", 50, *NONE, nproc=1, CUDA_VISIBLE_DEVICES="63")
    until(lambda: "GPU 63" in world.output(run), "the reason")
    run.terminate()
    run.wait()
    world.finish(world.run("device.py", 50, *NONE, nproc=1, CUDA_VISIBLE_DEVICES="0"))
