"""What follows when a rank lives and nothing comes of it: evidence is gathered, then the job fails as after a death."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from ckptd.core.ending import LIVE
from ckptd.core.events import Effect, Log, RestartWanted
from ckptd.core.failing import Failing
from ckptd.core.generation import Generation
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JobState
from ckptd.core.patience import Hung, Patience
from ckptd.core.policy.hang import Sample
from ckptd.core.straggling import Straggling
from ckptd.core.warnings import Warnings
from ckptd.core.watch_events import EndRanks, Gather, Gathered, Watched
from ckptd.types import Evidence

GATHER_S = 5.0
"""How long a job that hangs waits for its evidence before it goes on without."""
_STOPPED = ("is stopped", "is held by a debugger")
"""How the findings say that a process can't run, rather than that it does nothing."""


class _Suspicion(NamedTuple):
    """A hang whose evidence is being gathered."""

    incident: int
    evidence: Evidence
    hung: Hung
    seen: str
    found: Now


class Watching(Failing):
    """The part of a job that watches ranks which live."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        super().__init__(spec, first_incident)
        self.warnings = Warnings()
        self.patience = None if spec.hang is None else Patience(spec.hang)
        self.straggling = Straggling(spec.straggler, spec.world_size)
        self._attaches = False
        """Whether every rank has attached once: from then on, one that does not is stuck on its way."""
        self._watched_generation = 0
        self._suspicion: _Suspicion | None = None
        self._end_at_s: float | None = None
        """When what is left of an attached job that has failed is ended."""

    def _watched(self, event: Watched, now: Now) -> list[Effect]:
        generation, patience = self.generation, self.patience
        if generation is None or self.state not in LIVE:
            return []
        if generation.number != self._watched_generation:
            self._watched_generation = generation.number
            self.warnings.clear_all()
            self.straggling.begin()
            if patience is not None:
                patience.begin()
        samples = self._expected(generation, event)
        effects = self._straggles(event, samples, generation, now)
        if patience is None or self.state not in LIVE:
            return effects
        hung = patience.look(event.at_s, samples)
        suspicion = self._suspicion
        if suspicion is not None:
            left = suspicion.hung.sample.rank not in {item.rank for item in samples}
            goes_on = left or patience.went_on(suspicion.hung, suspicion.found.s)
            return effects + (self._take_back(suspicion) if goes_on else [])
        return effects if hung is None else effects + self._suspect(hung, generation, now)

    def _expected(self, generation: Generation, event: Watched) -> list[Sample]:
        """Return what is known of every rank that should make progress."""
        self._attaches = self._attaches or generation.all_in(generation.joined)
        away = generation.left | generation.gone
        here = generation.joined - away
        samples = [item for item in event.samples if item.rank in here and item.phase != "left"]
        if self._attaches:
            # A rank without a process has a launcher that is on its way: there is nobody to kill yet.
            started = set(generation.pids) if self.spec.supervised else set(range(generation.world_size))
            missing = sorted(started - generation.joined - away)
            samples += [Sample(rank, generation.first_step, 0, "absent", event.at_s) for rank in missing]
        return samples

    # --- a hang -----------------------------------------------------------------------------------------------

    def _suspect(self, hung: Hung, generation: Generation, now: Now) -> list[Effect]:
        """Ask for the evidence of a hang, while everything is still as it is."""
        seen = _seen(hung)
        summary = seen if hung.rank is None else f"rank {hung.rank} {seen}"
        evidence = Evidence("hang", "hang", hung.rank, 0.5, summary, hung.sign_s)
        number = self.recovery.next_number
        self._suspicion = _Suspicion(number, evidence, hung, seen, now)
        fields = {
            "rank": hung.rank,
            "step": hung.step,
            "idle_s": round(hung.idle_s, 3),
            "limit_s": round(hung.limit.seconds, 3),
            "rule": hung.limit.rule,
        }
        return [Log("hang found", fields, level="error"), Gather(number, generation.number, evidence)]

    def _take_back(self, suspicion: _Suspicion) -> list[Effect]:
        self._suspicion = None
        return [Log("hang over", {"step": suspicion.hung.step}, level="warning")]

    def _gathered(self, event: Gathered, now: Now) -> list[Effect]:
        suspicion = self._suspicion
        if suspicion is not None and suspicion.incident == event.incident and self.state in LIVE:
            return self._convict(event, now)
        return [] if event.path is None else self.recovery.gathered(event.incident, event.path)

    def _convict(self, gathered: Gathered, now: Now) -> list[Effect]:
        """Fail on a hang; the incident tells it from when it was found, not from when its evidence was there."""
        suspicion, generation = self._suspicion, self.generation
        assert suspicion is not None
        assert generation is not None
        if self.patience is not None:
            self.patience.convicted(suspicion.hung.step)
        evidence = sharpened(suspicion.evidence, suspicion.seen, gathered)
        effects = self._fail(evidence, (), suspicion.found)
        effects += self._gathered(gathered, now)
        return effects + self._end_ranks(generation, now)

    def _end_ranks(self, generation: Generation, now: Now) -> list[Effect]:
        """End ranks that another launcher has started: nothing else would make it see that they are of no use."""
        ranks = tuple(sorted(generation.joined - generation.gone))
        if self.spec.supervised or not ranks:
            return []
        self.recovery.kill_ordered(now.s)
        return [EndRanks(ranks)]

    def _restart_wanted(self, event: RestartWanted, now: Now) -> list[Effect]:
        """Restart. Ranks that another launcher has started are ended now: none has died, at which it would end them."""
        was, generation = self.state, self.generation
        effects = super()._restart_wanted(event, now)
        fails = was in LIVE and self.state is JobState.FENCED and generation is not None
        return effects + (self._end_ranks(generation, now) if fails and generation is not None else [])

    def _fail(self, evidence: Evidence, last_lines: tuple[str, ...], now: Now) -> list[Effect]:
        """Fail; of a death evidence is gathered beside, which nobody waits for. Of a hang it is there already."""
        suspicion, self._suspicion = self._suspicion, None  # it is none of the next generation's, which may begin soon
        effects = super()._fail(evidence, last_lines, now)
        incident = self.recovery.incident
        if suspicion is not None or incident is None or evidence.kind == "requested":
            return effects
        return [Gather(incident.incident.number, incident.incident.generation, evidence), *effects]

    # --- a straggler ------------------------------------------------------------------------------------------

    def _straggles(self, event: Watched, samples: list[Sample], generation: Generation, now: Now) -> list[Effect]:
        """Compare the ranks' own times; a straggler is a failure only if somebody wants it to be one."""
        effects, evidence = self.straggling.look(event.at_s, samples, self.warnings)
        if evidence is None or self._suspicion is not None:
            return effects
        return effects + self._fail(evidence, (), now) + self._end_ranks(generation, now)

    # --- time -------------------------------------------------------------------------------------------------

    def _watch(self, now: Now) -> list[Effect]:
        suspicion = self._suspicion
        if suspicion is not None and self.state not in LIVE:
            self._suspicion = None  # something else has happened to it
        elif suspicion is not None and now.s >= suspicion.found.s + GATHER_S:
            return self._convict(Gathered(suspicion.incident, None), now)
        return self._end_survivors(now)

    def _end_survivors(self, now: Now) -> list[Effect]:
        """End the ranks of an attached job that their launcher has not ended, long enough after a peer of theirs died.

        They wait for the dead one, and the next generation waits for them.
        """
        patience, generation = self.patience, self.generation
        if patience is None or generation is None or self.spec.supervised or self.state is not JobState.FENCED:
            self._end_at_s = None
            return []
        limit_s = patience.limit.seconds if patience.knows else patience.policy.floor_s
        if self._end_at_s is None:
            self._end_at_s = now.s + limit_s
        if now.s < self._end_at_s:
            return []
        self._end_at_s = now.s + limit_s
        return self._end_ranks(generation, now)


def _seen(hung: Hung) -> str:
    """Say in a few words what is seen of a hang, to follow the rank's name where one is known."""
    since = f"for {hung.idle_s:.1f} s (limit {hung.limit.seconds:.3g} s: {hung.limit.rule})"
    sample = hung.sample
    if hung.rank is None:
        return f"no rank has finished a step after step {hung.step} {since}"
    if sample.section_until_ns:
        return f"has been in section {sample.section!r} {since}"
    if sample.phase == "absent":
        return f"has not attached {since}"
    if sample.phase == "raised":
        return f"has raised an exception and has not ended {since}"
    doing = "" if sample.phase == "training" else f" and is {sample.phase}"
    return f"has not finished a step after step {hung.step}{doing} {since}"


def sharpened(evidence: Evidence, seen: str, gathered: Gathered) -> Evidence:
    """Return the evidence with what was found out: who the others wait for, and what that one and they are doing."""
    culprit = evidence.rank if gathered.culprit is None else gathered.culprit
    facts = tuple(f"rank {rank} {line}" for rank, line in sorted(gathered.findings.items()) if rank != culprit)
    finding = None if culprit is None else gathered.findings.get(culprit)
    if culprit is None or finding is None:
        return dataclasses.replace(evidence, facts=facts)
    return dataclasses.replace(
        evidence,
        kind="stopped" if finding.startswith(_STOPPED) else evidence.kind,
        rank=culprit,
        certainty=evidence.certainty if gathered.culprit is None else 1.0,
        summary=f"rank {culprit} {finding}; {'it ' if evidence.rank == culprit else ''}{seen}",
        facts=facts,
    )
