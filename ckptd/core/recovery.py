"""Failures and what is done about them: opens incidents, remembers failures, asks the restart policy."""

from __future__ import annotations

import signal

from ckptd.core import events as e
from ckptd.core.events import Effect, Log
from ckptd.core.generation import Generation
from ckptd.core.incidents import OpenIncident
from ckptd.core.policy.restart import Failure, RestartDecision, RestartPolicy, decide
from ckptd.core.restore import Source
from ckptd.errors import CkptdError, from_json
from ckptd.types import CheckpointId, Evidence, RaisedException

_REFUSALS = ("state", "config", "memory")


class Recovery:
    """The history of one job's failures in this run, and the incident that is open, if any."""

    def __init__(self, job: str, policy: RestartPolicy, first_incident: int) -> None:
        self.job = job
        self.policy = policy
        self.restarts = 0
        self.incident: OpenIncident | None = None
        self.refusal: CkptdError | None = None
        """The error of ckptd's own that the last failure was, when no restart can cure it."""
        self.exception: RaisedException | None = None
        """The exception of the last failure, for the command's last words."""
        self._failures: list[Failure] = []
        self._on_purpose = False
        self._next_number = first_incident

    def failed(
        self, generation: Generation, evidence: Evidence, last_lines: tuple[str, ...], now_s: float, now_wall: float
    ) -> list[Effect]:
        """Open an incident on the evidence that began it."""
        effects = self.close()  # it failed again before it had a commit
        step = generation.newest_step
        self.incident = OpenIncident.begin(
            self._next_number,
            self.job,
            generation.number,
            evidence,
            now_s=now_s,
            failed_at=now_wall,
            failed_step=step,
            last_lines=last_lines,
        )
        self._next_number += 1
        self.exception = evidence.exception
        self.refusal = _refusal(evidence.exception)
        self._on_purpose = evidence.kind == "requested"
        if not self._on_purpose:
            before = self._failures[-1].step if self._failures else generation.first_step
            self._failures.append(
                Failure(
                    signature=evidence.signature,
                    step=step,
                    progressed=step > before,
                    is_exception=evidence.exception is not None,
                    refused=None if self.refusal is None else str(self.refusal),
                    at_s=now_s,
                    lived_s=now_s - generation.began_s,
                    summary=evidence.summary,
                )
            )
        fields = {"cause": evidence.summary, "rank": evidence.rank, "step": step}
        return [*effects, Log("rank failed", fields, level="error"), e.Record(self.incident.snapshot())]

    def consequence(self, evidence: Evidence) -> None:
        """Note a rank that went down after the first one; a SIGKILL is ours then, and must not read as a fault."""
        if self.incident is not None:
            ours = evidence.signal == signal.SIGKILL
            self.incident.add_consequence(f"ckptd ended rank {evidence.rank}" if ours else evidence.summary)

    def decide(
        self, now_s: float, *, older: CheckpointId | None = None, damaged: bool = False
    ) -> tuple[RestartDecision, list[Effect]]:
        """Decide what follows, now that no rank of the generation is left.

        `older` is what the next one could begin with instead of what this one began with.
        With `damaged` it failed because its offer was: that is not held against the script, and can't go on for ever,
        since there is one copy less to try each time.
        """
        if damaged:
            if not self._on_purpose:
                self._failures.pop()
            self.refusal = None
            decision = RestartDecision(restart=True, delay_s=0.0, reasons=("a damaged copy is not offered again",))
        elif self._on_purpose:
            decision = RestartDecision(restart=True, delay_s=0.0, reasons=("somebody asked for it",))
        else:
            decision = decide(self._failures, self.policy, older)
        effects: list[Effect] = []
        if self.incident is not None:
            self.incident.mark("killed", now_s)
            self.incident.decide(decision)
            effects.append(e.Record(self.incident.snapshot()))
        return decision, effects

    def begins(self, offer: Source | None, now_s: float) -> list[Effect]:
        """Note that the next generation begins, and with what."""
        self.exception = self.refusal = None  # it was not the last word
        if self.incident is None:
            return []
        self.restarts += 1
        self.incident.mark("ready", now_s)
        self.incident.begin_again(offer)
        return [e.Record(self.incident.snapshot())]

    def mark(self, moment: str, at_s: float) -> None:
        """Note that a phase of the recovery is over."""
        if self.incident is not None:
            self.incident.mark(moment, at_s)

    def stepped(self, at_s: float) -> list[Effect]:
        """Note that the new generation has finished its first step everywhere: the job trains again."""
        if self.incident is None:
            return []
        self.incident.mark("stepped", at_s)
        record = self.incident.snapshot()
        fields: dict[str, object] = {
            "incident": record.number,
            "cause": record.cause,
            "lost_steps": record.lost_steps,
            "restored": record.restored,
            "seconds": record.seconds,
        }
        return [Log("job recovered", fields), e.Record(record)]

    def committed(self, checkpoint: CheckpointId) -> list[Effect]:
        """Close the incident with the first commit of a generation that came after it.

        A flush that was under way when a rank died commits too, but for the generation that failed.
        """
        if self.incident is None or checkpoint.generation <= self.incident.incident.generation:
            return []
        return self.close()

    def close(self) -> list[Effect]:
        """Close the incident, if one is open."""
        incident, self.incident = self.incident, None
        return [] if incident is None else [e.Record(incident.snapshot(closed=True))]


def _refusal(exception: RaisedException | None) -> CkptdError | None:
    """Return the error behind an exception that is ckptd's own refusal and that no restart can cure."""
    if exception is None or exception.error is None or exception.error.get("code") not in _REFUSALS:
        return None
    return from_json(exception.error)
