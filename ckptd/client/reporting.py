"""From `run.report` to the control page: the metric that the job watches goes to the ring that the agent reads.

What lies in main memory is written at once. A number on a device is not waited for: it is on its way to main memory
while training goes on, and is written at the first boundary at which it is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

from ckptd.client.framework import Binding, PendingNumber
from ckptd.client.guard import as_number
from ckptd.protocol.page import RING_ENTRIES, ControlPage

SkipData = Callable[[int, int], object]
"""User code that is told, after the restore, to skip what it would train on from one step to another, both included."""


def spread(ranges: Iterable[tuple[int, int]]) -> frozenset[int]:
    """Return all steps of some ranges, each from its first to its last."""
    return frozenset(chain.from_iterable(range(first, last + 1) for first, last in ranges))


class Reporting:
    """Writes one rank's reports. Every method may raise; the run's guard decides what comes of it."""

    def __init__(self, page: ControlPage, binding: Binding, metric: str) -> None:
        """Write what is reported as `metric`."""
        self.metric = metric
        self.write = page.report
        self._number = binding.number
        self._pending: deque[tuple[int, PendingNumber]] = deque(maxlen=RING_ENTRIES)
        """The oldest goes when a device is behind by more than the ring holds."""

    @property
    def waiting(self) -> bool:
        """Whether the next boundary has something to write."""
        return bool(self._pending)

    def report(self, step: int, value: Any) -> None:
        """Report a value of `step` that is no float: a one-element tensor, or any other kind of number."""
        try:
            pending = self._number(value)
        except TypeError:
            return
        if pending is not None:
            self._pending.append((step, pending))
            return
        number = as_number(value)
        if number is not None:  # else it is not in the manifest either
            self.write(step, number)

    def boundary(self, *, wait: bool = False) -> None:
        """Write what has arrived meanwhile; with `wait`, all that is on its way."""
        pending = self._pending
        while pending and (wait or pending[0][1].done):
            step, number = pending.popleft()
            self.write(step, number.value())
