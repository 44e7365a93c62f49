"""Failures and what is done about them: opens incidents, remembers failures, asks the restart policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ckptd.core import events as e
from ckptd.core.events import Effect, Log
from ckptd.core.generation import Generation
from ckptd.core.incidents import OpenIncident
from ckptd.core.policy.cause import Failed, compare, consequence
from ckptd.core.policy.restart import Failure, RestartDecision, RestartPolicy, decide, remembered
from ckptd.core.restore import Source
from ckptd.core.watch_events import Gather
from ckptd.errors import CkptdError, from_json
from ckptd.types import CheckpointId, Evidence, Incident, RaisedException

_SCRIPT_KINDS = ("nan", "spike")
_REFUSALS = ("state", "config", "memory")


class Recovery:
    """The history of one job's failures in this run, and the incident that is open, if any."""

    def __init__(self, job: str, policy: RestartPolicy, first_incident: int) -> None:
        self.job = job
        self.policy = policy
        self.restarts = 0
        self.incident: OpenIncident | None = None
        self._closed: Incident | None = None
        self.refusal: CkptdError | None = None
        """The error of ckptd's own that the last failure was, when no restart can cure it."""
        self.exception: RaisedException | None = None
        """The exception of the last failure, for the command's last words."""
        self._failures: list[Failure] = []
        self._cause: Failed | None = None
        self._others: list[Failed] = []
        """What else ended in the open incident, besides its cause."""
        self._killed_s: float | None = None
        """When ckptd ordered its kill of the ranks of the open incident."""
        self._on_purpose = False
        self._next_number = first_incident

    def history(self) -> dict[str, Any]:
        """Return what the next agent has to know of the failures so far."""
        return {
            "restarts": self.restarts,
            "failures": [dataclasses.asdict(item) for item in self._failures],
            "incident": None if self.incident is None else self.incident.to_json(),
        }

    def recall(self, history: Mapping[str, Any]) -> None:
        """Go on from what `history` says."""
        self.restarts = int(history.get("restarts", 0))
        known = {item.name for item in dataclasses.fields(Failure)}  # another version may know more
        self._failures = [
            Failure(**{name: item[name] for name in known & item.keys()}) for item in history.get("failures", ())
        ]
        incident = history.get("incident")
        self.incident = None if incident is None else OpenIncident.from_json(incident)
        if self.incident is not None:  # which the agent before may not have come to record
            self._next_number = max(self._next_number, self.incident.incident.number + 1)

    @property
    def next_number(self) -> int:
        """The number that the next incident will have."""
        return self._next_number

    def failed(
        self,
        generation: Generation,
        evidence: Evidence,
        last_lines: tuple[str, ...],
        now_s: float,
        now_wall: float,
        *,
        killed: bool = False,
    ) -> list[Effect]:
        """Open an incident on the evidence that began it; `killed` says that ckptd ends the other ranks now."""
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
        self._cause, self._others = Failed(evidence, last_lines), []
        self._killed_s = now_s if killed else None
        self.exception = evidence.exception
        self.refusal = _refusal(evidence.exception)
        self._on_purpose = evidence.kind == "requested"
        if not self._on_purpose:
            before = self._failures[-1].step if self._failures else generation.first_step
            failed_step = step if evidence.step is None else evidence.step
            self._failures.append(
                Failure(
                    signature=evidence.signature,
                    step=failed_step,
                    progressed=failed_step > before,
                    by_script=_by_script(evidence),
                    refused=None if self.refusal is None else str(self.refusal),
                    at_s=now_s,
                    lived_s=now_s - generation.began_s,
                    summary=evidence.summary,
                )
            )
            self._failures = remembered(self._failures, self.policy)
        fields = {"cause": evidence.summary, "rank": evidence.rank, "step": step}
        said = Log("generation failed", fields, level="error")
        if self._on_purpose:
            said = Log("restart requested", {"reason": evidence.summary, "step": step})
        return [*effects, said, e.Record(self.incident.snapshot())]

    def also_failed(self, evidence: Evidence, last_lines: tuple[str, ...] = ()) -> list[Effect]:
        """Take in a rank that went down in the open incident: a consequence, or the cause that was not known yet."""
        if self.incident is None or self._cause is None:
            return []
        newer = Failed(evidence, last_lines)
        verdict = compare(self._cause, newer, self._killed_s)
        changes = verdict.newer_is_cause and not self._on_purpose
        self._others.append(self._cause if changes else newer)
        if changes:
            self._cause = newer
        self.incident.follow(consequence(item, self._cause.evidence, self._killed_s) for item in self._others)
        if not changes:
            return []
        self.incident.change_cause(evidence, last_lines, verdict.reason)
        self.exception = evidence.exception
        self.refusal = _refusal(evidence.exception)
        self._failures[-1] = dataclasses.replace(
            self._failures[-1],
            signature=evidence.signature,
            by_script=_by_script(evidence),
            refused=None if self.refusal is None else str(self.refusal),
            summary=evidence.summary,
        )
        fields = {"cause": evidence.summary, "rank": evidence.rank, "reason": verdict.reason}
        record = self.incident.snapshot()
        return [
            Gather(record.number, record.generation, evidence),
            Log("cause changed", fields, level="error"),
            e.Record(record),
        ]

    def decide(
        self, now_s: float, *, older: CheckpointId | None = None, damaged: Source | None = None
    ) -> tuple[RestartDecision, list[Effect]]:
        """Decide what follows, now that no rank of the generation is left.

        `older` is what the next one could begin with instead of what this one began with.
        With `damaged` it failed because that copy, its offer, was: that is not held against the script, and can't go
        on for ever, since there is one copy less to try each time.
        """
        if damaged is not None:
            if not self._on_purpose:
                self._failures.pop()
            self.refusal = None
            reason = f"step {damaged.id.step} on {damaged.tier} is damaged, and is not offered again"
            decision = RestartDecision(restart=True, delay_s=0.0, reasons=(reason,))
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

    @property
    def look_up(self) -> str:
        """The command that tells the open incident, or the list of all when none is open."""
        return f"ckptctl incidents {self.job}" + ("" if self.incident is None else f" {self.incident.incident.number}")

    def because(self, reason: str) -> list[Effect]:
        """Note in the open incident what else was decided, or waited for, and why."""
        if self.incident is None:
            return []
        self.incident.add_reason(reason)
        return [e.Record(self.incident.snapshot())]

    def given_up(self, verdict: str, reason: str) -> list[Effect]:
        """Note in the open incident that nothing is started again, though the restart policy would have allowed it."""
        if self.incident is None:
            return []
        self.incident.decide(RestartDecision(restart=False, delay_s=0.0, reasons=(reason,), verdict=verdict))
        return [e.Record(self.incident.snapshot())]

    def refused(
        self,
        evidence: Evidence,
        reasons: tuple[str, ...],
        *,
        generation: int,
        step: int,
        now_s: float,
        now_wall: float,
    ) -> list[Effect]:
        """Note that no generation may begin: in the open incident, or in one of its own when nothing had failed."""
        if self.incident is None:
            self.incident = OpenIncident.begin(
                self._next_number,
                self.job,
                generation,
                evidence,
                now_s=now_s,
                failed_at=now_wall,
                failed_step=step,
                last_lines=(),
            )
            self._next_number += 1
        decision = RestartDecision(restart=False, delay_s=0.0, reasons=reasons, verdict=evidence.summary)
        self.incident.decide(decision)
        return [e.Record(self.incident.snapshot())]

    def begins(self, offer: Source | None, now_s: float) -> list[Effect]:
        """Note that the next generation begins, and with what."""
        self.exception = self.refusal = None  # it was not the last word
        if self.incident is None:
            return []
        self.restarts += 1
        self.incident.mark("ready", now_s)
        self.incident.begin_again(offer)
        return [e.Record(self.incident.snapshot())]

    def kill_ordered(self, now_s: float) -> None:
        """Note that ckptd ends the ranks of another launcher now: their ends follow from what was seen before."""
        if self._killed_s is None:
            self._killed_s = now_s

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
        if incident is None:
            return []
        self._closed = incident.snapshot(closed=True)
        return [e.Record(self._closed)]

    def gathered(self, number: int, path: str) -> list[Effect]:
        """Note where the evidence of an incident lies, which may have been closed before everything was gathered."""
        if self.incident is not None and self.incident.incident.number == number:
            self.incident.gathered(path)
            return [e.Record(self.incident.snapshot())]
        if self._closed is None or self._closed.number != number:
            return []
        self._closed = dataclasses.replace(self._closed, evidence_path=path)
        return [e.Record(self._closed)]


def _by_script(evidence: Evidence) -> bool:
    return evidence.exception is not None or evidence.kind in _SCRIPT_KINDS


def _refusal(exception: RaisedException | None) -> CkptdError | None:
    """Return the error behind an exception that is ckptd's own refusal and that no restart can cure."""
    if exception is None or exception.error is None or exception.error.get("code") not in _REFUSALS:
        return None
    return from_json(exception.error)
