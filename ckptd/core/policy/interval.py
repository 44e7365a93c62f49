"""When to capture: at a fixed time since the last capture, announced for a step that no rank has reached yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

REACTION_S = 0.05
"""How far ahead of the ranks a step is announced, in time: well above the agent's scheduling noise."""


@dataclass(frozen=True, slots=True)
class CaptureDecision:
    """The step to announce, None for not now; with the reason."""

    step: int | None
    reason: str


def lead_steps(step_time_s: float, misses: int) -> int:
    """Return how many steps ahead to announce; every miss doubles it."""
    ahead = math.ceil(REACTION_S / step_time_s) if step_time_s > 0 else 1
    return max(1, ahead) << min(misses, 10)


def next_capture(
    *, now_s: float, due_at_s: float, newest_step: int, step_time_s: float | None, misses: int, slots_free: bool
) -> CaptureDecision:
    """Choose the next step to capture.

    `newest_step` is the highest finished step of any rank, `step_time_s` the time of one step as observed, None while
    it isn't known. A capture that is due while no slot is free is skipped: training never waits for a disk.
    """
    if now_s < due_at_s:
        return CaptureDecision(None, "not due")
    if step_time_s is None:
        return CaptureDecision(None, "the time of a step isn't known yet")
    if not slots_free:
        return CaptureDecision(None, "all slots are busy")
    step = newest_step + lead_steps(step_time_s, misses)
    return CaptureDecision(step, f"due, and {step - newest_step} steps ahead of the first rank")
