"""A rank reads the parts it needs and nothing else, from whatever parts a checkpoint has, and knows what is its own."""

import os
import random
from contextlib import ExitStack, contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckptd.client.framework import Membership
from ckptd.errors import DamagedError, StateError
from ckptd.storage.boxes import Box
from ckptd.storage.digest import LEAF_BYTES, digest
from ckptd.storage.manifest import Chunk
from ckptd.storage.reading import read
from ckptd_integrations.torch import transfers as planning
from ckptd_integrations.torch.local_boxes import boxes_at
from ckptd_integrations.torch.restoring import restore
from ckptd_integrations.torch.scattering import Scatter
from tests.integrations.torch.offering import Offered, capture

DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]


@contextmanager
def rank_of(rank, world_size):
    """Be a rank whose collectives do nothing."""
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Membership(rank, world_size)
    finally:
        distributed.destroy_process_group()


def mesh_of(*shape):
    """Return a mesh of this rank's own name: torch keeps what it worked out for an equal one of another rank."""
    rank = distributed.get_rank()
    return init_device_mesh(
        "cpu", shape, mesh_dim_names=tuple(f"dim {dim} of rank {rank}" for dim in range(len(shape)))
    )


def share(full, placements, *mesh_shape):
    """Return this rank's DTensor of a tensor that all have in full."""
    return distribute_tensor(full.clone(), mesh_of(*mesh_shape), placements, src_data_rank=None)


def captured(make, world_size):
    """Return the images of all ranks of a job whose state is what `make` returns on each."""
    images = []
    for rank in range(world_size):
        with rank_of(rank, world_size) as membership:
            images.append(capture(make(), membership))
    return images


def numbers(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


@st.composite
def sharings(draw, dims):
    """A mesh and placements on it."""
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    placements = []
    for _ in mesh:
        dim = draw(st.integers(0, dims - 1))
        placements.append(
            draw(st.sampled_from([Replicate(), Shard(dim), Shard(dim), _StridedShard(dim, split_factor=2)]))
        )
    return mesh, tuple(placements)


def everywhere(mesh):
    return [tuple(place) for place in torch.cartesian_prod(*map(torch.arange, mesh)).view(-1, len(mesh)).tolist()]


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_any_sharing_to_any_other(data):
    """Whatever boxes a tensor was captured in, those of any other sharing are filled with the right elements."""
    shape = tuple(data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from(DTYPES))
    full = torch.randint(0, 256, shape, dtype=torch.uint8).to(dtype)
    before, after = data.draw(sharings(len(shape))), data.draw(sharings(len(shape)))
    content, chunks = bytearray(os.urandom(3)), []
    for coordinate in everywhere(before[0]):
        if any(at and placement.is_replicate() for at, placement in zip(coordinate, before[1], strict=True)):
            continue
        for box in boxes_at(shape, before[0], coordinate, before[1]):
            bits = full[slices(box.global_offset, box.shape)].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            place = (len(content), len(content) + len(bits))
            chunks.append(Chunk(0, "x", "", box.global_offset, box.shape, "file", *place, digest(bits), ()))
            content += bits
    order = data.draw(st.permutations(range(len(shape))))
    descriptor = os.memfd_create("ckptd-test")
    with ExitStack() as stack:
        stack.callback(os.close, descriptor)
        os.write(descriptor, content)
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(
            planning, "GAP_BYTES", data.draw(st.sampled_from([1, 16, 65536]))
        )
        for coordinate in everywhere(after[0]):
            boxes = boxes_at(shape, after[0], coordinate, after[1])
            sides = [
                max((box.local_offset[dim] + box.shape[dim] for box in boxes), default=0) for dim in range(len(shape))
            ]
            local = torch.zeros([sides[dim] for dim in order], dtype=dtype)
            local = local.permute([order.index(dim) for dim in range(len(shape))])
            read(list(planning.transfers("x", chunks, local, boxes)), {"file": descriptor}, threads=1, direct=False)
            for box in boxes:
                assert torch.equal(
                    local[slices(box.local_offset, box.shape)], full[slices(box.global_offset, box.shape)]
                )


def slices(offset, shape):
    return tuple(slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_bytes_in_any_pieces(data):
    """However a chunk's bytes are cut on their way, each element of the part ends up in its place, and no other."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=0, max_size=4)))
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    part = tuple(data.draw(st.integers(1, size - begin)) for size, begin in zip(shape, offset, strict=True))
    full = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
    cuts = sorted({0, full.numel(), *data.draw(st.lists(st.integers(0, full.numel()), max_size=5))})
    pieces = list(pairwise(cuts))
    random.Random(data.draw(st.integers())).shuffle(pieces)
    target = torch.full(part, -1, dtype=torch.int32)
    scatter = Scatter(target, shape, Box(offset, part))
    bits = memoryview(bytearray(full.numpy().tobytes()))
    for begin, end in pieces:
        scatter(begin * 4, bits[begin * 4 : end * 4])
    assert torch.equal(target, full[slices(offset, part)])


def test_large_pieces():
    """A piece that is longer than one copy may be is cut, with strides on both sides."""
    full = numbers(300, 700)
    target = torch.zeros(650, 300).t()
    Scatter(target, (300, 700), Box((0, 25), (300, 650)))(0, memoryview(bytearray(full.numpy().tobytes())))
    assert torch.equal(target, full[:, 25:675])


def test_only_what_is_needed(tmp_path, monkeypatch):
    """A rank opens the files that hold something of its own, and reads the leaves that it needs, once."""
    full = numbers(32, LEAF_BYTES // 16)  # a leaf is four rows
    images = captured(lambda: {"x": share(full, [Shard(0)], 2)}, 2)
    total = 0
    real = os.preadv

    def counting(descriptor, buffers, offset):
        nonlocal total
        count = real(descriptor, buffers, offset)
        total += count
        return count

    monkeypatch.setattr(os, "preadv", counting)
    for rank, needed in enumerate((0, 0, 1, 1)):
        with rank_of(rank, 4) as membership, Offered(images, tmp_path) as offered:
            x = share(torch.zeros_like(full), [Shard(0)], 4)
            total = 0
            restore({"x": x}, offered, membership, rng=False)
            assert torch.equal(x.to_local(), full[rank * 8 : rank * 8 + 8])
        assert {int(file[-17:-12]) for file in offered.opened} == {needed, rank % 2}
        assert 2 * LEAF_BYTES <= total <= 2 * LEAF_BYTES + 3 * 4096 * 4


def test_damage(tmp_path):
    """A flipped bit in a leaf that a rank needs is found and named; one in a leaf that it does not need is not its."""
    full = numbers(8, LEAF_BYTES // 8)  # a leaf is two rows
    (image,) = captured(lambda: {"x": full}, 1)
    with Offered([image], tmp_path) as offered:
        begin = offered.document["tensors"]["x"]["chunks"][0]["byte_range"][0]
        offered.flip(0, begin + 2 * LEAF_BYTES + 5)
        for rank in range(4):
            with rank_of(rank, 4) as membership:
                x = share(torch.zeros_like(full), [Shard(0)], 4)
                if rank == 2:
                    with pytest.raises(DamagedError, match=r"'x'.*rank-00000"):
                        restore({"x": x}, offered, membership, rng=False)
                else:
                    restore({"x": x}, offered, membership, rng=False)
                    assert torch.equal(x.to_local(), full[rank * 2 : rank * 2 + 2])
        with rank_of(1, 4) as membership, pytest.raises(DamagedError, match="'x'"):
            restore({"x": share(torch.zeros_like(full), [Shard(1)], 4)}, offered, membership, rng=False)


def test_state_of_each_rank():
    """What ranks keep for themselves comes from rank r % old world size; a new rank keeps its own generators."""

    def make(rank):
        return {"x": torch.tensor(rank), "same": torch.ones(2), "log": [rank], "g": torch.Generator().manual_seed(rank)}

    images = [capture(make(rank), Membership(rank, 2)) for rank in range(2)]
    for rank in range(4):
        state = make(10 + rank)
        with Offered(images) as offered:
            if rank == 0:
                with pytest.warns(UserWarning, match=r"'x' differed between ranks.*rank r % 2"):
                    restore(state, offered, Membership(rank, 4), rng=True)
            else:
                restore(state, offered, Membership(rank, 4), rng=True)
        assert (int(state["x"]), state["log"]) == (rank % 2, [rank % 2])
        assert state["g"].initial_seed() == (rank if rank < 2 else 10 + rank)


def test_generators_of_new_ranks():
    """The process's generators are restored on ranks that existed, and left as they are on those that did not."""
    from ckptd_integrations.torch.framework import TorchFramework

    torch.manual_seed(1)
    binding = TorchFramework().bind({"a": 1}, rng=True, membership=Membership(0, 1))
    prepared = binding.prepare(1)
    image = memoryview(bytearray(prepared.image_bytes))
    prepared.write(image)
    binding.close()
    with Offered([image]) as offered:
        for rank, seed in ((0, 1), (1, 2)):
            torch.manual_seed(2)
            restore({"a": 0}, offered, Membership(rank, 2), rng=True)
            drawn = torch.rand(3)
            torch.manual_seed(seed)
            assert torch.equal(drawn, torch.rand(3))


def test_global_shapes_are_compared():
    """A DTensor of another global shape is refused with both shapes, though the local ones may be the same."""
    images = captured(lambda: {"x": share(numbers(4, 2), [Shard(0)], 2)}, 2)
    with rank_of(0, 4) as membership, Offered(images) as offered:
        with pytest.raises(StateError, match=r"'x' is \[4, 2\] in the checkpoint and \[8, 2\]"):
            restore({"x": share(numbers(8, 2), [Shard(0)], 4)}, offered, membership, rng=False)


def test_meshes_of_some_ranks():
    """A part of a DTensor that only some ranks share comes back to the same rank of as many, and is refused else."""

    def on_submesh(full):
        mesh = mesh_of(2, distributed.get_world_size() // 2)
        return distribute_tensor(full, mesh[mesh.mesh_dim_names[1]], [Shard(0)], src_data_rank=None)

    images = []
    for rank in range(4):
        with rank_of(rank, 4) as membership:
            images.append(capture({"x": on_submesh(numbers(4) + 100 * (rank // 2))}, membership))
    for rank in range(4):
        with rank_of(rank, 4) as membership, Offered(images) as offered:
            x = on_submesh(torch.zeros(4))
            restore({"x": x}, offered, membership, rng=False)
            part = 2 * (rank % 2)
            assert torch.equal(x.to_local(), (numbers(4) + 100 * (rank // 2))[part : part + 2])
    with rank_of(0, 8) as membership, Offered(images) as offered:
        with pytest.raises(StateError, match="'x' is"):
            restore({"x": on_submesh(torch.zeros(8))}, offered, membership, rng=False)


class RowScales(torch.optim.Optimizer):
    """Keeps one number per row of a parameter, as optimizers with factored moments do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["scale"] = parameter.mean(dim=1) + 1


def test_state_that_is_not_like_its_parameter():
    """Sharded state of a shape of its own needs a state to fill; without one it is refused with a hint."""
    full = numbers(8, 3)

    def make(step):
        parameter = nn.Parameter(
            share(full if step else torch.zeros_like(full), [Shard(0)], distributed.get_world_size())
        )
        optimizer = RowScales([parameter])
        if step:
            optimizer.step()
        return {"parameter": parameter.detach(), "optimizer": optimizer}

    images = captured(lambda: make(True), 2)
    with rank_of(1, 4) as membership, Offered(images) as offered:
        with pytest.raises(StateError, match=r"'optimizer.state.0.scale' of shape \[8\]") as refused:
            restore(make(False), offered, membership, rng=False)
        assert "one step" in refused.value.hint
        state = make(False)
        state["optimizer"].step()
        restore(state, offered, membership, rng=False)
        (kept,) = state["optimizer"].state.values()
        assert torch.equal(kept["scale"].to_local(), (full.mean(dim=1) + 1)[2:4])


def test_fully_sharded_modules_are_filled_in_place():
    """The local shards of a module of FSDP2 stay the same memory, and so do the parameters that an optimizer steps."""

    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        fully_shard(model, mesh=mesh_of(distributed.get_world_size()))
        return model

    images = captured(lambda: {"model": make(1)}, 2)
    torch.manual_seed(1)
    full = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).state_dict()
    with rank_of(3, 4) as membership, Offered(images) as offered:
        model = make(2)
        shards = [(parameter, parameter.to_local().data_ptr()) for parameter in model.parameters()]
        model.unshard()
        restore({"model": model}, offered, membership, rng=False)
        for (parameter, place), now, whole in zip(shards, model.parameters(), full.values(), strict=True):
            assert now is parameter
            assert now.to_local().data_ptr() == place
            expected = share(whole, now.placements, 4).to_local()
            assert torch.equal(now.to_local(), expected)


class Wrapper:
    """An object that hands out and takes sharded tensors, as those written for torch's own checkpoints do."""

    def __init__(self, x):
        self.x = x

    def state_dict(self):
        return {"deep": [{"x": self.x}]}

    def load_state_dict(self, state):
        assert isinstance(state["deep"][0]["x"], DTensor)
        self.x = state["deep"][0]["x"]


def test_objects_that_hand_out_dtensors():
    """An object with a state of its own gets DTensors where it has some now."""
    full = numbers(6, 2)
    images = captured(lambda: {"o": Wrapper(share(full, [Shard(0)], 2))}, 2)
    with rank_of(2, 3) as membership, Offered(images) as offered:
        o = Wrapper(share(torch.zeros_like(full), [Shard(0)], 3))
        restore({"o": o}, offered, membership, rng=False)
        assert torch.equal(o.x.to_local(), full[4:])
