"""A job with a disk and a bucket: what is uploaded, kept and fetched."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from ckptd.core.job_spec import TierSpec
from ckptd.errors import DamagedError, FencedError, InvariantError, StoreError
from ckptd.types import Held
from tests.core.bucket import commit, logged, train, with_bucket
from tests.core.script import BUCKET, TIER, Script, cid

DOWN = StoreError("connection refused")


@pytest.fixture
def job() -> Script:
    """A job with a disk and a bucket, not begun."""
    return with_bucket()


@pytest.fixture
def training(job: Script) -> Script:
    """The same job, in training."""
    return train(job)


# --- uploads -----------------------------------------------------------------------------------------------------


def test_what_is_committed_on_the_disk_is_uploaded(training):
    """Proves that an upload begins with the commit, one at a time, the newest next, and that its commit is logged."""
    assert commit(training, 10, 0) == ["log checkpoint committed", "upload g1/s10 to bucket"]
    assert commit(training, 20, 1) == ["log checkpoint committed"]
    assert commit(training, 30, 0) == ["log checkpoint committed"]
    assert training.uploaded("g1/s10") == ["log checkpoint committed", "upload g1/s30 to bucket"]
    fields = logged(training, "checkpoint committed")[0]
    assert fields == {"generation": 1, "step": 10, "tier": BUCKET, "size_bytes": 8192, "upload_s": 0.2}
    assert training.machine.keeper.last_committed.tier == TIER


def test_a_bucket_that_is_too_slow_gets_fewer_and_says_so(training):
    """Proves that what waits is bounded, and that what it costs is in the log with its reason."""
    for place, step in enumerate((10, 20, 30)):
        commit(training, step, place % 2)
    assert commit(training, 40, 1) == ["log checkpoint committed", "log upload skipped"]
    (fields,) = logged(training, "upload skipped")
    assert (fields["step"], fields["tier"]) == (20, BUCKET)
    assert training.machine.keeper.tiers.counters.skipped == 1


def test_what_is_to_be_uploaded_stays_on_the_disk():
    """Proves that neither what is under way nor what waits is pruned, and that it is once it has arrived."""
    job = train(with_bucket(keep=1))
    commit(job, 10, 0)
    commit(job, 20, 1)
    assert commit(job, 30, 0) == ["log checkpoint committed"]
    job.uploaded("g1/s10")
    assert "prune g1/s10, keep g1/s40 g1/s30 g1/s20" in commit(job, 40, 1)


def test_a_prune_in_the_bucket_knows_what_is_on_its_way_there():
    """Proves that retention is each tier's own, and that files are kept to which the next upload may refer."""
    job = train(with_bucket(keep=3, keep_in_bucket=1))
    commit(job, 10, 0)
    commit(job, 20, 1)
    job.uploaded("g1/s10")
    commit(job, 30, 0)
    assert job.uploaded("g1/s20") == [
        "log checkpoint committed",
        "prune g1/s10 on bucket, keep g1/s20 g1/s30",
        "upload g1/s30 to bucket",
    ]


def test_a_late_upload_is_as_old_and_as_large_as_its_checkpoint(training):
    """Proves that retention reads in the bucket what it reads on the disk, and after a restart in manifests."""
    commit(training, 10, 0)
    training.now_s += 3600.0
    training.feed(e.Committed(cid("g1/s10"), BUCKET, 1, 0.2))
    held = training.machine.keeper.tiers.held
    assert held[BUCKET][cid("g1/s10")] == held[TIER][cid("g1/s10")]
    assert held[BUCKET][cid("g1/s10")].size_bytes == 8192


def test_an_older_one_that_would_not_stay_is_not_uploaded():
    """Proves that no bandwidth goes into what the bucket's retention would remove at once."""
    job = train(with_bucket(keep_in_bucket=1))
    commit(job, 10, 0)
    commit(job, 20, 1)
    commit(job, 30, 0)
    job.uploaded("g1/s10")
    assert job.uploaded("g1/s30") == ["log checkpoint committed", "prune g1/s10 on bucket, keep g1/s30 g1/s20"]
    assert job.machine.keeper.tiers.uploads[BUCKET].pinned == frozenset()


def test_a_failure_is_logged_and_tried_again_and_nothing_else_waits(training):
    """Proves that a dead bucket costs log lines only: the job captures, flushes, commits and restarts meanwhile."""
    commit(training, 10, 0)
    assert training.upload_failed("g1/s10") == ["log upload failed"]
    assert logged(training, "upload failed") == [
        {"step": 10, "tier": BUCKET, "error": "503 slow down", "retry_in_s": 1.0}
    ]
    assert training.wait(0.9) == []
    assert training.wait(0.2) == ["upload g1/s10 to bucket"]
    assert commit(training, 20, 1) == ["log checkpoint committed"]
    assert training.upload_failed("g1/s10") == ["log upload failed"]
    assert logged(training, "upload failed")[0]["retry_in_s"] is None
    assert training.wait(2.1) == ["upload g1/s20 to bucket"]
    assert training.all_die()[-1] == "claim 2 after g1/s20"


def test_a_lost_claim_ends_the_uploads_and_not_the_job(training):
    """Proves that a tier that a newer agent owns gets nothing more, while the disk does."""
    commit(training, 10, 0)
    fenced = FencedError("generation 1 is claimed by somebody else")
    assert training.upload_failed("g1/s10", fenced) == ["log upload failed"]
    assert logged(training, "upload failed")[0]["retry_in_s"] is None
    assert commit(training, 20, 1) == ["log checkpoint committed"]
    assert training.wait(120) == []


def test_a_snapshot_found_damaged_in_memory_is_not_uploaded(training):
    """Proves that what was written from damaged memory goes nowhere."""
    commit(training, 10, 0)
    training.uploaded("g1/s10")
    training.capture(20, 1)
    training.all_die()
    training.up_to_spawned(2)
    training.joined(0)
    training.restore_fails(0, "g1/s20", DamagedError("tensor 'w' is not what was captured"))
    assert training.committed("g1/s20") == ["log checkpoint committed"]


def test_the_interval_of_a_tier():
    """Proves that a tier may be given a checkpoint less often than the disk, without a warning for each other one."""
    job = train(with_bucket(every_s=35.0, keep=9))
    assert "upload g1/s10 to bucket" in commit(job, 10, 0)
    job.uploaded("g1/s10")
    assert commit(job, 20, 1) == ["log checkpoint committed"]
    assert commit(job, 30, 0) == ["log checkpoint committed"]
    assert commit(job, 40, 1) == ["log checkpoint committed"]
    assert job.wait(10) == ["upload g1/s40 to bucket"]


def test_two_tiers_of_one_name_are_a_bug():
    """Proves that facts of two tiers can't be mixed up."""
    with pytest.raises(InvariantError, match="two tiers of one name"):
        Script(further=[TierSpec(TIER)])


# --- beginning ---------------------------------------------------------------------------------------------------


def test_a_new_agent_uploads_what_the_last_one_did_not(job):
    """Proves that the newest checkpoint that the bucket lacks is uploaded as soon as the job begins."""
    job.begin()
    lines = job.store("g1/s20", "g1/s10", bucket=["g1/s10"], last_generation=1)
    assert lines == ["upload g1/s20 to bucket", "fetch g1/s20"]


def test_the_nearer_copy_is_offered_first(job):
    """Proves the order of sources: the newest first, and of one checkpoint the copy on the disk."""
    job.begin()
    assert job.store("g1/s20", "g1/s10", bucket=["g1/s20", "g1/s10"], last_generation=1) == ["fetch g1/s20"]
    assert job.fetch_failed("g1/s20")[-1] == "fetch g1/s20 from bucket"
    assert job.fetch_failed("g1/s20", tier=BUCKET)[-1] == "fetch g1/s10"


def test_a_lost_disk_is_made_good_by_the_bucket(job):
    """Proves that a checkpoint which is fetched is committed on the disk too, and that the log names the bucket."""
    job.begin()
    assert job.store(bucket=["g1/s20", "g1/s10"], last_generation=1) == ["fetch g1/s20 from bucket"]
    assert job.fetched("g1/s20", tier=BUCKET) == ["claim 2 after g1/s20"]
    job.up_to_spawned(2)
    assert job.joined(0) == ["admit 0 to 2 with g1/s20 from bucket"]
    assert list(job.machine.keeper.tiers.held[TIER]) == [cid("g1/s20")]
    assert job.all_die()[-1] == "fetch g1/s20"


def test_what_is_fetched_again_mends_the_disk_once(job):
    """Proves that a copy spoiled on the disk is fetched anew, and that it is given up if it is spoiled again."""
    job.begin()
    job.store("g1/s20", "g1/s10", bucket=["g1/s20"], last_generation=1)
    job.fetched("g1/s20")
    spoiled = DamagedError("tensor 'w' is not what was captured")
    job.up_to_spawned(2)
    job.joined(0)
    job.restore_fails(0, "g1/s20", spoiled)
    assert job.all_die()[-1] == "fetch g1/s20 from bucket"
    job.fetched("g1/s20", tier=BUCKET)
    job.up_to_spawned(3)
    job.joined(0)
    job.restore_fails(0, "g1/s20", spoiled)
    assert job.all_die()[-1] == "fetch g1/s10"


def test_a_bucket_that_can_not_be_read_does_not_keep_a_job_from_its_disk(job):
    """Proves that a restart goes on from the disk, that the log names the tier, and that uploads are tried."""
    job.begin()
    lines = job.store("g1/s20", last_generation=1, unread={BUCKET: DOWN})
    assert lines == ["log tier unreadable", "upload g1/s20 to bucket", "fetch g1/s20"]


def test_an_empty_disk_and_a_bucket_that_can_not_be_read_are_no_fresh_start(job):
    """Proves that a job does not begin anew while the place that may hold its checkpoints can't be seen."""
    job.begin()
    assert job.store(unread={BUCKET: DOWN}) == ["log tier unreadable", "end failed: StoreError: connection refused"]


def test_a_fetch_that_may_succeed_later_is_not_called_damage(job):
    """Proves that an older copy is offered meanwhile, and that where there is none the error is the tier's own."""
    job.begin()
    job.store("g1/s10", bucket=["g1/s20"], last_generation=1)
    assert job.fetch_failed("g1/s20", DOWN, tier=BUCKET) == ["log fetch failed", "fetch g1/s10"]
    job.fetched("g1/s10")
    job.up_to_spawned(2)
    assert [source.id for source in job.machine.offers.stored] == [cid("g1/s10")]
    again = with_bucket()
    again.begin()
    again.store(bucket=["g1/s20"], last_generation=1)
    assert again.fetch_failed("g1/s20", DOWN, tier=BUCKET) == [
        "log fetch failed", "end failed: StoreError: connection refused",
    ]  # fmt: skip


def test_facts_of_the_tiers_are_what_retention_judges(job):
    """Proves that what a tier holds beside the lineage, with its tags, is known to retention from the beginning."""
    job = with_bucket(keep=1, keep_in_bucket=1)
    job.begin()
    tagged = {TIER: (Held(cid("g1/s5"), tags=("paper",)), Held(cid("g1/s10")), Held(cid("g1/s20")))}
    sources = (e.Source(cid("g1/s20"), TIER), e.Source(cid("g1/s10"), TIER))
    job.feed(e.StoreRead(sources, 1, tagged))
    job.fetched("g1/s20")
    job.up_to_training(2, first_step=21, restores=True)
    job.wait(1.0)
    job.uploaded("g1/s20")
    job.now_s += 1
    job.progress(22)
    assert "prune g1/s20 g1/s10, keep g2/s40 g1/s5" in commit(job, 40, 0, generation=2)


# --- stepping back -----------------------------------------------------------------------------------------------


def test_an_upload_that_a_step_back_has_overtaken_counts_for_nothing():
    """Proves that its commit neither prunes the target in the bucket nor comes back into the lineage."""
    job = train(with_bucket(keep_in_bucket=1))
    commit(job, 10, 0)
    job.uploaded("g1/s10")
    commit(job, 20, 1)
    job.feed(e.RestartWanted(10))
    job.all_die()
    job.fetched("g1/s10")
    job.claimed(2)
    assert job.uploaded("g1/s20") == ["log checkpoint committed"]
    assert [source.id for source in job.machine.offers.stored] == [cid("g1/s10"), cid("g1/s10")]


def test_the_target_of_a_step_back_stays_while_it_is_under_way():
    """Proves that a newer commit in the bucket does not take away what the next generation is to begin with."""
    job = train(with_bucket(keep_in_bucket=1))
    commit(job, 10, 0)
    job.uploaded("g1/s10")
    commit(job, 20, 1)
    job.feed(e.RestartWanted(10))
    assert job.uploaded("g1/s20") == ["log checkpoint committed"]
    assert cid("g1/s10") in job.machine.keeper.tiers.held[BUCKET]
