"""A job whose disk is full: what goes for the next checkpoint, in which order, and what it costs when nothing may."""

from __future__ import annotations

import pytest

from ckptd.core.events import RestartWanted, SetupFailed
from ckptd.core.prune_events import Collect, MakeRoom
from ckptd.errors import FullError, StoreError
from tests.core.bucket import commit, logged, train, with_bucket
from tests.core.script import BUCKET, TIER, Script, cid

FULL = FullError("no space left on device")


@pytest.fixture
def full() -> Script:
    """A job with three checkpoints on its disk, whose fourth flush finds no room."""
    job = Script(keep=9)
    train(job)
    for place, step in enumerate((10, 20, 30)):
        commit(job, step, place % 2)
    job.capture(40, 1)
    assert job.flush_failed("g1/s40", FULL) == ["log flush failed", "make room: keep g1/s30 g1/s20 g1/s10"]
    return job


def test_garbage_goes_first(full):
    """Proves that the flush is tried again at once when what is no checkpoint has made room enough."""
    assert full.room_made(2 * 4096) == ["flush g1/s40"]
    assert len(full.machine.keeper.tiers.held[TIER]) == 3


def test_then_old_checkpoints_that_only_their_turn_keeps(full):
    """Proves that as many go as the snapshot needs, oldest first, and that the flush follows when they are gone."""
    assert full.room_made(100) == ["make room: g1/s10 keep g1/s30 g1/s20"]
    assert full.effects[0].reasons == ("the tier is full, and nothing but keep_last keeps it",)
    assert full.room_made(8192, "g1/s10") == ["flush g1/s40"]
    assert cid("g1/s10") not in [source.id for source in full.machine.offers.stored]
    assert full.flush_failed("g1/s40", FULL)[1] == "make room: keep g1/s30 g1/s20"
    assert full.room_made(8192) == ["make room: g1/s20 keep g1/s30"], "its own left-overs are no room for it"


def test_the_newest_stays_and_the_snapshot_is_skipped_and_said(full):
    """Proves that when nothing may go the snapshot stays in memory, that this is said once, and tried again later."""
    full.machine.keeper.tiers.held[TIER] = {cid("g1/s30"): full.machine.keeper.tiers.held[TIER][cid("g1/s30")]}
    assert full.room_made(92) == ["log checkpoint skipped"]
    (fields,) = logged(full, "checkpoint skipped")
    assert fields == {
        "step": 40, "tier": TIER, "reason": "the tier is full, and nothing there may go", "missing_bytes": 8100,
    }  # fmt: skip
    assert full.machine.keeper.counters.skipped == 1
    assert full.wait(0.9) == []
    assert full.wait(0.2) == ["flush g1/s40"]
    full.flush_failed("g1/s40", FULL)
    assert full.room_made(0) == []
    assert full.all_die()[-1] == "claim 2 after g1/s40"


def test_what_would_not_go_is_still_there(full):
    """Proves that a checkpoint which can't be removed is offered and judged as before, and is not tried in a loop."""
    assert full.room_made(100) == ["make room: g1/s10 keep g1/s30 g1/s20"]
    assert cid("g1/s10") not in [source.id for source in full.machine.offers.stored]
    assert full.room_made(0, "g1/s10", left={"g1/s10": ()}) == ["log checkpoint skipped"]
    assert logged(full, "checkpoint skipped")[0]["reason"] == "the tier is full, and what may go does not"
    assert cid("g1/s10") in full.machine.keeper.tiers.held[TIER]
    assert cid("g1/s10") in [source.id for source in full.machine.offers.stored]
    assert full.wait(0.9) == []
    assert full.wait(0.2) == ["flush g1/s40"]


def test_what_got_a_name_is_no_room(full):
    """Proves that a checkpoint which was tagged while the job ran stays one, and that the next oldest goes instead."""
    full.room_made(100)
    assert full.room_made(0, "g1/s10", left={"g1/s10": ("paper",)}) == ["make room: g1/s20 keep g1/s30 g1/s10"]
    assert full.room_made(8192, "g1/s20") == ["flush g1/s40"]
    assert full.machine.keeper.tiers.held[TIER][cid("g1/s10")].tags == ("paper",)


def test_what_got_a_name_can_be_stepped_back_to():
    """Proves that a checkpoint which retention would let go, but for its new name, is still offered to a restart."""
    job = Script(keep=1)
    train(job)
    commit(job, 10, 0)
    assert any(line.startswith("prune g1/s10,") for line in commit(job, 20, 1))
    assert job.pruned("g1/s10", left={"g1/s10": ("good",)}) == []
    commit(job, 30, 0)
    job.pruned("g1/s20")
    assert job.feed(RestartWanted(10))[-1] == "kill 9"
    job.all_die()
    assert job.wait(0.0) == [] and job.fetched("g1/s10") == ["claim 2 after g1/s10"]


def test_a_restart_that_finds_no_room_for_its_record():
    """Proves that garbage goes for it, then a checkpoint, and that the job waits when nothing may go."""
    job = Script(keep=9)
    train(job)
    commit(job, 10, 0)
    commit(job, 20, 1)
    job.all_die()
    assert job.feed(SetupFailed(FULL)) == ["log claim postponed", "make room: keep g1/s20 g1/s10"]
    assert job.room_made(0) == []
    assert job.wait(4.9) == []
    assert job.wait(0.2) == ["claim 2 after g1/s20"]
    assert job.feed(SetupFailed(FULL)) == ["log claim postponed", "make room: g1/s10 keep g1/s20"]
    assert job.room_made(8192, "g1/s10") == []
    assert job.wait(0.0) == ["claim 2 after g1/s20"]
    job.feed(SetupFailed(FULL))
    assert job.room_made(0) == []
    assert (job.wait(1.0), job.state) == ([], "preparing")
    assert job.wait(4.1) == ["claim 2 after g1/s20"]
    assert job.claimed(2)[-1] == "spawn generation 2, restart 1"
    assert job.wait(20.0) == []


def test_a_state_folder_that_is_full_ends_no_job() -> None:
    """Proves that a job waits with its restart until the state folder can be written, and pays with no checkpoint."""
    job = Script(keep=9)
    train(job)
    commit(job, 10, 0)
    commit(job, 20, 1)
    job.all_die()
    for _ in range(3):
        assert job.feed(SetupFailed(StoreError("no space left on device"), passing=True)) == ["log claim postponed"]
        assert job.wait(4.9) == []
        assert job.wait(0.2) == ["claim 2 after g1/s20"]
    assert job.claimed(2)[-1] == "spawn generation 2, restart 1"


def test_a_start_that_finds_no_room_for_its_record_is_an_error():
    """Proves that a job which has nothing to lose yet does not wait for room."""
    job = Script()
    job.begin()
    job.store()
    assert job.feed(SetupFailed(FULL)) == ["end failed: FullError: no space left on device"]


def test_a_newer_snapshot_takes_its_turn(full):
    """Proves that room is made for what is the newest by then, and that one order is under way at a time."""
    assert "flush g1/s40" in full.capture(50, 0)
    assert full.flush_failed("g1/s40", FULL) == ["log flush failed", "release 0:1", "release 1:1"]
    assert full.room_made(8192) == ["flush g1/s50"]


def test_room_for_a_snapshot_that_is_gone_is_no_bug(full):
    """Proves that an answer which nobody needs any more does nothing."""
    full.wait(1.0)
    full.committed("g1/s40")
    assert full.room_made(0) == []


def test_what_is_to_be_uploaded_is_no_room():
    """Proves that what is under way to the bucket stays on a full disk."""
    job = train(with_bucket(keep=9, backlog=1))
    for place, step in enumerate((10, 20, 30)):
        commit(job, step, place % 2)
    job.capture(40, 1)
    job.flush_failed("g1/s40", FULL)
    assert job.room_made(0) == ["make room: g1/s20 keep g1/s30 g1/s10"]


def test_other_failures_make_no_room(full):
    """Proves that a disk which fails in another way keeps what it has."""
    job = train(Script())
    job.capture(10, 0)
    assert job.flush_failed("g1/s10") == ["log flush failed"]


def collected(job: Script) -> list[tuple[str, int | None]]:
    """Return where garbage is looked for after the last input, and from which generation on records are needed."""
    return [(effect.tier, effect.needed_from) for effect in job.effects if isinstance(effect, Collect)]


def test_garbage_is_looked_for_with_the_first_commit_and_each_hour():
    """Proves when a tier is searched, each by its own clock, and that records are kept while a tier is unknown."""
    job = train(with_bucket())
    commit(job, 10, 0)
    assert collected(job) == [(TIER, 1)]
    job.uploaded("g1/s10")
    assert collected(job) == [(BUCKET, 1)]
    commit(job, 20, 1)
    assert collected(job) == []
    job.now_s += 3600
    commit(job, 30, 0)
    assert collected(job) == [(TIER, 1)]
    assert not any(isinstance(effect, MakeRoom) for effect in job.effects)


def test_records_are_kept_while_a_tier_could_not_be_read():
    """Proves that the oldest generation counts as unknown until every tier has been seen once."""
    job = with_bucket()
    job.begin()
    job.store("g4/s20", last_generation=4, unread={BUCKET: FULL})
    job.fetched("g4/s20")
    job.up_to_training(5, first_step=21, restores=True)
    job.now_s += 1.0
    job.progress(22)
    commit(job, 40, 0, generation=5)
    assert collected(job) == [(TIER, None)]
