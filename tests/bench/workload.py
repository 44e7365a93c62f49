"""The training that every contender checkpoints: a state that changes at every step, and two loops around it."""

from __future__ import annotations

import time

import torch
import xxhash
from torch import nn

from tests.bench.plan import Shape

DTYPES = {
    "fp32": (torch.float32,),
    "bf16": (torch.bfloat16,),
    "mixed": (torch.float32, torch.bfloat16),
}
"""By name, which types the weights have, in turn; Adam keeps its moments in the type of the weight."""
MATMULS = 12
"""Products of 512 x 512 in a full step: about as long as the optimizer's step over 512 MiB of state."""
DEVICE_WIDTH = 8192
"""Of the products on a GPU, in bf16: 1.5 ms each on a fast one."""
DEVICE_S = 0.008
SMALL_LAUNCHES = 400
"""On a GPU they are all that a waiting step does before its optimizer's: there the host is the slower of the two."""


class Training:
    """One rank's model, optimizer and gradients. Gradients are no part of the state."""

    def __init__(self, rank: int, shape: Shape, *, prepared: bool = True) -> None:
        """Build the state; without `prepared`, Adam makes its moments only when it steps or is restored."""
        self.shape = shape
        self.on_device = shape.device != "cpu"
        self._random = torch.Generator(shape.device).manual_seed(7 + (0 if shape.replicated else rank))
        self.model = self._build()
        self._trained = [weight for weight in self.model.parameters() if weight.requires_grad and shape.moments]
        self.optimizer: torch.optim.Optimizer | None = None
        if shape.moments:
            # With torch's own betas a second moment in bf16 stands still, and would be found unchanged.
            self.optimizer = torch.optim.Adam(self._trained, lr=1e-2, betas=(0.9, 0.9), fused=True)
            for weight in self._trained:
                weight.grad = self._filled(weight.numel(), weight.dtype).view_as(weight)
            if prepared:
                self.optimizer.step()
        self._gradients = [weight.grad for weight in self._trained]
        self._changes = 0
        self.prefix = "" if shape.replicated else f"rank{rank}."
        width, dtype = (DEVICE_WIDTH, torch.bfloat16) if self.on_device else (512, torch.float32)
        cores = [torch.rand(width, width, dtype=dtype, device=shape.device) for _ in range(3)]
        self._left, self._right, self._out = cores
        self._small = torch.zeros(64, device=shape.device)

    def _build(self) -> nn.Module:
        shape = self.shape
        total_bytes = int(shape.size_mib * 2**20)
        weights = nn.ParameterList([nn.Parameter(self._filled(64, torch.float32))] if shape.moments else [])
        frozen_bytes = int(total_bytes * shape.frozen)
        frozen = round(shape.tensors * shape.frozen)
        for number in range(frozen):
            dtype = DTYPES[shape.dtype][number % len(DTYPES[shape.dtype])]
            data = self._filled(frozen_bytes // frozen // dtype.itemsize, dtype)
            weights.append(nn.Parameter(data, requires_grad=False))
        copies = 3 if shape.moments else 1
        trained = max(1, (shape.tensors - frozen) // copies)
        for number in range(trained):
            dtype = DTYPES[shape.dtype][number % len(DTYPES[shape.dtype])]
            numbers = (total_bytes - frozen_bytes) // copies // trained // dtype.itemsize
            weights.append(nn.Parameter(self._filled(numbers, dtype)))
        module = nn.Module()
        module.weights = weights
        return module

    def _filled(self, numbers: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(numbers, dtype=dtype, device=self.shape.device).uniform_(-1, 1, generator=self._random)

    # --- the state --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, torch.Tensor]:
        """Return all tensors by a name of their own; names differ between ranks unless the state is replicated.

        torch.distributed.checkpoint takes tensors of one name for replicas and keeps only one of them.
        """
        found = {f"{self.prefix}{name}": weight.data for name, weight in self.model.named_parameters()}
        if self.optimizer is not None:
            names: dict[torch.Tensor, str] = {weight: name for name, weight in self.model.named_parameters()}
            for weight, moments in self.optimizer.state.items():
                for key, tensor in moments.items():
                    found[f"{self.prefix}{names[weight]}.{key}"] = tensor
        return found

    def state_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.state().values())

    def fingerprint(self) -> str:
        """Return a digest over all bytes, to prove that a load brought back what was checkpointed."""
        digest = xxhash.xxh3_128()
        for _, tensor in sorted(self.state().items()):
            digest.update(tensor.reshape(-1).view(torch.uint8).cpu().numpy().data)
        return digest.hexdigest()

    def change(self) -> None:
        """Change every trained element, so that no checkpoint finds something that the one before has."""
        self._changes += 1
        factor = -2.0 if self._changes % 2 else -0.5
        with torch.no_grad():
            if self.optimizer is None:
                for weight in self.model.parameters():
                    if weight.requires_grad:
                        weight.neg_()
                return
            for weight, gradient in zip(self._trained, self._gradients, strict=True):
                weight.grad = gradient if gradient is None else gradient.mul_(factor)
        self.optimizer.step()

    # --- the loops --------------------------------------------------------------------------------------------

    def prepare(self, kind: str) -> None:
        """Get ready for a loop: beside a waiting one the optimizer's real work is a device's, and small here."""
        for number, (weight, gradient) in enumerate(zip(self._trained, self._gradients, strict=True)):
            weight.grad = gradient if kind == "full" or number == 0 else None

    def work(self, kind: str) -> None:
        """Do a step's forward and backward."""
        if kind == "full":
            for _ in range(MATMULS):
                torch.mm(self._left, self._right, out=self._out)
        elif kind == "waiting":
            for _ in range(SMALL_LAUNCHES):
                self._small.add_(1)
            if not self.on_device:
                time.sleep(DEVICE_S)
        else:
            time.sleep(0.001)

    def optimize(self, kind: str) -> None:
        """Let the optimizer step: real steps of Adam over every trained tensor, or over a small one."""
        if kind != "idle" and self.optimizer is not None:
            self.optimizer.step()
        self.synchronize()

    def synchronize(self) -> None:
        """Wait for the device, as a step that reads its loss does."""
        if self.on_device:
            torch.cuda.synchronize()

    def copy_out_s(self) -> float:
        """Return how long the device takes to copy that many bytes to page-locked memory, in one piece."""
        source = torch.empty(self.state_bytes(), dtype=torch.uint8, device=self.shape.device)
        target = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
        took_s = []
        for _ in range(4):
            self.synchronize()
            begin_s = time.monotonic()
            target.copy_(source, non_blocking=True)
            self.synchronize()
            took_s.append(time.monotonic() - begin_s)
        return min(took_s)
