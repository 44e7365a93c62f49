"""How a job ends: stopped, given up, refused at its setup, or with a disk that takes nothing any more."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from ckptd.core.keeper import FINAL_FLUSH_TRIES
from ckptd.errors import ConfigError, JobFailedError, MemoryBudgetError
from ckptd.types import Evidence
from tests.core.script import Script, raised

REFUSED = ConfigError("train.py can't be executed: no such file")


def gone(rank: int) -> Evidence:
    """The evidence of a rank that was told to leave."""
    return Evidence("exit", "exit", rank, 1.0, f"rank {rank} ended with exit code 75", 0.0, returncode=75)


def test_a_stop_captures_first(captured):
    """Proves that a stop captures at the next boundary, has the ranks leave there, and ends with the commit."""
    captured.now_s += 1
    assert captured.stop() == ["log stopping"]
    assert captured.progress(12) == ["announce 13, the last"]
    assert captured.sealed(0, 13, slot=1) == []
    sealed = ["announce None", "flush g1/s13", "release 0:0", "release 1:0"]
    assert captured.sealed(1, 13, slot=1) == [*sealed, "leave", "log leaving"]
    assert captured.progress(13) == []
    captured.exited(0, gone(0))
    assert captured.exited(1, gone(1)) == ["log scavenging"]
    assert captured.committed("g1/s13") == ["log checkpoint committed", "end stopped"]
    assert captured.incidents == {}


def test_the_last_step_is_not_flushed_twice():
    """Proves that a last step which is committed, and gave its only slot up for a step that never comes, suffices."""
    job = Script(slots=1)
    job.begin_training()
    job.capture(10, 0)
    job.committed("g1/s10")
    job.now_s += 10
    assert job.progress(10) == ["release 0:0", "release 1:0", "announce 11"]
    assert job.sealed(0, 10, 0, final=True) == ["announce None", "log snapshot abandoned", "release 0:0"]
    assert job.sealed(1, 10, 0, final=True) == ["release 1:0"]
    job.left(0, 10)
    assert job.left(1, 10) == ["dismiss 0", "dismiss 1"]
    job.exited(0)
    assert job.exited(1) == ["end finished"]


def test_ranks_that_do_not_leave_are_ended_with_the_grace(captured):
    """Proves that ranks have the rest of the grace to clean up, and are ended then, with the checkpoint in place."""
    captured.now_s += 1
    captured.stop(grace_s=20)
    captured.progress(12)
    captured.all_sealed(13, slot=1)
    assert captured.committed("g1/s13") == ["log checkpoint committed"]
    captured.exited(0, gone(0))
    assert captured.wait(19) == []
    assert captured.wait(2) == ["kill 15"]
    assert captured.wait(5) == ["kill 9"]
    assert captured.die(1) == ["end stopped"]


def test_a_shorter_grace_counts(captured):
    """Proves that a second stop which has less time than the first shortens the wait, and a longer one does not."""
    captured.stop(grace_s=600)
    captured.stop(grace_s=20)
    captured.stop(grace_s=60)
    assert captured.wait(19) == []
    assert captured.wait(2) == ["log stop without checkpoint", "kill 15"]


def test_a_third_stop_waits_for_nothing(captured):
    """Proves that who asks three times gets the end at once, and is told what is lost with it."""
    captured.capture(20, 1)
    captured.stop()
    assert captured.stop(checkpoint=False) == ["kill 9"]
    lines = captured.stop(checkpoint=False)
    assert lines == ["kill 9", "log scavenging", "log snapshot abandoned", "end stopped"]


def test_a_stop_waits_for_one_checkpoint_only():
    """Proves that a disk which is slower than the interval does not keep a stopping job in training."""
    job = Script(every_s=1.0)
    job.begin_training()
    job.now_s += 0.5
    job.progress(2)
    job.stop()
    job.now_s += 0.1
    assert job.progress(2) == ["announce 3, the last"]
    job.all_sealed(3, slot=0)
    job.now_s += 5
    assert job.progress(13) == []
    assert job.committed("g1/s3") == ["log checkpoint committed"]


def test_a_missed_step_does_not_end_the_wish_of_a_stop(captured):
    """Proves that a stop tries again when a rank was past the step that it announced."""
    captured.now_s += 1
    captured.stop()
    assert captured.progress(12) == ["announce 13, the last"]
    captured.missed(0, 13)
    assert captured.progress(14) == ["announce 16, the last"]


def test_a_stop_waits_no_longer_than_its_grace(captured):
    """Proves that after the grace the ranks are ended without a checkpoint, which the log says."""
    captured.stop(grace_s=20)
    assert captured.wait(19) == []
    assert captured.wait(2) == ["log stop without checkpoint", "kill 15"]
    assert captured.wait(4) == []
    assert captured.wait(2) == ["kill 9"]
    captured.die(0)
    assert captured.die(1) == ["end stopped"]


def test_stopping_twice_stops_at_once(captured):
    """Proves that a second, impatient stop kills, and that a second patient one changes nothing."""
    captured.stop()
    assert captured.stop() == []
    assert captured.stop(checkpoint=False) == ["kill 9"]
    captured.die(0)
    assert captured.die(1) == ["end stopped"]


def test_a_stop_without_checkpoint_ends_the_ranks_now(captured):
    """Proves that a stop may do without a checkpoint."""
    assert captured.stop(checkpoint=False) == ["log stopping", "kill 15"]


def test_a_stop_does_not_wait_for_a_rank_that_is_dead(captured):
    """Proves that a death during a stop ends the survivors, who would wait for it in vain."""
    captured.stop()
    assert captured.die(1) == ["kill 15"]
    assert captured.die(0) == ["end stopped"]


def test_ranks_that_finish_while_they_are_stopped_are_let_go(captured):
    """Proves that training which ends by itself during a stop is committed and dismissed without waiting."""
    captured.now_s += 1
    captured.stop()
    assert captured.progress(12) == ["announce 13, the last"]
    assert captured.all_sealed(12, slot=1, final=True)[:2] == ["announce None", "log snapshot abandoned"]
    captured.left(0, 12)
    captured.left(1, 12)
    assert captured.committed("g1/s12")[1:] == ["dismiss 0", "dismiss 1"]
    captured.exited(0)
    assert captured.exited(1) == ["end stopped"]


def test_a_stop_before_the_first_rank_does_not_wait_for_any(begun):
    """Proves that a job which is stopped while its launcher still imports ends at once."""
    assert begun.stop() == ["log stopping", "kill 9", "end stopped"]


@pytest.mark.parametrize("answer", ["store", "fetched", "fetch_failed", "claimed"])
def test_an_answer_that_comes_after_the_stop_changes_nothing(captured, answer):
    """Proves that what was still being looked up when the job was stopped does not bring it back."""
    captured.capture(20, 1)
    captured.feed(e.RestartWanted(10))
    captured.all_die()
    assert captured.state == "preparing"
    assert captured.stop() == ["log stopping", "log scavenging"]
    assert captured.state == "draining"
    calls = {
        "store": lambda: captured.store("g1/s10"),
        "fetched": lambda: captured.fetched("g1/s10"),
        "fetch_failed": lambda: captured.fetch_failed("g1/s10"),
        "claimed": lambda: captured.claimed(2),
    }
    assert calls[answer]() == []
    assert captured.committed("g1/s20")[-1] == "end stopped"


def test_a_job_can_be_stopped_before_it_has_begun(job):
    """Proves that pending is no trap."""
    assert job.stop() == ["log stopping", "end stopped"]


def test_the_end_waits_for_what_memory_holds():
    """Proves that a job which is given up still makes its newest snapshot durable."""
    job = Script(max_restarts=0)
    job.begin_training()
    job.capture(10, 0)
    lines = job.all_die()
    assert job.state == "draining"
    assert not [line for line in lines if line.startswith("end")]
    verdict = "failure number 1 within 1 d, and max_restarts is 0: rank 0 was killed by signal 9"
    assert job.committed("g1/s10")[-1] == f"end failed: JobFailedError: {verdict}"


def hopeless(job: Script) -> list[str]:
    """Let the final flush fail until nobody waits for it any more; return what follows."""
    job.all_sealed(3, slot=0, final=True)
    job.left(0, 3)
    job.left(1, 3)
    for _ in range(FINAL_FLUSH_TRIES - 1):
        assert job.flush_failed("g1/s3") == ["log flush failed"]
        job.wait(20)
    return job.flush_failed("g1/s3")


def test_a_hopeless_flush_at_the_end_is_an_error(training):
    """Proves that a job whose last snapshot can't be made durable lets its ranks go and does not end as finished."""
    assert hopeless(training) == ["log flush failed", "dismiss 0", "dismiss 1"]
    training.exited(0)
    assert training.exited(1) == ["end failed: JobFailedError: the last snapshot could not be made durable"]
    assert training.machine.error.message == "the last snapshot could not be made durable"  # for `ckptctl status`


def test_a_hopeless_flush_is_not_blamed_on_an_old_exception(training):
    """Proves that an exception which the job has recovered from is not shown as the reason of its end."""
    training.exited(0, raised(0, "once"))
    training.die(1)
    training.up_to_training(2)
    training.all_sealed(3, slot=0, final=True)
    for _ in range(FINAL_FLUSH_TRIES):
        training.flush_failed("g2/s3")
        training.wait(20)
    training.exited(0)
    training.exited(1)
    training.flush_failed("g2/s3")
    assert training.effects[-1].exception is None
    assert training.effects[-1].error is not None


# --- setup -----------------------------------------------------------------------------------------------------------


def test_no_rank_can_be_started(begun):
    """Proves that a command which can't be executed ends the job, though no rank will ever be seen to go."""
    assert begun.feed(e.SetupFailed(REFUSED)) == ["kill 9", f"end failed: ConfigError: {REFUSED.message}"]
    assert begun.feed(e.SetupFailed(REFUSED)) == []


def test_one_rank_can_not_be_started(begun):
    """Proves that a rank which exists is killed when another one can't be started."""
    begun.spawned_one(0)
    assert begun.feed(e.SetupFailed(REFUSED))[0] == "kill 9"
    assert begun.state == "failed"


def test_a_rank_that_can_not_be_started_while_another_dies(begun):
    """Proves that a job does not wait in fenced for a rank that never came to be."""
    begun.spawned_one(0)
    begun.die(0)
    assert begun.state == "fenced"
    assert begun.feed(e.SetupFailed(REFUSED))[-1] == f"end failed: ConfigError: {REFUSED.message}"


def test_a_rank_that_can_not_be_started_during_a_stop(begun):
    """Proves that a stop does not wait for a rank that never came to be, and stays a stop."""
    begun.spawned_one(0)
    assert begun.stop() == ["log stopping", "kill 15"]
    assert begun.feed(e.SetupFailed(REFUSED)) == ["kill 9", "end stopped"]


def test_memory_that_runs_out_ends_a_running_job_with_its_reason(captured):
    """Proves that slots which can't be had any more are a refusal with the bytes in it, and keep the last snapshot."""
    captured.capture(20, 1)
    assert captured.feed(e.SetupFailed(MemoryBudgetError("slots need 4 GiB"))) == ["kill 9", "log scavenging"]
    assert captured.committed("g1/s20")[-1] == "end failed: MemoryBudgetError: slots need 4 GiB"


def test_a_launcher_that_fails_before_it_is_ready(begun):
    """Proves that a launcher which dies during its imports ends the job with what it said."""
    problem = JobFailedError("the launcher ended with 1 before it was ready; it said: No module named torch")
    assert begun.feed(e.SetupFailed(problem))[-1] == f"end failed: JobFailedError: {problem.message}"


def test_a_job_that_is_over_but_for_its_flush_waits_on(training):
    """Proves that a draining job tries its last flush again, and that nothing at its setup disturbs it."""
    training.all_sealed(3, slot=0, final=True)
    training.exited(0)
    assert training.exited(1) == []
    assert training.state == "draining"
    assert training.feed(e.SetupFailed(REFUSED)) == []
    assert training.stop() == ["log scavenging"]
    assert training.flush_failed("g1/s3") == ["log flush failed"]
    assert training.wait(1.1) == ["flush g1/s3"]
    assert training.committed("g1/s3") == ["log checkpoint committed", "end finished"]
