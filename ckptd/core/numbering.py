"""What ranks report of their steps: checkpoints get a name for it, and a job may step back from a bad number.

With the policy "warn" a bad number is said, and marks checkpoints (`core.health`). With "step_back" it is a failure as
well: the job begins again with the newest healthy checkpoint, and its script is told which steps to skip. A spike that
comes again though its step was to be skipped is trained through: nothing would come of stepping back for it once more,
and training may well recover from it, as it can't from NaN.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from ckptd.core.ending import LIVE
from ckptd.core.events import Effect, Log
from ckptd.core.generation import Generation
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JobState
from ckptd.core.number_events import Marked, Report, Reported
from ckptd.core.policy.numbers import NAN, SPIKE, Finding, judge
from ckptd.core.restore import Source
from ckptd.core.watching import Watching
from ckptd.errors import JobFailedError
from ckptd.types import CheckpointId, Evidence

SETTLE_S = 0.5
"""How long the report of a rank is waited for that is not yet at the bad step: it may have seen a bad one before."""
_SPIKE_CERTAINTY = 0.9


def in_words(ranges: Iterable[tuple[int, int]]) -> str:
    """Return ranges of steps as people read them: "steps 50, 61-64"."""
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return f"step {words}" if words.isdecimal() else f"steps {words}"


class _Trouble(NamedTuple):
    """The first bad step of a trouble: who reported it, and what."""

    rank: int
    step: int
    finding: Finding
    found_s: float


class Numbering(Watching):
    """The part of a job that listens to what its ranks report."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        super().__init__(spec, first_incident)
        self._windows: dict[int, deque[Report]] = {}
        """The last healthy reports of each rank."""
        self._heard: dict[int, int] = {}
        """The last step of which each rank of this generation has reported."""
        self._trouble: _Trouble | None = None
        self._said_missed = False
        self._begun = 0
        """The generation to which all this belongs."""

    def _begin_numbers(self, generation: Generation) -> None:
        """Begin a generation: what was reported of steps that it does again is none of its past."""
        self._windows = {
            rank: deque((item for item in window if item.step < generation.first_step), window.maxlen)
            for rank, window in self._windows.items()
        }
        if self._trouble is not None:
            self.warnings.clear(self._trouble.finding.kind, self._trouble.rank)
        self._heard, self._trouble, self._said_missed, self._begun = {}, None, False, generation.number

    # --- reports ----------------------------------------------------------------------------------------------

    def _reported(self, event: Reported, now: Now) -> list[Effect]:
        generation = self.generation
        listens = self.state in (*LIVE, JobState.FENCED, JobState.STOPPING)
        if self.spec.numbers.policy == "off" or generation is None or not listens:
            return []
        if generation.number != self._begun:
            self._begin_numbers(generation)
        changed = False
        for rank in sorted(generation.joined.intersection(event.reports)):
            for report in event.reports[rank]:
                changed = self._judge(rank, report, now) or changed
                self._heard[rank] = max(report.step, self._heard.get(rank, 0))
        effects: list[Effect] = [Marked()] if changed else []
        return effects + self._missed(event) + self._over() + self._settle(now, leaving=event.leaving)

    def _judge(self, rank: int, report: Report, now: Now) -> bool:
        """Take in one report; return whether it tells anything of a checkpoint, or is the first bad one."""
        policy, health = self.spec.numbers, self.keeper.health
        window = self._windows.setdefault(rank, deque(maxlen=policy.window))
        finding = judge([item.value for item in window], report.value, policy)
        if finding is None:
            window.append(report)
            return health.good(report.step)
        before = self._trouble
        fresh = health.first_bad is None or (before is not None and finding.kind == NAN and self._endured(before))
        if not health.bad(report.step) and not fresh:
            return False
        if before is not None and fresh:
            self.warnings.clear(before.finding.kind, before.rank)
        found_s = now.s if before is None or fresh else before.found_s
        self._trouble = _Trouble(rank, report.step, finding, found_s)
        return True

    def _missed(self, event: Reported) -> list[Effect]:
        """Say once in a generation that reports come faster than they are read."""
        if self._said_missed or not event.missed:
            return []
        self._said_missed = True
        rank, missed = next(iter(sorted(event.missed.items())))
        hint = "what is left of them counts; report less often than a thousand times a second"
        return [Log("reports missed", {"rank": rank, "reports": missed, "hint": hint}, level="warning")]

    def _over(self) -> list[Effect]:
        """Say that a trouble has begun, or has passed."""
        trouble, metric = self._trouble, self.spec.numbers.metric
        if trouble is None:
            return []
        kind = trouble.finding.kind
        if self.keeper.health.first_bad is None:
            self._trouble = None
            self.warnings.clear(kind, trouble.rank)
            return [Log("numbers healthy again", {"metric": metric, "step": max(self._heard.values())})]
        if not self.warnings.note(kind, trouble.rank, self._summary(trouble), trouble.found_s):
            return []
        fields = {
            "rank": trouble.rank,
            "step": trouble.step,
            "reason": trouble.finding.summary,
            "suspect_since": self.keeper.health.since,
            "policy": "warn" if self._endured(trouble) else self.spec.numbers.policy,
        }
        return [Log("numbers suspect", fields, level="warning")]

    def _summary(self, trouble: _Trouble) -> str:
        since = self.keeper.health.since
        last = f"step {since} was the last healthy one" if since else "no step was healthy before it"
        again = "; it came again after a step back, so training goes on" if self._endured(trouble) else ""
        return f"rank {trouble.rank} reported {trouble.finding.summary} at step {trouble.step}; {last}{again}"

    # --- stepping back ----------------------------------------------------------------------------------------

    def _endured(self, trouble: _Trouble) -> bool:
        """Tell whether a bad number is a spike that the job has stepped back from before."""
        return trouble.finding.kind == SPIKE and self.keeper.health.was_skipped(trouble.step)

    def _watch(self, now: Now) -> list[Effect]:
        return super()._watch(now) + self._settle(now)

    def _settle(self, now: Now, *, leaving: bool = False) -> list[Effect]:
        """Fail on a bad number once it is known which step was the first bad one, of all ranks that report."""
        trouble, generation = self._trouble, self.generation
        acts = self.spec.numbers.steps_back and self.state in (*LIVE, JobState.STOPPING)
        if trouble is None or generation is None or generation.number != self._begun or not acts:
            return []
        if self._condemned != generation.number and self._endured(trouble):
            return []
        if self.state is JobState.STOPPING:
            return self._stop_at_once(generation, now)
        behind = any(step < trouble.step for step in self._heard.values())
        if behind and not leaving and now.s < trouble.found_s + SETTLE_S:
            return []
        kind = trouble.finding.kind
        certainty = 1.0 if kind == NAN else _SPIKE_CERTAINTY
        evidence = Evidence(
            "numbers", kind, trouble.rank, certainty, self._summary(trouble), trouble.found_s, step=trouble.step
        )
        self._condemned = generation.number
        return [*self._fail(evidence, (), now), *self._end_ranks(generation, now)]

    def _stop_at_once(self, generation: Generation, now: Now) -> list[Effect]:
        """End the ranks of a job that is told to stop: nothing that they could capture would be begun with."""
        if self._condemned == generation.number:
            return []
        self._condemned = generation.number
        self.keeper.health.skip_bad()
        return [Marked(), *self._kill(), *self._end_ranks(generation, now)]

    def _claim(self, offer: Source | None, world_size: int | None = None) -> list[Effect]:
        effects = super()._claim(offer, world_size)
        if not effects or offer is not None or not self.spec.numbers.steps_back:
            return effects
        self.keeper.health.afresh = True
        return [Marked(), *effects]

    def _fail(self, evidence: Evidence, last_lines: tuple[str, ...], now: Now) -> list[Effect]:
        """Fail, and have what was bad by then skipped from now on, whoever plans the next generation."""
        if not self.spec.numbers.steps_back or self.keeper.health.first_bad is None:
            return super()._fail(evidence, last_lines, now)
        self.keeper.health.skip_bad()
        return [Marked(), *super()._fail(evidence, last_lines, now)]

    def _plan(self, now: Now) -> list[Effect]:
        """Plan the next generation. A job that steps back is not offered what is suspect."""
        health, offers = self.keeper.health, self.offers
        reachable = offers.reachable(self.keeper.book.complete)
        health.read(reachable)
        if self.state is not JobState.PREPARING or not self.spec.numbers.steps_back:
            return super()._plan(now)
        health.skip_bad()
        limit = offers.at_most_step
        within = {item for item in reachable if limit is None or item.step <= limit}
        if not within or (health.first_bad is None and max(within) not in health.suspect):
            return super()._plan(now)
        return self._leave_suspects(health.best(within), now)

    def _leave_suspects(self, best: CheckpointId | None, now: Now) -> list[Effect]:
        """Begin with `best`; when there is none, where the job itself began, if it has seen that."""
        health = self.keeper.health
        if best is None and not health.afresh:
            verdict = "every checkpoint of this job is suspect"
            hint = "begin with one of them by --numbers warn, or anew under another --name"
            noted = self.recovery.given_up(verdict, "there is no healthy one to step back to")
            return noted + self._give_up(JobFailedError(verdict, hint=hint), now)
        step = 0 if best is None else best.step
        self._step_back(step)
        if best is None:
            self.offers.begin_afresh()
            self.keeper.tiers.leave_all()
            reason = "every checkpoint is suspect, and the job began afresh"
        else:
            reason = health.why(best)
        skipped = health.skipped_after(step)
        fields: dict[str, object] = {"step": step, "reason": reason, "skipped": skipped}
        words = f"back to step {step}: {reason}" + (f"; to skip: {in_words(skipped)}" if skipped else "")
        noted = self.recovery.because(words)
        return [Log("step back", fields, level="warning"), Marked(), *noted, *super()._plan(now)]

    def numbers_to_tell(self) -> dict[str, Any]:
        """Return what a rank that is let in has to know: which metric to write down, and which steps to skip."""
        policy, generation = self.spec.numbers, self.generation
        step = 0 if generation is None else generation.first_step
        metric = None if policy.policy == "off" else policy.metric
        return {"metric": metric, "skipped": self.keeper.health.skipped_after(step)}

    def numbers_status(self) -> dict[str, Any]:
        """Return what `ckptctl status --json` says of reported numbers, and the next agent has to know."""
        policy, current = self.spec.numbers, self.generation is not None and self.generation.number == self._begun
        trouble = self._trouble if current else None
        bad = None if trouble is None else {"rank": trouble.rank, "step": trouble.step, "kind": trouble.finding.kind}
        return {"policy": policy.policy, "metric": policy.metric, "bad": bad, **self.keeper.health.to_json()}
