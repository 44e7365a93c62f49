"""Copying beside training: which tensors may wait, and the proof that nothing changed them meanwhile.

Parameters and an optimizer's state change in the optimizer's step and nowhere else. So their copy may run beside the
next forward and backward, if the optimizer's step waits for it: a hook that torch runs before every optimizer's step
does that. All else is copied at the boundary.

The proof is torch's own: each in-place change raises a tensor's version counter, after the change. Versions are
compared on the training thread, when every change that it made has been counted, and a snapshot whose tensors have
another version than at the boundary is void. (A change through `.data` is not counted, by torch's design.)
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptd.errors import StateError
from ckptd_integrations.torch.copying import copy_bytes

_version = operator.attrgetter("_version")
"""How often a tensor was changed in place; torch keeps it for autograd and has no public name for it."""


def owned_by_optimizers(roots: Iterable[Any]) -> set[int]:
    """Return the addresses of all tensors that only an optimizer's step changes, for the optimizers among `roots`."""
    owned: list[Tensor] = []
    for root in roots:
        if not isinstance(root, torch.optim.Optimizer):
            continue
        for group in root.param_groups:
            owned += group["params"]
        for values in root.state.values():
            if isinstance(values, Mapping):
                owned += [value for value in values.values() if isinstance(value, Tensor)]
    return set(map(Tensor.data_ptr, owned))


class BackgroundCopy:
    """A copy under way. It refers to tensors and slot until `finish`, which the training thread calls."""

    def __init__(
        self, names: list[str], tensors: list[Tensor], copies: tuple[list[int], list[int], list[int]], anchor: Any
    ) -> None:
        """Begin to copy: `copies` are destination and source addresses and sizes; `anchor` keeps the slot mapped."""
        self._names, self._tensors, self._anchor = names, tensors, anchor
        self._versions = list(map(_version, tensors))
        self._thread = threading.Thread(target=copy_bytes, args=copies, name="ckptd-capture")
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether the bytes are there."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for the copy; raises `StateError` naming a tensor that was changed under it."""
        self._thread.join()
        tensors, self._tensors, self._anchor = self._tensors, [], None
        for name, tensor, version in zip(self._names, tensors, self._versions, strict=True):
            if _version(tensor) != version:
                raise StateError(
                    f"tensor {name!r} was changed while it was copied beside training",
                    hint="something else than its optimizer's step changes it; captures stay at the boundary now",
                )


def before_any_optimizer_step(wait: Callable[[], None]) -> Callable[[], None]:
    """Have `wait` called before every optimizer's step of this process; returns what undoes it."""
    handle = register_optimizer_step_pre_hook(lambda *_: wait())
    return handle.remove
