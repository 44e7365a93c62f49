"""How a job comes to stop by itself: the time it has left, what stopping takes, and the conditions that people set.

The part of the job machine that looks at the clock for that; what a stop does is in `core.ending`.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

from ckptd.core import events as e
from ckptd.core.ending import LIVE, Ending
from ckptd.core.events import Effect, Log
from ckptd.core.halt_events import HaltWanted
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JobState
from ckptd.core.policy import halt
from ckptd.core.policy.interval import lead_steps

_REMEMBERED = 10
"""How many of the last captures, flushes and uploads say how long one takes."""


class Halting(Ending):
    """The way of a job to a stop that nobody asks for at that moment."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        super().__init__(spec, first_incident)
        self.conditions = spec.halt.conditions
        self.bounds = spec.halt
        self._took_s: dict[str, deque[float]] = {}
        """What has been measured: captures, flushes, and for each further tier its uploads."""
        self._measure_wanted = False

    # --- what is measured -------------------------------------------------------------------------------------

    def _measure(self, event: e.Committed) -> None:
        """Remember how long it took to commit, and before that to capture."""
        if event.tier == self.keeper.tiers.first:
            self._took("capture", self.keeper.book.snapshots[event.id].capture_s)
            self._took("flush", event.flush_s)
        else:
            self._took(event.tier, event.flush_s)
            self.upload_s[event.tier] = max(self._took_s[event.tier])

    def _took(self, what: str, seconds: float) -> None:
        self._took_s.setdefault(what, deque(maxlen=_REMEMBERED)).append(seconds)

    @property
    def pace(self) -> halt.Pace:
        """What this run has measured; an upload is that to the last tier."""
        last = self.spec.tiers[-1].name
        upload_s = 0.0 if last == self.keeper.tiers.first else self._longest(last)
        step_s = self.keeper.cadence.step_time_s
        return halt.Pace(self.spec.every_s, step_s, self._longest("capture"), self._longest("flush"), upload_s)

    def _longest(self, what: str) -> float | None:
        return max(self._took_s.get(what, ()), default=None)

    def time_left(self, now: Now) -> halt.TimeLeft | None:
        """Return how much time there is, None where nothing bounds it."""
        return halt.time_left(self.bounds, self.pace, now.s, now.wall)

    def bounds_now(self) -> dict[str, Any]:
        """Return what the next agent has to know of it, should there be one in this boot of the node."""
        return {
            "began_s": self.bounds.began_s,
            "limit_at_s": self.bounds.limit_at_s,
            "leave_by_s": self.leave_by_s,
            "conditions": dataclasses.asdict(self.conditions),
        }

    def recall_bounds(self, known: Mapping[str, Any], now: Now) -> float:
        """Go on with the bounds of the agent before, in the same run; return how much grace is left of a stop."""
        if not known:
            return 0.0
        self.bounds = dataclasses.replace(self.bounds, began_s=known["began_s"], limit_at_s=known["limit_at_s"])
        self.conditions = halt.Conditions(**known["conditions"])
        return 0.0 if known["leave_by_s"] is None else max(0.0, known["leave_by_s"] - now.s)

    # --- what follows from it ---------------------------------------------------------------------------------

    def _stop(self, event: e.StopWanted, now: Now) -> list[Effect]:
        """Stop, with no more grace than there is time."""
        left = self.time_left(now)
        if left is not None:
            event = dataclasses.replace(event, grace_s=min(event.grace_s, halt.grace_within(left)))
        return super()._stop(event, now)

    def _drain(self, now: Now) -> list[Effect]:
        """End the job; where nobody has asked for the end, its time is what bounds the wait for an upload."""
        left = self.time_left(now)
        if left is not None and self.leave_by_s is None:
            self.leave_by_s = now.s + halt.grace_within(left)
        return super()._drain(now)

    def _halt_wanted(self, event: HaltWanted) -> list[Effect]:
        self.conditions = event.conditions
        if self.state in (*LIVE, JobState.FENCED, JobState.BACKOFF, JobState.PREPARING):
            self.keeper.ending, self.keeper.last_step = False, None  # it is said again where it still holds
        return []

    def _halt(self, now: Now) -> list[Effect]:
        """Stop when it is time to."""
        if self.state not in (*LIVE, JobState.FENCED, JobState.BACKOFF, JobState.PREPARING):
            return []
        left = self.time_left(now)
        generation = self.generation
        # What the ranks have done is known once they train; what a generation begins with is done before.
        newest = 0 if generation is None or self.state not in LIVE else generation.newest_step
        wanted = halt.decide(self.bounds, self.conditions, left, wall=now.wall, newest_step=newest)
        if wanted is not None:
            effects: list[Effect] = []
            if left is not None and left.left_s <= left.margin_s:
                fields = {"left_s": round(left.left_s, 3), "margin_s": round(left.margin_s, 3)}
                effects.append(Log("time is over", fields | {"limit": left.limit, "reasons": list(left.reasons)}))
            done = generation is not None and generation.first_step == newest
            return effects + self._stop(e.StopWanted(wanted.grace_s, not done, wanted.reason), now)
        if left is not None and not self._measure_wanted and halt.wants_measure(left, self.pace):
            self._measure_wanted = True
            self.keeper.want(now.s)
        return []

    def _near_the_last(self) -> None:
        """Have the next capture announced as the last one where that is wanted."""
        keeper, generation = self.keeper, self.generation
        if self.state is not JobState.RUNNING or generation is None or keeper.announced or not self.spec.supervised:
            return
        if self.conditions.at_next_checkpoint:
            keeper.ending = True
        step_s = keeper.cadence.step_time_s
        if step_s is None:
            return
        lead = lead_steps(step_s, keeper.cadence.misses)
        last = halt.last_step(self.conditions.after_step, generation.newest_step, lead)
        if last is not None:
            keeper.ending, keeper.last_step = True, last
            keeper.want(0.0)

    def _halt_at_last(self, now: Now) -> list[Effect]:
        """Begin to stop when the last capture has been announced."""
        if self.state is not JobState.RUNNING or not self.keeper.last_announced:
            return []
        after = self.conditions.after_step
        reason = "a checkpoint was to be the last" if after is None else f"step {after} is to be the last"
        return self._stop(e.StopWanted(self.bounds.grace_s, reason=reason), now)
