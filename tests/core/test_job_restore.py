"""What a job begins with: from the disk, from memory, after damage, and after a step back."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from ckptd.errors import ConfigError, DamagedError, MemoryBudgetError, StateError, StoreError
from tests.core.script import Script, cid

# --- restoring from the disk ---------------------------------------------------------------------------------------


def test_memory_gone_the_newest_checkpoint_is_fetched(job):
    """Proves that a new agent begins with the best of the lineage, adopts it, and prunes by what was there before."""
    job.begin()
    assert job.store("g2/s30", "g1/s20", last_generation=3) == ["fetch g2/s30"]
    assert job.fetched("g2/s30") == ["claim 4 after g2/s30"]
    job.claimed(4)
    job.spawned()
    assert job.joined(0) == ["admit 0 to 4 with g2/s30 from local"]


def test_a_damaged_copy_falls_through_and_never_to_a_fresh_start(job):
    """Proves that a damaged checkpoint makes way for the next older one, and that damage of the last is an error."""
    job.begin()
    job.store("g2/s30", "g1/s20", last_generation=2)
    assert job.fetch_failed("g2/s30") == ["log checkpoint damaged", "fetch g1/s20"]
    lines = job.fetch_failed("g1/s20", DamagedError("shard 1 is cut short"))
    assert lines[0] == "log checkpoint damaged"
    assert lines[-1].startswith("end failed: DamagedError: there are checkpoints of this job, but none can be restored")
    assert "shard 1 is cut short" in lines[-1]


def test_what_lies_beyond_the_restored_one_leaves_the_lineage(job):
    """Proves that a checkpoint found damaged is not offered again, even after the job has restarted."""
    job.begin()
    job.store("g2/s30", "g1/s20", last_generation=2)
    job.fetch_failed("g2/s30")
    job.fetched("g1/s20")
    job.up_to_training(3, first_step=21, restores=True)
    assert [source.id for source in job.machine.offers.stored] == [cid("g1/s20")]
    assert job.all_die()[-1] == "claim 4 after g1/s20"


def test_a_store_that_can_not_be_read_ends_the_job(job):
    """Proves that an unreadable store is an error of its own, not an empty one."""
    job.begin()
    lines = job.feed(e.SetupFailed(StoreError("can't list /runs: permission denied")))
    assert lines == ["end failed: StoreError: can't list /runs: permission denied"]


@pytest.mark.parametrize("error", [ConfigError("written by 4 ranks"), MemoryBudgetError("no memory for slots")])
def test_a_fetch_that_no_older_one_would_cure_ends_the_job(job, error):
    """Proves that a wrong world size or a lack of memory does not walk through all checkpoints."""
    job.begin()
    job.store("g1/s20", "g1/s10", last_generation=1)
    assert job.fetch_failed("g1/s20", error) == [f"end failed: {type(error).__name__}: {error.message}"]


def test_a_snapshot_that_fails_to_restore_is_not_offered_again(job):
    """Proves that damage in memory is remembered: the next generation begins with something older."""
    job.begin()
    job.store("g1/s5", last_generation=1)
    job.fetched("g1/s5")
    job.up_to_training(2, first_step=6, restores=True)
    job.capture(14, 1)
    job.committed("g2/s14")
    job.all_die()
    job.claimed(3)
    job.spawned()
    job.joined(0)
    assert job.feed(e.RestoreFailed(0, cid("g2/s14"), DamagedError("digest differs"))) == ["log restore failed"]
    lines = job.all_die()
    assert "release 0:1" in lines
    assert lines[-1] == "fetch g1/s5"


def test_the_only_snapshot_fails_to_restore(captured):
    """Proves that damage of the last thing there is ends the job with an error, never with a silent fresh start."""
    captured.all_die()
    captured.claimed(2)
    captured.spawned()
    captured.joined(0)
    captured.feed(e.RestoreFailed(0, cid("g1/s10"), DamagedError("digest differs")))
    lines = captured.all_die()
    assert lines[-1].startswith("end failed: DamagedError: there are checkpoints of this job, but none can be restored")
    assert "g1/s10 on local failed to restore before" in lines[-1]


def test_state_that_does_not_fit_is_not_the_snapshot_s_fault(captured):
    """Proves that a snapshot is refused for damage only: what a changed script can't load is still a good snapshot."""
    captured.all_die()
    captured.claimed(2)
    captured.spawned()
    captured.joined(0)
    captured.feed(e.RestoreFailed(0, cid("g1/s10"), StateError("layer 3 does not fit")))
    assert captured.all_die()[-1] == "claim 3 after g1/s10"


def test_a_refused_snapshot_stays_while_its_generation_lives():
    """Proves that a rank which joins after another one failed to restore still finds what it is offered."""
    job = Script(supervised=False)
    job.joined(0)
    job.store("g1/s10", last_generation=1)
    job.fetched("g1/s10")
    assert job.claimed(2)[-1] == "admit 0 to 2 with g1/s10 from local"
    job.feed(e.RestoreFailed(0, cid("g1/s10"), DamagedError("digest differs")))
    assert job.wait(1) == []
    assert job.joined(1) == ["admit 1 to 2 with g1/s10 from local"]
    assert cid("g1/s10") in job.machine.keeper.book.snapshots


def test_a_word_about_a_restore_comes_too_late_once_the_next_is_planned(captured):
    """Proves that a snapshot which is offered already is not taken away any more, it would be missing at the join."""
    captured.all_die()
    captured.feed(e.RestoreFailed(0, cid("g1/s10"), DamagedError("digest differs")))
    captured.wait(1)
    captured.claimed(2)
    captured.spawned()
    assert captured.joined(0) == ["admit 0 to 2 with g1/s10 from memory"]
    assert captured.machine.keeper.book.newest.id == cid("g1/s10")


# --- stepping back -------------------------------------------------------------------------------------------------


def test_a_step_back_leaves_newer_ones_out_of_the_lineage(captured):
    """Proves that after a restart from an older step the newer ones are not offered, in memory or on the disk."""
    captured.capture(20, 1)
    captured.committed("g1/s20")
    assert captured.feed(e.RestartWanted(15))[0] == "log rank failed"
    captured.die(0)
    assert captured.die(1)[-1] == "fetch g1/s10"
    assert captured.fetched("g1/s10", slot=0) == ["claim 2 after g1/s10"]
    captured.up_to_training(2, first_step=11, restores=True)
    assert captured.all_die()[-1] == "claim 3 after g1/s10"


def test_a_step_back_keeps_what_it_has_fetched(captured):
    """Proves that the fetched checkpoint is still there when it is offered, however long the claim takes."""
    captured.capture(20, 1)
    captured.committed("g1/s20")
    captured.feed(e.RestartWanted(15))
    captured.all_die()
    captured.fetched("g1/s10", slot=0)
    captured.wait(1)
    captured.claimed(2)
    captured.spawned()
    assert captured.joined(0) == ["admit 0 to 2 with g1/s10 from local"]
    assert captured.machine.keeper.book.snapshots[cid("g1/s10")].slots == {0: 0, 1: 0}


def test_a_commit_that_a_step_back_has_overtaken_counts_for_nothing():
    """Proves that a late commit of what was left behind neither prunes the target nor comes back into the lineage."""
    job = Script(keep=1)
    job.begin()
    job.store()
    job.up_to_training()
    job.capture(10, 0)
    job.committed("g1/s10")
    job.capture(20, 1)
    job.feed(e.RestartWanted(10))
    job.die(0)
    assert job.die(1)[-1] == "fetch g1/s10"
    assert job.committed("g1/s20") == ["log checkpoint committed", "release 0:1", "release 1:1"]
    job.fetched("g1/s10", slot=0)
    job.up_to_training(2, first_step=11, restores=True)
    assert job.all_die()[-1] == "claim 3 after g1/s10"


def test_a_step_back_finds_what_is_still_being_flushed(captured):
    """Proves that the older of two snapshots in memory is offered from there, and stays until it is."""
    captured.capture(20, 1)
    assert captured.capture(21, 0) == ["announce None"]
    captured.feed(e.RestartWanted(20))
    assert captured.all_die()[-1] == "claim 2 after g1/s20"
    captured.committed("g1/s20")
    captured.claimed(2)
    captured.spawned()
    assert captured.joined(0) == ["admit 0 to 2 with g1/s20 from memory"]


def test_a_step_back_to_nothing_is_refused(captured):
    """Proves that asking for a step older than everything there is does not cost the running job."""
    assert captured.feed(e.RestartWanted(9)) == ["log restore failed"]
    assert captured.state == "running"
    captured.wait(1)
    assert captured.all_die()[-1] == "claim 2 after g1/s10"
