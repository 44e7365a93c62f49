"""The part of the witness that reads the incidents which the machine writes down."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ckptd.types import CheckpointId, Incident

if TYPE_CHECKING:
    from tests.simulation.witness import Witness


class IncidentWitness:
    """All incidents of one run, in their newest form."""

    def __init__(self, witness: Witness) -> None:
        self._require = witness.require
        self.next_number = 1
        self._known: dict[int, Incident] = {}
        self._just_closed: list[Incident] = []

    def recorded(self, incident: Incident, parent: CheckpointId | None) -> None:
        """Check a new form of an incident; `parent` is what the present generation was claimed to begin with."""
        known = self._known.get(incident.number)
        closed = known is not None and known.closed
        changed = closed and replace(known, evidence_path=incident.evidence_path) != incident
        self._require(not changed, f"incident {incident.number} changed after it was closed")
        self._require(known is not None or incident.number == self.next_number, f"incident number {incident.number}")
        if incident.lost_steps is not None and (known is None or known.lost_steps is None):
            began = None if incident.restored is None else (incident.restored["generation"], incident.restored["step"])
            self._require(began == parent, f"incident {incident.number} says restored {began}, it was {parent}")
        self.next_number = max(self.next_number, incident.number + 1)
        self._known[incident.number] = incident
        if incident.closed and not closed:
            self._just_closed.append(incident)

    def after_input(self, *, ended: bool) -> None:
        """Check that none was closed before its restart, unless the job has ended."""
        for incident in self._just_closed if not ended else ():
            known = incident.decision != "" and incident.lost_steps is not None
            self._require(known, f"incident {incident.number} was closed before its restart: {incident}")
        self._just_closed.clear()

    def agent_begins(self) -> None:
        """Forget what the agent before was about to say."""
        self._just_closed.clear()

    @property
    def open(self) -> list[int]:
        """The numbers of those that are not closed."""
        return [number for number, incident in self._known.items() if not incident.closed]
