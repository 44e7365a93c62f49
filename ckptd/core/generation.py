"""One incarnation of a job: which of its ranks are where."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptd.core.restore import Source
from ckptd.types import CheckpointId


@dataclass(slots=True)
class Generation:
    """A generation and its ranks, which go through spawned, joined, restored, stepped, left and gone."""

    number: int
    world_size: int
    offer: Source | None
    began_s: float
    damaged: bool = False
    """Whether a rank has found its offer damaged."""
    pids: dict[int, int] = field(default_factory=dict)
    joined: set[int] = field(default_factory=set)
    restored: set[int] = field(default_factory=set)
    stepped: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    steps: dict[int, int] = field(default_factory=dict)

    @property
    def parent(self) -> CheckpointId | None:
        """What it began with."""
        return None if self.offer is None else self.offer.id

    @property
    def first_step(self) -> int:
        """The step before its first own one."""
        return 0 if self.offer is None else self.offer.id.step

    @property
    def newest_step(self) -> int:
        """The highest finished step of any rank."""
        return max(self.steps.values(), default=self.first_step)

    def all_in(self, group: set[int]) -> bool:
        """Whether every rank of the job is in `group`."""
        return len(group) == self.world_size

    @property
    def training(self) -> bool:
        """Whether every rank trains: its first step is done and none has left or died."""
        return self.all_in(self.stepped) and not self.left and not self.gone
