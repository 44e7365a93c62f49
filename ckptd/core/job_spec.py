"""What a job is, as far as its machine needs to know, and what time it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ckptd.core.policy.restart import RestartPolicy
from ckptd.core.policy.retention import RetentionPolicy


class Now(NamedTuple):
    """A reading of both clocks: `s` monotonic for decisions, `wall` for people."""

    s: float
    wall: float


@dataclass(frozen=True, slots=True)
class TierSpec:
    """A tier of a job: its name, which no other has, and what comes to it and stays there."""

    name: str
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    every_s: float = 0.0
    """An upload begins no sooner than so long after the one before it; the newest waits meanwhile."""
    backlog: int = 2
    """How many checkpoints may wait for their upload; older ones are skipped."""
    scrub_s: float = 0.0
    """So long after its commit, and after each time it was read, a copy there is read again.

    0: only when it was found damaged.
    """


@dataclass(frozen=True, slots=True)
class JobSpec:
    """What the machine needs to know of a job.

    `supervised` means that the agent starts and kills the ranks; `slots` is how many each of them has. `tiers` are in
    the order of their cost: flushes go to the first one, from where checkpoints are uploaded to the others.
    """

    job: str
    world_size: int
    every_s: float
    supervised: bool = True
    slots: int = 2
    tiers: tuple[TierSpec, ...] = (TierSpec("local"),)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    scavenge_s: float = 120.0
    """How long a job that was stopped or given up waits for a snapshot in memory to become durable."""
