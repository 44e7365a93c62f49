"""What is seen of ranks that live (inputs) and what follows (effects), as values; see `core.events` for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptd.core.policy.hang import Sample
from ckptd.types import Evidence


@dataclass(frozen=True, slots=True)
class Watched:
    """What the control pages of all admitted ranks say now."""

    at_s: float
    """Monotonic time of the look."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Gather:
    """Gather the evidence of a failure into the folder of the incident; answered by `Gathered`."""

    incident: int
    """The number that the incident has, or will have."""
    generation: int
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Gathered:
    """What could be gathered of a failure."""

    incident: int
    path: str | None
    """The folder; None when nothing could be written."""
    findings: Mapping[int, str] = field(default_factory=dict)
    """For each rank one line: what it was doing."""
    culprit: int | None = None
    """The rank that the others wait for, if that can be told."""


@dataclass(frozen=True, slots=True)
class EndRanks:
    """Kill ranks that another launcher has started, so that it sees that they are gone."""

    ranks: tuple[int, ...]
