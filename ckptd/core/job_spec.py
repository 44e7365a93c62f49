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
class JobSpec:
    """What the machine needs to know of a job.

    `supervised` means that the agent starts and kills the ranks; `slots` is how many each of them has.
    """

    job: str
    world_size: int
    every_s: float
    supervised: bool = True
    slots: int = 2
    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
