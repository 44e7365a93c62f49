"""Snapshots and slots in any order of events, held against a model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ckptd.core.snapshots import SealedShard, SnapshotBook, SnapshotEvent, SnapshotState
from ckptd.types import CheckpointId


class Slots(RuleBasedStateMachine):
    """Ranks, a flush and restarts in any order, against a model that knows who may write what.

    `writable` is what the ranks may write: lent, and not handed over by a seal. A rank only ever seals a slot from
    there, as the control page has it; the book gives it back with `release`.
    """

    WORLD = 2
    SLOTS = 2

    def __init__(self) -> None:
        super().__init__()
        self.book = SnapshotBook(self.WORLD, self.SLOTS)
        self.step = 0
        self.generation = 1
        self.writable = {(rank, slot) for rank in range(self.WORLD) for slot in range(self.SLOTS)}
        self.content: dict[tuple[int, int], CheckpointId] = {}
        self.sealed: dict[CheckpointId, dict[int, int]] = {}
        self.refused: set[CheckpointId] = set()
        self.committed: set[CheckpointId] = set()
        self.differ = False
        for rank in range(self.WORLD):
            self.book.lend(rank, tuple(range(self.SLOTS)))

    def settle(self) -> None:
        """Let the book give slots back, each of which must have been handed over."""
        complete = self.complete()
        flushing = None if self.book.flushing is None else self.book.flushing.id
        for old in complete:
            if old != max(complete) and old != flushing:
                del self.sealed[old]  # superseded
        freed = self.book.release()
        assert len(set(freed)) == len(freed)
        for slot in freed:
            assert slot not in self.writable, f"{slot} was released while nobody held it"
            self.writable.add(slot)

    def complete(self) -> list[CheckpointId]:
        """Return what all ranks have sealed and nobody has refused, by the model's own book."""
        return [item for item, slots in self.sealed.items() if len(slots) == self.WORLD and item not in self.refused]

    @precondition(lambda self: not self.book.unsealed and self.book.can_capture())
    @rule(gap=st.integers(1, 3))
    def announce(self, gap):
        self.step += gap
        checkpoint = CheckpointId(self.generation, self.step)
        self.book.make_room()
        if len(self.writable) < self.WORLD:
            given_up = max(self.complete())
            assert given_up in self.committed, f"{given_up} was given up and is on no tier"
            del self.sealed[given_up]
        self.settle()
        assert {rank for rank, _ in self.writable} == set(range(self.WORLD))
        self.book.announce(checkpoint, 0.0)
        self.sealed[checkpoint] = {}

    @precondition(lambda self: self.book.unsealed)
    @rule(rank=st.integers(0, WORLD - 1), witness=st.sampled_from("aaaaaab"))
    def seal(self, rank, witness):
        checkpoint = self.book.unsealed[0].id
        if rank in self.sealed[checkpoint]:
            return
        slot = min(slot for owner, slot in self.writable if owner == rank)
        self.writable.remove((rank, slot))
        self.content[(rank, slot)] = checkpoint
        self.sealed[checkpoint][rank] = slot
        self.differ = self.differ or (rank == 0 and witness == "b")
        sealed = self.book.seal(checkpoint, rank, SealedShard(slot, 1, {}, {"w": str(self.differ and rank)}), now_s=0.0)
        if sealed.state is SnapshotState.DISPUTED:
            assert self.differ
            del self.sealed[checkpoint]
            self.differ = False
        self.settle()

    @precondition(lambda self: self.book.unsealed)
    @rule()
    def abandon(self):
        self.differ = False
        snapshot = self.book.unsealed[0]
        snapshot.move(SnapshotEvent.ABANDON)
        del self.sealed[snapshot.id]
        self.settle()

    @precondition(lambda self: self.book.unflushed is not None and self.book.flushing is None)
    @rule()
    def flush(self):
        assert self.book.unflushed.id == max(self.complete())
        self.book.unflushed.move(SnapshotEvent.FLUSH)
        self.settle()

    @precondition(lambda self: self.book.flushing is not None)
    @rule(event=st.sampled_from([SnapshotEvent.COMMIT, SnapshotEvent.FLUSH_FAILED]))
    def flush_ends(self, event):
        if event is SnapshotEvent.COMMIT:
            self.committed.add(self.book.flushing.id)
        self.book.flushing.move(event)
        self.settle()

    @precondition(lambda self: self.book.newest is not None)
    @rule()
    def restore_fails(self):
        self.refused.add(self.book.newest.id)
        self.book.refuse(self.book.newest.id)
        self.settle()

    @precondition(lambda self: not self.book.unsealed)
    @rule()
    def restart(self):
        self.generation += 1
        self.step = self.book.newest.id.step if self.book.newest else 0

    @invariant()
    def the_newest_complete_is_held(self):
        complete = self.complete()
        assert (self.book.newest is None) == (not complete)
        if complete:
            newest = self.book.newest
            assert newest.id == max(complete)
            for place in newest.slots.items():
                assert place not in self.writable
                assert self.content[place] == newest.id

    @invariant()
    def what_is_flushed_is_held(self):
        if self.book.flushing is not None:
            for place in self.book.flushing.slots.items():
                assert place not in self.writable
                assert self.content[place] == self.book.flushing.id

    @invariant()
    def no_slot_is_held_twice(self):
        places = [place for item in self.book.snapshots.values() for place in item.slots.items()]
        assert len(places) == len(set(places))
        assert sum(item.state is SnapshotState.FLUSHING for item in self.book.snapshots.values()) <= 1
        held = {(rank, slot) for rank in range(self.WORLD) for slot in self.book.held(rank)}
        assert held.isdisjoint(self.writable)


Slots.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


class Single(Slots):
    """The same with one slot per rank, which the newest snapshot leaves when the next is announced."""

    SLOTS = 1


Single.TestCase.settings = Slots.TestCase.settings


class TestSingle(Single.TestCase):
    """Proves the same for one slot per rank, and that nothing is given up before it is committed."""


class TestSlots(Slots.TestCase):
    """Proves that in any order of events no slot is held twice or released while needed, and the newest stays."""
