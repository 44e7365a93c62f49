"""Snapshots and slots: single rules on literals; `test_snapshot_slots` has all of them at once against a model."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from ckptd.core.snapshots import SealedShard, SnapshotBook, SnapshotEvent, SnapshotState
from ckptd.errors import InvariantError
from tests.core.script import cid


@pytest.fixture
def book() -> SnapshotBook:
    """A book of two ranks with slots 0 and 1 each."""
    made = SnapshotBook(2)
    for rank in range(2):
        made.lend(rank, (0, 1))
    return made


def shard(slot: int, reported: Mapping[str, float] | None = None, **witness: str) -> SealedShard:
    """Return a rank's part."""
    return SealedShard(slot, 4096, reported or {}, witness)


def seal(book: SnapshotBook, text: str, slot: int, *, ranks: tuple[int, ...] = (0, 1)) -> None:
    """Announce a snapshot if need be, and seal it."""
    if cid(text) not in book.snapshots:
        book.announce(cid(text), 0.0)
    for rank in ranks:
        book.seal(cid(text), rank, shard(slot), now_s=1.0)


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
        book.seal(cid("g1/s10"), rank, shard(0, {"loss": rank + 0.5, f"own{rank}": 1.0}), now_s=1.0)
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
    late = book.seal(cid("g1/s10"), 1, shard(0), now_s=1.0)
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


def test_nothing_is_announced_twice(book):
    """Proves that a second beginning of the same snapshot is taken for the bug that it is."""
    book.announce(cid("g1/s10"), 0.0)
    with pytest.raises(InvariantError, match="announced twice"):
        book.announce(cid("g1/s10"), 0.0)


# --- witnesses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("witnesses", "differing"),
    [
        ([{}, {}, {}], {}),
        ([{"w": "a"}, {"w": "a"}, {"w": "a"}], {}),
        ([{"w": "a"}, {}, {}], {}),
        ([{"w": "a"}, {"v": "b"}, {"u": "c"}], {}),
        ([{"w": "a"}, {"w": "b"}, {"w": "a"}], {"w": (1,)}),
        ([{"w": "b"}, {"w": "a"}, {"w": "a"}], {"w": (0,)}),
        ([{"w": "a"}, {"w": "b"}, {}], {"w": (1,)}),
        ([{}, {"w": "b"}, {"w": "a"}], {"w": (2,)}),
        ([{"w": "a"}, {"w": "b"}, {"w": "c"}], {"w": (1, 2)}),
        ([{"w": "a", "v": "x"}, {"w": "b", "v": "x"}, {"w": "a", "v": "y"}], {"w": (1,), "v": (2,)}),
    ],
)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_which_replicas_differ(witnesses, differing, order):
    """Proves that a tensor which several ranks name has to be the same on all, and who is said to be the odd one."""
    made = SnapshotBook(3)
    made.announce(cid("g1/s10"), 0.0)
    for rank in order:
        last = made.seal(cid("g1/s10"), rank, shard(0, **witnesses[rank]), now_s=1.0)
    assert last.differing == differing
    assert last.state is (SnapshotState.DISPUTED if differing else SnapshotState.SEALED)


def test_a_disputed_snapshot_is_neither_offered_nor_flushed(book):
    """Proves that differing replicas void a snapshot, give its slots back, and leave the one before it in place."""
    seal(book, "g1/s10", 0)
    book.announce(cid("g1/s20"), 0.0)
    book.seal(cid("g1/s20"), 0, shard(1, w="a"), now_s=1.0)
    book.seal(cid("g1/s20"), 1, shard(1, w="b"), now_s=1.0)
    assert book.newest.id == book.unflushed.id == cid("g1/s10")
    assert sorted(book.release()) == [(0, 1), (1, 1)]
    assert book.can_capture()


@pytest.mark.parametrize(
    ("witnesses", "state"),
    [
        (({}, {}), SnapshotState.SEALED),
        (({"w": "a"}, {}), SnapshotState.DISPUTED),
        (({}, {"w": "a"}), SnapshotState.DISPUTED),
        (({"w": "a"}, {"w": "a"}), SnapshotState.DISPUTED),
    ],
)
def test_once_replicas_differ_nothing_that_is_shared_out_counts(book, witnesses, state):
    """Proves that what a rank shared out before it knew, at an announced step or its last, makes no snapshot."""
    book.whole = True
    book.announce(cid("g1/s10"), 0.0)
    for rank, witness in enumerate(witnesses):
        last = book.seal(cid("g1/s10"), rank, shard(0, **witness), now_s=1.0)
    assert last.state is state


# --- one slot per rank ------------------------------------------------------------------------------------------------


@pytest.fixture
def single() -> SnapshotBook:
    """A book of two ranks with one slot each."""
    made = SnapshotBook(2, slots_per_rank=1)
    for rank in range(2):
        made.lend(rank, (0,))
    return made


def test_a_single_slot_is_given_up_once_it_is_committed(single):
    """Proves that the newest snapshot makes room for the next only when a tier has it, and no sooner than asked."""
    assert single.can_capture()
    seal(single, "g1/s10", 0)
    single.make_room()
    assert (single.can_capture(), single.release()) == (False, [])
    snapshot = single.snapshots[cid("g1/s10")]
    snapshot.move(SnapshotEvent.FLUSH)
    single.make_room()
    assert (single.can_capture(), single.release()) == (False, [])
    snapshot.move(SnapshotEvent.FLUSH_FAILED)
    assert not single.can_capture()
    snapshot.move(SnapshotEvent.FLUSH)
    snapshot.move(SnapshotEvent.COMMIT)
    assert single.can_capture()
    assert single.release() == []
    assert single.newest.id == cid("g1/s10")
    single.make_room()
    assert single.newest is None
    assert sorted(single.release()) == [(0, 0), (1, 0)]


def test_a_single_slot_that_is_free_costs_nothing(single):
    """Proves that a snapshot in slots which are not lent any more is kept when larger ones are free."""
    seal(single, "g1/s10", 0)
    single.snapshots[cid("g1/s10")].move(SnapshotEvent.FLUSH)
    single.snapshots[cid("g1/s10")].move(SnapshotEvent.COMMIT)
    for rank in range(2):
        single.lend(rank, (1,))
    single.make_room()
    assert single.newest.id == cid("g1/s10")


def test_of_two_slots_none_is_given_up(book):
    """Proves that with two slots the newest snapshot stays, committed or not."""
    seal(book, "g1/s10", 0)
    for event in (SnapshotEvent.FLUSH, SnapshotEvent.COMMIT):
        book.snapshots[cid("g1/s10")].move(event)
    for rank in range(2):
        book.lend(rank, (0,))
    book.make_room()
    assert not book.can_capture()
    assert book.newest.id == cid("g1/s10")


def test_without_slots_nothing_can_be_captured():
    """Proves that a rank which was lent nothing yet keeps a capture from being announced."""
    made = SnapshotBook(2)
    made.lend(0, (0, 1))
    assert not made.can_capture()
