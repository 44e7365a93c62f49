"""The rhythm of captures: the observed pace of training, when the next capture is due, and how many were missed."""

from __future__ import annotations

from collections.abc import Mapping

from ckptd.core.policy.interval import CaptureDecision, next_capture

_PACE_WEIGHT = 0.3


class Cadence:
    """Keeps what `next_capture` needs to know. Begun anew with each generation."""

    def __init__(self, every_s: float, now_s: float) -> None:
        self.every_s = every_s
        self.due_at_s = now_s + every_s
        self.misses = 0
        self.newest_step = 0
        self.step_time_s: float | None = None
        self._seen: tuple[float, int] | None = None

    def observe(self, steps: Mapping[int, int], now_s: float) -> None:
        """Take in how far the ranks are, and learn the time of a step."""
        newest = max(steps.values(), default=0)
        if self._seen is not None and newest > self._seen[1]:
            before_s, before_step = self._seen
            pace_s = max(1e-7, (now_s - before_s) / (newest - before_step))
            old = self.step_time_s
            self.step_time_s = pace_s if old is None else old + _PACE_WEIGHT * (pace_s - old)
        if self._seen is None or newest > self._seen[1]:
            self._seen = (now_s, newest)
        self.newest_step = max(self.newest_step, newest)

    def decide(self, now_s: float, *, slots_free: bool) -> CaptureDecision:
        """Choose the next step to capture, if any."""
        return next_capture(
            now_s=now_s,
            due_at_s=self.due_at_s,
            newest_step=self.newest_step,
            step_time_s=self.step_time_s,
            misses=self.misses,
            slots_free=slots_free,
        )

    def captured(self, now_s: float) -> None:
        """Note that a capture was announced or skipped: the next one is due an interval later."""
        self.due_at_s = now_s + self.every_s

    def met(self) -> None:
        """Note that every rank captured the announced step: a lead that bad luck has made long becomes shorter."""
        self.misses = max(0, self.misses - 1)

    def missed(self, now_s: float) -> None:
        """Note that a rank was past the announced step: try again at once, further ahead."""
        self.misses += 1
        self.due_at_s = now_s

    def hurry(self, now_s: float) -> None:
        """Make a capture due now."""
        self.due_at_s = min(self.due_at_s, now_s)
