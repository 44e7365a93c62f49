"""What an agent leaves in the journal for the one after it: where a job's machine was, as plain values.

The ranks themselves know better how far they are and what they have sealed; here is what they can't know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptd.core.adopt_events import HeldShard
from ckptd.core.restore import Source
from ckptd.types import CheckpointId

_WITH_RANKS = ("starting", "running", "stopping")


@dataclass(frozen=True, slots=True)
class Handover:
    """Where a job was. `state` is a `JobState`'s value; ranks are numbers."""

    state: str
    generation: int = 0
    offer: Source | None = None
    """What the generation began with."""
    began_s: float = 0.0
    """When it began, on the monotonic clock of the boot."""
    step: int = field(default=0, compare=False)
    """The newest finished step. It changes all the time, so it is no reason to write everything down anew."""
    pids: Mapping[int, int] = field(default_factory=dict)
    joined: frozenset[int] = frozenset()
    restored: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()
    whole: bool = False
    """Whether replicated tensors proved to differ."""
    shards: Mapping[int, tuple[HeldShard, ...]] = field(default_factory=dict)
    """What the slots of each rank hold, of the snapshots that a restart could begin with."""
    parents: Mapping[int, CheckpointId | None] = field(default_factory=dict)
    """What the generations of this run have begun with."""
    refused: frozenset[Source] = frozenset()
    """Copies that failed to restore."""
    at_most_step: int | None = None
    """Where the next generation is to begin at the latest, when the job steps back."""
    recovery: Mapping[str, Any] = field(default_factory=dict)
    """The failures so far, as `Recovery.history` has them."""
    halting: Mapping[str, Any] = field(default_factory=dict)
    """When it is to stop by itself, as `Halting.bounds_now` has it."""

    @property
    def has_ranks(self) -> bool:
        """Whether there were ranks that may train on."""
        return self.state in _WITH_RANKS and self.generation > 0

    def to_json(self) -> dict[str, Any]:
        """Return the form that stands in the journal."""
        return {
            "state": self.state,
            "generation": self.generation,
            "offer": None if self.offer is None else _source(self.offer),
            "began_s": self.began_s,
            "step": self.step,
            "pids": {str(rank): pid for rank, pid in self.pids.items()},
            "joined": sorted(self.joined),
            "restored": sorted(self.restored),
            "left": sorted(self.left),
            "whole": self.whole,
            "shards": {str(rank): [_shard(item) for item in shards] for rank, shards in self.shards.items()},
            "parents": {
                str(number): None if parent is None else list(parent) for number, parent in self.parents.items()
            },
            "refused": sorted(_source(source) for source in self.refused),
            "at_most_step": self.at_most_step,
            "recovery": dict(self.recovery),
            "halting": dict(self.halting),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Handover:
        """Rebuild what `to_json` wrote; raises `KeyError`, `TypeError` or `ValueError` for anything else."""
        offer = data["offer"]
        return cls(
            state=str(data["state"]),
            generation=int(data["generation"]),
            offer=None if offer is None else _read_source(offer),
            began_s=float(data["began_s"]),
            step=int(data["step"]),
            pids={int(rank): int(pid) for rank, pid in data["pids"].items()},
            joined=frozenset(data["joined"]),
            restored=frozenset(data["restored"]),
            left=frozenset(data["left"]),
            whole=bool(data["whole"]),
            shards={int(rank): tuple(map(_read_shard, shards)) for rank, shards in data["shards"].items()},
            parents={
                int(number): None if parent is None else CheckpointId(*parent)
                for number, parent in data["parents"].items()
            },
            refused=frozenset(map(_read_source, data["refused"])),
            at_most_step=data.get("at_most_step"),  # an older version does not know it
            recovery=dict(data["recovery"]),
            halting=dict(data["halting"]),
        )


def _source(source: Source) -> list[Any]:
    return [*source.id, source.tier]


def _read_source(data: list[Any]) -> Source:
    generation, step, tier = data
    return Source(CheckpointId(int(generation), int(step)), str(tier))


def _shard(shard: HeldShard) -> list[Any]:
    return [shard.slot, *shard.id, shard.image_bytes, dict(shard.values), dict(shard.witness)]


def _read_shard(data: list[Any]) -> HeldShard:
    slot, generation, step, image_bytes, values, witness = data
    return HeldShard(slot, CheckpointId(generation, step), image_bytes, values, witness=witness)
