"""The part of the witness that looks after reported numbers: nobody ends on weights that came of a NaN.

It knows which captures are spoilt from the ranks themselves, and works out from what the agent has heard which
checkpoints training has gone on well from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptd.core import events as e
from ckptd.core.number_events import Marked, Reported
from ckptd.core.prune_events import MakeRoom, Prune
from ckptd.core.restore import Source
from ckptd.errors import CkptdError
from ckptd.types import CheckpointId
from tests.simulation.storage import TIER

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent
    from tests.simulation.node import Node
    from tests.simulation.ranks import RankProcess

HEALTHY_AFTER = 3


class NumbersWitness:
    """What was reported and captured in one run, over all lives of the agent."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self.journal: dict[str, Any] = {}
        """What the agents have written down of it."""
        self.spoilt: set[CheckpointId] = set()
        """Captures of weights that came of a NaN."""
        self._good: set[int] = set()
        """Steps of the present generation that were heard to be good, before any that was bad."""
        self._bad: int | None = None
        self._proven: set[CheckpointId] = set()
        self._leaving: set[Source] = set()

    # --- what ranks do ----------------------------------------------------------------------------------------

    def captured(self, process: RankProcess) -> None:
        """Note what a rank seals; where a disk was lost, its name may have been another's."""
        checkpoint = CheckpointId(process.generation, process.step)
        (self.spoilt.add if process.spoilt else self.spoilt.discard)(checkpoint)

    def finished(self, process: RankProcess) -> None:
        """Check the weights that a rank ends with."""
        self._require(not process.spoilt, f"{process} ends with weights that came of a NaN")

    # --- what the agent hears and does ------------------------------------------------------------------------

    def before(self, event: e.Input) -> None:
        """Note what the machine is about to hear."""
        if isinstance(event, e.Claimed):
            self._good, self._bad = set(), None
        elif isinstance(event, e.Committed):
            self._leaving.discard(Source(event.id, event.tier))  # it may have left before, and be there again
        elif isinstance(event, e.Fetched) and event.copied:
            self._leaving.discard(Source(event.source.id, TIER))
        elif isinstance(event, Reported):
            heard = [report for reports in event.reports.values() for report in reports]
            bad = [report.step for report in heard if report.value != report.value]
            self._bad = min([*bad, *([] if self._bad is None else [self._bad])], default=None)
            limit = float("inf") if self._bad is None else self._bad
            self._good = {step for step in {*self._good, *(report.step for report in heard)} if step < limit}
            self._node.witness.seen["NaN heard"] += bool(bad)
        chain = self._node.witness.chain
        proven = {item for item in chain if sum(step > item.step for step in self._good) >= HEALTHY_AFTER}
        self._proven = (self._proven | proven).intersection(chain)

    def carried_out(self, effect: e.Effect, agent: ModelAgent) -> None:
        """Look at an effect: what is written down, and what is stepped back to."""
        if isinstance(effect, (Prune, MakeRoom)):
            self._let_go(effect)
        elif isinstance(effect, Marked):
            self.journal = agent.machine.keeper.health.to_json()
        elif isinstance(effect, e.Log) and effect.event == "step back":
            self._stepped_back(int(str(effect.fields["step"])))

    def _stepped_back(self, step: int) -> None:
        """Check what the next generation is to begin with."""
        witness = self._node.witness
        limit = float("inf") if witness.at_most is None else witness.at_most
        healthy = [item for item in witness.chain if item in self._proven and item.step <= limit]
        here = [item.step for item in healthy if item in self._node.disk.manifests or item in witness.memory]
        there = [item.step for item in healthy if item in self._node.bucket.manifests]  # if it could be read
        self._require(self._bad is not None or self._suspected, "steps back, and nobody has reported a NaN")
        newest = max(here, default=0)
        self._require(not here or step == newest or step in there, f"steps back to {step}, {here} are healthy")
        self._require(step >= newest, f"steps back to {step}, {here} are healthy")
        witness.at_most = step
        if not step:  # where the job began: nothing of what there is belongs to its past any more
            witness.chain.clear()
        witness.seen["stepped back"] += 1

    @property
    def _suspected(self) -> bool:
        """Whether anything that was committed was called suspect before this life."""
        return bool(self.journal.get("suspect"))

    def agent_begins(self) -> None:
        """Know of the past only what was written down of it."""
        written = {CheckpointId(item["generation"], item["step"]) for item in self.journal.get("healthy", ())}
        wrong = written - self._proven
        self._require(not wrong & self.spoilt, f"{wrong} were written down as healthy")
        self._proven &= written
        self._good, self._bad = set(), None
        self._leaving.clear()

    def _healthy(self, tier: str) -> list[CheckpointId]:
        """Return the healthy checkpoints on a tier that a restart may begin with, oldest first."""
        held = self._node.disk.manifests if tier == TIER else self._node.bucket.manifests
        return [item for item in self._node.witness.chain if item in held and item in self._proven]

    def _is_damaged(self, checkpoint: CheckpointId, tier: str) -> bool:
        """Whether a copy is worth nothing, so that it may go as soon as somebody has noticed."""
        return tier == TIER and checkpoint not in self._node.witness.intact

    def _let_go(self, order: Prune | MakeRoom) -> None:
        """Check that the newest healthy one stays, of those that nobody has let go before."""
        staying = [item for item in self._healthy(order.tier) if Source(item, order.tier) not in self._leaving]
        stays = not staying or staying[-1] not in order.ids or self._is_damaged(staying[-1], order.tier)
        self._require(stays, f"{staying[-1:]} is let go, the newest healthy")
        self._leaving |= {Source(item, order.tier) for item in order.ids}

    def steps_back_beyond(self, checkpoint: CheckpointId) -> bool:
        """Whether the job is about to begin with something older, for a NaN: this was let go before that."""
        at_most = self._node.witness.at_most
        return self._bad is not None and at_most is not None and checkpoint.step > at_most

    def checkpoint_leaves(self, checkpoint: CheckpointId, tier: str) -> None:
        """Check that it is not the only healthy one there; what was let go may have proved healthy only then."""
        healthy = self._healthy(tier)
        stays = healthy != [checkpoint] or self._is_damaged(checkpoint, tier)
        self._require(stays, f"{checkpoint} is removed from {tier}, the last healthy one")

    def excuses(self, error: CkptdError) -> bool:
        """Whether a job may end with an error because nothing that proved healthy ever came to a tier."""
        witness, node = self._node.witness, self._node
        there = {*node.disk.manifests, *node.bucket.manifests, *witness.memory}
        return "is suspect" in error.message and not there & self._proven

    def job_finished(self) -> None:
        """Check what a finished job leaves."""
        last = max(self._node.disk.manifests, default=None)
        self._require(last not in self.spoilt, f"{last} is what the job ends with, and came of a NaN")

    def _require(self, holds: bool, message: str) -> None:
        if self._node.options.nan_at:
            self._node.witness.require(holds, message)
