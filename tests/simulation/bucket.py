"""The model's object store: it outlives the node, may be down or slow for a while, and puts objects whole or not."""

from __future__ import annotations

import random

from ckptd.errors import StoreError
from tests.simulation.clock import Clock, Steps
from tests.simulation.disk import Disk

_SLOW = 20.0
_TIMEOUT_S = 0.5


class Bucket(Disk):
    """A tier behind a network. Its luck is its own, so that a bucket changes nothing of what else happens in a run."""

    def __init__(self, clock: Clock, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(f"bucket {seed}")
        self.down_until_s = 0.0
        self.slow_until_s = 0.0
        self._clock = clock

    @property
    def down(self) -> bool:
        """Whether nobody can reach it."""
        return self._clock.now_s < self.down_until_s

    def call(self, seconds: float, error_chance: float) -> Steps:
        """Make a request that takes about so long; returns the error that it ends with, if any."""
        slow = self._clock.now_s < self.slow_until_s
        yield seconds * self.rng.uniform(0.1, 1.0) * (_SLOW if slow else 1.0)
        if self.down:
            yield self.rng.uniform(0, _TIMEOUT_S)
            return StoreError("connection refused")
        if self.rng.random() < error_chance:
            return StoreError("503 slow down")
        return None
