"""What is asked of the evidence collector, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.core.policy.hang import Sample
from ckptd.types import Evidence

DEADLINE_S = 5.0
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class RankView:
    """One rank as it is looked at."""

    rank: int
    pid: int
    """Its process; it may have ended."""
    page: Mapping[str, int] | None
    """The first words of its control page, by name; None for a rank that has none."""
    history: Sequence[Sample]
    """What the page said at the last looks, oldest first."""
    out: Path | None
    """The file of its stdout; None where somebody else started it."""
    err: Path | None
    """The file of its stderr, likewise."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to gather, where to put it, and how much that may take."""

    folder: Path
    """The incident's own folder; made when it is missing."""
    job: str
    generation: int
    evidence: Evidence
    """Why it is gathered."""
    ranks: Sequence[RankView]
    deadline_s: float = DEADLINE_S
    """For everything together."""
    max_bytes: int = MAX_BYTES
    """For all files together."""
    gently: bool = False
    """Whether it must not take processor time from what goes on beside it."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was gathered, and what it says."""

    path: Path
    findings: Mapping[int, str]
    """For each rank one line: what it was doing."""
    culprit: int | None
    """The rank that the others wait for; None when that can't be told."""
