"""Snapshots and slots: single rules on literals, and all of them at once against a model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from ckptd.core.snapshots import SnapshotBook, SnapshotEvent, SnapshotState
from ckptd.errors import InvariantError
from ckptd.types import CheckpointId
from tests.core.script import cid


@pytest.fixture
def book() -> SnapshotBook:
    """A book of two ranks with slots 0 and 1 each."""
    made = SnapshotBook(2)
    for rank in range(2):
        made.lend(rank, (0, 1))
    return made


def seal(book: SnapshotBook, text: str, slot: int, *, ranks: tuple[int, ...] = (0, 1)) -> None:
    """Announce a snapshot if need be, and seal it."""
    if cid(text) not in book.snapshots:
        book.announce(cid(text), 0.0)
    for rank in ranks:
        book.seal(cid(text), (rank, slot), 4096, {}, now_s=1.0)


def test_a_snapshot_is_complete_with_the_last_rank(book):
    """Proves that a restart can begin with a snapshot only once every rank has sealed it."""
    seal(book, "g1/s10", 0, ranks=(0,))
    assert book.newest is None
    assert [item.id for item in book.unsealed] == [cid("g1/s10")]
    seal(book, "g1/s10", 0, ranks=(1,))
    assert book.newest.id == cid("g1/s10")
    assert book.newest.slots == {0: 0, 1: 0}
    assert book.unflushed.id == cid("g1/s10")
    assert book.unsealed == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_whose_metrics_count(book, order):
    """Proves that a metric which several ranks report is the lowest rank's, whoever seals last."""
    book.announce(cid("g1/s10"), 0.0)
    for rank in order:
        book.seal(cid("g1/s10"), (rank, 0), 4096, {"loss": rank + 0.5, f"own{rank}": 1.0}, now_s=1.0)
    assert book.newest.values == {"loss": 0.5, "own0": 1.0, "own1": 1.0}


def test_a_newer_snapshot_frees_the_older(book):
    """Proves that the slots of a superseded snapshot come back, once, and no other."""
    seal(book, "g1/s10", 0)
    assert book.release() == []
    seal(book, "g1/s20", 1)
    assert sorted(book.release()) == [(0, 0), (1, 0)]
    assert book.release() == []
    assert book.held(0) == {1: cid("g1/s20")}


def test_what_a_flush_reads_stays(book):
    """Proves that a snapshot which is being flushed keeps its slots although a newer one is complete."""
    seal(book, "g1/s10", 0)
    book.snapshots[cid("g1/s10")].move(SnapshotEvent.FLUSH)
    seal(book, "g1/s20", 1)
    assert book.release() == []
    assert not book.can_capture()
    assert sorted(item.id for item in book.complete) == [cid("g1/s10"), cid("g1/s20")]
    book.snapshots[cid("g1/s10")].move(SnapshotEvent.COMMIT)
    assert sorted(book.release()) == [(0, 0), (1, 0)]
    assert book.can_capture()


def test_the_slots_of_an_abandoned_snapshot_come_back(book):
    """Proves that the early ranks of a void snapshot get their slots back, and latecomers too."""
    seal(book, "g1/s10", 0, ranks=(0,))
    book.unsealed[0].move(SnapshotEvent.ABANDON)
    assert book.release() == [(0, 0)]
    late = book.seal(cid("g1/s10"), (1, 0), 4096, {}, now_s=1.0)
    assert late.state is SnapshotState.VOID
    assert book.release() == [(1, 0)]
    assert book.newest is None


def test_a_refused_snapshot_goes_unless_it_is_read(book):
    """Proves that a snapshot which failed to restore is not offered, and goes after the flush that reads it."""
    seal(book, "g1/s10", 0)
    book.snapshots[cid("g1/s10")].move(SnapshotEvent.FLUSH)
    book.refuse(cid("g1/s10"))
    book.refuse(cid("g1/s99"))
    assert book.newest is None
    assert book.release() == []
    book.snapshots[cid("g1/s10")].move(SnapshotEvent.FLUSH_FAILED)
    assert sorted(book.release()) == [(0, 0), (1, 0)]


def test_a_step_back_refuses_what_is_newer(book):
    """Proves that the newest snapshot up to the step asked for becomes the newest of all."""
    seal(book, "g1/s10", 0)
    book.snapshots[cid("g1/s10")].move(SnapshotEvent.FLUSH)
    seal(book, "g1/s20", 1)
    book.refuse_newer_than(15)
    assert book.newest.id == cid("g1/s10")
    assert sorted(book.release()) == [(0, 1), (1, 1)]


def test_an_adopted_checkpoint_is_complete_and_durable(book):
    """Proves that what was fetched is offered like any snapshot, and is not flushed again."""
    book.adopt(cid("g1/s10"), {0: 1, 1: 0}, {0: 4096, 1: 4096})
    assert book.newest.id == cid("g1/s10")
    assert book.unflushed is None
    assert book.held(0) == {1: cid("g1/s10")}
    assert book.held(1) == {0: cid("g1/s10")}


def test_a_generation_counts_before_a_step(book):
    """Proves that a lower step of a newer generation is the newer snapshot."""
    seal(book, "g1/s90", 0)
    seal(book, "g2/s15", 1)
    assert book.newest.id == cid("g2/s15")
    assert sorted(book.release()) == [(0, 0), (1, 0)]


def test_slots_lent_anew_do_not_free_what_old_ones_hold(book):
    """Proves that larger slots don't make the book forget what lies in the smaller ones."""
    seal(book, "g1/s10", 0)
    book.lend(0, (2, 3))
    assert book.held(0) == {0: cid("g1/s10")}
    assert book.can_capture()


def test_nothing_is_announced_or_fetched_twice(book):
    """Proves that a second beginning of the same snapshot is taken for the bug that it is."""
    book.announce(cid("g1/s10"), 0.0)
    with pytest.raises(InvariantError, match="announced twice"):
        book.announce(cid("g1/s10"), 0.0)
    with pytest.raises(InvariantError, match="though it is in memory"):
        book.adopt(cid("g1/s10"), {}, {})


def test_without_slots_nothing_can_be_captured():
    """Proves that a rank which was lent nothing yet keeps a capture from being announced."""
    made = SnapshotBook(2)
    made.lend(0, (0, 1))
    assert not made.can_capture()


class Slots(RuleBasedStateMachine):
    """Ranks, a flush and restarts in any order, against a model that knows who may write what.

    `writable` is what the ranks may write: lent, and not handed over by a seal. A rank only ever seals a slot from
    there, as the control page has it; the book gives it back with `release`.
    """

    WORLD = 2

    def __init__(self) -> None:
        super().__init__()
        self.book = SnapshotBook(self.WORLD)
        self.step = 0
        self.generation = 1
        self.writable = {(rank, slot) for rank in range(self.WORLD) for slot in range(2)}
        self.content: dict[tuple[int, int], CheckpointId] = {}
        self.sealed: dict[CheckpointId, dict[int, int]] = {}
        self.refused: set[CheckpointId] = set()
        for rank in range(self.WORLD):
            self.book.lend(rank, (0, 1))

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
        self.book.announce(checkpoint, 0.0)
        self.sealed[checkpoint] = {}

    @precondition(lambda self: self.book.unsealed)
    @rule(rank=st.integers(0, WORLD - 1))
    def seal(self, rank):
        checkpoint = self.book.unsealed[0].id
        if rank in self.sealed[checkpoint]:
            return
        slot = min(slot for owner, slot in self.writable if owner == rank)
        self.writable.remove((rank, slot))
        self.content[(rank, slot)] = checkpoint
        self.sealed[checkpoint][rank] = slot
        self.book.seal(checkpoint, (rank, slot), 1, {}, now_s=0.0)
        self.settle()

    @precondition(lambda self: self.book.unsealed)
    @rule()
    def abandon(self):
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

    @precondition(lambda self: self.book.newest is None and self.book.flushing is None and not self.book.unsealed)
    @rule()
    def fetch(self):
        self.step += 1
        checkpoint = CheckpointId(self.generation, self.step)
        slots = {rank: min(slot for owner, slot in self.writable if owner == rank) for rank in range(self.WORLD)}
        for place in slots.items():
            self.writable.remove(place)
            self.content[place] = checkpoint
        self.sealed[checkpoint] = dict(slots)
        self.book.adopt(checkpoint, slots, {})
        self.generation += 1

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


class TestSlots(Slots.TestCase):
    """Proves that in any order of events no slot is held twice or released while needed, and the newest stays."""
