"""How a job ends: stopped on purpose, given up, or finished, and not before its last snapshot is safe if that can be.

The half of the job machine that leads to a terminal state; `core.job` has the other.
"""

from __future__ import annotations

import signal

from ckptd.core import events as e
from ckptd.core.events import Effect, Log
from ckptd.core.generation import Generation
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JOB_TABLE, JobEvent, JobState
from ckptd.core.keeper import Keeper
from ckptd.core.recovery import Recovery
from ckptd.errors import CkptdError, JobFailedError

LIVE = (JobState.STARTING, JobState.RUNNING)
"""The states in which ranks live and should."""
_TERM_GRACE_S = 5.0


class Ending:
    """What a job is made of, and its way out."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        self.spec = spec
        self.state = JobState.PENDING
        self.keeper = Keeper(spec.world_size, spec.every_s, spec.tiers, spec.slots)
        self.generation: Generation | None = None
        self.recovery = Recovery(spec.job, spec.restart, first_incident)
        self._wake_at_s: float | None = None
        self._kill_at_s: float | None = None
        self._scavenge_until_s: float | None = None
        self._awaits_uploads = True
        self._outcome: tuple[JobEvent, CkptdError | None] = (JobEvent.FINISH, None)

    def _move(self, event: JobEvent) -> None:
        self.state = JOB_TABLE.next(self.state, event)

    def _setup_failed(self, error: CkptdError, now: Now) -> list[Effect]:
        """End the job at once: a rank that never came to be will not be seen to go."""
        if self.state not in (JobState.PREPARING, *LIVE, JobState.FENCED, JobState.STOPPING):
            return []
        effects: list[Effect] = [] if self.state is JobState.PREPARING else self._kill()
        if self.state is JobState.STOPPING:
            self._move(JobEvent.GONE)
            return effects + self._drain(now)
        if self.state in LIVE:
            self._move(JobEvent.STOP)
        return effects + self._give_up(error, now)

    def _kill(self) -> list[Effect]:
        return [e.Kill(signal.SIGKILL)] if self.spec.supervised else []

    def _give_up(self, error: CkptdError, now: Now) -> list[Effect]:
        self._outcome = (JobEvent.GIVE_UP, error)
        self._move(JobEvent.GONE)
        return self._drain(now)

    def _stop(self, event: e.StopWanted, now: Now) -> list[Effect]:
        if self.state is JobState.DRAINING:
            self._awaits_uploads = self._awaits_uploads and event.checkpoint
            return self._scavenge("the agent wants to end", now) + self._drain(now)
        if self.state is JobState.STOPPING:
            if event.checkpoint:
                return []
            self._wake_at_s = self._kill_at_s = None
            return [e.Kill(signal.SIGKILL)]
        was, generation = self.state, self.generation
        self._outcome = (JobEvent.HALT, None)
        self._move(JobEvent.STOP)
        if was not in LIVE or generation is None or not generation.pids:
            effects = self._kill() if was in LIVE else []
            self._move(JobEvent.GONE)
            return effects + self._drain(now)
        if event.checkpoint and was is JobState.RUNNING and generation.training:
            self.keeper.want(now.s)
            self._wake_at_s = now.s + event.grace_s
            return [Log("stopping", {"step": generation.newest_step, "grace_s": event.grace_s})]
        return self._terminate(now)

    def _stop_when_durable(self, now: Now) -> list[Effect]:
        waits = self.keeper.wished or self.keeper.announced or self.keeper.unflushed
        return [] if self._wake_at_s is None or waits else self._terminate(now)

    def _terminate(self, now: Now) -> list[Effect]:
        self._wake_at_s = None
        self._kill_at_s = now.s + _TERM_GRACE_S
        return [e.Kill(signal.SIGTERM)]

    def _drain(self, now: Now) -> list[Effect]:
        """End the job once its newest snapshot is where it should be, or waiting for that is hopeless or too long.

        Memory goes with the job: what lies there alone is waited for, if the job was stopped or given up no longer
        than `scavenge_s`, since whoever ended it wants its place. An upload has no such bound: its checkpoint is safe
        on the first tier, and its failures are counted.
        """
        self.keeper.tiers.hurry(now.s)
        event, error = self._outcome
        effects = self.keeper.abandon("the job is ending", now.s)
        if event is not JobEvent.FINISH:
            effects += self._scavenge("it was stopped" if error is None else error.message, now)
        late = self._scavenge_until_s is not None and now.s >= self._scavenge_until_s
        lost = self.keeper.unflushed and (self.keeper.hopeless or late)
        if self.keeper.unflushed and not lost:
            return effects
        if self.keeper.tiers.pending:
            if self._awaits_uploads:
                return effects
            hint = "the next start of the job uploads it"
            effects.append(Log("upload skipped", {"reason": "nobody waits for it any more", "hint": hint}))
        if lost and late:
            reason = f"it was not durable within {self.spec.scavenge_s:g} s"
            for step in self._only_in_memory:
                effects.append(Log("snapshot abandoned", {"step": step, "reason": reason}, level="error"))
        missing = self.keeper.tiers.hopeless
        if error is None and lost:
            event = JobEvent.GIVE_UP
            error = JobFailedError("the last snapshot could not be made durable", hint="see the flush errors above")
        elif error is None and missing:
            event = JobEvent.GIVE_UP
            error = JobFailedError(
                f"the last checkpoint is not on {' and '.join(missing)}: its upload has failed",
                hint=f"it is on {self.keeper.tiers.first}, from where the next start of the job uploads it; "
                "see the upload errors above",
            )
        self._move(event)
        exception = self.recovery.exception if error is not None else None
        return [*effects, *self.recovery.close(), e.End(self.state.value, error, exception)]

    def _scavenge(self, reason: str, now: Now) -> list[Effect]:
        """Begin the time in which what lies in memory alone must become durable; say so, and why."""
        if self._scavenge_until_s is not None:
            return []
        self._scavenge_until_s = now.s + self.spec.scavenge_s
        return [
            Log("scavenging", {"step": step, "reason": reason, "deadline_s": self.spec.scavenge_s})
            for step in self._only_in_memory
        ]

    @property
    def _only_in_memory(self) -> list[int]:
        """The step of the newest snapshot that is on no tier yet, if there is one."""
        book = self.keeper.book
        newest = book.unflushed or book.flushing
        return [] if newest is None else [newest.id.step]
