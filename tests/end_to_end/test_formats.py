"""From a file of somebody else's to a job that trains, and back to a file: `ckptctl import`, `run` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.end_to_end.harness import World


def trained() -> dict[str, Any]:
    """The states that the script attaches, after a few steps."""
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 4)).square().sum().backward()
        optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def same(left: Any, right: Any) -> bool:
    """Whether two nested states are equal, element by element."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_a_job_begins_with_what_was_imported(world: World, tmp_path: Path) -> None:
    """Two ranks begin after the imported step with the very weights and moments, and the job's export is loadable."""
    state = trained()
    first = tmp_path / "first.pt"
    torch.save({"net": state["model"], "optim": state["optimizer"], "rest": 1}, first)
    place = ["--job", "imported", "--store", str(world.store)]
    names = ["--as", "model=net", "--as", "optimizer=optim"]
    found = world.json("import", str(first), *place, "--step", "30", *names)
    assert (found["states"], found["step"], found["generation"]) == (["model", "optimizer"], 30, 1)
    assert all(item["intact"] for item in world.json("verify", "imported", "--store", str(world.store)))
    began_with = tmp_path / "began"
    run = world.run("imported.py", 40, BEGAN_WITH=str(began_with))
    assert "began after step 30" in world.finish(run)
    assert same(torch.load(began_with, weights_only=True), state)
    exported = world.ctl("export", "imported", "--to", "out", "--format", "torch")
    assert exported.returncode == 0, exported.stderr
    assert "exported step 40 of generation 2" in exported.stdout
    loaded = torch.load(world.folder / "out/checkpoint.pt", weights_only=True)
    assert loaded["optimizer"]["state"][0]["step"] == state["optimizer"]["state"][0]["step"] + 10
