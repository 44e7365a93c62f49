"""How a job ends: stopped on purpose, given up, or finished, and never before its last snapshot is durable.

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
        self.keeper = Keeper(spec.world_size, spec.every_s, spec.retention, spec.slots)
        self.generation: Generation | None = None
        self.recovery = Recovery(spec.job, spec.restart, first_incident)
        self._wake_at_s: float | None = None
        self._kill_at_s: float | None = None
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
        if self.state in (JobState.STOPPING, JobState.DRAINING):
            if not event.checkpoint and self.state is JobState.STOPPING:
                self._wake_at_s = self._kill_at_s = None
                return [e.Kill(signal.SIGKILL)]
            return []
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
        waits = self.keeper.wished or self.keeper.announced or self.keeper.pending
        return [] if self._wake_at_s is None or waits else self._terminate(now)

    def _terminate(self, now: Now) -> list[Effect]:
        self._wake_at_s = None
        self._kill_at_s = now.s + _TERM_GRACE_S
        return [e.Kill(signal.SIGTERM)]

    def _drain(self, now: Now) -> list[Effect]:
        """End the job once nothing in memory waits for its commit, or waiting is hopeless."""
        effects = self.keeper.abandon("the job is ending", now.s)
        if self.keeper.pending and not self.keeper.hopeless:
            return effects
        event, error = self._outcome
        if error is None and self.keeper.hopeless:
            event = JobEvent.GIVE_UP
            error = JobFailedError("the last snapshot could not be made durable", hint="see the flush errors above")
        self._move(event)
        exception = self.recovery.exception if error is not None else None
        return [*effects, *self.recovery.close(), e.End(self.state.value, error, exception)]
