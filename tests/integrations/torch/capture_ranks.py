"""Ranks that capture sharded and replicated state and look at each other's images, for `test_dtensor_capture`."""

import json
import mmap
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ckptd.client.framework import Membership
from ckptd.errors import StateError
from ckptd.storage.image import VALUES_NAME, parse
from ckptd_integrations.torch import layouts
from ckptd_integrations.torch.framework import TorchBinding
from ckptd_integrations.torch.objects import is_plain
from ckptd_integrations.torch.tensors import DTYPES
from tests.integrations.torch.offering import capture
from tests.integrations.torch.reshard_ranks import job


class Rank:
    """One rank's part in a job: where images go, and what it has found out."""

    def __init__(self, place, rank, world_size):
        self.place, self.rank, self.world_size = place, rank, world_size
        self.membership = Membership(rank, world_size)
        self.outcomes = {}

    def exchange(self, name, image):
        """Give all ranks each other's images."""
        (self.place / f"{name}.{self.rank}").write_bytes(image)
        distributed.barrier()
        return [memoryview((self.place / f"{name}.{rank}").read_bytes()) for rank in range(self.world_size)]

    def check(self, name, state, tensors, shared=()):
        """Note what is wrong with the images of all ranks, given the names of tensors of the job and their values."""
        images = self.exchange(name, capture(state, self.membership))
        self.outcomes[name] = " ".join(faults(images, tensors, shared))


def faults(images, tensors, shared):
    """Yield in words whatever the pieces in all images do not make up as they should."""
    spans = [[span for span in parse(image).spans if span.piece] for image in images]
    found = {span.piece.tensor for of_rank in spans for span in of_rank}
    if found != set(tensors):
        yield f"tensors {sorted(found.symmetric_difference(tensors))} are on one side only"
        return
    for name, expected in tensors.items():
        times = torch.zeros(expected.shape, dtype=torch.int64)
        made = torch.zeros_like(expected)
        for image, of_rank in zip(images, spans, strict=True):
            for span in of_rank:
                if span.piece.tensor == name:
                    box = tuple(slice(at, at + size) for at, size in zip(span.piece.offset, span.shape, strict=True))
                    if span.end > span.begin:
                        elements = torch.frombuffer(bytearray(image[span.begin : span.end]), dtype=DTYPES[span.dtype])
                        made[box] = elements.view(span.shape)
                    times[box] += 1
                    if span.piece.shape != tuple(expected.shape):
                        yield f"{name} has the shape {span.piece.shape}"
        if not torch.equal(made, expected) or not bool((times == 1).all()):
            yield f"{name} is not what it was"
    sizes = [sum(span.end - span.begin for span in of_rank if span.piece.tensor in shared) for of_rank in spans]
    if shared and max(sizes) == sum(sizes):
        yield f"{shared} are not shared out: {sizes}"


def model_of(width=12):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 5), nn.Linear(5, 1))


def trained(model):
    """Return the state of a model after a step, and all its DTensors in full."""
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def moments(number):
    return [f"optimizer.state.{number}.exp_avg", f"optimizer.state.{number}.exp_avg_sq"]


def in_full(state):
    found = {f"model.{name}": item for name, item in state["model"].named_parameters()}
    for number, values in state["optimizer"].state_dict()["state"].items():
        found |= {f"optimizer.state.{number}.{key}": item for key, item in values.items()}
    return {name: item.full_tensor().detach() for name, item in found.items() if isinstance(item, DTensor)}


def two(place, rank, world_size):
    """Two ranks: FSDP2, tensor parallel, DDP, odd placements and what is refused."""
    me = Rank(place, rank, world_size)
    mesh = init_device_mesh("cpu", (2,))
    model = model_of()
    fully_shard(model[0])
    fully_shard(model)
    state = trained(model)
    me.outcomes["fsdp is plain"] = "" if is_plain(model) else "it is not"
    me.check("fsdp", state, in_full(state))
    overlapped(me, state)
    model = parallelize_module(model_of(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    state = trained(model)
    me.check("tensor parallel", state, in_full(state), shared=["model.2.bias", *moments(3)])
    odd(me, mesh)
    replicated(me)
    finish(me)


def overlapped(me, state):
    """Copy FSDP2 beside training: the same image, waited for, and a change under it is noticed."""
    binding = TorchBinding(state, rng=False, membership=me.membership)
    model, optimizer = state["model"], state["optimizer"]
    size = binding.prepare(1).image_bytes
    outcome = ""
    with mmap.mmap(-1, size) as memory, mmap.mmap(-1, size) as other:
        optimizer.step()
        binding.prepare(1).write(memoryview(memory))
        pending = binding.prepare(1).begin(memoryview(other))
        binding.before_optimizer_steps(pending.finish)
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        if memory[:size] != other[:size]:
            outcome = "the image differs"
        pending = binding.prepare(1).begin(memoryview(other))
        with torch.no_grad():
            next(model.parameters()).add_(1)
        try:
            pending.finish()
            outcome = "a change was not noticed"
        except StateError as error:
            outcome = outcome or ("" if "'model.0.weight'" in str(error) else str(error))
        binding.before_optimizer_steps(lambda: None)
    binding.close()
    me.outcomes["overlapped"] = outcome


def odd(me, mesh):
    """DTensors that are scalars, empty, complex, replicated, tied or of other than the first dimension."""
    torch.manual_seed(9)
    full = {
        "scalar": (torch.tensor(2.5), Replicate()),
        "empty": (torch.zeros(0, 3), Shard(0)),
        "short": (torch.arange(3.0).view(1, 3), Shard(0)),
        "columns": (torch.randn(4, 5), Shard(1)),
        "complex": (torch.randn(5, dtype=torch.complex128), Shard(0)),
        "copies": (torch.randn(10, 4), Replicate()),
        "half": (torch.randn(7).bfloat16(), Shard(0)),
    }
    state = {name: distribute_tensor(item, mesh, [placement]) for name, (item, placement) in full.items()}
    tensors = {f"state.{name}": item for name, (item, _) in full.items()}
    tensors["state.complex"] = torch.view_as_real(full["complex"][0])
    state["tied"] = state["short"]
    me.check("odd", {"state": state}, tensors, shared=["state.copies"])
    names = {span.name for span in parse(capture({"state": state}, me.membership)).spans}
    me.outcomes["tied"] = "" if "state.tied" not in names else "it was captured twice"
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    try:
        capture({"sum": partial}, me.membership)
        me.outcomes["partial"] = "it was captured"
    except StateError as error:
        me.outcomes["partial"] = "" if "'sum'" in str(error) and "P(sum)" in str(error) else str(error)


def replicated(me):
    """DDP around a model that is bound without it: parameters and Adam's state once, buffers by each rank."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 300), nn.BatchNorm1d(300), nn.Linear(300, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    other = torch.optim.SGD([nn.Parameter(torch.ones(3))], momentum=0.9)
    state = {"model": model, "optimizer": optimizer, "other": other}
    binding = TorchBinding(state, rng=False, membership=me.membership)
    before = any(span.piece for span in binding.prepare(1).layout.spans)
    wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    wrapped(torch.randn(4, 8) + me.rank).sum().backward()
    optimizer.step()
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()
    seen = [None] * me.world_size
    distributed.all_gather_object(seen, binding.prepare(1).witness())
    me.outcomes["witness"] = "" if seen[0] and seen[0] == seen[1] and not before else f"{seen} {before}"
    tensors = {f"model.{name}": item.detach() for name, item in model.named_parameters()}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.state.{number}.{key}": item for key, item in values.items()}
    me.check("ddp", state, tensors)
    images = me.exchange("ddp-again", capture(state, me.membership))
    sizes = Counter(
        {rank: sum(s.end - s.begin for s in parse(image).spans if s.piece) for rank, image in enumerate(images)}
    )
    own = [{span.name for span in parse(image).spans if not span.piece} for image in images]
    expected = {VALUES_NAME, *(f"model.1.{name}" for name, _ in model[1].named_buffers())}
    expected.add("other.state.0.momentum_buffer")
    me.outcomes["ddp buffers"] = "" if own == [expected] * 2 else f"{own}"
    me.outcomes["ddp balance"] = "" if max(sizes.values()) < 1.1 * min(sizes.values()) else f"{sizes}"
    binding.close()
    del wrapped
    distributed.barrier()


def four(place, rank, world_size):
    """Four ranks: shards without elements, hybrid sharding and FSDP2 over tensor parallel."""
    me = Rank(place, rank, world_size)
    model = model_of()
    fully_shard(model)
    state = trained(model)
    me.check("fsdp of four", state, in_full(state))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = model_of()
    fully_shard(model, mesh=mesh)
    state = trained(model)
    me.check("hybrid", state, in_full(state), shared=["model.0.weight", *moments(0)])
    model = parallelize_module(model_of(8), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    state = trained(model)
    me.check("fsdp and tensor parallel", state, in_full(state), shared=["model.3.bias", *moments(5)])
    alone = model_of()
    fully_shard(alone, mesh=mesh["dp"])
    spans = parse(capture({"model": alone}, me.membership)).spans
    me.outcomes["a mesh of some ranks"] = "" if not any(span.piece for span in spans) else "it belongs to the job"
    finish(me)


def finish(me):
    with (me.place / f"outcomes-{me.world_size}.{me.rank}").open("w") as file:
        json.dump(me.outcomes, file)


def main():
    layouts.SMALL_BYTES = layouts.SMALL_TENSOR_BYTES = 1
    place = Path(sys.argv[1])
    for work, world_size in ((two, 2), (four, 4)):
        if not job(work, place, world_size):
            sys.exit(f"the job of {world_size} ranks failed")


if __name__ == "__main__":
    main()
