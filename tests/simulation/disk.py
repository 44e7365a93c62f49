"""The model's disk: files, manifests and generation records. It survives the agent; a write may not."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptd.types import CheckpointId
from tests.simulation.memory import PARTS, Cell, Content

File = tuple[CheckpointId, int]
"""The file that a rank's shard of a checkpoint has made."""


@dataclass(slots=True)
class Manifest:
    """What a committed checkpoint consists of: each rank's shard, by the digest that the flush took of it."""

    id: CheckpointId
    digests: dict[int, Content]
    places: dict[int, tuple[CheckpointId, ...]]
    """Whose file of the same rank holds which part: an older one's, when the part has not changed since."""

    @property
    def files(self) -> set[File]:
        """Every file that it needs."""
        return {(place, rank) for rank, places in self.places.items() for place in places}


@dataclass(slots=True)
class Disk:
    """The store of the job. `changes` counts every write, so that a checker knows when to look again."""

    manifests: dict[CheckpointId, Manifest] = field(default_factory=dict)
    removed: dict[CheckpointId, tuple[float, Manifest]] = field(default_factory=dict)
    """Of checkpoints that can be brought back: when they were removed, and their manifests."""
    files: dict[File, Content] = field(default_factory=dict)
    parents: dict[int, CheckpointId | None] = field(default_factory=dict)
    flipped: set[CheckpointId] = field(default_factory=set)
    """Checkpoints of which the simulation has damaged a byte of their own: only who reads it can tell."""
    cut: set[CheckpointId] = field(default_factory=set)
    """Checkpoints of which the simulation has cut a file in half: a look at its size tells."""
    generation_counter: int = 0
    changes: int = 0

    @property
    def damaged(self) -> set[CheckpointId]:
        """What the simulation has damaged."""
        return self.flipped | self.cut

    @property
    def whole(self) -> list[Manifest]:
        """Every checkpoint of which nothing may be missing: the committed ones, and those that can be brought back."""
        return [*self.manifests.values(), *(manifest for _, manifest in self.removed.values())]

    def read(self, manifest: Manifest, rank: int, part: int) -> Cell | None:
        """Return a part of a checkpoint, wherever it lies; None when it is not there."""
        content = self.files.get((manifest.places[rank][part], rank))
        return None if content is None else content[part]

    def content(self, manifest: Manifest, rank: int) -> Content:
        """Return all parts of a rank's shard."""
        return tuple(self.read(manifest, rank, part) for part in range(PARTS))

    def put_file(self, file: File, content: Content) -> None:
        """Write a file, whole or not."""
        self.files[file] = content
        self.changes += 1

    def put_manifest(self, manifest: Manifest) -> bool:
        """Write a manifest, unless there is one already: the commit."""
        if manifest.id in self.manifests:
            return False
        self.manifests[manifest.id] = manifest
        self.changes += 1
        return True

    def delete_manifest(self, checkpoint: CheckpointId, removed_s: float | None = None) -> None:
        """Uncommit a checkpoint; with a time, in such a way that it can be brought back."""
        manifest = self.manifests.pop(checkpoint, None)
        if manifest is not None and removed_s is not None:
            self.removed[checkpoint] = removed_s, manifest
        self.changes += 1

    def delete_file(self, file: File) -> None:
        """Remove a file."""
        self.files.pop(file, None)
        self.changes += 1

    def mended(self, checkpoint: CheckpointId) -> None:
        """Note that a checkpoint's own files are right again."""
        self.flipped.discard(checkpoint)
        self.cut.discard(checkpoint)
        self.changes += 1

    def damage(self, checkpoint: CheckpointId, rank: int, *, cut: bool) -> None:
        """Damage a part that is in a checkpoint's own file: it is not any more what the manifest says."""
        self.files[(checkpoint, rank)] = (None, *self.files[(checkpoint, rank)][1:])
        (self.cut if cut else self.flipped).add(checkpoint)
        self.changes += 1
