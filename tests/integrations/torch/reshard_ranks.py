"""Ranks that capture and restore sharded training state; `test_reshard` starts this once and reads what they found.

One process imports torch and forks the ranks of each job from itself: three jobs capture, three restore.
"""

import json
import os
import signal
import sys
import traceback
from functools import cache
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptd.client.framework import Membership
from ckptd_integrations.torch.restoring import restore
from tests.integrations.torch.offering import Offered, capture

SIZES = {"even": (8, 12, 4), "odd": (5, 7, 3)}
SOURCES = [
    ("even", "plain", 1), ("even", "plain", 2), ("even", "fsdp", 1), ("even", "fsdp", 2), ("even", "fsdp", 4),
    ("even", "tensor", 2), ("even", "fsdp-tensor", 4), ("even", "hybrid", 4), ("even", "columns", 4),
    ("odd", "plain", 1), ("odd", "fsdp", 2), ("odd", "fsdp", 4),
]  # fmt: skip
TARGETS = [*SOURCES, ("even", "tensor", 4), ("even", "plain", 4), ("odd", "fsdp", 1), ("odd", "plain", 2)]


@cache
def mesh_of(*shape):
    """Return the mesh of this shape; each costs process groups."""
    return init_device_mesh("cpu", shape, mesh_dim_names=("first", "last")[-len(shape) :])


def arrange(model, layout, world_size):
    """Share a model out among the ranks."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if layout == "plain":
        return
    mesh = mesh_of(2, world_size // 2) if layout in ("fsdp-tensor", "hybrid") else mesh_of(world_size)
    if "tensor" in layout:
        parallelize_module(model, mesh["last"], plan)
    if layout != "tensor":
        place = (lambda parameter: Shard(parameter.dim() - 1)) if layout == "columns" else None
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh["first"] if "tensor" in layout else mesh, shard_placement_fn=place)


def make(size, layout, world_size, seed):
    torch.manual_seed(seed)
    a, b, c = SIZES[size]
    model = nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c))
    arrange(model, layout, world_size)
    return {"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=0.1)}


def step(state):
    """Step with gradients that follow from the parameters, so that every layout computes the same."""
    for parameter in state["model"].parameters():
        parameter.grad = parameter.detach() * 0.5 + 0.25
    state["optimizer"].step()


def whole(state):
    """Return all tensors in full, by name."""
    named = dict(state["model"].named_parameters())
    tensors = dict(named)
    for name, parameter in named.items():
        for key, value in state["optimizer"].state[parameter].items():
            tensors[f"{name}.{key}"] = value
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
        for name, value in tensors.items()
    }


def captures(place, rank, world_size):
    for number, (size, layout, ranks) in enumerate(SOURCES):
        if ranks == world_size:
            state = make(size, layout, world_size, number)
            step(state)
            step(state)
            image = capture(state, Membership(rank, world_size, ("model", "optimizer") if layout == "plain" else None))
            (place / f"{number}.{rank}").write_bytes(image)
            before = whole(state)
            step(state)
            after = whole(state)
            if rank == 0:
                torch.save((before, after), place / f"{number}.whole")


def restores(place, rank, world_size):
    for target in TARGETS:
        size, layout, ranks = target
        for number, source in enumerate(SOURCES):
            if ranks == world_size and source[0] == size:
                images = [(place / f"{number}.{old}").read_bytes() for old in range(source[2])]
                state = make(size, layout, world_size, 1000)
                parameters = list(state["model"].parameters())
                with Offered([memoryview(image) for image in images]) as offered:
                    restore(state, offered, Membership(rank, world_size), rng=False)
                before, after = torch.load(place / f"{number}.whole")
                result = compare(whole(state), before)
                same = [now is then for now, then in zip(state["model"].parameters(), parameters, strict=True)]
                step(state)
                if source[1] == "fsdp":  # Gathering everything takes most of this test's time.
                    result = result or compare(whole(state), after)
                result = result or ("" if all(same) else "parameters were replaced")
                with (place / f"outcomes.{rank}").open("a") as file:
                    file.write(json.dumps([*source, *target[1:], rank, result]) + "\n")


def compare(left, right):
    if left.keys() != right.keys():
        return f"{sorted(left)} and {sorted(right)}"
    return " ".join(name for name in left if not torch.equal(left[name], right[name]))


def job(work, place, world_size):
    """Fork the ranks of one job and wait for them."""
    store = place / f"{work.__name__}-{world_size}"
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                torch.set_num_threads(1)
                distributed.init_process_group(
                    "gloo", store=distributed.FileStore(str(store), world_size), rank=rank, world_size=world_size
                )
                work(place, rank, world_size)
                distributed.barrier()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        pids.append(pid)
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if status:  # The others wait for it in a collective.
            for other in pids:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            return False
    return True


def main():
    place = Path(sys.argv[1])
    for work in (captures, restores):
        for world_size in (1, 2, 4):
            if not job(work, place, world_size):
                sys.exit(f"{work.__name__} of {world_size} ranks failed")


if __name__ == "__main__":
    main()
