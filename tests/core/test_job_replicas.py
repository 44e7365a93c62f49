"""Replicated tensors that are not the same on all ranks, and ranks with a single slot."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from tests.core.script import Script, cid

LOST = ["announce None", "log replicas differ", "whole", "release 0:1", "release 1:1"]


def announced(job: Script, step: int) -> None:
    """Let an interval pass, and a capture of `step` be announced."""
    job.now_s += 10
    assert f"announce {step}" in job.progress(step - 1)


def logs(job: Script, event: str) -> list[dict[str, object]]:
    """Return the fields of the last effects' log lines of one event."""
    return [dict(effect.fields) for effect in job.effects if isinstance(effect, e.Log) and effect.event == event]


# --- replicas -----------------------------------------------------------------------------------------------------


def test_replicas_that_agree_say_nothing(captured):
    """Proves that equal witnesses change nothing about a snapshot."""
    announced(captured, 20)
    captured.sealed(0, 20, slot=1, w="same")
    assert captured.sealed(1, 20, slot=1, w="same")[:2] == ["announce None", "flush g1/s20"]
    assert not captured.machine.keeper.book.whole


def test_replicas_that_differ_void_the_snapshot(captured):
    """Proves that it is not flushed, that the log names tensor, ranks and step, and that all ranks hear `whole`."""
    announced(captured, 20)
    assert captured.sealed(0, 20, slot=1, w="a", v="x") == []
    assert captured.sealed(1, 20, slot=1, w="b", v="x") == LOST
    (fields,) = logs(captured, "replicas differ")
    assert (fields["tensor"], fields["ranks"], fields["step"]) == ("w", [1], 20)
    assert "replicated" in fields["hint"]
    assert captured.machine.keeper.counters.abandoned == 1


def test_the_next_snapshot_follows_at_once(captured):
    """Proves that the interval is not waited out for the first snapshot that counts, which needs no witness."""
    announced(captured, 20)
    captured.sealed(0, 20, slot=1, w="a")
    captured.sealed(1, 20, slot=1, w="b")
    captured.now_s += 1
    assert captured.progress(21) == ["announce 22"]
    assert captured.all_sealed(22, slot=1)[:2] == ["announce None", "flush g1/s22"]
    assert captured.machine.keeper.book.newest.id == cid("g1/s22")


def test_a_restart_begins_with_what_was_before_the_dispute(captured):
    """Proves that earlier snapshots stay usable, and that every later generation captures whole from its start."""
    announced(captured, 20)
    captured.sealed(0, 20, slot=1, w="a")
    captured.sealed(1, 20, slot=1, w="b")
    assert captured.all_die()[-1] == "claim 2 after g1/s10"
    captured.up_to_spawned(2)
    assert captured.joined(0) == ["admit 0 to 2 with g1/s10 from memory, whole"]
    assert captured.joined(1) == ["admit 1 to 2 with g1/s10 from memory, whole"]


def test_a_rank_that_did_not_know_yet_makes_no_snapshot(captured):
    """Proves that a last step sealed before the word came is void as well, with a reason, and no second `whole`."""
    announced(captured, 20)
    captured.sealed(0, 20, slot=1, w="a")
    captured.sealed(0, 21, slot=0, final=True, w="a")
    assert "whole" in captured.sealed(1, 20, slot=1, w="b")
    lines = captured.sealed(1, 21, slot=0, final=True)
    assert lines == ["announce None", "log snapshot abandoned", "release 0:0", "release 1:0"]
    assert captured.machine.keeper.book.newest.id == cid("g1/s10")


def test_a_wish_outlives_a_dispute(captured):
    """Proves that somebody who asked for a checkpoint gets the next one."""
    captured.feed(e.CheckpointWanted())
    assert captured.progress(12) == ["announce 13"]
    captured.sealed(0, 13, slot=1, w="a")
    captured.sealed(1, 13, slot=1, w="b")
    assert captured.machine.keeper.wished
    assert captured.progress(14)[0].startswith("announce")


# --- one slot per rank --------------------------------------------------------------------------------------------


@pytest.fixture
def single() -> Script:
    """A job with one slot per rank that has committed step 10."""
    job = Script(slots=1)
    job.begin_training()
    job.now_s += 1.0
    job.progress(2)
    assert job.capture(10, 0) == ["announce None", "flush g1/s10"]
    return job


def test_the_only_slot_is_given_up_for_the_next_capture(single):
    """Proves that the slot is released before the step is announced, and that until then memory has the snapshot."""
    assert single.committed("g1/s10") == ["log checkpoint committed"]
    assert single.machine.keeper.book.newest.id == cid("g1/s10")
    single.now_s += 10
    assert single.progress(19) == ["release 0:0", "release 1:0", "announce 20"]
    assert single.all_die()[-1] == "fetch g1/s10"


def test_what_is_on_no_tier_keeps_its_only_slot(single):
    """Proves that a snapshot whose flush is under way or has failed is never given up, however often one is due."""
    single.now_s += 10
    assert single.progress(19) == ["log checkpoint skipped"]
    single.flush_failed("g1/s10")
    single.feed(e.CheckpointWanted())
    assert single.progress(20) == []
    assert single.all_die()[-1] == "claim 2 after g1/s10"


def test_a_last_step_gets_the_only_slot_by_asking(single):
    """Proves that a rank which waits with its last step for the slot gets it, without waiting for the interval."""
    single.committed("g1/s10")
    single.now_s += 1
    assert single.progress(12) == []
    single.feed(e.CheckpointWanted())
    assert single.progress(12)[:2] == ["release 0:0", "release 1:0"]
    single.sealed(0, 12, slot=0, final=True)
    assert single.sealed(1, 12, slot=0, final=True) == ["announce None", "flush g1/s12"]


def test_a_last_step_right_after_a_restart_gets_the_only_slot(single):
    """Proves that no pace of training needs to be known for that, since no step is to come."""
    single.committed("g1/s10")
    single.all_die()
    single.up_to_training(2, first_step=11, restores=True)
    assert single.feed(e.CheckpointWanted()) == []
    assert single.progress(11) == ["release 0:0", "release 1:0"]
    assert single.progress(11) == []
    single.sealed(0, 11, slot=0, final=True)
    assert single.sealed(1, 11, slot=0, final=True) == ["announce None", "flush g2/s11"]


def test_an_offer_keeps_its_only_slot_until_all_have_restored(single):
    """Proves that nothing is announced, and so nothing given up, while a rank has yet to restore from it."""
    single.committed("g1/s10")
    single.all_die()
    single.up_to_joined(2)
    single.feed(e.RankRestored(0, 0.1))
    single.feed(e.RankStepped(0, 11, single.now_s))
    single.feed(e.CheckpointWanted())
    for step in (11, 12, 13):
        single.now_s += 20
        assert single.feed(e.Progress({0: step})) == []
    single.feed(e.RankRestored(1, 0.1))
    single.feed(e.RankStepped(1, 11, single.now_s))
    single.now_s += 1
    assert single.progress(14)[:2] == ["release 0:0", "release 1:0"]
