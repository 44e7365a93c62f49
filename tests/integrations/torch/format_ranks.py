"""Ranks that capture sharded state, and ranks that load exports of it: `test_formats_ranks` starts this once."""

import json
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ckptd.client.framework import Membership
from tests.integrations.torch.offering import capture
from tests.integrations.torch.reshard_ranks import compare, job, mesh_of, step, whole
from tests.integrations.torch.stored import IMPORTERS, commit, exported, imported, restored


def make(seed, world_size):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh_of(world_size))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}


def captures(place, rank, world_size):
    """FSDP2 over two ranks, two steps, and a third one to compare with."""
    state = make(1, world_size)
    step(state)
    step(state)
    state["model"][1].running_mean += 2
    (place / f"image.{rank}").write_bytes(capture(state, Membership(rank, world_size)))
    before = whole(state)
    step(state)
    after = whole(state)
    if rank == 0:
        torch.save((before, after), place / "whole.pt")


def exports(place, _rank, _world_size):
    """Both formats, by a process of its own."""
    tier = commit([(place / f"image.{rank}").read_bytes() for rank in range(2)])
    for name in ("torch", "dcp"):
        exported(name, tier, place / name)


def loads(place, rank, world_size):
    """The library loads into targets that are sharded anew; so does a restore of what was imported again."""
    before, after = torch.load(place / "whole.pt")
    outcomes = {}
    state = make(2, world_size)
    model, optimizer = get_state_dict(state["model"], state["optimizer"])
    by_name = {name: number for number, (name, _) in enumerate(state["model"].named_parameters())}
    moments = {str(by_name[name]): dict(values) for name, values in optimizer["state"].items()}
    target = {"model": model, "optimizer": {"state": moments}}
    dcp.load(target, storage_reader=dcp.FileSystemReader(place / "dcp"))
    set_state_dict(state["model"], state["optimizer"], model_state_dict=model, optim_state_dict=optimizer)
    outcomes["dcp"] = compare(whole(state), before)
    step(state)
    outcomes["dcp goes on"] = compare(whole(state), after)
    loaded = torch.load(place / "torch/checkpoint.pt", weights_only=True)
    parameters = [name for name, _ in state["model"].named_parameters()]
    found = {name: loaded["model"][name] for name in parameters}
    outcomes["torch"] = compare(found, {name: before[name] for name in parameters})
    if any(isinstance(item, DTensor) for item in found.values()):
        outcomes["torch"] += " not whole"
    for name in ("torch", "dcp"):
        tier, _, at = imported(IMPORTERS[name], place / name)
        state = make(3, world_size)
        restored(tier, at, state, rank, world_size)
        outcomes[f"restored from {name}"] = compare(whole(state), before)
        if not torch.equal(state["model"][1].running_mean, torch.full((7,), 2.0)):
            outcomes[f"restored from {name}"] += " buffers"
        step(state)
        outcomes[f"restored from {name} goes on"] = compare(whole(state), after)
    (place / f"outcomes-{world_size}.{rank}").write_text(json.dumps(outcomes))
    distributed.barrier()


def main():
    place = Path(sys.argv[1])
    for work, world_size in ((captures, 2), (exports, 1), (loads, 1), (loads, 2)):
        if not job(work, place, world_size):
            sys.exit(f"{work.__name__} of {world_size} ranks failed")


if __name__ == "__main__":
    main()
