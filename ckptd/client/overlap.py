"""Whether to copy beside training or at the boundary: what each costs is measured in the job itself.

A copy beside the next forward and backward costs no stall, but on a machine whose every core trains it slows down the
step by more than it hides. So both ways are tried a few times, and the cheaper one is taken from then on, with a look
at the other now and then. Pure: times come in as arguments.
"""

from __future__ import annotations

from statistics import median

TRIALS = 3
"""How often each way is tried before one is chosen."""
REVISIT = 16
"""After how many captures the other way is tried again."""
WINDOW_S = 1.0
"""How long after a capture its cost is looked for; a like time after that shows what steps cost without it."""


class OverlapChooser:
    """Chooses for each capture. `setting` is "auto", "on" or "off"."""

    def __init__(self, setting: str = "auto") -> None:
        self.setting = setting
        self.reason = f"set to {setting}"
        self._costs: dict[bool, list[float]] = {True: [], False: []}
        self._captures = 0

    def choose(self) -> bool:
        """Return whether the next capture is to overlap with training."""
        if self.setting != "auto":
            return self.setting == "on"
        self._captures += 1
        tried = {way: len(costs) for way, costs in self._costs.items()}
        if min(tried.values()) < TRIALS:
            # In turn, so that what changes while a job warms up falls on both.
            return tried[True] <= tried[False]
        cheaper = self.cheaper
        return not cheaper if self._captures % REVISIT == 0 else cheaper

    @property
    def cheaper(self) -> bool:
        """Whether overlapping has cost less, by the median of its latest trials."""
        return self._middle(True) <= self._middle(False)

    def record(self, *, overlapped: bool, cost_s: float) -> None:
        """Take in what a capture has cost training."""
        costs = self._costs[overlapped]
        costs.append(cost_s)
        del costs[: -2 * TRIALS]
        if min(map(len, self._costs.values())) >= TRIALS:
            self.reason = (
                f"overlapped captures cost {self._middle(True) * 1000:.0f} ms,"
                f" those at the boundary {self._middle(False) * 1000:.0f} ms"
            )

    def refuse(self, reason: str) -> None:
        """Copy at the boundary from now on: something else than the optimizer changes what it should own."""
        self.setting, self.reason = "off", reason

    def _middle(self, way: bool) -> float:
        return median(self._costs[way])


class CostProbe:
    """Measures what one capture costs: the time of the steps after it, against as many steps after those."""

    def __init__(self, *, overlapped: bool, begin_s: float) -> None:
        self.overlapped = overlapped
        self._begin_s = begin_s
        self._window: tuple[float, int] | None = None
        self._steps = 0

    def tick(self, now_s: float, *, settled: bool) -> float | None:
        """Note the end of a step; return the cost in seconds once it is known."""
        self._steps += 1
        if self._window is None:
            if settled and now_s - self._begin_s >= WINDOW_S:
                self._window = (now_s, self._steps)
            return None
        end_s, steps = self._window
        if self._steps < 2 * steps:
            return None
        return (end_s - self._begin_s) - (now_s - end_s)
