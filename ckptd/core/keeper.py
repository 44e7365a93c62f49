"""The keeper coordinates a job's checkpoints: announces steps, follows seals, orders flushes, uploads and prunes.

It knows nothing of processes; `core.job` tells it when a generation begins and when its ranks are gone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptd.core.adopt_events import HeldShard
from ckptd.core.cadence import Cadence
from ckptd.core.events import (
    Announce,
    CaptureMissed,
    Committed,
    Effect,
    Flush,
    FlushFailed,
    Log,
    RankSealed,
    Release,
    UploadFailed,
    Whole,
)
from ckptd.core.health import Health
from ckptd.core.job_spec import Now, TierSpec
from ckptd.core.number_events import Marked
from ckptd.core.prune_events import RoomMade
from ckptd.core.restore import Source
from ckptd.core.snapshots import SealedShard, Slot, Snapshot, SnapshotBook, SnapshotEvent, SnapshotState
from ckptd.core.tiers import Tiers
from ckptd.errors import FullError
from ckptd.types import CheckpointId, Held

_FLUSH_RETRY_MAX_S = 60.0
_FULL_RETRY_S = 5.0
"""A full tier refuses at once, and how long it stays full has nothing to do with how often it was tried."""
_DOUBLINGS_MAX = 10
_TAKEN = frozenset({"self", "event", "level", "timestamp", "job", "exc_info", "exception", "stack", "stack_info"})
"""What a log line calls its own: a metric of that name is in the manifest only."""
FINAL_FLUSH_TRIES = 4
_DIFFER_HINT = (
    "from now on each rank captures its own copy; synchronise it, or leave it out of `replicated`:"
    " see ckptd/client/README.md"
)


@dataclass(slots=True)
class Counters:
    """What happened to snapshots in this run, for status and tests: no skip is silent."""

    committed: int = 0
    skipped: int = 0
    missed: int = 0
    abandoned: int = 0
    flush_failures: int = 0


class Keeper:
    """Keeps the checkpoints of one job. Every method returns the effects to carry out, in order."""

    def __init__(
        self,
        world_size: int,
        every_s: float,
        tiers: Sequence[TierSpec],
        slots_per_rank: int = 2,
        healthy_after: int = 3,
    ) -> None:
        self.book = SnapshotBook(world_size, slots_per_rank)
        self.health = Health(healthy_after)
        self.tiers = Tiers(tiers, self.health)
        self.every_s = every_s
        self.cadence = Cadence(every_s, 0.0)
        self.counters = Counters()
        self.generation = 0
        self.last_committed: Source | None = None
        self.parents: dict[int, CheckpointId | None] = {}
        """What the generations of this run have begun with."""
        self._retry_flush_at_s = 0.0
        self._making_room = False
        self._no_room_for: CheckpointId | None = None
        """The last snapshot that was said to be skipped for want of room."""
        self._wished = False
        self._answer: CheckpointId | None = None
        self._last: CheckpointId | None = None
        self.ending = False
        """Whether the next capture is to be the job's last, at which the ranks wait."""
        self.last_step: int | None = None
        """Which step that should be, when it matters."""

    def begin(self, generation: int, parent: CheckpointId | None, now_s: float) -> None:
        """Begin a generation; what older generations left in memory stays until something newer is complete."""
        self.resume(generation, parent, now_s)
        self.health.begin(generation, parent)

    def resume(self, generation: int, parent: CheckpointId | None, now_s: float) -> None:
        """Go on with a generation that was begun before; of its checkpoints the health may be known."""
        self.generation = generation
        self.parents[generation] = parent
        self._last, self.ending, self.last_step = None, False, None
        self.cadence = Cadence(self.every_s, now_s)
        self.tiers.begin(generation, parent)
        if self._wished:
            self.cadence.hurry(now_s)

    def adopt(self, shards: Mapping[Slot, HeldShard], trusted: Collection[CheckpointId], now_s: float) -> list[Effect]:
        """Take in what slots hold that came from another agent; want a capture, which somebody may have asked for."""
        disputed = self.book.adopt(shards, self.tiers.held[self.tiers.first], trusted, now_s)
        for snapshot in self.book.complete:
            self.health.returned(snapshot.id)
        self.want(now_s)
        return [effect for item in disputed for effect in self._disputed(item, now_s)] + self._settle(now_s)

    def found(
        self, sources: Sequence[Source], held: Mapping[str, Iterable[Held]], unread: Collection[str] = ()
    ) -> None:
        """Take in what the tiers hold already."""
        self.tiers.found(sources, held, unread)
        if sources:
            self.last_committed = sources[0]

    @property
    def unflushed(self) -> bool:
        """Whether anything complete in memory is on no tier yet."""
        return self.book.flushing is not None or self.book.unflushed is not None

    @property
    def pending(self) -> bool:
        """Whether anything is still to be done for the newest: its flush, or its upload to some tier."""
        return self.unflushed or self.tiers.pending

    # --- capture ----------------------------------------------------------------------------------------------

    def want(self, now_s: float) -> None:
        """Make a capture due now: somebody asked for one. A wish that comes to nothing is tried again."""
        self._wished = True
        self.cadence.hurry(now_s)

    @property
    def wished(self) -> bool:
        """Whether somebody asked for a checkpoint and no step has been announced for it yet."""
        return self._wished

    @property
    def announced(self) -> bool:
        """Whether the ranks are on their way to a step to capture."""
        return bool(self.book.unsealed)

    @property
    def last_announced(self) -> bool:
        """Whether the ranks are on their way to the job's last step."""
        return self._last is not None and any(item.id == self._last for item in self.book.unsealed)

    @property
    def last_captured(self) -> bool:
        """Whether the job's last snapshot is complete."""
        snapshot = None if self._last is None else self.book.snapshots.get(self._last)
        return snapshot is not None and snapshot.complete

    def observe(self, steps: Mapping[int, int], now_s: float, *, may_capture: bool) -> list[Effect]:
        """Take in the ranks' progress and announce the next capture when it is due."""
        self.cadence.observe(steps, now_s)
        if not may_capture or self.announced:
            return []
        waits = self.ending and self.book.slots_per_rank > 1  # at the last step the ranks wait for a slot
        decision = self.cadence.decide(now_s, slots_free=waits or self.book.can_capture())
        released: list[Effect] = []
        if decision.step is not None or self._wished:  # who has no step left asks, and waits for a slot
            self.book.make_room()
            released = self._release()  # before the step is announced: a rank may be there at once
        if decision.step is not None:
            step, self.last_step = max(decision.step, self.last_step or 0), None
            snapshot = self.book.announce(CheckpointId(self.generation, step), now_s)
            self._last = snapshot.id if self.ending else None
            if self._wished or self.ending:  # the last one is wanted whoever asked for it
                self._wished, self._answer = False, snapshot.id
            self.cadence.captured(now_s)
            log = Log("capture announced", {"step": step}, level="debug")
            return [*released, Announce(step, last=self.ending), log]
        if decision.reason == "all slots are busy" and not self._wished:
            self.counters.skipped += 1
            self.cadence.captured(now_s)
            return [Log("checkpoint skipped", {"reason": "every slot is still being flushed"}, level="warning")]
        return released

    def sealed(self, event: RankSealed, now_s: float, *, training: bool = True) -> list[Effect]:
        """Take in a rank's seal; the last rank's makes the snapshot complete and starts its flush.

        A final one needs no announcement, while `training`. An earlier step stays announced: the other ranks have
        passed it, so what they say of it is on its way.
        """
        checkpoint = CheckpointId(self.generation, event.step)
        effects: list[Effect] = []
        if event.final and training and checkpoint not in self.book.snapshots:
            beyond = [item for item in self.book.unsealed if item.id.step > event.step]
            effects += self._abandon(beyond, "training ended before it")
            if checkpoint not in self.tiers.held[self.tiers.first]:  # else it was given up for one beyond
                self.book.announce(checkpoint, now_s)
        shard = SealedShard(event.slot, event.image_bytes, event.values, event.witness)
        snapshot = self.book.seal(checkpoint, event.rank, shard, now_s=now_s)
        snapshot.capture_s = max(snapshot.capture_s, event.capture_s)
        if snapshot.state is SnapshotState.SEALED:
            effects += [Marked()] if self.health.sealed(checkpoint) else []
            self.cadence.met()
            effects.append(Announce(None))
        elif snapshot.state is SnapshotState.DISPUTED:
            effects += self._disputed(snapshot, now_s)
        return effects + self._settle(now_s)

    def _disputed(self, snapshot: Snapshot, now_s: float) -> list[Effect]:
        """Say which tensors differ, and have the next snapshot at once, in which no rank relies on another."""
        self.counters.abandoned += 1
        self._wished = self._wished or snapshot.id == self._answer
        self.cadence.hurry(now_s)
        effects: list[Effect] = [Announce(None)]
        for tensor, ranks in snapshot.differing.items():
            fields = {"tensor": tensor, "ranks": list(ranks), "step": snapshot.id.step, "hint": _DIFFER_HINT}
            effects.append(Log("replicas differ", fields, level="error"))
        if not snapshot.differing:
            fields = {"step": snapshot.id.step, "reason": "some ranks did not know yet that replicas differ"}
            effects.append(Log("snapshot abandoned", fields))
        if not self.book.whole:
            self.book.whole = True
            effects.append(Whole())
        return effects

    def missed(self, event: CaptureMissed, now_s: float) -> list[Effect]:
        """Give up a step that a rank could not capture."""
        missed = [item for item in self.book.unsealed if item.id.step == event.step]
        if not missed:
            return []
        self.counters.missed += 1
        if event.error is None:
            self.cadence.missed(now_s)
            effects = self._abandon(missed, f"rank {event.rank} was past it", level="debug")
        else:
            effects = self._abandon(missed, f"rank {event.rank}: {event.error}", level="error")
        return effects + self._settle(now_s)

    def abandon(self, reason: str, now_s: float) -> list[Effect]:
        """Void whatever is announced and not complete."""
        return self._abandon(self.book.unsealed, reason) + self._settle(now_s)

    def _abandon(self, snapshots: Iterable[Snapshot], reason: str, level: str = "info") -> list[Effect]:
        effects: list[Effect] = []
        for snapshot in snapshots:
            snapshot.move(SnapshotEvent.ABANDON)
            self.counters.abandoned += 1
            self._wished = self._wished or snapshot.id == self._answer
            effects += [
                Announce(None),
                Log("snapshot abandoned", {"step": snapshot.id.step, "reason": reason}, level=level),
            ]
        return effects

    # --- flush and commit -------------------------------------------------------------------------------------

    def _settle(self, now_s: float) -> list[Effect]:
        """Start the flush and the uploads that are due, and hand back slots that nobody needs."""
        effects: list[Effect] = []
        unflushed = self.book.unflushed
        if unflushed is not None and self.book.flushing is None and now_s >= self._retry_flush_at_s:
            unflushed.move(SnapshotEvent.FLUSH)
            effects.append(self.order_of(unflushed))
        return effects + self.tiers.start(now_s) + self._release()

    def _release(self) -> list[Effect]:
        return [Release(rank, slot) for rank, slot in self.book.release()]

    def order_of(self, snapshot: Snapshot) -> Flush:
        """Return what there is to know of a complete snapshot, as the order to flush it."""
        parent = self.parents.get(snapshot.id.generation)
        values = {**snapshot.values, **self.health.notes()}
        return Flush(snapshot.id, parent, snapshot.slots, snapshot.image_bytes, values)

    def tick(self, now_s: float) -> list[Effect]:
        """Retry what failed, when its time has come."""
        return self._settle(now_s)

    def on_committed(
        self, event: Committed, now: Now, *, usable: bool = True, restorable: CheckpointId | None = None
    ) -> list[Effect]:
        """Note that a snapshot is a checkpoint now, upload it, and prune what retention lets go.

        Not `usable` is one that the next restore can't begin with: nothing goes because of it, and it goes nowhere.
        `restorable` is the newest on the tier with which it could.
        """
        snapshot = self.book.snapshots[event.id]
        snapshot.move(SnapshotEvent.COMMIT)
        self._retry_flush_at_s = 0.0
        self.counters.committed += 1
        self.last_committed = Source(event.id, event.tier)
        item = Held(event.id, now.wall, event.size_bytes, snapshot.values)
        skipped = self.tiers.flushed(item, upload=usable)
        sealed_at_s = now.s if snapshot.sealed_at_s is None else snapshot.sealed_at_s
        fields = {
            "generation": event.id.generation,
            "step": event.id.step,
            "tier": event.tier,
            "size_bytes": event.size_bytes,
            "capture_s": round(snapshot.capture_s, 4),
            "flush_s": round(event.flush_s, 4),
            "durable_s": round(now.s - sealed_at_s + snapshot.capture_s, 4),
        }
        fields |= {name: value for name, value in snapshot.values.items() if name not in _TAKEN.union(fields)}
        pruned = self._prune(event.tier, restorable, now.s) if usable else []
        self.forget_health()
        return [Log("checkpoint committed", fields), *skipped, *pruned, *self._settle(now.s)]

    def forget_health(self) -> None:
        """Forget of which checkpoints the health is known that are nowhere any more."""
        everywhere = {item for held in self.tiers.held.values() for item in held}
        self.health.keep(everywhere.union(self.book.snapshots, (source.id for source in self.tiers.going)))

    def _prune(self, tier: str, restorable: CheckpointId | None, now_s: float) -> list[Effect]:
        return self.tiers.prune(tier, restorable) + self.tiers.collect(tier, now_s)

    def on_uploaded(
        self, event: Committed, now: Now, *, usable: bool = True, restorable: CheckpointId | None = None
    ) -> list[Effect]:
        """Note that a checkpoint is on a further tier too, and prune there what retention lets go."""
        self.tiers.uploaded(event.id, event.tier, event.size_bytes, now.wall)
        fields = {
            "generation": event.id.generation,
            "step": event.id.step,
            "tier": event.tier,
            "size_bytes": event.size_bytes,
            "upload_s": round(event.flush_s, 4),
        }
        pruned = self._prune(event.tier, restorable, now.s) if usable else []
        return [Log("checkpoint committed", fields), *pruned, *self._settle(now.s)]

    def on_upload_failed(self, event: UploadFailed, now_s: float) -> list[Effect]:
        """Try again later, or do without it; nothing else waits for it."""
        return self.tiers.failed(event, now_s) + self._settle(now_s)

    def on_flush_failed(self, event: FlushFailed, now_s: float) -> list[Effect]:
        """Keep the snapshot in memory and try again later, a newer one first if there is one by then."""
        snapshot = self.book.snapshots[event.id]
        snapshot.move(SnapshotEvent.FLUSH_FAILED)
        snapshot.flush_failures += 1
        self.counters.flush_failures += 1
        delay_s = min(_FLUSH_RETRY_MAX_S, 0.5 * 2.0 ** min(snapshot.flush_failures, _DOUBLINGS_MAX))
        self._retry_flush_at_s = now_s + delay_s
        fields = {"step": event.id.step, "error": str(event.error), "retry_in_s": delay_s}
        room: list[Effect] = []
        if isinstance(event.error, FullError) and not self._making_room:
            room.append(self.tiers.no_garbage())
            self._making_room = True
        return [Log("flush failed", fields, level="error"), *room, *self._settle(now_s)]

    def want_room(self, restorable: CheckpointId | None, *, garbage_only: bool) -> list[Effect]:
        """Have garbage and, unless that is to be all, a checkpoint go from the first tier; one order at a time."""
        if self._making_room:
            return []
        self._making_room = True
        return [(None if garbage_only else self.tiers.make_room(restorable, 1)) or self.tiers.no_garbage()]

    def on_room_made(self, event: RoomMade, now_s: float, *, restorable: CheckpointId | None = None) -> list[Effect]:
        """Try the flush again that found the first tier full, or let checkpoints go for it first.

        How much is missing nobody says, so it is all of the snapshot; but what the first failure of a snapshot has set
        free is not its own left-over, and counts. When nothing may go any more, or what may go would not, the snapshot
        stays in memory like after any other failure: it or a newer one is tried again later.
        """
        self._making_room = False
        snapshot = self.book.unflushed
        if snapshot is None:
            return self._settle(now_s)
        missing_bytes = sum(snapshot.image_bytes.values())
        if snapshot.flush_failures <= 1:
            missing_bytes -= event.freed_bytes
        if not event.left.keys() >= set(event.ids) or missing_bytes <= 0:
            self._retry_flush_at_s = now_s
            return self._settle(now_s)
        stuck = not all(event.left.values())
        order = None if stuck else self.tiers.make_room(restorable, missing_bytes)
        if order is not None:
            self._making_room = True
            return [order, *self._settle(now_s)]
        self._retry_flush_at_s = min(self._retry_flush_at_s, now_s + _FULL_RETRY_S)
        if self._no_room_for == snapshot.id:
            return self._settle(now_s)
        self._no_room_for = snapshot.id
        self.counters.skipped += 1
        fields: dict[str, object] = {
            "step": snapshot.id.step,
            "tier": event.tier,
            "reason": "the tier is full, and " + ("what may go does not" if stuck else "nothing there may go"),
            "missing_bytes": missing_bytes,
        }
        return [Log("checkpoint skipped", fields, level="warning"), *self._settle(now_s)]

    @property
    def hopeless(self) -> bool:
        """Whether the newest snapshot failed to become durable so often that an ending job stops waiting for it."""
        unflushed = self.book.unflushed
        return unflushed is not None and unflushed.flush_failures >= FINAL_FLUSH_TRIES
