"""What a job begins with: from the disk, from memory, after damage, of another world size, and after a step back."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from ckptd.core.restore import MEMORY, Source
from ckptd.errors import CkptdError, DamagedError, StateError, StoreError
from tests.core.bucket import with_bucket
from tests.core.script import TIER, Script, cid

# --- restoring from the disk ---------------------------------------------------------------------------------------


def test_memory_gone_the_newest_checkpoint_is_fetched(job):
    """Proves that a new agent begins with the best of the lineage, and that no slot is needed for it."""
    job.begin()
    assert job.store("g2/s30", "g1/s20", last_generation=3) == ["fetch g2/s30"]
    assert job.fetched("g2/s30") == ["claim 4 after g2/s30"]
    job.up_to_spawned(4)
    assert job.joined(0) == ["admit 0 to 4 with g2/s30 from local"]
    assert job.machine.keeper.book.snapshots == {}


@pytest.mark.parametrize(("world_size", "said"), [(4, 4), (2, None), (1, 1)])
def test_a_checkpoint_of_another_world_size_is_offered_like_any(job, world_size, said):
    """Proves that a job may go on with more or fewer ranks than its checkpoint has, and that its log says so."""
    job.begin()
    job.store("g1/s20", last_generation=1)
    assert job.fetched("g1/s20", world_size) == ["claim 2 after g1/s20"]
    assert job.claimed(2) == ["log generation started", "spawn generation 2, restart 0"]
    (started,) = [effect for effect in job.effects if isinstance(effect, e.Log)]
    assert started.fields.get("restore_world_size") == said
    job.spawned()
    assert [job.joined(rank) for rank in job.ranks] == [
        ["admit 0 to 2 with g1/s20 from local"], ["admit 1 to 2 with g1/s20 from local"],
    ]  # fmt: skip


def test_another_world_size_is_said_of_its_own_restore_only(job):
    """Proves that the next generation, which begins with a snapshot of its own ranks, does not repeat it."""
    job.begin()
    job.store("g1/s20", last_generation=1)
    job.fetched("g1/s20", 4)
    job.up_to_training(2, first_step=21, restores=True)
    job.now_s += 1
    job.progress(22)
    job.capture(30, 0)
    job.all_die()
    job.claimed(3)
    assert "restore_world_size" not in job.effects[0].fields


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
    assert job.all_die()[-1] == "fetch g1/s20"


def test_a_store_that_can_not_be_read_ends_the_job(job):
    """Proves that an unreadable store is an error of its own, not an empty one."""
    job.begin()
    lines = job.feed(e.SetupFailed(StoreError("can't list /runs: permission denied")))
    assert lines == ["end failed: StoreError: can't list /runs: permission denied"]


DAMAGED = DamagedError("tensor 'w' of rank 1 is not what was captured")


def fails_to_restore(job: Script, generation: int, checkpoint: str, error: CkptdError = DAMAGED) -> list[str]:
    """Let a generation begin, fail to use what it is offered and end; return what follows."""
    job.up_to_spawned(generation)
    job.joined(0)
    assert job.restore_fails(0, checkpoint, error) == ["log restore failed"]
    return job.all_die()


def test_damage_in_memory_leaves_the_copy_on_the_disk(captured):
    """Proves that only the damaged copy is refused: the same step's copy on the disk is next, and no step is lost."""
    captured.all_die()
    lines = fails_to_restore(captured, 2, "g1/s10")
    assert "release 0:0" in lines
    assert lines[-1] == "fetch g1/s10"
    assert captured.fetched("g1/s10") == ["claim 3 after g1/s10"]


def test_damage_of_every_copy_falls_through_to_an_older_step(captured):
    """Proves the whole descent: memory, the disk's copy of the same step, the step before, and at last an error."""
    captured.capture(20, 1)
    captured.committed("g1/s20")
    captured.all_die()
    assert fails_to_restore(captured, 2, "g1/s20")[-1] == "fetch g1/s20"
    captured.fetched("g1/s20")
    assert fails_to_restore(captured, 3, "g1/s20")[-1] == "fetch g1/s10"
    captured.fetched("g1/s10")
    lines = fails_to_restore(captured, 4, "g1/s10")
    assert lines[-1].startswith("end failed: DamagedError: there are checkpoints of this job, but none can be restored")
    for copy in ("g1/s20 in memory", "g1/s20 on local", "g1/s10 on local"):
        assert f"{copy} failed to restore before" in lines[-1]


def test_a_copy_that_is_damaged_on_the_disk_too_is_written_from_damage(captured):
    """Proves that a flush of what proved damaged in memory makes no copy that a restart would begin with."""
    captured.capture(20, 1)
    captured.all_die()
    assert fails_to_restore(captured, 2, "g1/s20")[-1] == "fetch g1/s10"
    assert captured.committed("g1/s20")[0] == "log checkpoint committed"
    captured.fetched("g1/s10")
    assert fails_to_restore(captured, 3, "g1/s10")[-1].startswith("end failed: DamagedError")
    assert Source(cid("g1/s20"), TIER) in captured.machine.offers.refused


def test_the_log_says_which_copy_was_damaged_and_what_in_it(captured):
    """Proves that the line names the tier, the step, the rank and the damage."""
    captured.all_die()
    captured.up_to_spawned(2)
    captured.joined(0)
    captured.restore_fails(0, "g1/s10", DAMAGED)
    (log,) = captured.effects
    assert log.level == "error"
    assert log.fields == {"rank": 0, "step": 10, "tier": MEMORY, "error": str(DAMAGED)}


@pytest.mark.parametrize("word_first", [True, False])
def test_a_damaged_copy_costs_no_restart_and_no_delay(word_first):
    """Proves that such restarts are neither counted nor delayed, whether the word or the death comes first."""
    job = Script(max_restarts=1, same_exception_limit=2, same_death_limit=2)
    job.begin()
    job.store(*(f"g1/s{step}" for step in range(60, 0, -10)), last_generation=1)
    job.fetched("g1/s60")
    for generation, step in enumerate(range(60, 10, -10), start=2):
        job.up_to_spawned(generation)
        job.joined(0)
        if word_first:
            job.restore_fails(0, f"g1/s{step}", DAMAGED)
            job.die(0)
        else:
            job.die(0)
            job.restore_fails(0, f"g1/s{step}", DAMAGED)
        assert job.die(1)[-1] == f"fetch g1/s{step - 10}"
        assert job.incidents[generation - 1].reasons == (f"step {step} on {TIER} is damaged, and is not offered again",)
        job.fetched(f"g1/s{step - 10}")
    job.up_to_training(generation + 1, first_step=11, restores=True)
    assert job.all_die()[-1] == "fetch g1/s10"
    assert job.machine.recovery.restarts == 5


def test_the_budget_counts_on_behind_a_damaged_copy(captured):
    """Proves that a damaged copy does not wipe out what the script has used up already."""
    captured.machine.recovery.policy = type(captured.machine.recovery.policy)(max_restarts=1)
    captured.all_die()
    assert fails_to_restore(captured, 2, "g1/s10")[-1] == "fetch g1/s10"
    captured.fetched("g1/s10")
    captured.up_to_training(3, first_step=11, restores=True)
    assert "max_restarts is 1" in captured.all_die()[-1]


def test_damage_during_a_restart_on_purpose_keeps_its_target(captured):
    """Proves that a step back which meets a damaged copy goes on to what lies before it, not to anything newer."""
    captured.capture(20, 1)
    captured.committed("g1/s20")
    captured.feed(e.RestartWanted(10))
    captured.all_die()
    captured.fetched("g1/s10")
    lines = fails_to_restore(captured, 2, "g1/s10")
    assert lines[-1].startswith("end failed: DamagedError")


def test_state_that_does_not_fit_is_not_the_snapshot_s_fault(captured):
    """Proves that a snapshot is refused for damage only: what a changed script can't load is still a good snapshot."""
    captured.all_die()
    misfit = StateError("layer 3 does not fit")
    assert fails_to_restore(captured, 2, "g1/s10", misfit)[-1] == "claim 3 after g1/s10"


def test_a_refused_snapshot_stays_while_its_generation_lives():
    """Proves that a rank which joins after another one failed to restore still finds what it is offered."""
    job = Script(supervised=False)
    job.joined(0)
    job.store("g1/s10", last_generation=1)
    job.fetched("g1/s10")
    job.claimed(2)
    job.joined(1)
    job.restored()
    job.stepped(11)
    job.now_s += 1
    job.progress(12)
    job.capture(20, 0)
    job.committed("g2/s20")
    for rank in job.ranks:
        job.die(rank)
    job.joined(0, pid=900)
    job.store("g2/s20", "g1/s10", last_generation=2)
    assert job.claimed(3)[-1] == "admit 0 to 3 with g2/s20 from memory"
    job.restore_fails(0, "g2/s20", DAMAGED)
    assert job.wait(1) == []
    assert job.joined(1, pid=901) == ["admit 1 to 3 with g2/s20 from memory"]
    assert cid("g2/s20") in job.machine.keeper.book.snapshots


@pytest.mark.parametrize("final", [False, True])
def test_what_has_not_restored_can_not_seal(captured, final):
    """Proves that an offered snapshot outlives every rank's restore: none seals, so nothing newer, before its own."""
    captured.all_die()
    captured.up_to_joined(2)
    captured.feed(e.RankRestored(0, 0.1))
    captured.sealed(0, 12, slot=1, final=final)
    assert captured.sealed(1, 12, slot=1, final=final) == []
    assert captured.machine.keeper.book.newest.id == cid("g1/s10")
    assert captured.machine.keeper.book.held(1)[0] == cid("g1/s10")


def test_a_word_about_a_restore_comes_too_late_once_the_next_is_planned(captured):
    """Proves that a snapshot which is offered already is not taken away any more, it would be missing at the join."""
    captured.all_die()
    captured.restore_fails(0, "g1/s10", DAMAGED)
    captured.wait(1)
    captured.up_to_spawned(2)
    assert captured.joined(0) == ["admit 0 to 2 with g1/s10 from memory"]
    assert captured.machine.keeper.book.newest.id == cid("g1/s10")


def test_a_word_about_a_copy_that_is_looked_at_is_heeded(job):
    """Proves that a copy which a rank found damaged is not offered again though it can be, but what comes after it."""
    job.begin()
    job.store("g2/s30", "g1/s20", last_generation=2)
    job.fetched("g2/s30")
    job.up_to_spawned(3)
    assert job.all_die()[-1] == "fetch g2/s30"
    job.restore_fails(0, "g2/s30", DAMAGED)
    assert job.fetched("g2/s30") == ["fetch g1/s20"]
    job.restore_fails(0, "g2/s30", DAMAGED)
    assert job.fetched("g1/s20") == ["claim 4 after g1/s20"]


# --- stepping back -------------------------------------------------------------------------------------------------


def test_a_step_back_leaves_newer_ones_out_of_the_lineage(captured):
    """Proves that after a restart from an older step the newer ones are not offered, in memory or on the disk."""
    captured.capture(20, 1)
    captured.committed("g1/s20")
    assert captured.feed(e.RestartWanted(15))[0] == "log restart requested"
    captured.die(0)
    assert captured.die(1)[-1] == "fetch g1/s10"
    assert captured.fetched("g1/s10") == ["claim 2 after g1/s10"]
    captured.up_to_training(2, first_step=11, restores=True)
    assert captured.all_die()[-1] == "fetch g1/s10"


def test_a_commit_that_a_step_back_has_overtaken_counts_for_nothing():
    """Proves that a late commit of what was left behind neither prunes the target nor comes back into the lineage."""
    job = Script(keep=1)
    job.begin_training()
    job.capture(10, 0)
    job.committed("g1/s10")
    job.capture(20, 1)
    job.feed(e.RestartWanted(10))
    job.die(0)
    assert job.die(1)[-1] == "fetch g1/s10"
    assert job.committed("g1/s20") == ["log checkpoint committed", "release 0:1", "release 1:1"]
    job.fetched("g1/s10")
    job.up_to_training(2, first_step=11, restores=True)
    assert job.all_die()[-1] == "fetch g1/s10"


def test_a_step_back_finds_what_is_still_being_flushed(captured):
    """Proves that the older of two snapshots in memory is offered from there, and stays until it is."""
    captured.capture(20, 1)
    assert captured.capture(21, 0) == ["announce None"]
    captured.feed(e.RestartWanted(20))
    assert captured.all_die()[-1] == "claim 2 after g1/s20"
    captured.committed("g1/s20")
    captured.up_to_spawned(2)
    assert captured.joined(0) == ["admit 0 to 2 with g1/s20 from memory"]


def test_a_step_back_to_nothing_is_refused(captured):
    """Proves that asking for a step older than everything there is does not cost the running job."""
    assert captured.feed(e.RestartWanted(9)) == ["log restore failed"]
    assert captured.state == "running"
    captured.wait(1)
    assert captured.all_die()[-1] == "claim 2 after g1/s10"


@pytest.mark.parametrize(
    ("stored", "goes_on"),
    [({}, "end failed: StoreError: "), ({"bucket": ["g1/s10"]}, "fetch g1/s10 from bucket")],
    ids=["nowhere", "in the bucket"],
)
def test_what_was_there_before_a_reboot_is_no_fresh_start(stored, goes_on):
    """Proves that a job which had a checkpoint begins with any that is there, and with nothing only when told to."""
    job = with_bucket()
    job.machine.expects = 20
    job.begin()
    assert job.store(**stored)[-1].startswith(goes_on)
