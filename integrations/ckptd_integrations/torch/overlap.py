"""Copying beside training: what may wait, and the proof that nothing changed it meanwhile.

Parameters and an optimizer's state change in the optimizer's step and nowhere else. So their copy may run beside the
next forward and backward, if the optimizer's step waits for it: a hook that torch runs before every optimizer's step
does that. All else is copied at the boundary.

The proof is torch's own: each in-place change raises a tensor's version counter, after the change. Versions are
compared on the thread that steps, when every change that it made has been counted, and a snapshot whose tensors have
another version than at the boundary is void. Not counted are changes through `.data`, by torch's design, and what fused
optimizers do to parameters and moments; those count their steps in `step`, and that is compared as well. A step that
is replayed as a CUDA graph runs no hook: so an image is copied beside training only if a hook has run since the last.
"""

from __future__ import annotations

import operator
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

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

    def changed(self) -> str | None:
        """Return the name of a tensor that was changed since, or None."""
        versions = list(map(_version, self._tensors))
        if versions != self._versions:
            changed = next(i for i, version in enumerate(versions) if version != self._versions[i])
            return self._names[changed % len(self._names)]
        pointers = list(map(Tensor.data_ptr, self._holders))
        if pointers != self._pointers:
            return self._names[next(i for i, pointer in enumerate(pointers) if pointer != self._pointers[i])]
        return None


class PendingCopy:
    """A copy under way: the `PendingImage` of this integration. It refers to tensors and slot until `finish`."""

    def __init__(self, watch: Watch, anchor: Any, copy: Callable[[], None] | None, device: DeviceCopies | None) -> None:
        """Begin: `copy` runs in a thread, `device` is under way already, `anchor` keeps the slot mapped."""
        self._watch: Watch | None = watch
        self._anchor = anchor
        self._device = device
        self._changed: str | None = None
        self._ordered = False
        # Reentrant, because a hook that runs inside `finish` of the same thread must not stop it.
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        if copy is not None:
            thread = threading.Thread(target=_run_nicely, args=(copy,), name="ckptd-capture")
            try:
                thread.start()
            except RuntimeError:
                copy()  # No more threads may be started here.
            else:
                self._thread = thread

    @property
    def done(self) -> bool:
        """Whether the bytes are there."""
        thread, device = self._thread, self._device
        return (thread is None or not thread.is_alive()) and (device is None or device.done)

    def order(self) -> bool:
        """Have the device do what comes now after the copy; returns whether that is enough for an optimizer to step.

        It is not where a thread copies, and needless where the copy is done: then `finish` is the way.
        """
        with self._lock:
            if self._watch is None or self._device is None or self._thread is not None or self._device.done:
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
                if self._thread is not None:
                    self._thread.join()
                if self._device is not None:
                    self._device.synchronize()
                if not self._ordered:
                    self._changed = self._watch.changed()
                self._watch = self._anchor = self._device = self._thread = None
            if self._changed is not None:
                raise StateError(
                    f"tensor {self._changed!r} was changed while it was copied beside training",
                    hint="something else than its optimizer's step changes it",
                )


def _run_nicely(copy: Callable[[], None]) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # of this thread, and of those it starts
    copy()


class StepHook:
    """What torch calls before every optimizer's step of this process, also of optimizers that are not bound."""

    def __init__(self) -> None:
        self._wait: Callable[[], None] | None = None
        self._pending: PendingCopy | None = None
        self._steps = 0
        self._steps_at_begin = 0
        this = weakref.ref(self)

        def before_step(*_: object) -> None:
            hook = this()
            if hook is not None:
                hook._before_step()  # noqa: SLF001 - its own

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
        """Order steps after `pending` from now on, if its device can do that."""
        self._pending = pending

    def _before_step(self) -> None:
        self._steps += 1
        ordered = self._pending is not None and self._pending.order()
        if self._wait is not None and not ordered:
            self._wait()
