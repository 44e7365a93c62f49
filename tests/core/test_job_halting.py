"""How a job comes to stop by itself: limits, conditions, and what is uploaded until then."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from ckptd.core import events as e
from ckptd.core.halt_events import HaltWanted
from ckptd.core.handover import Handover
from ckptd.core.policy.halt import Conditions, HaltPolicy
from ckptd.types import Evidence
from tests.core.bucket import commit, logged, train, with_bucket
from tests.core.script import Script, cid

LEFT = Evidence("exit", "exit", 0, 1.0, "rank 0 ended with exit code 75", 0.0, returncode=75)


def bounded(job: Script, **policy: Any) -> Script:
    """Bound the time of a job that has not begun, or set its conditions."""
    spec = dataclasses.replace(job.machine.spec, halt=HaltPolicy(began_at=1e9, **policy))
    job.machine = type(job.machine)(spec)
    return job


def test_a_time_limit_stops_with_the_measured_margin():
    """Proves that a job begins to stop so long before its limit as its own captures and flushes say, and says why."""
    job = train(bounded(Script(), limit_at_s=1000.0, margin_s=5.0))
    commit(job, 10, 0)
    # interval 10, two steps of about 1 s, capture 0.1, flush 0.2, extra 5
    left = job.machine.time_left(job_now(job))
    assert left.margin_s == pytest.approx(17.3, abs=0.5)
    job.now_s = 1000 - left.margin_s - 0.1
    assert job.wait(0) == []
    assert job.wait(0.2) == ["log time is over", "log stopping"]
    (fields,) = logged(job, "stopping")
    assert fields["grace_s"] == pytest.approx(left.margin_s - 0.1 - (left.margin_s - 0.1) / 4, abs=0.1)


def job_now(job: Script) -> Any:
    """What time it is for the job."""
    return type("Now", (), {"s": job.now_s, "wall": 1e9 + job.now_s})


def test_the_end_of_a_batch_job_is_a_moment_of_the_wall_clock():
    """Proves that a batch job's end stops the job as a time limit does."""
    job = train(bounded(Script(), ends_at=1e9 + 500.0))
    job.now_s = 400
    job.wait(0)
    assert job.state == "running"
    job.now_s = 490
    assert job.wait(0) == ["log time is over", "log stopping"]


def test_a_limit_that_comes_before_training_ends_the_job():
    """Proves that time which is over while ranks still import is no reason to begin, and nothing is waited for."""
    job = bounded(Script(), limit_at_s=10.0)
    job.begin()
    job.store()
    job.claimed(1)
    job.now_s = 9
    assert job.wait(0)[-2:] == ["kill 9", "end stopped"]


def test_without_any_measure_a_checkpoint_is_asked_for():
    """Proves that a job whose interval is longer than its time captures once to learn how long that takes."""
    job = train(bounded(Script(every_s=3600.0), limit_at_s=100.0))
    job.now_s = 20
    job.wait(0)
    assert job.progress(20) == []
    job.now_s = 26
    job.wait(0)
    assert job.progress(26) == ["announce 27"]
    job.all_sealed(27, 0)
    job.committed("g1/s27")
    job.now_s = 28
    job.wait(0)
    assert job.progress(28) == []


def test_after_a_step_the_job_stops_at_that_very_step():
    """Proves that the step is announced as the last ahead of the ranks, and that the stop begins with that."""
    job = train(bounded(Script(every_s=3600.0), conditions=Conditions(after_step=20)))
    for step in range(3, 16):
        job.now_s += 1
        job.wait(0)
        assert job.progress(step) == []
    job.now_s += 1
    job.wait(0)
    assert job.progress(16) == ["announce 20, the last", "log stopping"]
    assert job.state == "stopping"
    assert job.all_sealed(20, 0)[-2:] == ["leave", "log leaving"]
    job.committed("g1/s20")
    job.exited(0)
    assert job.exited(1) == ["end stopped"]


def test_a_capture_shortly_before_the_last_step_is_not_in_its_way():
    """Proves that a regular capture which is under way is waited for, and the last step announced then."""
    job = train(bounded(Script(every_s=13.0), conditions=Conditions(after_step=20)))
    job.now_s = 15.0
    assert job.progress(15) == ["announce 16"]
    job.now_s = 16.0
    job.wait(0)
    assert job.progress(16) == []
    job.all_sealed(16, 0)
    job.wait(0)
    assert job.progress(16) == ["announce 20, the last", "log stopping"]


def test_a_job_that_is_past_its_last_step_stops_without_another_capture():
    """Proves that the same command run again after the last step ends as it did before, and trains nothing."""
    job = bounded(Script(), conditions=Conditions(after_step=20))
    job.begin()
    job.store("g1/s20")
    job.fetched("g1/s20")
    job.up_to_joined(2)
    assert job.wait(0.1) == ["log stopping", "kill 15"]
    job.die(0)
    assert job.die(1) == ["end stopped"]


def test_the_next_checkpoint_is_the_last():
    """Proves that a job which is to stop at its next checkpoint waits for its interval, and stops at that step."""
    job = train(Script())
    job.feed(HaltWanted(Conditions(at_next_checkpoint=True)))
    job.wait(0)
    assert job.progress(3) == []
    job.now_s += 10
    job.wait(0)
    assert job.progress(12) == ["announce 13, the last", "log stopping"]


def test_the_next_checkpoint_is_tried_again_until_there_is_one():
    """Proves that a job which stops at its next checkpoint makes another one when a rank was past that, and has it."""
    job = train(Script())
    job.feed(HaltWanted(Conditions(at_next_checkpoint=True)))
    job.now_s += 10
    assert job.progress(12) == ["announce 13, the last", "log stopping"]
    assert job.missed(1, 13) == ["announce None"]
    job.now_s += 1
    assert job.progress(13) == ["announce 15, the last"]
    assert job.all_sealed(15, 0)[-2:] == ["leave", "log leaving"]


def test_what_was_cleared_stops_nothing():
    """Proves that conditions can be taken back."""
    job = train(Script())
    job.feed(HaltWanted(Conditions(after_step=30, at=1e9 + 5, at_next_checkpoint=True)))
    job.wait(0)
    job.feed(HaltWanted(Conditions()))
    job.now_s += 50
    job.wait(0)
    assert job.progress(40) == ["announce 41"]


def test_a_moment_stops_the_job():
    """Proves that a moment of the wall clock stops the job with its own grace."""
    job = train(bounded(Script(), grace_s=33.0, conditions=Conditions(at=1e9 + 50)))
    job.now_s = 49.9
    job.wait(0)
    assert job.state == "running"
    job.now_s = 50
    assert job.wait(0) == ["log stopping"]
    assert logged(job, "stopping")[0]["grace_s"] == 33.0


def test_a_stop_has_no_more_grace_than_there_is_time():
    """Proves that a stop shortly before the end of a batch job is over before that, though its grace is longer."""
    job = train(bounded(Script(), ends_at=1e9 + 500.0))
    job.now_s = 460
    job.stop(grace_s=90)
    assert logged(job, "stopping")[0]["grace_s"] == 35.0
    assert job.wait(34.9) == []
    assert job.wait(0.2) == ["log stop without checkpoint", "kill 15"]


def test_an_upload_after_the_last_step_has_no_more_than_the_time():
    """Proves that a finished job whose bucket hangs ends, resumable, before its time is over; else it waits."""
    jobs = [train(bounded(with_bucket(), limit_at_s=limit_s)) for limit_s in (100.0, None)]
    for job in jobs:
        commit(job, 10, 0)
        for rank in job.ranks:
            job.left(rank, 11)
        job.exited(0)
        assert job.exited(1) == []
        job.now_s = 94
        assert job.wait(0) == []
    assert [jobs[0].wait(1.1), jobs[1].wait(1000)] == [["log upload skipped", "end stopped"], []]


def taken_over(before: Script, bounds: HaltPolicy) -> Script:
    """Let another agent take a job over, with bounds of its own until it knows those of the one before."""
    after = bounded(Script())
    after.machine = type(after.machine)(dataclasses.replace(after.machine.spec, halt=bounds))
    after.now_s, after.pids = before.now_s, dict(before.pids)
    handover = Handover.from_json(json.loads(json.dumps(before.machine.handover().to_json())))
    after.machine.adopt(handover, job_now(after))
    return after


def test_another_agent_goes_on_with_the_same_limit_and_conditions():
    """Proves that the time limit counts from the start of the run and not of its agent, and that conditions stay."""
    job = train(bounded(Script(), limit_at_s=100.0))
    job.feed(HaltWanted(Conditions(after_step=500, at=2e9)))
    job.now_s = 40
    after = taken_over(job, HaltPolicy(began_s=40, began_at=1e9, limit_at_s=140.0))
    assert after.machine.time_left(job_now(after)).left_s == 60
    assert after.machine.time_left(job_now(after)).whole_s == 100
    assert after.machine.conditions == Conditions(after_step=500, at=2e9)


def test_another_agent_goes_on_with_a_stop_though_no_rank_has_waited_for_it():
    """Proves that a job which was being stopped when its agent died does not begin again: its ranks have left."""
    job = train(Script())
    job.stop(grace_s=60)
    job.progress(3)
    job.all_sealed(4, 0)
    after = taken_over(job, HaltPolicy())
    after.exited(0, LEFT)
    after.exited(1, LEFT)
    lines = after.store("g1/s4", last_generation=1)
    assert after.state in ("stopped", "draining"), (after.state, lines)


# --- what is uploaded until then ---------------------------------------------------------------------------------


def test_the_last_checkpoint_finds_the_way_free():
    """Proves that an older checkpoint whose upload has not begun does not get in the way of the last one."""
    job = train(with_bucket())
    job.capture(10, 0)
    job.now_s += 1
    job.stop()
    assert "upload g1/s10 to bucket" not in job.committed("g1/s10")
    assert job.progress(12) == ["announce 13, the last"]
    job.all_sealed(13, 1)
    job.exited(0)
    job.exited(1)
    assert job.committed("g1/s13")[-1] == "upload g1/s13 to bucket"
    assert job.uploaded("g1/s13")[-1] == "end stopped"


def test_an_upload_that_is_under_way_is_finished_first():
    """Proves that what is nearest to complete is not given up for what comes after it."""
    job = train(with_bucket())
    commit(job, 10, 0)
    job.now_s += 1
    job.stop(grace_s=60)
    job.progress(12)
    job.all_sealed(13, 1)
    job.committed("g1/s13")
    job.exited(0)
    job.exited(1)
    assert job.uploaded("g1/s10") == ["log checkpoint committed", "upload g1/s13 to bucket"]
    lines = job.wait(60)
    assert lines == ["log upload skipped", "end stopped"]
    assert logged(job, "upload skipped") == [
        {
            "step": 13,
            "tier": "bucket",
            "newest_there": 10,
            "reason": "the grace is over",
            "hint": "the next start of the job uploads it",
        }
    ]


def test_where_both_fit_the_older_one_begins_too():
    """Proves that an upload which is known to be short is not held back."""
    job = train(with_bucket())
    commit(job, 10, 0)
    job.uploaded("g1/s10")
    job.capture(20, 1)
    job.stop()
    assert job.committed("g1/s20")[-1] == "upload g1/s20 to bucket"


def test_a_stop_that_captures_nothing_uploads_what_there_is():
    """Proves that a checkpoint which waits for its interval is uploaded once nothing newer will come."""
    job = train(with_bucket(every_s=3600.0))
    commit(job, 10, 0)
    job.uploaded("g1/s10")
    commit(job, 20, 1)
    job.stop(grace_s=20)
    assert job.wait(20) == ["log stop without checkpoint", "kill 15"]
    assert "upload g1/s20 to bucket" in job.wait(0.1)


def test_a_shorter_interval_of_uploads_is_waited_for_no_longer_than_the_grace():
    """Proves that a bucket which is down does not keep a stopped job beyond its grace, and that it ends resumable."""
    job = train(with_bucket())
    commit(job, 10, 0)
    job.stop(grace_s=30)
    job.die(0)
    job.die(1)
    job.upload_failed("g1/s10")
    assert job.wait(29) == ["upload g1/s10 to bucket"]
    assert job.wait(1) == ["log upload skipped", "end stopped"]
    assert cid("g1/s10") in job.machine.keeper.tiers.held["local"]
    assert isinstance(job.effects[-1], e.End)
