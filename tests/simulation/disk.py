"""The model's disk: shards, manifests and generation records. It survives the agent; a write may not."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptd.types import CheckpointId
from tests.simulation.memory import Content


@dataclass(slots=True)
class Manifest:
    """What a committed checkpoint consists of: each rank's shard, by the digest that the flush took of it."""

    id: CheckpointId
    digests: dict[int, Content]


@dataclass(slots=True)
class Disk:
    """The store of the job. `changes` counts every write, so that a checker knows when to look again."""

    manifests: dict[CheckpointId, Manifest] = field(default_factory=dict)
    shards: dict[tuple[CheckpointId, int], Content] = field(default_factory=dict)
    parents: dict[int, CheckpointId | None] = field(default_factory=dict)
    damaged: set[CheckpointId] = field(default_factory=set)
    """Checkpoints of which the simulation has flipped a shard."""
    generation_counter: int = 0
    changes: int = 0

    def put_shard(self, checkpoint: CheckpointId, rank: int, content: Content) -> None:
        """Write a shard, whole or not."""
        self.shards[(checkpoint, rank)] = content
        self.changes += 1

    def put_manifest(self, manifest: Manifest) -> bool:
        """Write a manifest, unless there is one already: the commit."""
        if manifest.id in self.manifests:
            return False
        self.manifests[manifest.id] = manifest
        self.changes += 1
        return True

    def delete_manifest(self, checkpoint: CheckpointId) -> None:
        """Uncommit a checkpoint."""
        self.manifests.pop(checkpoint, None)
        self.changes += 1

    def delete_shard(self, checkpoint: CheckpointId, rank: int) -> None:
        """Remove a shard."""
        self.shards.pop((checkpoint, rank), None)
        self.changes += 1

    def flip(self, checkpoint: CheckpointId, rank: int) -> None:
        """Damage a stored shard: its bytes are not any more what the manifest says."""
        self.shards[(checkpoint, rank)] = (None, *self.shards[(checkpoint, rank)][1:])
        self.damaged.add(checkpoint)
        self.changes += 1
