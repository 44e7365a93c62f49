"""Which tensors all ranks hold alike, as far as torch itself knows it: what DistributedDataParallel keeps the same.

A user rarely binds the wrapper, and may wrap after binding. So wrappers are looked for once among all objects, and from
then on torch says when one is made.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


class Replicas:
    """Knows the parameters that live DistributedDataParallel modules of this process keep the same on all ranks.

    Buffers are not among them: the statistics of a BatchNorm are each rank's own.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._parameters: weakref.WeakKeyDictionary[nn.Module, list[Tensor]] = weakref.WeakKeyDictionary()
        self._wrappers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handle: Any = None
        if world_size > 1:
            self._handle = register_module_module_registration_hook(self._registered)
            for item in gc.get_objects():
                if issubclass(type(item), DistributedDataParallel):
                    self._wrappers.add(item)

    def _registered(self, module: nn.Module, _name: str, _part: nn.Module | None) -> None:
        if isinstance(module, DistributedDataParallel):
            self._wrappers.add(module)

    def parameters(self) -> list[Tensor]:
        """Return the replicated parameters."""
        found: list[Tensor] = []
        for wrapper in list(self._wrappers):
            known = self._parameters.get(wrapper)
            if known is None:
                known = self._parameters_of(wrapper)
                if known is None:
                    continue
                self._parameters[wrapper] = known
            found += known
        return found

    def _parameters_of(self, wrapper: Any) -> list[Tensor] | None:
        group = wrapper.__dict__.get("process_group")
        if "reducer" not in wrapper.__dict__:
            return None  # It is still being made.
        if group is None or group.size() != self._world_size:
            return []
        ignored = set(wrapper.parameters_to_ignore)
        return [item for name, item in wrapper.module.named_parameters() if name not in ignored]

    def close(self) -> None:
        """Ask torch no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def has_same_state(optimizer: Optimizer, replicated: Iterable[int]) -> bool:
    """Return whether an optimizer's state is the same on all ranks, if the parameters of the ids `replicated` are.

    It is when it steps these and no others, and is torch's own: what it keeps then follows from what it was given.
    """
    ids = replicated if isinstance(replicated, (set, frozenset)) else set(replicated)
    return type(optimizer).__module__.startswith("torch.optim.") and ids.issuperset(parameter_ids([optimizer]))


def parameter_ids(optimizers: Sequence[Optimizer]) -> list[int]:
    """Return the ids of the parameters that optimizers step."""
    return [id(item) for optimizer in optimizers for group in optimizer.param_groups for item in group["params"]]
