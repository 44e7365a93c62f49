"""What the journal has of one job: how it is, and what the next agent needs to go on with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from ckptd.config import JobConfig
from ckptd.core.job import JobMachine
from ckptd.core.job_states import TERMINAL, JobState
from ckptd.daemon.living import boot_id, started
from ckptd.daemon.processes import Processes
from ckptd.daemon.ranks import Rank
from ckptd.errors import CkptdError
from ckptd.journal import Journal, Life, entry_now
from ckptd.log import Logger
from ckptd.types import Incident

_EVERY_S = 1.0


class Record:
    """Writes one job down. A full state folder costs memory of the past, not the training."""

    def __init__(self, journal: Journal, config: JobConfig, pid: int, socket: str, logger: Logger) -> None:
        """Begin with nothing written; `pid` and `socket` are the agent's."""
        self.urgent = False
        """Whether something has happened that the next agent has to know."""
        self._journal = journal
        self._config = config
        self._pid = pid
        self._socket = socket
        self._log = logger
        self._written_at_s = 0.0
        self._failed = False

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return self.urgent or time.monotonic() - self._written_at_s > _EVERY_S

    def write(self, status: dict[str, Any], life: Life) -> bool:
        """Write down how the job is now; return whether that could be done."""
        self._written_at_s, self.urgent = time.monotonic(), False
        entry = entry_now(self._config.name, self._config.to_json(), status, self._pid, self._socket, life=life)
        return self._try(lambda: self._journal.write_job(entry))

    def write_incident(self, incident: Incident) -> None:
        """Write down the newest form of an incident."""
        self._try(lambda: self._journal.write_incident(incident))

    def _try(self, write: Callable[[], None]) -> bool:
        try:
            write()
        except CkptdError as error:
            if not self._failed:
                self._log.error("journal failed", error=str(error))
            self._failed = True
            return False
        return True


def life_of(
    machine: JobMachine,
    processes: Processes | None,
    admitted: Mapping[int, Rank],
    *,
    incarnation: str,
    back: bool,
    left: JobState | None,
    stopped: bool,
    slot_bytes: int,
) -> Life:
    """Return what the next agent has to know; `back` says whether a job with ranks or a command of its own comes back.

    Without `processes` the `admitted` ranks are somebody else's: there is nothing to come back to when they have gone.
    """
    launcher, began = (0, 0), {number: started(rank.peer.pid) for number, rank in admitted.items()}
    if processes is not None:
        launcher, began = processes.launcher, processes.ranks_started
    return Life(
        back and (processes is not None or bool(began)),
        boot_id(),
        *launcher,
        incarnation,
        ranks_started={str(rank): ticks for rank, ticks in began.items()},
        handover=machine.handover().to_json(),
        slot_bytes=slot_bytes,
        left="" if left is None else left.value,
        stopped=stopped,
    )


def returns(state: JobState, *, stopped: bool, left: JobState | None) -> bool:
    """Return whether a job is to come back when its service starts again.

    `stopped` says that somebody has ended the job itself: it comes back only to be stopped to its end. `left` is how
    far it was when its agent began to end.
    """
    if state not in TERMINAL:
        return True
    if stopped or state is JobState.FINISHED:
        return False
    return left is not None and (state is JobState.STOPPED or left is not JobState.DRAINING)
