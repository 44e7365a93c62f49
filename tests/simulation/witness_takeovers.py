"""The part of the witness that knows what of an agent's memory is left to the next one: what ranks still hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.adopt_events import RankReturned
from ckptd.types import CheckpointId

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent
    from tests.simulation.node import Node
    from tests.simulation.witness import Witness


class TakeoverWitness:
    """All takeovers of one run."""

    def __init__(self, witness: Witness, node: Node) -> None:
        self._witness, self._node = witness, node
        self.count = 0
        self.lost = CheckpointId(0, 0)
        """The newest snapshot that went with its ranks while no agent was there."""
        self._announced: set[int] | None = None
        """The steps that the present agent has announced; None as long as it is the first one."""

    def begins(self) -> None:
        """Note that an agent takes over, and what of the memory is still in somebody's hands."""
        self.count += 1
        self._announced = set()
        self._witness.at_most = self._node.journal.at_most_step
        self.forget_lost()

    def agent_begins(self) -> None:
        """Note that an agent begins without anything."""
        self._announced = None

    def forget_lost(self) -> None:
        """Forget snapshots of which a slot is in nobody's hands any more."""
        witness, agent = self._witness, self._node.agent
        held = {id(slot) for slots in agent.arena.slots.values() for slot in slots.values()} if agent.alive else set()
        held |= {id(slot) for process in self._node.processes() if process.alive for slot in process.slots.values()}
        lost = [item for item, slots in witness.memory.items() if not all(id(slot) in held for slot in slots)]
        for item in lost:
            del witness.memory[item]
            self.lost = max(item, self.lost)
            witness.seen["memory lost with a rank"] += 1

    def is_void(self, event: e.RankSealed) -> bool:
        """Whether nobody waits for a step that was sealed: the agent that had announced it is dead."""
        return self._announced is not None and not event.final and event.step not in self._announced

    def announced(self, effect: e.Announce) -> None:
        """Note what the present agent announces."""
        if self._announced is not None and effect.step is not None:
            self._announced.add(effect.step)

    def returned(self, event: RankReturned, agent: ModelAgent) -> None:
        """Check what a rank hands back, and note which snapshots are complete with it."""
        witness = self._witness
        witness.seen["rank returned"] += 1
        for shard in event.sealed:
            slot = agent.arena.slots[event.rank][shard.slot]
            if not slot.flipped:
                witness.check_content(tuple(slot.cells), event.rank, shard.id, "handed back")
            witness.sealed_by(event.rank, shard.id, shard.slot, shard.witness)
