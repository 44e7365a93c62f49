"""An open incident: collects what a failure was, what was decided and how long each phase of the recovery took."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

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

    def mark(self, moment: str, now_s: float) -> None:
        """Note when a phase ended; the first time counts."""
        self._at_s.setdefault(moment, now_s)

    def add_consequence(self, text: str) -> None:
        """Note a rank that went down with the first one."""
        self.incident = dataclasses.replace(self.incident, consequences=(*self.incident.consequences, text))

    def decide(self, decision: RestartDecision) -> None:
        """Note what the restart policy says."""
        words = "restart the whole job" if decision.restart else f"give up: {decision.verdict}"
        self.incident = dataclasses.replace(self.incident, decision=words, reasons=decision.reasons)

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
