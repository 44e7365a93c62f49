"""Which rank holds up the others: what each rank's steps took it, without waiting, in; who is slow out, with figures.

In lock-step all ranks take as long for a step as the slowest. So a rank's own time counts, without what it has waited
for others, where the ranks can tell. Where none of them can, their steps are compared as they are: that shows only who
falls behind, as ranks do that meet every so many steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

_COUNTS = 0.1
"""A rank is slow only if it takes longer than its peers by at least this share of a step: else it costs nothing."""
_LEAST_S = 1e-6
"""Peers that do nothing but wait are taken to need this much, so that there is something to compare with."""


@dataclass(frozen=True, slots=True)
class StragglerPolicy:
    """When a rank is a straggler, and whether that is a failure."""

    factor: float = 1.5
    """So many times the median of its peers' own times."""
    restart: bool = False


class Mark(NamedTuple):
    """Where a rank was at one of its boundaries."""

    step: int
    beat_ns: int
    waited_ns: int


class Pace(NamedTuple):
    """What a step took a rank, on average between two marks."""

    step_s: float
    """All in all."""
    waited_s: float
    """Of which it has waited for others; 0 when it can't tell."""

    @property
    def own_s(self) -> float:
        """What it needed itself."""
        return max(0.0, self.step_s - self.waited_s)


class Slow(NamedTuple):
    """A rank that is slower than its peers, in figures."""

    own_s: float
    peers_s: float
    ratio: float
    step_s: float
    measured: bool
    """Whether waiting is left out, rather than that whole steps are compared."""


def pace(first: Mark, last: Mark) -> Pace | None:
    """Return what a step took between two marks; None when there was none between them."""
    steps = last.step - first.step
    if steps <= 0 or last.beat_ns <= first.beat_ns:
        return None
    return Pace((last.beat_ns - first.beat_ns) / steps / 1e9, max(0, last.waited_ns - first.waited_ns) / steps / 1e9)


def until_factor(factor: float) -> float:
    """Return from which factor on a rank that was slow still is: half-way back, so that it does not flicker."""
    return 1 + (factor - 1) / 2


def slow_ranks(paces: Mapping[int, Pace], factor: float) -> dict[int, Slow]:
    """Return the ranks whose own time is at least `factor` times the median of their peers'.

    Where some ranks tell what they wait and others don't, those that don't are left out: they would look busy always.
    """
    measured = any(item.waited_s > 0 for item in paces.values())
    known = {rank: item for rank, item in paces.items() if item.waited_s > 0 or not measured}
    found = {}
    for rank, item in known.items():
        peers = [other.own_s for number, other in known.items() if number != rank]
        if not peers:
            continue
        peers_s = median(peers)
        ratio = item.own_s / max(peers_s, _LEAST_S)
        if ratio >= factor and item.own_s - peers_s >= _COUNTS * item.step_s:
            found[rank] = Slow(item.own_s, peers_s, ratio, item.step_s, measured)
    return found
