"""An open incident: collects what a failure was, what was decided and how long each phase of the recovery took."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ckptd.core.policy.restart import RestartDecision
from ckptd.core.restore import Source
from ckptd.types import Evidence, Incident


class OpenIncident:
    """One failure on its way from evidence to the first commit of the next generation.

    The moments are monotonic times: failed (the process ended), detected (the agent knew), killed (no rank is left),
    ready (decided, and any back-off waited out), joined (all ranks are back), restored, stepped (the first step is
    done everywhere).
    """

    def __init__(self, incident: Incident, failed_s: float, detected_s: float) -> None:
        self.incident = incident
        self._because: tuple[str, ...] = ()
        self._at_s: dict[str, float] = {"failed": failed_s, "detected": detected_s}

    @classmethod
    def begin(
        cls, number: int, job: str, generation: int, evidence: Evidence, *, now_s: float, **facts: object
    ) -> OpenIncident:
        """Open an incident on a detector's evidence."""
        incident = Incident(
            number=number,
            job=job,
            generation=generation,
            cause=evidence.summary,
            kind=evidence.kind,
            rank=evidence.rank,
            signal=evidence.signal,
            returncode=evidence.returncode,
            exception=evidence.exception,
            **facts,  # type: ignore[arg-type]
        )
        return cls(incident, evidence.at_s, now_s)

    def to_json(self) -> dict[str, Any]:
        """Return the form in which the next agent finds it."""
        return {"incident": self.incident.to_json(), "at_s": dict(self._at_s)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> OpenIncident:
        """Rebuild what `to_json` wrote."""
        at_s = data["at_s"]
        found = cls(Incident.from_json(data["incident"]), at_s["failed"], at_s["detected"])
        found._at_s.update(at_s)
        return found

    def mark(self, moment: str, now_s: float) -> None:
        """Note when a phase ended; the first time counts."""
        self._at_s.setdefault(moment, now_s)

    def change_cause(self, evidence: Evidence, last_lines: tuple[str, ...], reason: str) -> None:
        """Take another failure for the cause, for that reason; what was taken for it is one of the consequences."""
        self._because = (*self._because, reason)
        self._at_s["failed"] = min(self._at_s["failed"], evidence.at_s)
        self.incident = dataclasses.replace(
            self.incident,
            cause=evidence.summary,
            kind=evidence.kind,
            rank=evidence.rank,
            signal=evidence.signal,
            returncode=evidence.returncode,
            exception=evidence.exception,
            last_lines=last_lines,
        )

    def follow(self, consequences: Iterable[str]) -> None:
        """Note what went down with the cause, in words."""
        self.incident = dataclasses.replace(self.incident, consequences=tuple(consequences))

    def gathered(self, path: str) -> None:
        """Note where the evidence lies that was gathered of it."""
        self.incident = dataclasses.replace(self.incident, evidence_path=path)

    def decide(self, decision: RestartDecision) -> None:
        """Note what the restart policy says; why this failure is the cause comes before it."""
        words = "restart the whole job" if decision.restart else f"give up: {decision.verdict}"
        self.incident = dataclasses.replace(self.incident, decision=words, reasons=(*self._because, *decision.reasons))

    def add_reason(self, reason: str) -> None:
        """Note what else was decided, or waited for, and why."""
        if reason not in self.incident.reasons:  # what is planned again has the same reasons
            self.incident = dataclasses.replace(self.incident, reasons=(*self.incident.reasons, reason))

    def begin_again(self, source: Source | None) -> None:
        """Note what the next generation begins with."""
        step = 0 if source is None else source.id.step
        self.incident = dataclasses.replace(
            self.incident,
            restored=None
            if source is None
            else {"step": step, "tier": source.tier, "generation": source.id.generation},
            lost_steps=max(0, self.incident.failed_step - step),
        )

    def snapshot(self, *, closed: bool = False) -> Incident:
        """Return the incident with the seconds known so far."""
        self.incident = dataclasses.replace(self.incident, seconds=self.seconds(), closed=closed)
        return self.incident

    def seconds(self) -> dict[str, float]:
        """Return the length of each phase that is over; a phase that did not happen has no entry."""
        at = self._at_s
        spans: Mapping[str, tuple[str, str]] = {
            "detect": ("failed", "detected"),
            "kill": ("detected", "killed"),
            "decide": ("killed", "ready"),
            "start": ("ready", "joined"),
            "restore": ("joined", "restored"),
            "first_step": ("restored" if "restored" in at else "joined", "stepped"),
            "total": ("failed", "stepped"),
        }
        return {
            name: round(max(0.0, at[end] - at[begin]), 6)
            for name, (begin, end) in spans.items()
            if begin in at and end in at
        }
