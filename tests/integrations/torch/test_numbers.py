"""Reported tensors on their way to main memory."""

from __future__ import annotations

import math

import pytest
import torch

from ckptd.client.framework import Membership
from ckptd_integrations.torch.framework import TorchBinding


@pytest.fixture
def binding() -> TorchBinding:
    """A binding of no objects."""
    return TorchBinding({}, rng=False, membership=Membership(0, 1))


@pytest.mark.parametrize("value", [1.0, 2, "x", None, torch.tensor(1.0), torch.ones(2), torch.tensor(1.0).half()])
def test_what_lies_in_main_memory_is_read_at_once(binding: TorchBinding, value: object) -> None:
    """Proves that nothing but a tensor on a device is brought from anywhere."""
    assert binding.number(value) is None


def test_a_distributed_tensor_is_refused(binding: TorchBinding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a tensor which only a collective could read is none to report."""
    monkeypatch.setattr("ckptd_integrations.torch.framework.is_dtensor", lambda _: True)
    with pytest.raises(TypeError, match="full_tensor"):
        binding.number(torch.tensor(1.0))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_number_on_a_device_comes_behind_its_work(binding: TorchBinding) -> None:
    """Proves that a report returns while the device still works, and has the value that was computed."""
    work = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(200):
        work = work @ work
        work = work / work.norm()
    loss = work.sum() * math.nan
    pending = binding.number(loss)
    assert pending is not None
    assert not pending.done
    loss.zero_()  # the value was that of the moment
    assert math.isnan(pending.value())
    assert pending.done
    assert binding.number(torch.ones(2, device="cuda")) is None
