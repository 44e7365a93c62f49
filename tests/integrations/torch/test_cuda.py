"""Captures from a GPU: page-locked slots, a stream beside training's, and events instead of waits of the host."""

import mmap

import pytest
import torch
from torch import nn

from ckptd.client.framework import Membership
from ckptd.errors import StateError
from ckptd.storage.image import parse
from ckptd_integrations.torch.framework import TorchFramework

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def job():
    """A model with buffers on a GPU, its optimizer after a step, and both bound."""
    model = nn.Sequential(nn.Linear(512, 2048), nn.BatchNorm1d(2048), nn.Linear(2048, 512)).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    held = {"model": model, "optimizer": optimizer, "turned": torch.randn(30, 20, device="cuda").t()}
    binding = TorchFramework().bind(held, rng=True, membership=Membership(0, 1))
    step(model, optimizer)
    yield model, optimizer, binding
    binding.close()


def step(model, optimizer):
    """Do one training step; nothing of it is waited for."""
    optimizer.zero_grad()
    model(torch.randn(64, 512, device="cuda")).square().mean().backward()
    optimizer.step()


def written(binding):
    """Return an image that was copied at the boundary."""
    prepared = binding.prepare(1)
    slot = bytearray(prepared.image_bytes)
    prepared.write(memoryview(slot))
    return slot


def test_device_tensors_overlap_by_default(job):
    """A binding with tensors on a GPU says so."""
    _, _, binding = job
    written(binding)
    assert binding.overlaps_by_default


@pytest.mark.parametrize("busy_cycles", [0, 5 * 10**8])
def test_the_image_is_that_of_the_boundary(job, busy_cycles):
    """Steps that follow at once do not reach into the copy, buffers included; the host waits for no busy device."""
    model, optimizer, binding = job
    waits = []
    with mmap.mmap(-1, binding.prepare(1).image_bytes) as memory:
        for _ in range(3):
            expected = written(binding)
            torch.cuda._sleep(busy_cycles)
            pending = binding.prepare(1).begin(memoryview(memory))
            assert pending is not None
            binding.before_optimizer_steps(lambda now=pending: waits.append(now.finish()))
            for _ in range(3):
                step(model, optimizer)
            pending.finish()
            assert pending.done
            assert memory[:] == expected
        binding.close()
    assert not (busy_cycles and waits)


def test_an_early_change_is_named(job):
    """What changes a parameter before the optimizer's step makes the image void, also when it is finished later."""
    model, optimizer, binding = job
    with mmap.mmap(-1, binding.prepare(1).image_bytes) as memory:
        pending = binding.prepare(1).begin(memoryview(memory))
        with torch.no_grad():
            model[0].weight.mul_(2)
        step(model, optimizer)
        with pytest.raises(StateError, match=r"'model\.0\.weight'"):
            pending.finish()
        binding.close()


def test_slots_can_be_unmapped(job):
    """A slot is page-locked until the binding is closed, or an image no longer fits; then it can be unmapped."""
    model, optimizer, binding = job
    with mmap.mmap(-1, binding.prepare(1).image_bytes) as memory:
        binding.prepare(1).begin(memoryview(memory)).finish()
        with pytest.raises(BufferError):
            memory.close()
        binding.state["more"] = torch.zeros(2**20)
        binding.prepare(1)
        memory.close()
    with mmap.mmap(-1, binding.prepare(1).image_bytes) as memory:
        step(model, optimizer)
        binding.prepare(1).begin(memoryview(memory)).finish()
        binding.close()


def test_witness_is_of_the_boundary():
    """Digests of replicated tensors are those of the boundary, also when they are asked for after a step."""
    model = nn.Linear(64, 64).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for rank in range(2):
        torch.manual_seed(1)
        held = {"model": model, "optimizer": optimizer}
        binding = TorchFramework().bind(held, rng=False, membership=Membership(rank, 2, ("model", "optimizer")))
        before = {name: item.clone() for name, item in model.state_dict().items()}
        model(torch.ones(3, 64, device="cuda")).sum().backward()
        optimizer.step()
        model.load_state_dict(before)
        prepared = binding.prepare(1)
        with mmap.mmap(-1, prepared.image_bytes) as memory:
            pending = prepared.begin(memoryview(memory))
            binding.before_optimizer_steps(pending.finish)
            optimizer.step()
            pending.finish()
            seen.append(prepared.witness())
            assert any(span.piece for span in parse(memory[:]).spans)
            model.load_state_dict(before)
            binding.close()
    assert seen[0]
    assert seen[0] == seen[1]
