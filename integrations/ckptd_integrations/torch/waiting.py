"""How long a rank waits for the others, where the host can tell, for less than 2 µs a step.

Ranks in lock-step all take the same time for a step, whoever of them is slow; what tells them apart is who waits. Two
places are timed. One is `Work.wait`, where each collective that Python calls ends. The other is the end of a backward
pass: from the last gradient's arrival until the pass is over nothing is left to do but to exchange gradients, as
`DistributedDataParallel` does in there.

Both are the host's waits. Over NCCL a host goes on while its device waits, so nothing is counted there; and a rank in
a collective of which neither Python nor autograd knows (compiled, or functional) counts as busy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic_ns
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

Add = Callable[[int], None]
_LEARNING_PASSES = 2
"""In so many backward passes all parameters are looked at, to find the one whose gradient comes last."""
_listeners: list[Add] = []
_original: list[Callable[..., Any]] = []
"""The `Work.wait` of torch's own, while there are listeners."""


class WaitMeter:
    """Adds up the waits of this process while it is open."""

    def __init__(self) -> None:
        self._backward: BackwardEnd | None = None
        self._add: Add | None = None

    def count(self, objects: Iterable[Any], add: Add) -> None:
        """Have `add` told of every wait from now on, in nanoseconds; of `objects` the modules' gradients are timed."""
        self.close()
        self._add = add
        self._backward = BackwardEnd(_parameters(objects), add)
        _listen(add)

    def close(self) -> None:
        """Undo what `count` has changed in torch."""
        if self._backward is not None:
            self._backward.close()
            self._backward = None
        if self._add is not None:
            _ignore(self._add)
            self._add = None


def _parameters(objects: Iterable[Any]) -> list[Tensor]:
    modules = [item for item in objects if isinstance(item, torch.nn.Module)]
    found = {id(tensor): tensor for module in modules for tensor in module.parameters() if tensor.requires_grad}
    return [tensor for tensor in found.values() if tensor.is_leaf and not tensor.is_inference()]


class BackwardEnd:
    """Times backward passes from their last gradient to their end.

    What is queued in a pass runs at its end, in turn. `DistributedDataParallel` queues its waiting when its last bucket
    is full, which is after the last gradient's own hook: so that hook queues something that queues what takes the time.
    """

    def __init__(self, parameters: list[Tensor], add: Add) -> None:
        engine: Any = torch.autograd.Variable._execution_engine  # noqa: SLF001 - as torch.nn.parallel calls it
        self._queue = engine.queue_callback
        self._add = add
        self._parameters = parameters
        self._began_ns = 0
        self._passes = 0
        self._last = 0
        self._in_pass = False
        self._handles: list[RemovableHandle] = []
        for number, tensor in enumerate(parameters):
            self._hook(tensor, self._learning_hook(number))

    def _hook(self, tensor: Any, call: Callable[[Tensor], None]) -> None:
        self._handles.append(tensor.register_post_accumulate_grad_hook(call))

    def _learning_hook(self, number: int) -> Callable[[Tensor], None]:
        def arrived(_: Tensor) -> None:
            self._last = number
            if not self._in_pass:
                self._in_pass = self._at_end(self._learn)

        return arrived

    def _learn(self) -> None:
        self._in_pass = False
        self._passes += 1
        if self._passes == _LEARNING_PASSES and self._handles:
            self.close()
            self._hook(self._parameters[self._last], self._arrived)

    def _arrived(self, _: Tensor) -> None:
        self._began_ns = monotonic_ns()
        self._at_end(self._after_the_others)

    def _after_the_others(self) -> None:
        self._at_end(self._ended)

    def _ended(self) -> None:
        self._add(monotonic_ns() - self._began_ns)

    def _at_end(self, work: Callable[[], None]) -> bool:
        """Have `work` done at the end of this backward pass; False when the hook runs outside of any."""
        try:
            self._queue(work)
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _listen(add: Add) -> None:
    """Tell `add` how long each wait for a collective takes."""
    if not torch.distributed.is_available():
        return
    work: Any = torch.distributed.distributed_c10d.Work
    if not _original:
        _original.append(work.wait)
        work.wait = _timed(work.wait)
    _listeners.append(add)


def _ignore(add: Add) -> None:
    if add in _listeners:
        _listeners.remove(add)
    if not _listeners and _original:
        work: Any = torch.distributed.distributed_c10d.Work
        work.wait = _original.pop()


def _timed(original: Callable[..., Any]) -> Callable[..., Any]:
    def wait(self: Any, *arguments: Any, **keywords: Any) -> Any:
        began_ns = monotonic_ns()
        try:
            return original(self, *arguments, **keywords)
        finally:
            passed_ns = monotonic_ns() - began_ns
            for add in _listeners:
                add(passed_ns)

    return wait
