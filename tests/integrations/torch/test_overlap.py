"""Captures beside training: the same image as at the boundary, and a change under the copy never goes unnoticed."""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import nn

from ckptd.errors import StateError
from ckptd_integrations.torch.framework import TorchBinding, TorchFramework
from ckptd_integrations.torch.overlap import owned_by_optimizers


def make(width: int = 64) -> tuple[nn.Module, torch.optim.Optimizer, TorchBinding]:
    """Return a model with a buffer and a frozen layer, its optimizer after one step, and both bound."""
    model = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 8), nn.Linear(8, 8))
    model[3].requires_grad_(False)
    optimizer = torch.optim.AdamW([item for item in model.parameters() if item.requires_grad])
    step(model, optimizer)
    return model, optimizer, TorchFramework().bind({"model": model, "optimizer": optimizer}, rng=True)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Do one training step."""
    optimizer.zero_grad()
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()


def slot_for(binding: TorchBinding) -> mmap.mmap:
    """Return memory that is large enough."""
    return mmap.mmap(-1, binding.prepare().image_bytes + 4096)


def test_an_overlapped_image_is_the_same_to_the_bit() -> None:
    """Begun at the boundary and finished after forward and backward, the image is what `write` would have made."""
    model, optimizer, binding = make()
    whole, beside = slot_for(binding), slot_for(binding)
    binding.prepare().write(memoryview(whole))
    copy = binding.prepare().begin(memoryview(beside))
    assert copy is not None
    model(torch.randn(4, 8)).square().mean().backward()
    copy.finish()
    size = binding.prepare().image_bytes
    assert whole[:size] == beside[:size]
    optimizer.step()
    whole.close()
    beside.close()


def test_only_what_an_optimizer_owns_waits() -> None:
    """Parameters in an optimizer and its state may wait; buffers, frozen parameters and all else may not."""
    model, optimizer, binding = make()
    owned = owned_by_optimizers(binding.state.values())
    assert model[0].weight.data_ptr() in owned
    assert optimizer.state[model[0].weight]["exp_avg"].data_ptr() in owned
    assert model[3].weight.data_ptr() not in owned
    assert model[1].running_mean.data_ptr() not in owned


def test_without_an_optimizer_nothing_waits() -> None:
    """A model alone is copied at the boundary, whole."""
    binding = TorchFramework().bind({"model": nn.Linear(3, 3)}, rng=False)
    memory = slot_for(binding)
    assert binding.prepare().begin(memoryview(memory)) is None
    memory.close()


def test_a_change_under_the_copy_voids_it_and_is_named() -> None:
    """What changes a parameter between boundary and optimizer step makes the snapshot void, by name."""
    model, _, binding = make()
    memory = slot_for(binding)
    copy = binding.prepare().begin(memoryview(memory))
    assert copy is not None
    with torch.no_grad():
        model[2].weight.clamp_(-0.1, 0.1)
    with pytest.raises(StateError, match=r"model\.2\.weight.*changed while it was copied"):
        copy.finish()
    memory.close()


@pytest.mark.parametrize("kind", ["AdamW foreach", "AdamW fused", "SGD", "two optimizers", "scaler", "accumulation"])
def test_the_optimizer_waits_for_the_copy(kind: str) -> None:
    """Before any optimizer changes a tensor the hook is called, so the copy is done; for every kind of optimizer."""
    model = nn.Linear(16, 16)
    half = [model.weight], [model.bias]
    makers = {
        "AdamW foreach": lambda: [torch.optim.AdamW(model.parameters(), foreach=True)],
        "AdamW fused": lambda: [torch.optim.AdamW(model.parameters(), fused=True)],
        "two optimizers": lambda: [torch.optim.AdamW(half[0]), torch.optim.SGD(half[1], lr=0.1, momentum=0.9)],
    }
    optimizers = makers.get(kind, lambda: [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)])()
    for optimizer in optimizers:
        step(model_of(model), optimizer)
    state = {f"optimizer{number}": optimizer for number, optimizer in enumerate(optimizers)}
    binding = TorchFramework().bind({"model": model, **state}, rng=False)
    expected, memory = slot_for(binding), slot_for(binding)
    binding.prepare().write(memoryview(expected))
    waits: list[int] = []
    copy = binding.prepare().begin(memoryview(memory))
    assert copy is not None

    def wait() -> None:
        if not waits:
            copy.finish()
        waits.append(1)

    binding.before_optimizer_steps(wait)
    try:
        for _ in range(2 if kind == "accumulation" else 1):
            model(torch.randn(4, 16)).square().mean().backward()
        assert not waits
        for optimizer in optimizers:
            if kind == "scaler":
                scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
                scaler.scale(model(torch.randn(4, 16)).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        assert len(waits) == len(optimizers)
    finally:
        binding.close()
    size = binding.prepare().image_bytes
    assert memory[:size] == expected[:size]
    step(model_of(model), optimizers[0])
    assert len(waits) == len(optimizers)  # unhooked
    expected.close()
    memory.close()


def model_of(linear: nn.Linear) -> nn.Module:
    """Return a module that takes eight inputs, as `step` gives."""
    return nn.Sequential(nn.ZeroPad1d((0, 8)), linear)
