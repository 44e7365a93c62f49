"""Whether to copy beside training or at the boundary: what each costs is measured in the job itself.

A copy beside the next forward and backward costs no stall, but on a machine whose every core trains it slows down the
step by more than it hides. So both ways are tried a few times, and the cheaper one is taken from then on, with a look
at the other now and then. Pure: times come in as arguments.

What a capture costs is by how much later than without it training comes to the point where the image is complete. For
a copy at the boundary that is the stall itself. A copy beside training is complete, at the latest, where an optimizer
is about to change what is copied, mostly in the same step; so it costs the time from the boundary until there, less
what those steps, and that part of a step, usually take. From this point on both ways are alike: the same image is
sealed, and its flush begins. So the flush is in neither cost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from typing import TypeVar

SETTINGS = ("auto", "on", "off")
TRIALS = 3
"""How often each way has to be tried before one is chosen."""
_KEPT = 5
"""How many of the latest costs of each way count."""
_FIRST_GAP = 8
_LONGEST_GAP = 64
"""After how many captures the other way is tried again, at first and at last: doubled each time it proves dearer."""
_SPANS = 9
_SPANS_AT_ONCE = 3
NEVER_NS = 2**63
"""Later than any time of the clock."""


_Number = TypeVar("_Number", int, float)


class OverlapChooser:
    """Chooses for each capture. `setting` is "auto", "on" or "off"; with `surely_cheaper` nothing is measured.

    Ranks in lock-step wait for each other, so that one rank's way is in the other's cost. Which way is tried depends
    on the number of captures alone, so all ranks try the same way at the same step.
    """

    def __init__(self, setting: str = "auto", *, surely_cheaper: bool = False) -> None:
        self._fixed = {"on": True, "off": False}.get(setting, True if surely_cheaper else None)
        self._costs: dict[bool, deque[float]] = {way: deque(maxlen=_KEPT) for way in (False, True)}
        self._captures = 0
        self._gap = self._left = _FIRST_GAP

    @property
    def measures(self) -> bool:
        """Whether costs matter, and should be recorded."""
        return self._fixed is None

    @property
    def overlaps(self) -> bool:
        """Whether any capture may overlap with training."""
        return self._fixed is not False

    @property
    def cheaper(self) -> bool | None:
        """Whether overlapping has cost less, by the medians; None while either way was tried too seldom."""
        if min(map(len, self._costs.values())) < TRIALS:
            return None
        return _median(self._costs[True]) < _median(self._costs[False])

    def choose(self) -> bool:
        """Return whether the next capture is to overlap with training; called for each announced step."""
        if self._fixed is not None:
            return self._fixed
        self._captures += 1
        cheaper = self.cheaper
        if cheaper is None:
            return self._captures % 2 == 0  # in turn, so that what changes while a job warms up falls on both
        self._left -= 1
        if self._left > 0:
            return cheaper
        self._left = self._gap
        return not cheaper

    def record(self, *, overlapped: bool, cost_s: float) -> None:
        """Take in what a capture has cost training."""
        before = self.cheaper
        self._costs[overlapped].append(cost_s)
        if before is None:
            return
        if overlapped != before:
            # A way that has become cheaper is tried again at once, until its median says so too.
            better = cost_s < _median(self._costs[before])
            self._gap = self._left = 1 if better else min(2 * max(self._gap, _FIRST_GAP // 2), _LONGEST_GAP)
        if self.cheaper != before:
            self._gap = self._left = _FIRST_GAP

    def refuse(self) -> None:
        """Copy at the boundary from now on: something else than an optimizer changes what it should own."""
        self._fixed = False


class UsualTime:
    """How long a step usually takes, and how long of it, until an optimizer steps, it leaves alone what those own.

    Only a few steps between two captures are looked at, about halfway: not beside a flush if that can be helped, and
    so that other steps cost nothing.
    """

    def __init__(self) -> None:
        self._steps_ns: deque[int] = deque(maxlen=_SPANS)
        self._spans_ns: deque[int] = deque(maxlen=_SPANS)
        self._step_began_ns: int | None = None
        self._begin_ns: int | None = None
        self._sample_ns = 0
        self._left = _SPANS_AT_ONCE
        self._captured_ns: int | None = None

    @property
    def open(self) -> bool:
        """Whether the time of the present step is being taken."""
        return self._step_began_ns is not None

    @property
    def due_ns(self) -> int:
        """From when on `boundary` has to be told of boundaries."""
        return 0 if self.open else self._sample_ns

    @property
    def known(self) -> bool:
        """Whether enough steps were looked at."""
        return len(self._steps_ns) >= _SPANS_AT_ONCE

    def usual_ns(self, steps: int, *, until_optimizer: bool) -> int | None:
        """Return how long some steps take, with the next until its optimizer steps; None while that isn't known."""
        if not self.known:
            return None
        return steps * _median(self._steps_ns) + (_median(self._spans_ns) if until_optimizer else 0)

    def boundary(self, now_ns: int) -> None:
        """Note that a step is over and the next begins."""
        self.optimizer_step(now_ns)
        if self._step_began_ns is not None:
            self._steps_ns.append(now_ns - self._step_began_ns)
            self._step_began_ns = None
        if self._captured_ns is None:
            self._captured_ns = now_ns  # the first interval is as long as the others
        if now_ns >= self._sample_ns:
            self._begin_ns = self._step_began_ns = now_ns

    def optimizer_step(self, now_ns: int) -> None:
        """Note that an optimizer is about to step."""
        begin_ns, self._begin_ns = self._begin_ns, None
        if begin_ns is None:
            return
        self._spans_ns.append(now_ns - begin_ns)
        self._left -= 1
        if self._left <= 0:
            self._sample_ns = NEVER_NS

    def captured(self, now_ns: int) -> None:
        """Note that a capture begins at this boundary, so that the step that begins with it is none like others."""
        self._begin_ns = self._step_began_ns = None
        interval_ns = 0 if self._captured_ns is None else now_ns - self._captured_ns
        self._captured_ns = now_ns
        self._sample_ns = 0 if not self.known else now_ns + interval_ns // 2
        self._left = _SPANS_AT_ONCE


def _median(numbers: Collection[_Number]) -> _Number:
    """Return the middle one, of two the larger; importing `statistics` would cost a rank 10 ms."""
    return sorted(numbers)[len(numbers) // 2]
