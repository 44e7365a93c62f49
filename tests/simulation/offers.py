"""What a model agent offers: the slots of all ranks, or a checkpoint on the disk, to be read part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.restore import MEMORY, Source
from tests.simulation.clock import Signal
from tests.simulation.disk import Disk, Manifest
from tests.simulation.memory import Cell, Slot

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent


@dataclass(slots=True)
class Offer:
    """What the ranks of one generation may read."""

    generation: int
    source: Source
    digested: bool
    """Whether who reads can tell damage: a snapshot has digests once it was flushed."""
    ready: Signal
    slots: dict[int, Slot]
    manifest: Manifest | None
    disk: Disk

    @classmethod
    def make(cls, agent: ModelAgent, order: e.Admit) -> Offer:
        """Offer what an admission says; a snapshot without digests takes a while to describe."""
        source, node = order.offer, agent.node
        assert source is not None
        ready = Signal(node.clock)
        slots: dict[int, Slot] = {}
        manifest, digested = None, True
        if source.tier == MEMORY:
            snapshot = agent.machine.keeper.book.snapshots.get(source.id)
            node.witness.require(snapshot is not None, f"{source} is offered and not there")
            assert snapshot is not None
            slots = {rank: agent.arena.slots[rank][number] for rank, number in snapshot.slots.items()}
            digested = source.id in agent.known_digests
        else:
            manifest = node.disk.manifests.get(source.id)
            node.witness.require(manifest is not None, f"{source} is offered and not there")
        delay_s = 0.0 if digested else node.rng.uniform(0, 0.2)
        node.clock.after(delay_s, agent, "offer", ready.fire)
        return cls(order.generation, source, digested, ready, slots, manifest, node.disk)

    def read(self, rank: int, part: int) -> tuple[Cell | None, bool]:
        """Return a part of a rank's shard, and whether it is seen to be damaged."""
        if self.manifest is None:
            cell = self.slots[rank].cells[part]
            return cell, self.digested and cell is None
        cell = self.disk.read(self.manifest, rank, part)
        return cell, cell != self.manifest.digests[rank][part]
