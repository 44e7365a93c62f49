"""The states of a job and everything that moves it between them."""

from __future__ import annotations

from enum import Enum

from ckptd.core.table import TransitionTable


class JobState(Enum):
    """Where a job is; `ckptctl status` shows the value."""

    PENDING = "pending"
    PREPARING = "preparing"
    STARTING = "starting"
    RUNNING = "running"
    FENCED = "fenced"
    BACKOFF = "backoff"
    STOPPING = "stopping"
    DRAINING = "draining"
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


class JobEvent(Enum):
    """What moves a job."""

    BEGIN = "begin"
    ADOPT = "adopt"
    CLAIMED = "claimed"
    TRAINING = "training"
    FAIL = "fail"
    RETRY = "retry"
    BACK_OFF = "back off"
    AWAIT = "await ranks"
    COMPLETE = "complete"
    STOP = "stop"
    GONE = "all ranks gone"
    FINISH = "finish"
    HALT = "halt"
    GIVE_UP = "give up"


TERMINAL = frozenset({JobState.FINISHED, JobState.FAILED, JobState.STOPPED})

JOB_TABLE: TransitionTable[JobState, JobEvent] = TransitionTable(
    "job",
    {
        JobState.PENDING: {
            JobEvent.BEGIN: JobState.PREPARING,
            JobEvent.ADOPT: JobState.STARTING,
            JobEvent.STOP: JobState.STOPPING,
        },
        JobState.PREPARING: {
            JobEvent.CLAIMED: JobState.STARTING,
            JobEvent.STOP: JobState.STOPPING,
            JobEvent.GONE: JobState.DRAINING,
        },
        JobState.STARTING: {
            JobEvent.TRAINING: JobState.RUNNING,
            JobEvent.FAIL: JobState.FENCED,
            JobEvent.AWAIT: JobState.PENDING,
            JobEvent.COMPLETE: JobState.DRAINING,
            JobEvent.STOP: JobState.STOPPING,
        },
        JobState.RUNNING: {
            JobEvent.FAIL: JobState.FENCED,
            JobEvent.AWAIT: JobState.PENDING,
            JobEvent.COMPLETE: JobState.DRAINING,
            JobEvent.STOP: JobState.STOPPING,
        },
        JobState.FENCED: {
            JobEvent.RETRY: JobState.PREPARING,
            JobEvent.BACK_OFF: JobState.BACKOFF,
            JobEvent.AWAIT: JobState.PENDING,
            JobEvent.STOP: JobState.STOPPING,
            JobEvent.GONE: JobState.DRAINING,
        },
        JobState.BACKOFF: {JobEvent.RETRY: JobState.PREPARING, JobEvent.STOP: JobState.STOPPING},
        JobState.STOPPING: {JobEvent.GONE: JobState.DRAINING},
        JobState.DRAINING: {
            JobEvent.AWAIT: JobState.PENDING,
            JobEvent.FINISH: JobState.FINISHED,
            JobEvent.GIVE_UP: JobState.FAILED,
            JobEvent.HALT: JobState.STOPPED,
        },
        JobState.FINISHED: {},
        JobState.FAILED: {},
        JobState.STOPPED: {},
    },
)
