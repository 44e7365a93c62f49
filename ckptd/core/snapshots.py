"""Snapshots and the slots that hold them: which are sealed, being flushed, committed, and which may be reused.

A snapshot is announced for a future step, sealed rank by rank, flushed once every rank has sealed, and committed when
its manifest stands on a tier. Two rules keep a restart possible at any instant: the newest complete snapshot is never
released, and neither is one that a flush is reading. With one slot per rank the first can't hold: there the newest is
given up for the next capture, but only once it is on a tier.

The first rule is also what keeps an offer whole. A generation that begins with a snapshot in memory reads the slots of
all ranks, and a rank may come late, while others train. Only a newer complete snapshot lets the offered one go, and to
be complete it must have been sealed by every rank, each of which restored before. Nor is it given up before: captures
are announced only when every rank has finished a step. So nobody writes a slot from which somebody still restores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from ckptd.core.adopt_events import HeldShard
from ckptd.core.table import TransitionTable
from ckptd.errors import invariant
from ckptd.types import CheckpointId


class SnapshotState(Enum):
    """Where a snapshot is on its way from an announced step to a checkpoint."""

    ANNOUNCED = "announced"
    SEALED = "sealed"
    FLUSHING = "flushing"
    COMMITTED = "committed"
    DISPUTED = "disputed"
    VOID = "void"
    SUPERSEDED = "superseded"


class SnapshotEvent(Enum):
    """What can happen to a snapshot."""

    ALL_SEALED = "all ranks sealed"
    RANKS_DIFFER = "ranks differ"
    ABANDON = "abandon"
    FLUSH = "flush"
    COMMIT = "commit"
    FLUSH_FAILED = "flush failed"
    SUPERSEDE = "a newer one is complete"
    GIVE_UP = "its slots are needed"
    FOUND = "found on a tier"


SNAPSHOT_TABLE: TransitionTable[SnapshotState, SnapshotEvent] = TransitionTable(
    "snapshot",
    {
        SnapshotState.ANNOUNCED: {
            SnapshotEvent.ALL_SEALED: SnapshotState.SEALED,
            SnapshotEvent.RANKS_DIFFER: SnapshotState.DISPUTED,
            SnapshotEvent.ABANDON: SnapshotState.VOID,
        },
        SnapshotState.SEALED: {
            SnapshotEvent.FLUSH: SnapshotState.FLUSHING,
            SnapshotEvent.FOUND: SnapshotState.COMMITTED,
            SnapshotEvent.SUPERSEDE: SnapshotState.SUPERSEDED,
        },
        SnapshotState.FLUSHING: {
            SnapshotEvent.COMMIT: SnapshotState.COMMITTED,
            SnapshotEvent.FLUSH_FAILED: SnapshotState.SEALED,
        },
        SnapshotState.COMMITTED: {
            SnapshotEvent.SUPERSEDE: SnapshotState.SUPERSEDED,
            SnapshotEvent.GIVE_UP: SnapshotState.SUPERSEDED,
        },
        SnapshotState.DISPUTED: {},
        SnapshotState.VOID: {},
        SnapshotState.SUPERSEDED: {},
    },
)

Slot = tuple[int, int]
"""Rank and slot number."""


class SealedShard(NamedTuple):
    """One rank's part of a snapshot: where it lies, the metrics that the rank reported, and its witness."""

    slot: int
    image_bytes: int
    reported: Mapping[str, float]
    witness: Mapping[str, str]


@dataclass(slots=True)
class Snapshot:
    """One step's state in memory; `shards` are by rank."""

    id: CheckpointId
    announced_at_s: float
    state: SnapshotState = SnapshotState.ANNOUNCED
    shards: dict[int, SealedShard] = field(default_factory=dict)
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
    def slots(self) -> dict[int, int]:
        """Where it lies: a slot of each rank that has sealed."""
        return {rank: shard.slot for rank, shard in self.shards.items()}

    @property
    def image_bytes(self) -> dict[int, int]:
        """How much of its slot each shard takes, by rank."""
        return {rank: shard.image_bytes for rank, shard in self.shards.items()}

    @property
    def values(self) -> dict[str, float]:
        """The metrics of all ranks; of one that several report, the lowest rank's."""
        ranks = sorted(self.shards, reverse=True)
        return {name: value for rank in ranks for name, value in self.shards[rank].reported.items()}

    @property
    def shared_out(self) -> bool:
        """Whether any rank has captured but its share of replicated tensors."""
        return any(shard.witness for shard in self.shards.values())

    @property
    def differing(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors in the witnesses, those that are not the same on all ranks, and which ranks are alone."""
        digests: dict[str, dict[int, str]] = {}
        for rank in sorted(self.shards):
            for name, digest in self.shards[rank].witness.items():
                digests.setdefault(name, {})[rank] = digest
        odd: dict[str, tuple[int, ...]] = {}
        for name, by_rank in sorted(digests.items()):
            usual, count = Counter(by_rank.values()).most_common(1)[0]  # of a tie, the lowest rank's
            if count < len(by_rank):
                odd[name] = tuple(rank for rank, digest in by_rank.items() if digest != usual)
        return odd

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

    def __init__(self, world_size: int, slots_per_rank: int = 2) -> None:
        self.world_size = world_size
        self.slots_per_rank = slots_per_rank
        self.whole = False
        """Whether replicated tensors proved to differ: then a snapshot counts only if no rank has shared them out."""
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

    def seal(self, checkpoint: CheckpointId, rank: int, shard: SealedShard, *, now_s: float) -> Snapshot:
        """Note that a rank has sealed its shard; the snapshot is complete with the last rank's, unless they differ."""
        self._holds[(rank, shard.slot)] = checkpoint
        snapshot = self.snapshots.get(checkpoint)
        if snapshot is None or snapshot.state is not SnapshotState.ANNOUNCED:
            # Abandoned meanwhile: the slot is released with the next release().
            return snapshot or Snapshot(checkpoint, now_s, SnapshotState.VOID)
        snapshot.shards[rank] = shard
        if len(snapshot.shards) == self.world_size:
            differs = snapshot.differing or (self.whole and snapshot.shared_out)
            snapshot.move(SnapshotEvent.RANKS_DIFFER if differs else SnapshotEvent.ALL_SEALED)
            snapshot.sealed_at_s = now_s
        return snapshot

    def adopt(
        self,
        shards: Mapping[Slot, HeldShard],
        committed: Collection[CheckpointId],
        trusted: Collection[CheckpointId],
        now_s: float,
    ) -> list[Snapshot]:
        """Take in what slots hold that came from another agent: complete snapshots, of which some are `committed`.

        Those in `trusted` that agent has found complete itself, before replicas differed. What some ranks have sealed
        and others have not is void, unless it is their last and the others are on the way. Returns those whose ranks
        differ.
        """
        for (rank, slot), item in shards.items():
            snapshot = self.snapshots.setdefault(item.id, Snapshot(item.id, now_s))
            snapshot.shards[rank] = SealedShard(slot, item.image_bytes, item.values, item.witness)
            snapshot.capture_s = max(snapshot.capture_s, item.capture_s)
            self._holds[(rank, slot)] = item.id
        final = {item.id for item in shards.values() if item.final}
        found = {item.id: self.snapshots[item.id] for item in shards.values()}.values()
        for snapshot in found:
            if len(snapshot.shards) == self.world_size:
                unproven = self.whole and snapshot.shared_out and snapshot.id not in trusted
                differs = snapshot.differing or unproven
                snapshot.move(SnapshotEvent.RANKS_DIFFER if differs else SnapshotEvent.ALL_SEALED)
                snapshot.sealed_at_s = now_s
            elif snapshot.id not in final:
                snapshot.move(SnapshotEvent.ABANDON)
            if snapshot.state is SnapshotState.SEALED and snapshot.id in committed:
                snapshot.move(SnapshotEvent.FOUND)
        return [snapshot for snapshot in found if snapshot.state is SnapshotState.DISPUTED]

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
        """Whether every rank has a slot that holds nothing needed, or has it after `make_room`."""
        return self._has_room() or (self._expendable is not None and self._has_room(self._expendable.id))

    def make_room(self) -> None:
        """Give up what `can_capture` counts upon; its slots come back with release()."""
        if not self._has_room() and self._expendable is not None:
            self._expendable.move(SnapshotEvent.GIVE_UP)

    def _has_room(self, without: CheckpointId | None = None) -> bool:
        return all(
            any(self._holds.get((rank, slot)) in (None, without) for slot in self._lent[rank])
            for rank in range(self.world_size)
        )

    @property
    def _expendable(self) -> Snapshot | None:
        """The newest snapshot, where there is one slot for it and the next, once a restart can begin on a tier."""
        newest = self.newest
        committed = newest is not None and newest.state is SnapshotState.COMMITTED
        return newest if committed and self.slots_per_rank == 1 else None

    def held(self, rank: int) -> dict[int, CheckpointId]:
        """Return what a rank's slots hold, by slot number."""
        return {slot: held for (owner, slot), held in self._holds.items() if owner == rank}

    def release(self) -> list[Slot]:
        """Return the slots that nobody needs any more, and forget what they held."""
        newest = self.newest
        for snapshot in list(self.snapshots.values()):
            done = snapshot.state in (SnapshotState.VOID, SnapshotState.DISPUTED, SnapshotState.SUPERSEDED)
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
