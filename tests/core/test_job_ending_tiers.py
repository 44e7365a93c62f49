"""How a job with a bucket ends: what it waits for, how long, and what it says if that is not enough."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from ckptd.core.restore import Source
from ckptd.core.uploads import FINAL_UPLOAD_TRIES
from ckptd.errors import FencedError, RefusedError
from ckptd.types import Held
from tests.core.bucket import commit, logged, train, with_bucket
from tests.core.script import Script, cid


@pytest.fixture
def job() -> Script:
    """A job with a disk and a bucket, not begun."""
    return with_bucket()


@pytest.fixture
def training(job: Script) -> Script:
    """The same job, in training."""
    return train(job)


# --- the end -----------------------------------------------------------------------------------------------------


def finish(job: Script) -> list[str]:
    """Let training end at step 3, and the last rank's process be gone; return what follows."""
    job.all_sealed(3, slot=0, final=True)
    job.left(0, 3)
    job.left(1, 3)
    assert job.committed("g1/s3")[-2:] == ["dismiss 0", "dismiss 1"]  # no rank waits for an upload
    job.exited(0)
    return job.exited(1)


def test_the_end_waits_for_the_upload_of_the_newest(training):
    """Proves that ranks are let go with the flush, and that the job ends when its last checkpoint is everywhere."""
    assert finish(training) == []
    assert training.state == "draining"
    assert training.machine.keeper.pending
    assert training.uploaded("g1/s3") == ["log checkpoint committed", "end finished"]


def test_an_older_one_is_not_waited_for():
    """Proves that a job ends with its newest checkpoint uploaded, whatever else waits."""
    job = train(with_bucket())
    job.capture(10, 0)
    job.committed("g1/s10")
    job.all_sealed(12, slot=1, final=True)
    job.left(0, 12)
    job.left(1, 12)
    job.committed("g1/s12")
    assert job.upload_failed("g1/s10") == ["log upload failed"]
    job.exited(0)
    assert job.exited(1) == ["upload g1/s12 to bucket"]
    assert job.uploaded("g1/s12")[-1] == "end finished"


def test_a_dead_bucket_at_the_end_is_an_error_that_names_it(training):
    """Proves that an ending job tries so often, not for ever, and says which tier lacks the last checkpoint."""
    finish(training)
    for _ in range(FINAL_UPLOAD_TRIES - 1):
        assert training.upload_failed("g1/s3") == ["log upload failed"]
        assert training.wait(60) == ["upload g1/s3 to bucket"]
    assert training.upload_failed("g1/s3") == [
        "log upload failed",
        "end failed: JobFailedError: the last checkpoint is not on bucket: its upload has failed",
    ]


@pytest.mark.parametrize("error", [RefusedError("access denied"), FencedError("somebody else's")])
def test_what_no_retry_cures_ends_the_wait_at_once(training, error):
    """Proves that a refusal or a lost claim is not waited out."""
    finish(training)
    assert training.upload_failed("g1/s3", error)[-1].startswith("end failed: JobFailedError: the last checkpoint")


def test_a_stop_waits_for_the_upload_too_and_an_impatient_one_does_not(training):
    """Proves that a stop ends the ranks with the flush and itself with the upload, unless it is repeated at once."""
    commit(training, 10, 0)
    training.stop(checkpoint=False)
    training.exited(0)
    assert training.exited(1) == []
    assert training.stop() == []
    assert training.stop(checkpoint=False) == ["log upload skipped", "end stopped"]


def test_a_stop_before_the_first_generation_uploads_what_a_step_back_has_left_the_newest(job):
    """Proves that what lies in the bucket beyond a step back does not pass for the newest checkpoint of a new agent."""
    there = {"local": ("g1/s8",), "bucket": ("g1/s26", "g1/s20", "g1/s14")}
    held = {tier: tuple(Held(cid(item)) for item in items) for tier, items in there.items()}
    job.begin()
    lines = job.feed(e.StoreRead((Source(cid("g1/s8"), "local"),), 2, held))
    assert lines == ["upload g1/s8 to bucket", "fetch g1/s8"]
    assert job.stop() == ["log stopping"]
    assert job.uploaded("g1/s8")[-1] == "end stopped"


def test_a_failed_job_keeps_its_own_error(training):
    """Proves that a bucket which is down as well does not hide why the job was given up."""
    training.machine.recovery.policy = type(training.machine.recovery.policy)(max_restarts=0)
    commit(training, 10, 0)
    training.all_die()
    assert training.state == "draining"
    assert "max_restarts is 0" in training.upload_failed("g1/s10", RefusedError("access denied"))[-1]


# --- scavenging --------------------------------------------------------------------------------------------------


def test_memory_is_given_up_only_after_a_deadline(training):
    """Proves that a job which is given up flushes what it has in memory, says for how long and why, and then ends."""
    training.machine.recovery.policy = type(training.machine.recovery.policy)(max_restarts=0)
    training.capture(10, 0)
    assert "log scavenging" in training.all_die()
    (fields,) = logged(training, "scavenging")
    assert fields == {
        "step": 10,
        "reason": "failure number 1 within 1 d, and max_restarts is 0: rank 0 was killed by signal 9",
        "deadline_s": 120.0,
    }
    assert training.wait(119) == []
    lines = training.wait(1)
    assert lines[0] == "log snapshot abandoned"
    assert lines[-1].startswith("end failed: JobFailedError: failure number 1")
    assert logged(training, "snapshot abandoned")[0]["reason"] == "it was not durable within 120 s"


def test_a_stop_scavenges_and_a_disk_that_hangs_makes_it_an_error(training):
    """Proves that a stop does not end as if all were well when the newest snapshot is lost."""
    training.capture(10, 0)
    training.stop(checkpoint=False)
    training.exited(0)
    assert training.exited(1) == ["log scavenging"]
    assert training.wait(120)[-1] == "end failed: JobFailedError: the last snapshot could not be made durable"


def test_a_job_that_finished_waits_for_a_slow_disk_until_somebody_wants_it_to_end(training):
    """Proves that the result of a whole training has no deadline, unless the agent is told to stop."""
    training.all_sealed(3, slot=0, final=True)
    training.exited(0)
    training.exited(1)
    assert training.wait(1000) == []
    assert training.stop() == ["log scavenging"]
    assert training.wait(120)[-1].startswith("end failed: JobFailedError")


def test_a_job_whose_ranks_come_back_has_no_deadline_any_more():
    """Proves that what was the end of an attached job, and was not, leaves nothing behind."""
    job = with_bucket(supervised=False)
    job.joined(0)
    job.store()
    job.claimed(1)
    job.joined(1)
    job.stepped(1)
    job.progress(1)
    job.all_sealed(3, slot=0, final=True)
    job.exited(0)
    job.exited(1)
    job.stop()
    assert job.joined(0, pid=900) == ["read store"]
    job.store()
    assert job.machine._scavenge_until_s is None
