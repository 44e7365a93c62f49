"""The entry of the integration: binds the user's objects, captures and restores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ckptd.client.framework import Membership, OfferedCheckpoint
from ckptd.errors import StateError
from ckptd_integrations.torch import restoring
from ckptd_integrations.torch.capture import Means, TorchImage, pack_values
from ckptd_integrations.torch.cuda import DeviceNumber, PageLocks
from ckptd_integrations.torch.layouts import LayoutCache
from ckptd_integrations.torch.local_boxes import is_dtensor
from ckptd_integrations.torch.overlap import CopyThread, StepHook
from ckptd_integrations.torch.rng import RNG_NAME, capture_rng
from ckptd_integrations.torch.roles import RoleFinder
from ckptd_integrations.torch.tensors import tabulate
from ckptd_integrations.torch.tree import Harvest, Known
from ckptd_integrations.torch.waiting import WaitMeter

_RESERVED = "__ckptd__"


class TorchFramework:
    """The `Framework` of PyTorch; it has no state of its own."""

    def bind(self, state: Mapping[str, Any], *, rng: bool, membership: Membership) -> TorchBinding:
        """Bind the user's named objects; `rng` asks to capture the process's random number generators as well.

        Raises `StateError` for a name that ckptd keeps for itself, or a replicated one that is not bound.
        """
        return TorchBinding(state, rng=rng, membership=membership)


class TorchBinding:
    """The `Binding` of PyTorch: the user's named objects, and what is known since their last capture."""

    def __init__(self, state: Mapping[str, Any], *, rng: bool, membership: Membership) -> None:
        self.state: dict[str, Any] = dict(state)
        self._rng = rng
        self._membership = membership
        self._check_names()
        for name in membership.replicated or ():
            if name not in self.state:
                raise StateError(f"{name!r} is said to be replicated and is not attached", hint="use attached names")
        self._roles = RoleFinder(membership)
        self._means = Means(LayoutCache(membership), StepHook(), PageLocks(), CopyThread())
        self._known = Known()
        self._waits = WaitMeter()

    @property
    def overlaps_by_default(self) -> bool:
        """Whether any tensor lies on a CUDA device, which copies without the help of a core."""
        cuda: Any = torch.cuda
        if not cuda.is_initialized():
            return False
        harvest = Harvest()
        try:
            for name, value in self.state.items():
                harvest.encode(value, name)
        except StateError:
            return True  # What can't be captured now, such as a lazy module, has its say at the first capture.
        return any(tensor.is_cuda for tensor in harvest.tensors)

    def prepare(self, step: int, *, whole: bool = False) -> TorchImage:
        """Collect what has to be captured at the boundary of `step`, without copying a tensor.

        With `whole`, replicated tensors are not shared out. Raises `StateError` naming the key and the type of what
        can't be captured.
        """
        self._check_names()
        harvest = Harvest(self._known)
        entries, roots = [], []
        for name, value in self.state.items():
            begin = len(harvest.tensors)
            entries.append((name, harvest.encode(value, name)))
            roots.append((name, begin, len(harvest.tensors)))
        if self._rng:
            entries.append((RNG_NAME, harvest.encode(capture_rng(), RNG_NAME)))
        table = tabulate(harvest.names, harvest.tensors)
        roles = self._roles.find(harvest, roots, table)
        values = pack_values(entries, table)
        placement = self._means.layouts.place(table, roles, len(values), whole=whole)
        # Slots below that size are about to be replaced, and can be unmapped only when they are not locked.
        self._means.locks.release(placement.layout.image_bytes)
        return TorchImage(step, placement, table=table, roles=roles, values=values, means=self._means)

    def before_optimizer_steps(self, wait: Callable[[], None]) -> None:
        """Have `wait` called before every optimizer's step from now on that an image may have to be finished for.

        It is not called while devices make a copy: they order the step after it, and the image is finished later. It
        may come from another thread than training's: optimizers also step in hooks of a backward pass.
        """
        self._means.hook.call(wait)

    def number(self, value: object) -> DeviceNumber | None:
        """Have a one-element tensor on a CUDA device brought to main memory, in the order of the device's work.

        None for what lies on no device. Raises `TypeError` for a distributed tensor: to read it takes a collective.
        """
        if not isinstance(value, torch.Tensor):
            return None
        if is_dtensor(value):
            raise TypeError("a distributed tensor is reported as its full_tensor()")
        return DeviceNumber(value) if value.is_cuda and value.numel() == 1 else None

    def count_waits(self, add: Callable[[int], None]) -> None:
        """Have `add` told how long this rank's host waits for other ranks, in nanoseconds."""
        self._waits.count(self.state.values(), add)

    def restore(self, offered: OfferedCheckpoint) -> None:
        """Fill the bound objects in place from the parts that this rank needs.

        Raises `StateError` naming what does not fit, before anything was changed, and `DamagedError` when a digest
        differs: then objects may be filled in part.
        """
        restoring.restore(self.state, offered, self._membership, rng=self._rng)

    def close(self) -> None:
        """Undo what binding has changed in torch, and unlock slots."""
        self._waits.close()
        self._means.hook.close()
        self._means.thread.close()
        self._means.locks.release()
        self._roles.close()

    def _check_names(self) -> None:
        for name in self.state:
            if not isinstance(name, str) or name.startswith(_RESERVED):
                raise StateError(
                    f"state can't be named {name!r}", hint=f"use a string that begins not with {_RESERVED}"
                )
