"""The state that every contender checkpoints, and the two training loops that it is checkpointed beside."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

BLOCKS = 12
BYTES_PER_PARAMETER = 2 + 4 + 4  # bf16 weight, fp32 first and second moment


def make_state(rank: int, size_mib: int, tensors: int = 150, seed: int = 7) -> dict[str, torch.Tensor]:
    """Return `size_mib` MiB of one rank's training state in about `tensors` tensors: bf16 weights and Adam's moments.

    Names differ between ranks, because torch.distributed.checkpoint takes tensors of one name for replicas and keeps
    only one of them: every rank's state shall be written.
    """
    random = torch.Generator().manual_seed(seed + rank)
    weights = max(1, tensors // 3)
    each = size_mib * 2**20 // BYTES_PER_PARAMETER // weights
    columns = max(1, min(4096, each))
    rows = max(1, each // columns)
    state: dict[str, torch.Tensor] = {}
    for number in range(weights):
        name = f"rank{rank}.block{number % BLOCKS}.weight{number}"
        state[name] = torch.empty(rows, columns, dtype=torch.bfloat16).uniform_(-1, 1, generator=random)
        state[f"{name}.exp_avg"] = torch.empty(rows, columns).uniform_(-1, 1, generator=random)
        state[f"{name}.exp_avg_sq"] = torch.empty(rows, columns).uniform_(0, 1, generator=random)
    return state


def size_bytes(state: dict[str, torch.Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.nbytes for tensor in state.values())


def change(state: dict[str, torch.Tensor]) -> None:
    """Change every element in place, as an optimizer's step does."""
    for tensor in state.values():
        tensor.neg_()


class Loops:
    """Two fake training steps of about 10 ms each."""

    def __init__(self) -> None:
        self._left, self._right, self._out = torch.rand(512, 512), torch.rand(512, 512), torch.empty(512, 512)
        self._small = torch.zeros(64)

    def full(self) -> None:
        """Keep one core busy, as training on CPU does."""
        for _ in range(4):
            torch.mm(self._left, self._right, out=self._out)

    def waiting(self) -> None:
        """Launch small work from Python, then wait 8 ms for a device, as a GPU's host thread does."""
        for _ in range(400):
            self._small.add_(1)
        time.sleep(0.008)

    def of(self, kind: str) -> Callable[[], None]:
        """Return the loop of that name."""
        return self.full if kind == "full" else self.waiting


class Weights(torch.nn.Module):
    """The bf16 weights of a state as a module's parameters, over the same memory."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        names = [name for name in state if not name.endswith(("exp_avg", "exp_avg_sq"))]
        self.names = names
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(state[name]) for name in names])


class Moments(torch.optim.Optimizer):
    """Adam's state over the same memory; its step changes nothing, so that a loop's cost is the loop's own."""

    def __init__(self, module: Weights, state: dict[str, torch.Tensor]) -> None:
        super().__init__(module.weights, {"lr": 0.0})
        for name, weight in zip(module.names, module.weights, strict=True):
            self.state[weight] = {"exp_avg": state[f"{name}.exp_avg"], "exp_avg_sq": state[f"{name}.exp_avg_sq"]}

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Do nothing; hooks run as for any optimizer."""
