"""A job whose stored copies are read again while it trains: what is mended, what is offered, what retention does."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from ckptd.core.job_spec import TierSpec
from ckptd.core.policy.retention import RetentionPolicy
from ckptd.core.prune_events import Pruned
from ckptd.core.restore import Source
from ckptd.core.scrub_events import Mended, Scrubbed
from ckptd.errors import DamagedError, FullError, NotFoundError, StoreError
from tests.core.bucket import commit, logged, train
from tests.core.script import BUCKET, TIER, Script, cid

BROKEN = ("rank-00000.safetensors: tensor 'w' is not what was committed", "and", "so on")
DAY_S = 86400.0


@pytest.fixture
def job() -> Script:
    """A job in training whose disk is scrubbed every day, with two checkpoints there and in a bucket."""
    job = train(Script(keep=2, scrub_s=DAY_S, further=[TierSpec(BUCKET, RetentionPolicy(9))]))
    for place, step in enumerate((10, 20)):
        commit(job, step, place)
        job.uploaded(f"g1/s{step}")
    return job


def scrubbed(job: Script, checkpoint: str, *problems: str, tier: str = TIER, **more: object) -> list[str]:
    """Answer what was found in a copy."""
    return job.feed(Scrubbed(Source(cid(checkpoint), tier), problems, size_bytes=8192, seconds=1.5, **more))


def mended(job: Script, checkpoint: str, *problems: str, **more: object) -> list[str]:
    """Answer that a copy was mended, but for what has no good copy."""
    origins = {} if problems or more else {"a": BUCKET, "b": BUCKET}
    return job.feed(Mended(Source(cid(checkpoint), TIER), origins, problems, **more))


def damage_found(job: Script, checkpoint: str = "g1/s20") -> list[str]:
    """Let the scrub of a copy find damage."""
    job.machine.suspect(Source(cid(checkpoint), TIER))
    assert job.wait(1.5) == [f"scrub {checkpoint} on local"]
    return scrubbed(job, checkpoint, *BROKEN)


def test_a_copy_is_read_again_after_its_time(job):
    """Proves that the oldest is read first, one at a time, each once in its interval, only where that is asked for."""
    assert job.wait(DAY_S / 2) == []
    assert job.wait(DAY_S / 2) == ["scrub g1/s10 on local"]
    assert job.wait(DAY_S) == []
    assert scrubbed(job, "g1/s10") == []
    assert job.wait(1.0) == ["scrub g1/s20 on local"]
    scrubbed(job, "g1/s20")
    assert job.wait(DAY_S - 2) == []
    assert job.wait(2.0) == ["scrub g1/s10 on local"]
    assert (job.machine.scrubs.checked, job.machine.scrubs.last_at) == (2, pytest.approx(1e9 + job.now_s - DAY_S))


def test_what_is_there_at_the_start_is_as_old_as_its_commit():
    """Proves that a restart of the agent neither reads everything anew nor trusts what is old already."""
    job = Script(scrub_s=DAY_S)
    job.begin()
    wall = 1e9 + job.now_s
    held = {TIER: (e.Held(cid("g1/s10"), wall - 2 * DAY_S), e.Held(cid("g1/s20"), wall - DAY_S + 100))}
    job.feed(e.StoreRead((Source(cid("g1/s20"), TIER), Source(cid("g1/s10"), TIER)), 1, held))
    job.fetched("g1/s20")
    job.up_to_training(2, first_step=21, restores=True)
    assert job.wait(1.0) == ["scrub g1/s10 on local"]
    scrubbed(job, "g1/s10")
    assert job.wait(50.0) == []
    assert job.wait(50.0) == ["scrub g1/s20 on local"]


def test_nothing_is_read_unless_the_job_runs(job):
    """Proves that a restart has the disk for itself, and that what was begun before it may end during it."""
    assert job.wait(DAY_S) == ["scrub g1/s10 on local"]
    job.all_die()
    scrubbed(job, "g1/s10")
    assert "scrub g1/s20 on local" not in job.wait(DAY_S)


def test_without_an_interval_nothing_is_read():
    """Proves that a tier that asks for no scrub gets none."""
    job = train(Script())
    commit(job, 10, 0)
    assert job.wait(1000 * DAY_S) == []


def test_what_was_found_damaged_is_read_without_an_interval():
    """Proves that what keeps a prune from removing anything is mended on a tier that asks for no scrub too, once."""
    job = train(Script(further=[TierSpec(BUCKET)]))
    commit(job, 10, 0)
    job.uploaded("g1/s10")
    for answer in ({"error": StoreError("it is down")}, {"problems": BROKEN}):
        job.feed(Pruned(BUCKET, (), unreadable=(cid("g1/s10"),)))
        assert job.wait(1.5) == ["scrub g1/s10 on bucket"]
        job.feed(Scrubbed(Source(cid("g1/s10"), BUCKET), **answer))
        assert job.wait(1000 * DAY_S) == []
    job.feed(Mended(Source(cid("g1/s10"), BUCKET), {"a": TIER}))
    assert not job.machine.keeper.tiers.damaged
    assert job.wait(1000 * DAY_S) == []


def test_what_its_upload_reads_is_left_alone():
    """Proves that a copy is not read by two at once, since its upload checks every byte anyway."""
    job = train(Script(scrub_s=1.0, further=[TierSpec(BUCKET)]))
    commit(job, 10, 0)
    assert job.wait(10.0) == []
    job.uploaded("g1/s10")
    assert job.wait(1.0) == ["scrub g1/s10 on local"]


def test_damage_is_said_and_mended(job):
    """Proves that a damaged copy is named with what is wrong, mended at once, and offered only after that."""
    assert damage_found(job) == ["log checkpoint damaged", "mend g1/s20 on local"]
    error = f"{BROKEN[0]} (and 2 more)"
    assert logged(job, "checkpoint damaged") == [{"step": 20, "tier": TIER, "error": error}]
    assert Source(cid("g1/s20"), TIER) in job.machine.offers.refused
    assert job.wait(DAY_S) == []
    assert mended(job, "g1/s20") == ["log checkpoint mended"]
    assert logged(job, "checkpoint mended") == [{"step": 20, "tier": TIER, "origins": [BUCKET], "files": 2}]
    assert not job.machine.offers.refused
    assert job.machine.scrubs.mended == 1


@pytest.mark.parametrize(
    ("problems", "error"), [(["no good copy"], None), ([], FullError("no room")), ([], DamagedError("no manifest"))]
)
def test_what_can_not_be_mended_is_not_offered(job, problems, error):
    """Proves that a copy which stays damaged is passed over by the next restart, and looked at again a day later."""
    damage_found(job)
    more = {} if error is None else {"error": error}
    assert mended(job, "g1/s20", *problems, **more) == ["log mend failed"]
    job.machine.keeper.book.snapshots.clear()
    assert job.all_die()[-1] == "fetch g1/s20 from bucket"
    job.fetched("g1/s20", tier=BUCKET)
    assert not job.machine.keeper.tiers.damaged, "what is fetched replaces what is damaged"


def test_what_stays_damaged_is_tried_again(job):
    """Proves that a copy without a good one anywhere is read again after its interval, when it may be sound."""
    damage_found(job)
    mended(job, "g1/s20", "no good copy")
    assert job.wait(DAY_S - 15) == []
    assert job.wait(10) == ["scrub g1/s10 on local"]
    scrubbed(job, "g1/s10")
    assert job.wait(10) == ["scrub g1/s20 on local"]
    assert scrubbed(job, "g1/s20") == []
    assert not job.machine.offers.refused, "somebody has mended it by hand"


def test_damage_is_said_once(job):
    """Proves that a copy which a restart has called damaged is mended without its being said a second time."""
    damage_found(job)
    mended(job, "g1/s20", "no good copy")
    job.machine.suspect(Source(cid("g1/s20"), TIER))
    assert job.wait(1.5) == ["scrub g1/s20 on local"]
    assert scrubbed(job, "g1/s20", *BROKEN) == ["mend g1/s20 on local"]


def test_damage_takes_no_good_copy_with_it(job):
    """Proves that retention counts sound copies only, and that what is being mended stays until that is done."""
    damage_found(job)
    assert not [line for line in commit(job, 30, 0) if line.startswith("prune")]
    assert sorted(job.machine.keeper.tiers.held[TIER]) == [cid("g1/s10"), cid("g1/s20"), cid("g1/s30")]
    mended(job, "g1/s20")
    job.uploaded("g1/s30")
    assert "prune g1/s20 g1/s10, keep g1/s40 g1/s30" in commit(job, 40, 1)


def test_the_last_good_copy_stays_however_many_are_damaged():
    """Proves that with everything newer damaged, what is sound is not removed, though it is older than what is kept."""
    job = train(Script(keep=2, scrub_s=DAY_S))
    commit(job, 10, 0)
    for place, step in enumerate((20, 30)):
        commit(job, step, 1 - place)
        damage_found(job, f"g1/s{step}")
        mended(job, f"g1/s{step}", "no other tier is known")
    assert cid("g1/s10") in job.machine.keeper.tiers.held[TIER]
    assert job.machine.offers.newest_on(TIER) == cid("g1/s10")


def test_what_was_let_go_meanwhile_is_no_problem(job):
    """Proves that neither damage nor absence of a copy that retention has removed is said or mended."""
    assert job.wait(DAY_S) == ["scrub g1/s10 on local"]
    assert any(line.startswith("prune g1/s10") for line in commit(job, 30, 0))
    assert scrubbed(job, "g1/s10", *BROKEN) == []
    assert logged(job, "checkpoint damaged") == []
    assert not job.machine.keeper.tiers.damaged
    assert job.wait(1.0) == ["scrub g1/s20 on local"]


def test_what_can_not_be_read_now_is_no_damage(job):
    """Proves that a tier which is down makes nobody distrust its copies, and that they are tried again soon."""
    assert job.wait(DAY_S) == ["scrub g1/s10 on local"]
    assert scrubbed(job, "g1/s10", error=StoreError("it is down")) == ["log scrub failed"]
    assert not job.machine.offers.refused
    assert job.wait(1.0) == ["scrub g1/s20 on local"]
    scrubbed(job, "g1/s20")
    assert job.wait(500.0) == []
    assert job.wait(100.0) == ["scrub g1/s10 on local"]


def test_what_somebody_else_has_removed_is_forgotten(job):
    """Proves that a copy which is not there any more, though nobody here has let it go, is no source of a restart."""
    assert job.wait(DAY_S) == ["scrub g1/s10 on local"]
    assert scrubbed(job, "g1/s10", error=NotFoundError("no such object")) == ["log scrub failed"]
    assert cid("g1/s10") not in job.machine.keeper.tiers.held[TIER]
    assert Source(cid("g1/s10"), TIER) not in job.machine.offers.stored


def test_what_a_rank_found_damaged_is_read_and_mended():
    """Proves that the failure of a restore is not only passed over but seen to as soon as the job trains again."""
    job = Script(scrub_s=DAY_S)
    job.begin()
    job.store("g1/s20", "g1/s10", last_generation=1)
    job.fetched("g1/s20")
    job.up_to_spawned(2)
    job.joined(0)
    job.restore_fails(0, "g1/s20", DamagedError("tensor 'w' is not what was committed"))
    job.all_die()
    job.fetched("g1/s10")
    job.up_to_training(3, first_step=11, restores=True)
    assert job.wait(1.0) == ["scrub g1/s20 on local"]
    scrubbed(job, "g1/s20", *BROKEN)
    mended(job, "g1/s20")
    assert Source(cid("g1/s20"), TIER) not in job.machine.offers.stored, "it is not in the lineage any more"


def test_what_an_upload_found_damaged_is_read(job):
    """Proves that an upload which stops at damage on the disk has that copy looked at."""
    commit(job, 30, 0)
    assert job.upload_failed("g1/s30", DamagedError("tensor 'w' is not what was committed")) == ["log upload failed"]
    assert job.wait(1.5) == ["scrub g1/s30 on local"]


def test_what_an_upload_found_damaged_goes_there_once_it_is_mended(job):
    """Proves that the newest checkpoint reaches the bucket after all, without a newer commit or a new start."""
    commit(job, 30, 0)
    job.upload_failed("g1/s30", DamagedError("tensor 'w' is not what was committed"))
    assert job.wait(1.5) == ["scrub g1/s30 on local"]
    scrubbed(job, "g1/s30", *BROKEN)
    mended(job, "g1/s30")
    assert job.wait(5.0) == ["upload g1/s30 to bucket"]


def test_a_prune_that_found_a_manifest_damaged_is_made_up_for(job):
    """Proves that what was not removed goes with the next prune, and that what kept it from going is mended first."""
    assert any(line.startswith("prune g1/s10,") for line in commit(job, 30, 0))
    job.uploaded("g1/s30")
    assert job.feed(Pruned(TIER, (cid("g1/s10"),), {cid("g1/s10"): ()}, unreadable=(cid("g1/s20"),))) == []
    assert job.wait(1.5) == ["scrub g1/s20 on local"]
    assert scrubbed(job, "g1/s20", "the manifest is not JSON") == ["log checkpoint damaged", "mend g1/s20 on local"]
    mended(job, "g1/s20")
    assert any(line.startswith("prune g1/s20 g1/s10,") for line in commit(job, 40, 1))
    job.feed(Pruned(TIER, (cid("g1/s20"), cid("g1/s10"))))
    assert sorted(job.machine.keeper.tiers.held[TIER]) == [cid("g1/s30"), cid("g1/s40")]
