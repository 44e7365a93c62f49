"""What a job is, as far as its machine needs to know, and what time it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from ckptd.core.policy.halt import HaltPolicy
from ckptd.core.policy.hang import HangPolicy
from ckptd.core.policy.numbers import NumbersPolicy
from ckptd.core.policy.restart import RestartPolicy
from ckptd.core.policy.retention import RetentionPolicy
from ckptd.core.policy.straggler import StragglerPolicy


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
    numbers: NumbersPolicy = field(default_factory=NumbersPolicy)
    """What to make of the numbers that ranks report."""
    scavenge_s: float = 120.0
    """How long a job that was stopped or given up waits for a snapshot in memory to become durable."""
    return_s: float = 600.0
    """How long a rank that lives may take to come back to an agent that has taken its job over: a step, or a pause."""
    check_wait_s: float = 300.0
    """How long the job waits for its node to be fit before a generation starts."""
    halt: HaltPolicy = field(default_factory=HaltPolicy)
    """When it is to stop by itself."""
    hang: HangPolicy | None = None
    """How long a rank may go without a sign of life; None: as long as it likes."""
    straggler: StragglerPolicy = field(default_factory=StragglerPolicy)
    """When a rank holds up the others."""
