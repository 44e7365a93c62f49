"""How a job fails and begins again: ranks that end, the incident that this opens, and what the restart policy says.

The part of the job machine between a failure and the next generation; `core.job` has the way into it.
"""

from __future__ import annotations

from ckptd.core import events as e
from ckptd.core.ending import LIVE
from ckptd.core.events import Effect, Log
from ckptd.core.generation import Generation
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JobEvent, JobState
from ckptd.core.scrubbing import Scrubbing
from ckptd.errors import DamagedError, JobFailedError
from ckptd.types import Evidence


class Failing(Scrubbing):
    """The way of a job from a rank's end to its next generation, or to its own end."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        super().__init__(spec, first_incident)
        self._waiting: dict[int, int] = {}
        """Ranks of an attached job that have come before the end of their predecessors was seen: rank and pid."""
        self._condemned = 0
        """The generation that was ended for a bad number: nobody is let go of it to finish with what came of that."""
        self._warned_unprotected = False
        """Whether it was said that some ranks don't attach."""

    def _exited(self, event: e.RankExited, now: Now) -> list[Effect]:
        if self._waiting.get(event.rank) == event.pid:
            del self._waiting[event.rank]
        generation = self.generation
        if generation is None or generation.pids.get(event.rank) != event.pid:
            return []
        generation.gone.add(event.rank)
        effects: list[Effect] = []
        evidence = event.evidence
        absent = not (generation.all_in(generation.joined) or self._warned_unprotected)
        if evidence is None and not self.spec.supervised and absent:
            # Nobody is let go before all have left, so its launcher has ended it.
            summary = f"rank {event.rank} ended before every rank had joined"
            evidence = Evidence("exit", "vanished", event.rank, 1.0, summary, now.s)
        if evidence is not None and self.state in LIVE:
            effects += self._fail(evidence, event.last_lines, now)
        elif evidence is not None and self.state is JobState.FENCED:
            effects += self.recovery.also_failed(evidence, event.last_lines)
        elif evidence is not None and self.state is JobState.STOPPING and self._wake_at_s and not self._may_leave:
            effects += self._terminate(now)  # the others would wait for the dead one
        if self._nobody_left(generation):
            effects += self._all_gone(now)
        return effects

    def _nobody_left(self, generation: Generation) -> bool:
        """Whether every rank is gone; of an attached job that has failed, every rank that ever came."""
        if self.spec.supervised or self.state in LIVE:
            return generation.all_in(generation.gone)
        return generation.joined <= generation.gone

    def _launcher_exited(self, event: e.LauncherExited, now: Now) -> list[Effect]:
        if self.generation is None or self.state not in (*LIVE, JobState.FENCED, JobState.STOPPING):
            return []
        effects = self._fail(event.evidence, (), now) if self.state in LIVE else []
        self.generation.gone = set(range(self.spec.world_size))
        return effects + self._all_gone(now)

    def _fail(self, evidence: Evidence, last_lines: tuple[str, ...], now: Now) -> list[Effect]:
        generation = self.generation
        assert generation is not None
        self._move(JobEvent.FAIL)
        kill = [] if generation.all_in(generation.gone) else self._kill()
        effects = self.recovery.failed(generation, evidence, last_lines, now.s, now.wall, killed=bool(kill))
        return effects + self.keeper.abandon("its generation has failed", now.s) + kill

    def _all_gone(self, now: Now) -> list[Effect]:
        match self.state:
            case JobState.FENCED:
                return self._decide(now)
            case JobState.STOPPING:
                self._move(JobEvent.GONE)
                return self._drain(now)
            case JobState.STARTING | JobState.RUNNING:
                effects = self.keeper.abandon("training ended before it", now.s)
                if self._waiting:
                    self._move(JobEvent.AWAIT)
                    return effects + self.begin()
                self._move(JobEvent.COMPLETE)
                return effects + self._drain(now)
        return []

    def _decide(self, now: Now) -> list[Effect]:
        generation = self.generation
        offer = None if generation is None else generation.offer
        older = None if offer is None else self.offers.newest_before(offer.id, self.keeper.book.complete)
        damaged = offer if generation is not None and generation.damaged else None
        decision, effects = self.recovery.decide(now.s, older=older, damaged=damaged)
        if not decision.restart:
            kept = self.keeper.last_committed is not None or bool(self.keeper.book.complete)
            again = "goes on from the newest checkpoint" if kept else "begins afresh, for there is no checkpoint"
            hint = f"`{self.recovery.look_up}` tells more; the same command again {again}"
            error = self.recovery.refusal or JobFailedError(decision.verdict or "the job has failed", hint=hint)
            return effects + self._give_up(error, now)
        if decision.at_most_step is not None:
            self._step_back(decision.at_most_step)
        if not self.spec.supervised:
            self._move(JobEvent.AWAIT)
            return effects + (self.begin() if self._waiting else [])
        if decision.delay_s:
            self._move(JobEvent.BACK_OFF)
            self._wake_at_s = now.s + decision.delay_s
            fields = {"delay_s": decision.delay_s, "reasons": list(decision.reasons)}
            return [*effects, Log("restart delayed", fields, level="warning")]
        self._move(JobEvent.RETRY)
        return effects + self._plan(now)

    def _restore_failed(self, event: e.RestoreFailed) -> list[Effect]:
        generation = self.generation
        offer = None if generation is None else generation.offer
        fields: dict[str, object] = {"rank": event.rank, "step": event.id.step}
        if generation is not None and offer is not None and offer.id == event.id:
            fields["tier"] = offer.tier
            if isinstance(event.error, DamagedError):
                self.offers.refuse(offer)
                self.suspect(offer)
                generation.damaged = True
        return [Log("restore failed", fields | {"error": str(event.error)}, level="error")]

    def _step_back(self, step: int) -> None:
        """Have the next generation begin no later than at `step`, and nothing newer be begun with ever after."""
        self.keeper.book.refuse_newer_than(step)
        self.offers.at_most_step = step

    def _restart_wanted(self, event: e.RestartWanted, now: Now) -> list[Effect]:
        live = self.state in LIVE and self.generation is not None and bool(self.generation.pids)
        if not live and self.state is not JobState.BACKOFF:
            return []  # it is starting anyway
        if event.step is not None:
            if self.offers.newest_until(event.step, self.keeper.book.complete) is None:
                error = f"there is no checkpoint at step {event.step} or before it: the job goes on"
                return [Log("restore failed", {"step": event.step, "error": error}, level="error")]
            self._step_back(event.step)
        if self.state is JobState.BACKOFF:
            self._wake_at_s = now.s
            return []
        place = "" if event.step is None else f" from step {event.step} or before it"
        evidence = Evidence("operator", "requested", None, 1.0, f"a restart{place} was asked for", now.s)
        return self._fail(evidence, (), now)
