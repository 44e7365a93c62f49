"""A job that goes well: begins, trains, checkpoints and ends."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from ckptd.errors import AgentError
from tests.core.script import Script, cid


def test_a_clean_run_from_begin_to_end(job):
    """Proves the whole straight line of effects from an empty store to a finished job."""
    assert job.begin() == ["read store"]
    assert job.store() == ["claim 1 after None"]
    assert job.claimed(1) == ["log generation started", "spawn generation 1, restart 0"]
    assert job.spawned() == []
    assert job.joined(0) == ["admit 0 to 1 with nothing"]
    assert job.state == "starting"
    assert job.joined(1) == ["admit 1 to 1 with nothing"]
    assert job.state == "running"
    job.now_s = 1.0
    assert job.stepped(1) == []
    job.now_s = 2.0
    assert job.progress(1) == []
    job.now_s = 11.0
    assert job.progress(9) == ["announce 10"]
    assert job.sealed(0, 10, slot=0) == []
    assert job.sealed(1, 10, slot=0) == ["announce None", "flush g1/s10"]
    assert job.committed("g1/s10") == ["log checkpoint committed"]
    assert job.all_sealed(12, slot=1, final=True) == ["announce None", "flush g1/s12", "release 0:0", "release 1:0"]
    assert job.left(0, 12) == []
    assert job.left(1, 12) == []
    assert job.committed("g1/s12") == ["log checkpoint committed", "dismiss 0", "dismiss 1"]
    assert job.exited(0) == []
    assert job.exited(1) == ["end finished"]
    assert job.state == "finished"


def test_a_finished_job_hears_nothing_more(starting):
    """Proves that inputs after the end have no effect."""
    starting.exited(0)
    assert starting.exited(1) == ["end finished"]
    assert (
        starting.die(0) == starting.wait(60) == starting.stop() == starting.claimed(2) == starting.store("g1/s5") == []
    )


def test_a_script_without_ckptd_is_warned_about_and_finishes(starting):
    """Proves that ranks which never attach are named once after half a minute, and that the job ends with them."""
    assert starting.wait(29) == []
    assert starting.wait(2) == ["log ranks not attached"]
    assert starting.wait(60) == []
    assert starting.state == "running"
    starting.exited(0)
    assert starting.exited(1) == ["end finished"]


def test_a_rank_that_leaves_alone_is_not_held(starting):
    """Proves that a rank whose peers never attach is let go, since nothing of it will ever be committed."""
    starting.joined(0)
    assert starting.left(0, 5) == []
    assert starting.wait(31) == ["log ranks not attached", "dismiss 0"]
    starting.exited(0)
    assert starting.exited(1) == ["end finished"]


def test_ranks_are_held_until_the_last_commit(training):
    """Proves that a rank which has left is dismissed only once its last snapshot is durable."""
    assert training.all_sealed(3, slot=0, final=True) == ["announce None", "flush g1/s3"]
    training.left(0, 3)
    assert training.left(1, 3) == []
    assert training.wait(5) == []
    assert training.committed("g1/s3")[1:] == ["dismiss 0", "dismiss 1"]


def test_a_rank_that_is_past_the_step_makes_the_lead_grow(training):
    """Proves that a missed step is abandoned, its slots come back, and the next one is announced further ahead."""
    training.now_s = 11.0
    assert training.progress(9) == ["announce 10"]
    training.sealed(0, 10, slot=0)
    assert training.missed(1, 10) == ["announce None", "release 0:0"]
    assert training.progress(10) == ["announce 12"]
    assert training.missed(0, 12)[0] == "announce None"
    assert training.progress(12) == ["announce 16"]
    assert training.machine.keeper.counters.missed == 2


def test_a_lead_that_luck_made_long_shrinks_again(training):
    """Proves that captures which succeed undo the doubling, or a long job would end with an endless lead."""
    training.now_s = 11.0
    training.progress(9)
    training.missed(0, 10)
    assert training.progress(10) == ["announce 12"]
    training.all_sealed(12, slot=0)
    training.committed("g1/s12")
    assert training.machine.keeper.cadence.misses == 0
    training.now_s = 22.0
    assert training.progress(19) == ["announce 20"]


def test_a_capture_that_fails_is_no_reason_to_hurry(training):
    """Proves that an error of one rank's capture abandons the step and waits for the next interval."""
    training.now_s = 11.0
    training.progress(9)
    assert training.missed(0, 10, AgentError("no")) == ["announce None", "log snapshot abandoned"]
    assert training.progress(11) == []
    training.now_s = 21.5
    assert training.progress(19) == ["announce 20"]


def test_a_miss_of_another_step_changes_nothing(training):
    """Proves that a late word about an abandoned step does not abandon the present one."""
    training.now_s = 11.0
    assert training.progress(9) == ["announce 10"]
    assert training.missed(0, 7) == []
    assert training.all_sealed(10, slot=0) == ["announce None", "flush g1/s10"]


def test_a_busy_disk_skips_captures_and_says_so(captured):
    """Proves that with every slot being flushed a capture is skipped, counted and logged, and training goes on."""
    assert captured.capture(20, 1) == ["announce None", "flush g1/s20", "release 0:0", "release 1:0"]
    assert captured.capture(30, 0) == ["announce None"]
    captured.now_s += 10
    assert captured.progress(39) == ["log checkpoint skipped"]
    assert captured.progress(40) == []
    assert captured.machine.keeper.counters.skipped == 1
    assert captured.committed("g1/s20") == [
        "log checkpoint committed", "flush g1/s30", "release 0:1", "release 1:1",
    ]  # fmt: skip


def test_a_wish_is_answered_at_the_next_boundary(captured):
    """Proves that somebody who asks for a checkpoint does not wait for the interval."""
    captured.now_s += 2
    assert captured.progress(12) == []
    assert captured.feed(e.CheckpointWanted()) == []
    assert captured.progress(12) == ["announce 13"]
    captured.all_sealed(13, slot=1)
    assert captured.progress(14) == []


def test_a_wish_that_comes_to_nothing_is_tried_again(captured):
    """Proves that a wish outlives the step that was meant to answer it, even a restart."""
    captured.feed(e.CheckpointWanted())
    assert captured.progress(12) == ["announce 13"]
    captured.sealed(0, 13, slot=1)
    captured.all_die(1)
    captured.up_to_training(2, first_step=11, restores=True)
    captured.now_s += 1
    assert captured.progress(12) == ["announce 13"]


def test_what_retention_lets_go_is_pruned_after_the_commit():
    """Proves that the oldest checkpoint goes only when the newest is on the disk."""
    job = Script(keep=2)
    job.begin_training()
    job.capture(10, 0)
    job.committed("g1/s10")
    job.capture(20, 1)
    job.committed("g1/s20")
    job.capture(30, 0)
    assert job.committed("g1/s30") == ["log checkpoint committed", "prune g1/s10, keep g1/s30 g1/s20"]


def test_slots_are_needed_before_a_capture(starting):
    """Proves that nothing is announced as long as a rank has no slot to capture into."""
    starting.feed(e.RankJoined(0, starting.pids[0]))
    starting.lend(0)
    starting.feed(e.RankJoined(1, starting.pids[1]))
    starting.stepped(1)
    starting.progress(1)
    starting.now_s = 11.0
    assert starting.progress(9) == ["log checkpoint skipped"]
    starting.lend(1)
    starting.now_s = 21.5
    assert starting.progress(19) == ["announce 20"]


def test_an_early_step_survives_a_final_seal(training):
    """Proves that the announced step before the last one completes although another rank has sealed its end already."""
    training.now_s = 11.0
    assert training.progress(9) == ["announce 10"]
    assert training.sealed(0, 10, slot=0) == []
    assert training.sealed(0, 11, slot=1, final=True) == []
    assert training.sealed(1, 10, slot=0) == ["announce None", "flush g1/s10"]
    assert training.sealed(1, 11, slot=1, final=True) == ["announce None"]
    assert training.committed("g1/s10") == ["log checkpoint committed", "flush g1/s11", "release 0:0", "release 1:0"]


def test_a_step_beyond_the_end_is_abandoned(training):
    """Proves that a step which training does not reach gives way to the final snapshot."""
    training.now_s = 11.0
    assert training.progress(9) == ["announce 10"]
    assert training.sealed(0, 9, slot=0, final=True) == ["announce None", "log snapshot abandoned"]
    assert training.sealed(1, 9, slot=0, final=True) == ["announce None", "flush g1/s9"]


def test_the_announced_step_may_be_the_last(training):
    """Proves that one rank's announced capture and another's final one of the same step make one snapshot."""
    training.now_s = 11.0
    training.progress(9)
    assert training.sealed(0, 10, slot=0) == []
    assert training.sealed(1, 10, slot=0, final=True) == ["announce None", "flush g1/s10"]


def test_a_slow_store_shows_the_last_commit_of_before(job):
    """Proves that the status of a resumed job names what the store holds, before this run has committed anything."""
    job.begin()
    job.store("g2/s30", "g1/s20", last_generation=3)
    assert job.machine.keeper.last_committed.id == cid("g2/s30")


@pytest.mark.parametrize("event", [e.RankRestored(0, 0.1), e.RankStepped(0, 1, 0.0), e.RankLeft(0, 1)])
def test_who_has_not_joined_is_not_heard(starting, event):
    """Proves that a rank without a place can't move the job."""
    assert starting.feed(event) == []
    assert starting.state == "starting"


def test_metrics_do_not_take_the_log_s_own_words(training):
    """Proves that a metric named like a part of the log line neither hides it nor crashes the agent that logs it."""
    training.machine.keeper.book.announce(cid("g1/s3"), 0.0)
    metrics = {"loss": 0.5, "event": 1.0, "step": 99.0, "self": 2.0}
    for rank in training.ranks:
        training.feed(e.RankSealed(rank, 3, 0, 4096, 0.1, metrics, final=False))
    (flush,) = [effect for effect in training.effects if isinstance(effect, e.Flush)]
    assert flush.values == metrics
    training.committed("g1/s3")
    fields = training.effects[0].fields
    assert (fields["step"], fields["loss"]) == (3, 0.5)
    assert not {"event", "self"} & set(fields)
