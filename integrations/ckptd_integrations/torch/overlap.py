"""Copying beside training: what may wait, and the proof that nothing changed it meanwhile.

Parameters and an optimizer's state change in the optimizer's step and nowhere else. So their copy may run beside the
next forward and backward, if the optimizer's step waits for it: a hook that torch runs before every optimizer's step
does that, unless the step leaves alone what is being copied: another optimizer's, or of parameters without gradients.
All else is copied at the boundary.

The proof is torch's own: each in-place change raises a tensor's version counter, after the change. Versions are
compared on the thread that steps, when every change that it made has been counted, and a snapshot whose tensors have
another version than at the boundary is void. Not counted are changes through `.data`, by torch's design, and what fused
optimizers do to parameters and moments; those count their steps in `step`, and that is compared as well. A step that
is replayed as a CUDA graph runs no hook: so an image is copied beside training only if a hook has run since the last.
"""

from __future__ import annotations

import contextlib
import operator
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ckptd.errors import StateError
from ckptd_integrations.torch.cuda import DeviceCopies

NICENESS = 10
"""Of the thread that copies. Where training's own threads fill every core, a copy that takes one from them holds up
the others, which wait for the slowest. Steps with a copy took 5 to 15 % less time with 10 than with 0, and the wait
before the optimizer's step stayed below 5 ms; with 19 that wait grew to 47 ms (2 cores, 344 MiB, load 6 to 7)."""

_version = operator.attrgetter("_version")
"""How often a tensor was changed in place; torch keeps it for autograd and has no public name for it."""


class Watch:
    """Tensors that nothing but an optimizer's step may change, as they were at the boundary."""

    def __init__(self, names: Sequence[str], owners: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
        """Note versions and places; raises `RuntimeError` when a tensor made in inference mode has no version."""
        self._names = names
        self._tensors = (*owners, *tensors) if owners is not tensors else tensors
        self._versions = list(map(_version, self._tensors))
        self._holders = tensors
        self._pointers = list(map(Tensor.data_ptr, tensors))
        # A tensor whose `data` is replaced would take its memory along, while it is being read.
        self._storages = list(map(Tensor.untyped_storage, tensors))
        self._excused: set[int] = set()

    def excuse(self, storages: AbstractSet[int]) -> None:
        """Let tensors in these storages change from now on: what is copied of them is there already."""
        self._excused.update(i for i, storage in enumerate(self._storages) if storage.data_ptr() in storages)

    def changed(self) -> str | None:
        """Return the name of a tensor that was changed since and was not excused, or None."""
        for before, now in (
            (self._versions, list(map(_version, self._tensors))),
            (self._pointers, list(map(Tensor.data_ptr, self._holders))),
        ):
            if now != before:
                changed = {i % len(self._names) for i, value in enumerate(now) if value != before[i]} - self._excused
                if changed:
                    return self._names[min(changed)]
        return None


class CopyThread:
    """The thread that copies beside training, started with the first copy and kept for the next ones.

    Handing it a copy takes 0.05 ms. Starting a thread takes 0.7 ms, because whoever starts one waits until it runs, and
    it gives the interpreter back only when it copies.
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None

    def begin(self, copy: Callable[[], None]) -> Future[None]:
        """Have `copy` run beside training; where no more threads may be started it has run when this returns."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "ckptd-capture", initializer=_be_nice)
        try:
            return self._pool.submit(copy)
        except RuntimeError:
            # It is queued all the same: another thread, started for the next copy, would write a sealed slot.
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
            done: Future[None] = Future()
            copy()
            done.set_result(None)
            return done

    def close(self) -> None:
        """Let the thread end when it has copied what it has."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)
            self._pool = None


def _be_nice() -> None:
    with contextlib.suppress(PermissionError):  # it is nicer already
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # of this thread, and of those it starts


class PendingCopy:
    """A copy under way: the `PendingImage` of this integration. It refers to tensors and slot until `finish`."""

    def __init__(
        self,
        watch: Watch,
        copied: Sequence[Tensor],
        copy: Future[None] | None,
        device: DeviceCopies | None,
    ) -> None:
        """Take over copies that are under way: `copy` in a thread, `device` on devices.

        `copied` are the tensors that they read.
        """
        self._watch: Watch | None = watch
        self._storages = frozenset(tensor.untyped_storage().data_ptr() for tensor in copied)
        self._device = device
        self._changed: str | None = None
        self._ordered = False
        # Reentrant, because a hook that runs inside `finish` of the same thread must not stop it.
        self._lock = threading.RLock()
        self._copy = copy

    @property
    def done(self) -> bool:
        """Whether the bytes are there."""
        copy, device = self._copy, self._device
        return (copy is None or copy.done()) and (device is None or device.done)

    def allows(self, changed: AbstractSet[int]) -> bool:
        """Return whether a step that changes nothing but these storages may be taken before the copy is there."""
        with self._lock:
            if self._watch is None or not self._storages.isdisjoint(changed):
                return False
            self._watch.excuse(changed)
            return True

    def order(self) -> bool:
        """Have the device do what comes now after the copy; returns whether that is enough for an optimizer to step.

        It is not where a thread copies, and needless where the copy is done: then `finish` is the way.
        """
        with self._lock:
            if self._watch is None or self._device is None or self._copy is not None or self._device.done:
                return False
            if not self._ordered:
                # Versions say nothing any more once the optimizer has stepped.
                self._changed = self._watch.changed()
                self._ordered = True
            self._device.order()
            return True

    def finish(self) -> None:
        """Wait for the copy; raises `StateError` naming a tensor that was changed under it, also when called again.

        May be called from any thread, such as autograd's, when an optimizer steps in a hook of a backward pass.
        """
        with self._lock:
            if self._watch is not None:
                if self._copy is not None:
                    self._copy.result()
                if self._device is not None:
                    self._device.synchronize()
                if not self._ordered:
                    self._changed = self._watch.changed()
                self._watch = self._device = self._copy = None
            if self._changed is not None:
                raise StateError(
                    f"tensor {self._changed!r} was changed while it was copied beside training",
                    hint="something else than its optimizer's step changes it",
                )


class StepHook:
    """What torch calls before every optimizer's step of this process, also of optimizers that are not bound."""

    def __init__(self) -> None:
        self._wait: Callable[[], None] | None = None
        self._pending: PendingCopy | None = None
        self._steps = 0
        self._steps_at_begin = 0
        this = weakref.ref(self)

        def before_step(optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            hook = this()
            if hook is not None:
                closure = any(map(callable, (*arguments, *keywords.values())))
                hook._before_step(optimizer, has_closure=closure)  # noqa: SLF001 - its own

        handle = register_optimizer_step_pre_hook(before_step)
        self.close = weakref.finalize(self, handle.remove)
        """Have torch call no more."""

    def call(self, wait: Callable[[], None]) -> None:
        """Have `wait` called before a step that a copy must be finished for."""
        self._wait = wait

    def step_seen(self) -> bool:
        """Return whether a step has been seen since this was asked last."""
        seen = self._steps != self._steps_at_begin
        self._steps_at_begin = self._steps
        return seen

    def follow(self, pending: PendingCopy) -> None:
        """Let only such steps pass `pending` as don't disturb it; others are ordered after it, or wait."""
        self._pending = pending

    def _before_step(self, optimizer: Optimizer, *, has_closure: bool) -> None:
        self._steps += 1
        pending = self._pending
        if self._wait is not None and not (
            pending is not None and _passes(pending, optimizer, has_closure=has_closure)
        ):
            self._wait()


def _passes(pending: PendingCopy, optimizer: Optimizer, *, has_closure: bool) -> bool:
    """Return whether an optimizer may step without waiting for a copy."""
    try:
        changed = changed_storages(optimizer, has_closure=has_closure)
    except RuntimeError:
        return pending.order()  # it keeps tensors that have no storage of their own, such as sparse ones
    return pending.allows(changed) or pending.order()


def changed_storages(optimizer: Optimizer, *, has_closure: bool) -> set[int]:
    """Return the addresses of all storages that an optimizer's step may change.

    Raises `RuntimeError` where a tensor does not say.

    Those of torch leave parameters without a gradient alone, and what they keep for them; a closure may give them one.
    """
    skips = type(optimizer).__module__.startswith("torch.optim.") and not has_closure
    found = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if skips and parameter.grad is None:
                continue
            kept = optimizer.state.get(parameter)
            for item in (parameter, *(kept.values() if isinstance(kept, dict) else ())):
                if isinstance(item, Tensor):
                    local = getattr(item, "_local_tensor", item)  # of a DTensor
                    found.add(local.untyped_storage().data_ptr())
    return found
