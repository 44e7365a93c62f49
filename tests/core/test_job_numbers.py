"""A job whose ranks report bad numbers."""

from __future__ import annotations

import math

import pytest

from ckptd.core.gate_events import NodeChecked
from ckptd.core.number_events import Marked, Report, Reported
from ckptd.core.numbering import SETTLE_S
from ckptd.core.policy.numbers import NumbersPolicy
from ckptd.errors import DamagedError
from tests.core.bucket import with_bucket
from tests.core.script import TIER, Script, cid

STEP_BACK = NumbersPolicy("step_back")


def reports(job: Script, *steps: int, ranks=(0, 1), value: float = 1.0, leaving: bool = False) -> list[str]:
    """Let ranks report the same value of some steps."""
    found = [Report(step, value) for step in steps]
    return job.feed(Reported(dict.fromkeys(ranks, found), leaving=leaving))


def trained(numbers: NumbersPolicy, *captured: int, upto: int, **options) -> Script:
    """Return a job that has reported every step, with checkpoints of some of them."""
    job = Script(numbers=numbers, **options)
    job.begin_training()
    at = 1
    for number, step in enumerate(captured):
        reports(job, *range(at, step + 1))
        job.capture(step, number % 2)
        job.committed(f"g1/s{step}")
        at = step + 1
    reports(job, *range(at, upto + 1))
    return job


def test_warn_marks_and_says_so_once():
    """Proves that with "warn" a NaN is said once and shown, marks what nothing has proved, and ends nobody."""
    job = trained(NumbersPolicy("warn"), 12, 19, upto=19)
    assert reports(job, 20, ranks=[1], value=math.nan) == ["log numbers suspect"]
    assert Marked() in job.effects
    assert reports(job, 20, 21, value=math.nan) == []
    assert job.state == "running"
    status = job.machine.numbers_status()
    assert status["bad"] == {"rank": 1, "step": 20, "kind": "nan"}
    assert status["suspect"] == [{"generation": 1, "step": 19}]
    assert status["healthy"] == [{"generation": 1, "step": 12}]
    (warned,) = job.machine.warnings
    assert warned.summary == "rank 1 reported loss nan at step 20; step 19 was the last healthy one"


def test_a_snapshot_in_trouble_is_marked_before_it_is_flushed():
    """Proves that the next agent knows of what is captured after a bad step, though it may see its commit alone."""
    job = trained(NumbersPolicy("warn"), 12, upto=19)
    reports(job, 20, value=math.nan)
    job.capture(22, 1)
    effects = [type(effect).__name__ for effect in job.effects]
    assert effects.index("Marked") < effects.index("Flush")


def test_trouble_passes():
    """Proves that a spike which is followed by enough healthy steps is over, and that checkpoints lose their mark."""
    job = trained(NumbersPolicy("warn"), 19, upto=20)
    assert reports(job, 21, value=9.0) == ["log numbers suspect"]
    job.capture(22, 1)
    job.committed("g1/s22")
    assert job.machine.numbers_status()["suspect"] == [{"generation": 1, "step": 22}]
    assert reports(job, 22, 23) == []
    assert reports(job, 24) == ["log numbers healthy again"]
    assert job.machine.numbers_status()["suspect"] == []
    assert list(job.machine.warnings) == []


def test_a_spike_needs_a_history():
    """Proves that a high value among the first ones is no spike."""
    job = trained(STEP_BACK, upto=10)
    assert reports(job, 11, value=100.0) == []


def test_off_listens_to_nothing():
    """Proves that with "off" a NaN is no matter, and ranks are told to write nothing down."""
    job = trained(NumbersPolicy("off"), 12, upto=15)
    assert reports(job, 16, value=math.nan) == []
    assert job.machine.numbers_to_tell() == {"metric": None, "skipped": []}


def test_a_nan_steps_back_to_the_newest_healthy_checkpoint():
    """Proves the whole way: the failure, its kind, what is begun with, and that ranks are told what to skip."""
    job = trained(STEP_BACK, 12, 18, upto=19)
    cause = "rank 0 reported loss nan at step 20; step 19 was the last healthy one"
    assert reports(job, 20, value=math.nan) == [
        "log numbers suspect", "log generation failed", f"incident 1 open: {cause}", "kill 9",
    ]  # fmt: skip
    assert job.incidents[1].kind == "nan"
    lines = job.all_die()
    assert "log step back" in lines
    assert lines[-1] == "fetch g1/s12"  # only step 19 has followed step 18
    assert job.fetched("g1/s12") == ["claim 2 after g1/s12"]
    assert "admit 0 to 2 with g1/s12 from local" in (job.claimed(2), job.spawned(), job.joined(0))[2]
    assert job.machine.numbers_to_tell() == {"metric": "loss", "skipped": [(20, 20)]}
    assert job.machine.numbers_status()["bad"] is None
    assert "back to step 12: the newest healthy one; to skip: step 20" in job.incidents[1].reasons


def test_steps_of_which_nothing_is_known_are_skipped_with_the_bad_one():
    """Proves that the range begins after the last healthy report, whichever rank has made it."""
    job = trained(STEP_BACK, 12, upto=16)
    reports(job, 17, ranks=[1])
    reports(job, 20, value=math.nan)
    assert job.machine.keeper.health.skipped == [(18, 20)]


def test_the_first_bad_step_of_all_ranks_counts():
    """Proves that a rank which is behind is waited for, since what it reports may be the cause, but not for long."""
    job = trained(STEP_BACK, 12, upto=18)
    reports(job, 19, ranks=[0])
    assert reports(job, 20, ranks=[0], value=math.nan) == ["log numbers suspect"]
    lines = reports(job, 19, ranks=[1], value=math.inf)
    assert "incident 1 open: rank 1 reported loss inf at step 19; step 18 was the last healthy one" in lines
    job = trained(STEP_BACK, 12, upto=18)
    assert reports(job, 20, ranks=[0], value=math.nan) == ["log numbers suspect"]
    assert job.wait(SETTLE_S / 2) == []
    assert "kill 9" in job.wait(SETTLE_S)


def test_nobody_leaves_with_a_nan():
    """Proves that a bad last step is a failure though a rank is behind: nothing would come of waiting."""
    job = trained(STEP_BACK, 12, upto=18)
    reports(job, 19, ranks=[0], value=math.nan)
    assert "kill 9" in reports(job, ranks=[], leaving=True)


def test_a_rank_that_raises_on_its_nan_steps_back_too():
    """Proves that what failed the job does not matter: what is suspect is not begun with, and the step is skipped."""
    job = trained(STEP_BACK, 12, 19, upto=19)
    reports(job, 20, ranks=[0], value=math.nan)
    lines = job.all_die()
    assert lines[-1] == "fetch g1/s12"
    assert job.machine.keeper.health.skipped == [(20, 20)]


def test_with_warn_a_restart_takes_the_newest():
    """Proves that marking alone changes nothing of what a restart begins with."""
    job = trained(NumbersPolicy("warn"), 12, 19, upto=19)
    reports(job, 20, value=math.nan)
    assert "claim 2 after g1/s19" in job.all_die()


def test_a_nan_before_any_checkpoint_begins_afresh():
    """Proves that a job which began with nothing begins with nothing again, told what to skip."""
    job = trained(STEP_BACK, upto=3)
    reports(job, 4, value=math.nan)
    assert "claim 2 after None" in job.all_die()
    job.claimed(2)
    assert job.machine.numbers_to_tell()["skipped"] == [(4, 4)]


def test_where_all_is_suspect_a_job_that_began_afresh_does_so_again():
    """Proves that the beginning is the oldest checkpoint of a job that has none which is not suspect."""
    job = trained(STEP_BACK, 4, upto=4)
    reports(job, 5, value=math.nan)
    lines = job.all_die()
    assert "log step back" in lines
    assert "claim 2 after None" in lines
    job.up_to_training(2)
    assert job.machine.keeper.book.newest is None


def test_an_upload_that_ends_after_a_step_back_to_the_beginning_is_not_begun_with():
    """Proves that a suspect checkpoint which comes to the bucket while the job waits to begin afresh is not offered."""
    job = with_bucket(numbers=STEP_BACK)
    job.node = None
    job.begin_training()
    reports(job, 1, 2, 3, 4)
    job.capture(4, 0)
    assert "upload g1/s4 to bucket" in job.committed("g1/s4")
    reports(job, 5, value=math.nan)
    assert "log step back" in job.all_die()
    job.uploaded("g1/s4")
    assert "claim 2 after None" in job.feed(NodeChecked(()))


def test_where_all_is_suspect_a_job_that_was_resumed_gives_up():
    """Proves that a job whose beginning nobody here has seen ends with an error, and not with a fresh start."""
    job = Script(numbers=STEP_BACK)
    job.begin()
    job.store("g1/s10", last_generation=1)
    job.fetched("g1/s10")
    job.up_to_training(2, first_step=11, restores=True)
    reports(job, 11, value=math.nan)
    assert job.all_die()[-1] == "end failed: JobFailedError: every checkpoint of this job is suspect"
    assert job.incidents[1].decision == "give up: every checkpoint of this job is suspect"


def test_the_same_nan_again_steps_back_further_and_then_gives_up():
    """Proves that a NaN at the same step, however often, ends: with an older checkpoint, and then with a verdict."""
    job = trained(STEP_BACK, 6, 12, 19, upto=19)
    begun, generation, step = [], 1, 20
    while job.state != "failed":
        reports(job, step, value=math.nan)
        lines = job.all_die()
        while job.state == "backoff":
            lines = job.wait(60.0)
        if job.state == "failed":
            break
        generation += 1
        begun.append(lines[-1].removeprefix("fetch "))
        job.fetched(begun[-1])
        first = cid(begun[-1]).step + 1
        job.up_to_training(generation, first_step=first, restores=True)
        reports(job, *range(first, step))
    assert set(begun[:-1]) == {"g1/s12"}
    assert begun[-1] == "g1/s6"
    assert "nan" in job.effects[-1].error.message or "the same failure" in job.effects[-1].error.message


def test_a_spike_that_comes_again_is_trained_through():
    """Proves that a job which can't skip a spike is not ended by it, however often, but by a NaN that follows it."""
    job = trained(STEP_BACK, 24, 30, upto=31)
    assert "kill 9" in reports(job, 32, value=9.0)
    job.all_die()
    job.fetched("g1/s24")
    job.up_to_training(2, first_step=25, restores=True)
    reports(job, *range(25, 32))
    assert reports(job, 32, value=9.0) == ["log numbers suspect"]
    (warned,) = job.machine.warnings
    assert warned.summary.endswith("; it came again after a step back, so training goes on")
    assert reports(job, 33, value=9.0) == []
    assert job.state == "running"
    assert "kill 9" in reports(job, 34, value=math.nan)
    assert job.incidents[2].kind == "nan"


@pytest.mark.parametrize("keep", [1, 2])
def test_retention_keeps_the_newest_healthy_one(keep):
    """Proves that the newest healthy checkpoint stays while newer ones come, whatever the rules say."""
    job = trained(NumbersPolicy("warn"), 12, upto=19, keep=keep)
    reports(job, 20, value=math.nan)
    for number, step in enumerate((24, 30, 36, 42)):
        job.capture(step, (number + 1) % 2)
        job.committed(f"g1/s{step}")
        reports(job, *range(step, step + 6), value=math.nan)
        job.pruned(*(f"g1/s{item}" for item in (24, 30, 36, 42)[: max(0, number + 1 - keep)]))
    held = {item.step for item in job.machine.keeper.tiers.held[TIER]}
    assert held == {12, *(24, 30, 36, 42)[-keep:]}


def test_a_damaged_copy_is_not_what_retention_keeps():
    """Proves that a step back goes on to the next when the newest healthy one can't be read."""
    job = trained(STEP_BACK, 6, 12, 19, upto=19)
    reports(job, 20, value=math.nan)
    assert job.all_die()[-1] == "fetch g1/s12"
    assert job.fetch_failed("g1/s12", DamagedError("no"))[-1] == "fetch g1/s6"


def test_an_operators_step_back_holds():
    """Proves that of what is old enough for `restart --from` the newest healthy one is taken."""
    job = trained(STEP_BACK, 6, 12, 18, upto=19)
    health = job.machine.keeper.health
    assert {item.step for item in health.healthy} == {6, 12}
    reports(job, 20, value=math.nan)
    job.machine.offers.at_most_step = 11
    assert job.all_die()[-1] == "fetch g1/s6"


def test_missed_reports_are_said_once():
    """Proves that reports which nobody could read are said, once a generation."""
    job = trained(NumbersPolicy("warn"), upto=3)
    lost = Reported({0: [Report(90, 1.0)]}, {0: 20})
    assert job.feed(lost) == ["log reports missed"]
    assert job.feed(lost) == []
