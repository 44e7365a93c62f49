"""The part of the witness that looks at single ranks: what they are offered and read, and how they end."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from ckptd.core.policy.interval import REACTION_S
from ckptd.core.restore import Source
from ckptd.types import CheckpointId
from tests.simulation.memory import Cell, shard_of

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.offers import Offer
    from tests.simulation.ranks import RankProcess


class ViolationError(Exception):
    """Something happened that the design excludes."""


class RankWitness:
    """What is to be said of a rank by itself."""

    _node: Node
    _flush_open: bool
    seen: Counter[str]
    _claims: dict[int, CheckpointId | None]
    _finished: dict[int, tuple[int, int]]
    flush_failures: dict[CheckpointId, int]

    def require(self, holds: bool, message: str) -> None:
        """Fail the run unless something holds."""
        if not holds:
            raise ViolationError(message)

    def offer_opened(self, process: RankProcess, source: Source, offer: Offer | None) -> None:
        """Check that a rank which was told of an offer finds it."""
        right = offer is not None and offer.generation == process.generation and offer.source == source
        self.require(right, f"{process} was told of {source} and finds {offer}")

    def rank_reads(
        self, process: RankProcess, checkpoint: CheckpointId, owner: int, part: int, cell: Cell | None
    ) -> None:
        """Check what a rank puts into its objects, from its own shard or that of another rank."""
        self.require(checkpoint == self._claims[process.generation], f"{process} restores {checkpoint}")
        wanted = shard_of(owner, checkpoint.step)[part]
        self.require(cell == wanted, f"part {part} of rank {owner} in {checkpoint} was restored wrong: {cell}")

    def no_slot(self, process: RankProcess, *, final: bool) -> None:
        """Note a capture that found no free slot: no surprise when messages take longer than a few steps."""
        slow = self._node.options.latency_s > REACTION_S / 2
        kept = max(self.flush_failures.values(), default=0) > 5  # by a disk that refused a snapshot for minutes
        self.require((slow and not final) or kept, f"{process} finds no free slot at step {process.step}")
        self.seen["no free slot"] += 1

    def rank_killed(self, process: RankProcess) -> None:
        """Note in the middle of what a rank dies."""
        self.seen["killed in a capture"] += process.capturing
        self.seen["killed during a flush"] += self._flush_open
        self.seen["killed before the first step"] += process.step == 0

    def rank_finished(self, process: RankProcess) -> None:
        """Note the state in which a rank leaves training."""
        self._finished[process.rank] = (process.step, process.state)
