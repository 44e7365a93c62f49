"""Snapshots and the slots that hold them: which are sealed, being flushed, committed, and which may be reused.

A snapshot is announced for a future step, sealed rank by rank, flushed once every rank has sealed, and committed when
its manifest stands on a tier. Two rules keep a restart possible at any instant: the newest complete snapshot is never
released, and neither is one that a flush is reading.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from ckptd.core.table import TransitionTable
from ckptd.errors import invariant
from ckptd.types import CheckpointId


class SnapshotState(Enum):
    """Where a snapshot is on its way from an announced step to a checkpoint."""

    ANNOUNCED = "announced"
    SEALED = "sealed"
    FLUSHING = "flushing"
    COMMITTED = "committed"
    VOID = "void"
    SUPERSEDED = "superseded"


class SnapshotEvent(Enum):
    """What can happen to a snapshot."""

    ALL_SEALED = "all ranks sealed"
    ABANDON = "abandon"
    FLUSH = "flush"
    COMMIT = "commit"
    FLUSH_FAILED = "flush failed"
    SUPERSEDE = "a newer one is complete"


SNAPSHOT_TABLE: TransitionTable[SnapshotState, SnapshotEvent] = TransitionTable(
    "snapshot",
    {
        SnapshotState.ANNOUNCED: {
            SnapshotEvent.ALL_SEALED: SnapshotState.SEALED,
            SnapshotEvent.ABANDON: SnapshotState.VOID,
        },
        SnapshotState.SEALED: {
            SnapshotEvent.FLUSH: SnapshotState.FLUSHING,
            SnapshotEvent.SUPERSEDE: SnapshotState.SUPERSEDED,
        },
        SnapshotState.FLUSHING: {
            SnapshotEvent.COMMIT: SnapshotState.COMMITTED,
            SnapshotEvent.FLUSH_FAILED: SnapshotState.SEALED,
        },
        SnapshotState.COMMITTED: {SnapshotEvent.SUPERSEDE: SnapshotState.SUPERSEDED},
        SnapshotState.VOID: {},
        SnapshotState.SUPERSEDED: {},
    },
)

Slot = tuple[int, int]
"""Rank and slot number."""


@dataclass(slots=True)
class Snapshot:
    """One step's state in memory. `slots`, `image_bytes` and `reported`, the metrics, are by rank."""

    id: CheckpointId
    announced_at_s: float
    state: SnapshotState = SnapshotState.ANNOUNCED
    slots: dict[int, int] = field(default_factory=dict)
    image_bytes: dict[int, int] = field(default_factory=dict)
    reported: dict[int, Mapping[str, float]] = field(default_factory=dict)
    capture_s: float = 0.0
    """The longest capture among its ranks: what training paid for it."""
    sealed_at_s: float | None = None
    flush_failures: int = 0
    refused: bool = False
    """It failed to restore, or a step back has left it behind: it must not be offered any more."""

    def move(self, event: SnapshotEvent) -> None:
        """Take a transition of the table."""
        self.state = SNAPSHOT_TABLE.next(self.state, event)

    @property
    def values(self) -> dict[str, float]:
        """The metrics of all ranks; of one that several report, the lowest rank's."""
        ranks = sorted(self.reported, reverse=True)
        return {name: value for rank in ranks for name, value in self.reported[rank].items()}

    @property
    def complete(self) -> bool:
        """Whether a restart can begin with it."""
        return not self.refused and self.state in (
            SnapshotState.SEALED,
            SnapshotState.FLUSHING,
            SnapshotState.COMMITTED,
        )


class SnapshotBook:
    """All snapshots in the memory of one job, and what each lent slot holds."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.snapshots: dict[CheckpointId, Snapshot] = {}
        self._lent: dict[int, tuple[int, ...]] = dict.fromkeys(range(world_size), ())
        self._holds: dict[Slot, CheckpointId] = {}

    def lend(self, rank: int, slots: tuple[int, ...]) -> None:
        """Note which slots a rank may write from now on; slots lent before stay while they hold something needed."""
        self._lent[rank] = slots

    def announce(self, checkpoint: CheckpointId, now_s: float) -> Snapshot:
        """Begin a snapshot of a future step."""
        invariant(checkpoint not in self.snapshots, f"{checkpoint} was announced twice")
        snapshot = Snapshot(checkpoint, now_s)
        self.snapshots[checkpoint] = snapshot
        return snapshot

    def seal(
        self, checkpoint: CheckpointId, place: Slot, image_bytes: int, values: Mapping[str, float], *, now_s: float
    ) -> Snapshot:
        """Note that a rank has sealed its shard; the snapshot is complete with the last rank's."""
        rank, slot = place
        self._holds[place] = checkpoint
        snapshot = self.snapshots.get(checkpoint)
        if snapshot is None or snapshot.state is not SnapshotState.ANNOUNCED:
            # Abandoned meanwhile: the slot is released with the next release().
            return snapshot or Snapshot(checkpoint, now_s, SnapshotState.VOID)
        snapshot.slots[rank] = slot
        snapshot.image_bytes[rank] = image_bytes
        snapshot.reported[rank] = values
        if len(snapshot.slots) == self.world_size:
            snapshot.move(SnapshotEvent.ALL_SEALED)
            snapshot.sealed_at_s = now_s
        return snapshot

    def adopt(self, checkpoint: CheckpointId, slots: Mapping[int, int], image_bytes: Mapping[int, int]) -> Snapshot:
        """Take in a checkpoint that was fetched from a tier into slots: complete, and committed already."""
        invariant(checkpoint not in self.snapshots, f"{checkpoint} was fetched though it is in memory")
        snapshot = Snapshot(checkpoint, 0.0, SnapshotState.COMMITTED, dict(slots), dict(image_bytes))
        self.snapshots[checkpoint] = snapshot
        for rank, slot in slots.items():
            self._holds[(rank, slot)] = checkpoint
        return snapshot

    def refuse(self, checkpoint: CheckpointId) -> None:
        """Never offer a snapshot again; its slots come back with release(), after a flush that reads them."""
        if checkpoint in self.snapshots:
            self.snapshots[checkpoint].refused = True

    def refuse_newer_than(self, step: int) -> None:
        """Refuse what a step back to `step` leaves behind."""
        for snapshot in self.snapshots.values():
            if snapshot.complete and snapshot.id.step > step:
                snapshot.refused = True

    @property
    def unsealed(self) -> list[Snapshot]:
        """What is announced but not complete: one that ranks are on their way to, and at the end the final one."""
        return [item for item in self.snapshots.values() if item.state is SnapshotState.ANNOUNCED]

    @property
    def newest(self) -> Snapshot | None:
        """The newest complete snapshot: what a restart from memory begins with."""
        return max(self.complete, key=lambda item: item.id, default=None)

    @property
    def complete(self) -> list[Snapshot]:
        """All that a restart could begin with: the newest, and one that is still being flushed."""
        return [item for item in self.snapshots.values() if item.complete]

    @property
    def flushing(self) -> Snapshot | None:
        """The snapshot whose flush is under way, at most one."""
        return next((item for item in self.snapshots.values() if item.state is SnapshotState.FLUSHING), None)

    @property
    def unflushed(self) -> Snapshot | None:
        """The newest complete snapshot, when it is on no tier yet."""
        newest = self.newest
        return newest if newest is not None and newest.state is SnapshotState.SEALED else None

    def can_capture(self) -> bool:
        """Whether every rank has a slot that holds nothing needed."""
        return all(any((rank, slot) not in self._holds for slot in self._lent[rank]) for rank in range(self.world_size))

    def held(self, rank: int) -> dict[int, CheckpointId]:
        """Return what a rank's slots hold, by slot number."""
        return {slot: held for (owner, slot), held in self._holds.items() if owner == rank}

    def release(self) -> list[Slot]:
        """Return the slots that nobody needs any more, and forget what they held."""
        newest = self.newest
        for snapshot in list(self.snapshots.values()):
            done = snapshot.state in (SnapshotState.VOID, SnapshotState.SUPERSEDED)
            done = done or (snapshot.refused and snapshot.state is not SnapshotState.FLUSHING)
            older = newest is not None and snapshot.id < newest.id
            if older and SNAPSHOT_TABLE.allows(snapshot.state, SnapshotEvent.SUPERSEDE):
                snapshot.move(SnapshotEvent.SUPERSEDE)
                done = True
            if done:
                del self.snapshots[snapshot.id]
        freed = [slot for slot, held in self._holds.items() if held not in self.snapshots]
        for slot in freed:
            del self._holds[slot]
        return freed
