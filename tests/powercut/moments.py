"""When the power goes: drawn from the seed, spread over everything that a store does."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum

PHASES = {"boot": 2, "verify": 1, "claim": 1, "undo": 1, "flush": 4, "commit": 4, "tag": 2, "prune": 4, "idle": 1}
"""What the guest says that it is at, and how often the power goes then."""
_QUIET = ("verify", "idle")
"""Phases that write nothing: the power goes after a while."""
_ONCE = ("boot", "verify", "claim", "undo")
_LATEST_S = 1.5
_MOST_REQUESTS = {"boot": 12, "claim": 8, "undo": 8, "flush": 24, "commit": 8, "tag": 8, "prune": 24}
"""Of writes and flushes, about as many as the disk sees in one phase."""
_MOST_FLUSHES = 6


class Trigger(StrEnum):
    """What takes the power away."""

    TIME = "after"
    REQUEST = "at a write or flush after"
    FLUSH = "at a flush after"


_CHANCES = (1, 1, 2)
"""Of the three. Before a flush the cache is at its fullest, and what the guest waits for is about to be true."""


@dataclass(frozen=True, slots=True)
class Moment:
    """The power goes when a phase was entered so many times, and then after a while or before a request of the disk."""

    phase: str
    times: int
    trigger: Trigger
    amount: float
    """Seconds, or which request from then on."""

    def __str__(self) -> str:
        amount = f"{self.amount:.2f} s" if self.trigger is Trigger.TIME else f"{self.amount:g}."
        return f"{amount} {self.trigger} {self.phase} {self.times}"


def draw(rng: random.Random) -> Moment:
    """Draw a moment."""
    phase = rng.choices(list(PHASES), list(PHASES.values()))[0]
    times = 1 if phase in _ONCE else rng.randint(1, 4)
    chances = _CHANCES if phase != "boot" else (0, 1, 1)  # before the disk is mounted there is nothing to lose
    trigger = Trigger.TIME if phase in _QUIET else rng.choices(list(Trigger), chances)[0]
    if trigger is Trigger.TIME:
        return Moment(phase, times, trigger, rng.uniform(0, _LATEST_S))
    return Moment(
        phase, times, trigger, rng.randint(1, _MOST_FLUSHES if trigger is Trigger.FLUSH else _MOST_REQUESTS[phase])
    )
