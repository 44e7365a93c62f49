"""Helpers for the tests of the torch integration."""

import struct
from collections import OrderedDict

import numpy as np
import pytest
import torch

from ckptd.client.framework import Membership
from ckptd_integrations.torch.framework import TorchFramework
from tests.integrations.torch.offering import Offered

ALONE = Membership(0, 1)


class Harness:
    """Binds, captures into plain memory, restores and compares bit for bit."""

    def bind(self, rng=False, membership=ALONE, **state):
        return TorchFramework().bind(state, rng=rng, membership=membership)

    def image(self, binding, step=1, whole=False):
        """Capture into a slot that held other bytes before."""
        prepared = binding.prepare(step, whole=whole)
        slot = memoryview(bytearray(b"\xa5" * prepared.image_bytes))
        prepared.write(slot)
        return slot

    def capture(self, rng=False, membership=ALONE, **state):
        return self.image(self.bind(rng=rng, membership=membership, **state))

    def restore(self, image, rng=False, membership=ALONE, **state):
        """Restore from one rank's image, or from a list of all ranks' images."""
        binding = self.bind(rng=rng, membership=membership, **state)
        with Offered(image if isinstance(image, list) else [image]) as offered:
            binding.restore(offered)
        return binding.state

    def same(self, left, right, path="state"):
        """Fail unless both sides have the same types and the same bits."""
        assert type(left) is type(right), f"{path}: {type(left)} and {type(right)}"
        if isinstance(left, torch.Tensor):
            assert (left.dtype, left.shape, left.device) == (right.dtype, right.shape, right.device), path
            assert bits(left) == bits(right), path
        elif isinstance(left, np.ndarray):
            assert (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes()), path
        elif isinstance(left, torch.nn.Module):
            self.same(left.state_dict(), right.state_dict(), path)
        elif isinstance(left, np.generic):
            assert left.tobytes() == right.tobytes(), path
        elif isinstance(left, float):
            assert struct.pack("d", left) == struct.pack("d", right) or (left != left and right != right), path
        elif isinstance(left, complex):
            self.same((left.real, left.imag), (right.real, right.imag), path)
        elif isinstance(left, dict):
            self.same(list(left), list(right), f"keys of {path}")
            for key in left:
                self.same(left[key], right[key], f"{path}.{key}")
            if isinstance(left, OrderedDict):
                self.same(vars(left), vars(right), f"attributes of {path}")
        elif isinstance(left, (set, frozenset)):
            assert left == right, path
        elif hasattr(left, "__iter__") and not isinstance(left, (str, bytes)):
            left, right = list(left), list(right)
            assert len(left) == len(right), path
            for index, pair in enumerate(zip(left, right, strict=True)):
                self.same(*pair, f"{path}.{index}")
        else:
            assert left == right, path


def bits(tensor):
    """Return a tensor's elements as bytes, in row-major order."""
    if tensor.is_meta:
        return b""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@pytest.fixture(scope="session")
def harness():
    return Harness()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(7)
