"""What ranks report of their steps (an input) and what follows (an effect), as values; see `core.events` for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Report(NamedTuple):
    """One value of the watched metric: of which step, counted as the loop counts it."""

    step: int
    value: float


@dataclass(frozen=True, slots=True)
class Reported:
    """What ranks have reported since the last look, of all ranks at once so that the first bad step is known."""

    reports: Mapping[int, Sequence[Report]]
    """By rank, in the order in which it reported them."""
    missed: Mapping[int, int] = field(default_factory=dict)
    """How many reports of a rank were written over before anybody read them."""
    leaving: bool = False
    """Whether a rank is about to go, so that nothing more can be waited for."""


@dataclass(frozen=True, slots=True)
class Marked:
    """What is known of the health of checkpoints has changed, and is to be written down."""
