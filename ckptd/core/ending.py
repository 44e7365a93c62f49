"""How a job ends: stopped on purpose, given up, or finished, and not before its last snapshot is safe if that can be.

The half of the job machine that leads to a terminal state; `core.job` has the other.
"""

from __future__ import annotations

import signal

from ckptd.core import events as e
from ckptd.core.events import Effect, Log
from ckptd.core.generation import Generation
from ckptd.core.halt_events import Leave
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JOB_TABLE, JobEvent, JobState
from ckptd.core.keeper import Keeper
from ckptd.core.recovery import Recovery
from ckptd.errors import CkptdError, JobFailedError
from ckptd.types import CheckpointId

LIVE = (JobState.STARTING, JobState.RUNNING)
"""The states in which ranks live and should."""
_TERM_GRACE_S = 5.0


class Ending:
    """What a job is made of, and its way out."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        self.spec = spec
        self.state = JobState.PENDING
        self.keeper = Keeper(spec.world_size, spec.every_s, spec.tiers, spec.slots, spec.numbers.healthy)
        self.generation: Generation | None = None
        self.recovery = Recovery(spec.job, spec.restart, first_incident)
        self._wake_at_s: float | None = None
        self._kill_at_s: float | None = None
        self._scavenge_until_s: float | None = None
        self._awaits_uploads = True
        self.leave_by_s: float | None = None
        """When the grace is over of whoever has asked for the end."""
        self.why: str | None = None
        """Why the job is told to stop."""
        self._may_leave = False
        """Whether the ranks were told to leave, so that each of them may end."""
        self._at_once = False
        self._gone_with_agent: CheckpointId | None = None
        """A snapshot newer than all checkpoints, of which an agent that was replaced knew, and that is nowhere now."""
        self.upload_s: dict[str, float] = {}
        """For each further tier, how long one of the last uploads took at most."""
        self._outcome: tuple[JobEvent, CkptdError | None] = (JobEvent.FINISH, None)
        self.error: CkptdError | None = None
        """Why the job has failed, when it has."""

    def _move(self, event: JobEvent) -> None:
        self.state = JOB_TABLE.next(self.state, event)

    def _setup_failed(self, error: CkptdError, now: Now, *, passing: bool = False) -> list[Effect]:  # noqa: ARG002 - see Planning
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
        until_s = now.s + event.grace_s
        self.leave_by_s = until_s if self.leave_by_s is None else min(self.leave_by_s, until_s)
        if self.state in (JobState.STOPPING, JobState.DRAINING):
            return self._stop_again(event, now)
        was, generation = self.state, self.generation
        self.why = event.reason
        self._outcome = (JobEvent.HALT, None)
        self._move(JobEvent.STOP)
        step = None if generation is None else generation.newest_step
        said = Log("stopping", {"reason": event.reason, "step": step, "grace_s": event.grace_s})
        if was not in LIVE or generation is None or not generation.pids:
            effects = self._kill() if was in LIVE else []
            self._move(JobEvent.GONE)
            return [said, *effects, *self._drain(now)]
        if not (event.checkpoint and was is JobState.RUNNING and generation.training):
            return [said, *self._terminate(now)]
        self.keeper.ending = self.spec.supervised
        if not self.keeper.last_announced:
            self.keeper.want(now.s)
        self.keeper.tiers.await_last(self.upload_s, event.grace_s)
        self._wake_at_s = self.leave_by_s
        return [said]

    def _stop_again(self, event: e.StopWanted, now: Now) -> list[Effect]:
        """Take in a stop of a job that is ending: a shorter grace, or that nobody wants to wait any more."""
        if self._wake_at_s is not None:
            self._wake_at_s = self.leave_by_s
        if event.checkpoint:
            return self._scavenge(event.reason, now) + self._drain(now) if self.state is JobState.DRAINING else []
        hurried, self._awaits_uploads = not self._awaits_uploads, False
        self._at_once = hurried
        if self.state is JobState.DRAINING:
            return self._scavenge(event.reason, now) + self._drain(now)
        self._wake_at_s = self._kill_at_s = None
        if not hurried:
            return [e.Kill(signal.SIGKILL)]
        self._move(JobEvent.GONE)
        return [e.Kill(signal.SIGKILL), *self._drain(now)]

    def _let_leave(self, now: Now) -> list[Effect]:
        """Tell the ranks to leave once the last snapshot is complete: memory has all that they could still give.

        They have the rest of the grace to end by themselves.
        """
        if self.state is not JobState.STOPPING or self._may_leave or not self.keeper.last_captured:
            return []
        self._may_leave = True
        assert self.generation is not None
        left_s = None if self._wake_at_s is None else round(self._wake_at_s - now.s, 3)
        return [Leave(), Log("leaving", {"step": self.generation.newest_step, "grace_s": left_s})]

    def _stop_when_durable(self, now: Now) -> list[Effect]:
        """Upload the last snapshot once it is on the first tier; ranks of another launcher are let go then."""
        waits = self.keeper.wished or self.keeper.announced or self.keeper.unflushed
        if self._wake_at_s is None or waits:
            return []
        self.keeper.tiers.hurry(now.s)
        return [] if self.spec.supervised else self._terminate(now)

    def _grace_over(self, now: Now) -> list[Effect]:
        """End ranks that have not ended within the grace."""
        said = [] if self._may_leave else [Log("stop without checkpoint", {"reason": self.why}, level="warning")]
        return [*said, *self._terminate(now)]

    def _terminate(self, now: Now) -> list[Effect]:
        self._wake_at_s = None
        self._kill_at_s = now.s + _TERM_GRACE_S
        self.keeper.tiers.hurry(now.s)  # nothing newer will come
        return [e.Kill(signal.SIGTERM)]

    def _drain(self, now: Now) -> list[Effect]:
        """End the job once its newest snapshot is where it should be, or waiting for that is hopeless or too long.

        Memory goes with the job: what lies there alone is waited for, if the job was stopped or given up no longer
        than `scavenge_s`, since whoever ended it wants its place. An upload has the grace of whoever asked for the end,
        and no bound when nobody did: its checkpoint is safe on the first tier, and its failures are counted.
        """
        if not self.keeper.unflushed or self.keeper.hopeless:
            self.keeper.tiers.hurry(now.s)  # else the newest is still to come, and goes first
        event, error = self._outcome
        effects = self.keeper.abandon("the job is ending", now.s)
        if event is not JobEvent.FINISH:
            effects += self._scavenge("it was stopped" if error is None else error.message, now)
        late = self._scavenge_until_s is not None and now.s >= self._scavenge_until_s
        late = late or self._at_once
        lost = self.keeper.unflushed and (self.keeper.hopeless or late)
        if self.keeper.unflushed and not lost:
            return effects
        if self.keeper.tiers.pending:
            over = self.leave_by_s is not None and now.s >= self.leave_by_s
            if self._awaits_uploads and not over:
                return effects
            effects += self._left_behind("the grace is over" if over else "nobody waits for it any more")
            event = JobEvent.HALT if event is JobEvent.FINISH else event  # to be run again, for the upload
        if lost and late:
            reason = "nobody waits for it any more"
            if not self._at_once:
                reason = f"it was not durable within {self.spec.scavenge_s:g} s"
            for step in self._only_in_memory:
                effects.append(Log("snapshot abandoned", {"step": step, "reason": reason}, level="error"))
        missing = self.keeper.tiers.hopeless
        if error is None and lost and self._at_once:
            event = JobEvent.HALT  # as it was wanted, and said
        elif error is None and (lost or self._gone_with_agent is not None):
            event = JobEvent.GIVE_UP
            hint = "see the flush errors in the log"
            error = JobFailedError("the last snapshot could not be made durable", hint=hint)
        elif error is None and missing:
            event = JobEvent.GIVE_UP
            error = JobFailedError(
                f"the last checkpoint is not on {' and '.join(missing)}: its upload has failed",
                hint=f"it is on {self.keeper.tiers.first}, from where the next start of the job uploads it; "
                "see the upload errors in the log",
            )
        self._move(event)
        self.error = error
        exception = self.recovery.exception if error is not None else None
        return [*effects, *self.recovery.close(), e.End(self.state.value, error, exception)]

    def _left_behind(self, reason: str) -> list[Effect]:
        """Say of each tier that lacks the newest checkpoint what it has instead."""
        return [
            Log(
                "upload skipped",
                {
                    "step": owed.step,
                    "tier": tier,
                    "newest_there": None if there is None else there.step,
                    "reason": reason,
                    "hint": "the next start of the job uploads it",
                },
                level="warning",
            )
            for tier, (owed, there) in self.keeper.tiers.left_behind_by.items()
        ]

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
