"""A job in which something dies, is damaged or repeats itself."""

from __future__ import annotations

from ckptd.core import events as e
from ckptd.core.restore import Source
from ckptd.errors import StateError
from ckptd.types import Evidence
from tests.core.script import TIER, Script, cid, killed, raised


def launcher_end():
    """Return the evidence of a launcher that has ended."""
    return Evidence("exit", "launcher", None, 1.0, "the launcher ended with SIGKILL", 0.0)


def test_a_rank_killed_before_the_first_step_starts_the_job_afresh(starting):
    """Proves that with nothing sealed and nothing stored a death leads to a new generation from nothing."""
    starting.joined(0)
    assert starting.die(1) == ["log generation failed", "incident 1 open: rank 1 was killed by signal 9", "kill 9"]
    assert starting.state == "fenced"
    assert starting.die(0) == ["incident 1 open: rank 1 was killed by signal 9", "claim 2 after None"]
    assert starting.claimed(2) == [
        "log generation started", "incident 1 open: rank 1 was killed by signal 9, lost 0",
        "spawn generation 2, restart 1",
    ]  # fmt: skip


def test_a_kill_costs_the_steps_since_the_newest_snapshot(captured):
    """Proves the whole recovery: pinned snapshot, kill, claim, offer from memory, lost steps, closed by a commit."""
    captured.now_s = 15.0
    captured.progress(13)
    assert captured.die(1) == ["log generation failed", "incident 1 open: rank 1 was killed by signal 9", "kill 9"]
    assert captured.die(0)[-1] == "claim 2 after g1/s10"
    assert captured.claimed(2)[1:] == [
        "incident 1 open: rank 1 was killed by signal 9, lost 3", "spawn generation 2, restart 1",
    ]  # fmt: skip
    captured.spawned()
    assert captured.joined(0) == ["admit 0 to 2 with g1/s10 from memory"]
    assert captured.joined(1) == ["admit 1 to 2 with g1/s10 from memory"]
    assert captured.state == "starting"
    captured.restored()
    assert captured.state == "running"
    assert captured.stepped(11) == ["log job recovered", "incident 1 open: rank 1 was killed by signal 9, lost 3"]
    captured.progress(11)
    captured.capture(19, 1)
    assert "incident 1 closed: rank 1 was killed by signal 9, lost 3" in captured.committed("g2/s19")
    incident = captured.incidents[1]
    assert incident.restored == {"step": 10, "tier": "memory", "generation": 1}
    assert incident.consequences == ("ckptd ended rank 0",)
    assert set(incident.seconds) == {"detect", "kill", "decide", "start", "restore", "first_step", "total"}


def test_a_death_in_the_middle_of_a_capture_voids_the_snapshot(captured):
    """Proves that a step which one of two ranks has sealed is not offered, and that its slot comes back."""
    captured.now_s += 10
    assert captured.progress(19) == ["announce 20"]
    captured.sealed(0, 20, slot=1)
    assert captured.die(1) == [
        "log generation failed", "incident 1 open: rank 1 was killed by signal 9",
        "announce None", "log snapshot abandoned", "release 0:1", "kill 9",
    ]  # fmt: skip
    assert captured.die(0)[-1] == "claim 2 after g1/s10"


def test_a_seal_that_arrives_after_the_death_completes_nothing(captured):
    """Proves that a survivor's seal of a fenced generation only gives its slot back, a final one too."""
    captured.now_s += 10
    captured.progress(19)
    captured.sealed(0, 20, slot=1)
    captured.die(1)
    assert captured.sealed(1, 20, slot=1) == ["release 1:1"]
    assert captured.sealed(0, 20, slot=0, final=True) == ["release 0:0"]
    captured.die(0)
    captured.up_to_training(2, first_step=11, restores=True)
    assert captured.machine.keeper.book.unsealed == []


def test_a_death_in_the_middle_of_a_flush_costs_nothing(captured):
    """Proves that a snapshot which is being flushed is offered from memory, and commits under the old generation."""
    captured.capture(20, 1)
    assert captured.all_die()[-1] == "claim 2 after g1/s20"
    assert captured.committed("g1/s20") == ["log checkpoint committed"]
    assert captured.claimed(2)[-1] == "spawn generation 2, restart 1"
    captured.spawned()
    assert captured.joined(0) == ["admit 0 to 2 with g1/s20 from memory"]


def test_a_commit_of_the_failed_generation_leaves_the_incident_open(captured):
    """Proves that a flush which outlives its generation is not taken for the recovery."""
    captured.capture(20, 1)
    captured.die(0)
    captured.committed("g1/s20")
    captured.die(1)
    captured.claimed(2)
    assert not captured.incidents[1].closed
    assert captured.incidents[1].lost_steps == 0
    assert captured.machine.recovery.restarts == 1


def test_a_second_failure_before_a_commit_closes_the_first(captured):
    """Proves that each failure is an incident of its own, with what it cost."""
    captured.all_die(0)
    captured.up_to_training(2, first_step=11, restores=True)
    captured.progress(12)
    lines = captured.all_die(1)
    assert lines[0] == "incident 1 closed: rank 0 was killed by signal 9, lost 0"
    captured.claimed(3)
    assert captured.incidents[2].lost_steps == 2


def test_a_failed_flush_is_tried_again_later(training):
    """Proves that a snapshot which can't be flushed stays in memory and is tried again with growing delays."""
    training.capture(10, 0)
    assert training.flush_failed("g1/s10") == ["log flush failed"]
    assert training.wait(0.9) == []
    assert training.wait(0.2) == ["flush g1/s10"]
    assert training.flush_failed("g1/s10") == ["log flush failed"]
    assert [item.kind for item in training.machine.warnings] == ["flush"]
    assert training.wait(1.9) == []
    assert training.wait(0.2) == ["flush g1/s10"]
    assert training.committed("g1/s10") == ["log checkpoint committed"]
    assert list(training.machine.warnings) == []
    assert training.machine.keeper.counters.flush_failures == 2


def test_a_newer_snapshot_takes_the_place_of_one_that_could_not_be_flushed(training):
    """Proves that the retry goes to the newest snapshot, and that the older one's slots come back."""
    training.capture(10, 0)
    for delay_s in (1, 2, 4, 8):
        training.flush_failed("g1/s10")
        assert training.wait(delay_s) == ["flush g1/s10"]
    training.flush_failed("g1/s10")
    assert training.capture(30, 1) == ["announce None", "release 0:0", "release 1:0"]
    assert training.wait(6) == ["flush g1/s30"]


def test_three_same_exceptions_fail_the_job_with_their_verdict(job):
    """Proves that an exception which a restart does not cure is not tried for ever, and reaches the user."""
    job.begin()
    job.store()
    for generation in (1, 2, 3):
        job.up_to_training(generation)
        job.exited(0, raised(0, "nan"))
        lines = job.die(1) + job.wait(100)
    verdict = "the same failure 3 times in a row at step 1: rank 0 raised ValueError"
    assert f"end failed: JobFailedError: {verdict}" in lines
    assert job.state == "failed"
    assert job.incidents[3].decision == f"give up: {verdict}"
    assert job.incidents[3].closed


def test_the_verdict_comes_with_the_traceback():
    """Proves that the end of a failed job carries the exception that ended it."""
    job = Script(same_exception_limit=1)
    job.begin_training()
    job.exited(0, raised(0, "nan"))
    job.die(1)
    assert job.effects[-1].exception.message == "nan"


def test_a_refusal_is_not_tried_again(job):
    """Proves that state which doesn't fit the model ends the job at the first failure, with the refusal's own error."""
    job.begin_training()
    job.exited(0, raised(0, "no", error=StateError("layer 3 has shape [4], wanted [8]").to_json()))
    assert job.die(1)[-1] == "end failed: StateError: layer 3 has shape [4], wanted [8]"


def test_fruitless_restarts_are_delayed(job):
    """Proves that generations which make no progress wait longer and longer, and that a stop ends the wait."""
    job.begin_training()
    assert job.all_die()[-1] == "claim 2 after None"
    job.up_to_training(2)
    assert job.all_die()[-1] == "claim 3 after None"
    job.up_to_training(3)
    assert job.all_die()[-1] == "log restart delayed"
    assert job.state == "backoff"
    assert job.wait(0.9) == []
    assert job.wait(0.2) == ["claim 4 after None"]
    job.up_to_training(4)
    job.all_die()
    assert job.wait(1.5) == []
    assert job.stop()[-1] == "end stopped"


def test_a_restart_that_makes_progress_is_not_delayed(captured):
    """Proves that however often a job fails, moving on is what counts."""
    generation, step = 2, 10
    for _ in range(4):
        assert captured.all_die()[-1].startswith("claim")
        captured.up_to_training(generation, first_step=step + 1, restores=True)
        captured.progress(step + 2)
        generation, step = generation + 1, step + 2


def test_a_launcher_that_dies_before_its_ranks_train(captured):
    """Proves that ranks which have nothing to capture yet are ended at once with their launcher."""
    captured.all_die()
    captured.up_to_joined(2)
    assert captured.feed(e.LauncherExited(launcher_end()))[-3:] == [
        "log generation failed", "incident 2 open: the launcher ended with SIGKILL", "kill 9",
    ]  # fmt: skip
    captured.exited(0)
    assert captured.exited(1)[-1] == "claim 3 after g1/s10"


def test_a_launcher_that_ends_between_two_generations_is_no_failure(captured):
    """Proves that with no rank alive a dead launcher is only started anew, with the next spawn."""
    captured.all_die()
    assert captured.feed(e.LauncherExited(launcher_end())) == []
    assert captured.claimed(2)[-1] == "spawn generation 2, restart 1"


def test_a_launcher_that_ends_while_the_ranks_are_killed_changes_nothing_else(captured):
    """Proves that the launcher's death during a recovery has its ranks killed by the agent itself."""
    captured.die(0)
    assert captured.feed(e.LauncherExited(launcher_end())) == ["kill 9"]
    assert captured.exited(1)[-1] == "claim 2 after g1/s10"
    assert len(captured.incidents) == 1


def test_a_restart_on_purpose_is_no_failure(captured):
    """Proves that an operator's restart goes through the same path, and is not held against the script."""
    assert captured.feed(e.RestartWanted()) == [
        "log restart requested", "incident 1 open: a restart was asked for", "kill 9",
    ]  # fmt: skip
    captured.die(0)
    assert captured.die(1)[-1] == "claim 2 after g1/s10"
    assert captured.incidents[1].reasons == ("somebody asked for it",)
    captured.up_to_training(2)
    assert "incident 2 open: a restart from step 10 or before it was asked for" in captured.feed(e.RestartWanted(10))


def test_a_restart_of_what_is_only_starting_is_not_needed(begun):
    """Proves that a restart before any rank exists does not wait for the end of ranks that never began."""
    assert begun.feed(e.RestartWanted()) == []
    assert begun.state == "starting"


def test_a_late_join_is_not_carried_into_the_next_generation(starting):
    """Proves that a rank which asked for its place just before it was killed gets none in the next generation."""
    starting.die(1)
    assert starting.joined(0) == []
    starting.die(0)
    assert starting.claimed(2)[-1] == "spawn generation 2, restart 1"
    starting.spawned()
    assert starting.joined(0) == ["admit 0 to 2 with nothing"]


def test_late_words_of_an_old_generation_change_nothing(captured):
    """Proves that exits, seals and steps of a generation that is over have no effect on the one that follows."""
    old = dict(captured.pids)
    captured.all_die()
    captured.up_to_spawned(2)
    assert captured.exited(0, killed(0), pid=old[0]) == []
    assert captured.sealed(0, 20, slot=1) == []
    assert captured.feed(e.RankStepped(1, 50, 0.0)) == []
    assert captured.feed(e.Progress({0: 70, 1: 70})) == []
    assert captured.left(1, 50) == []
    assert captured.state == "starting"
    assert captured.machine.generation.newest_step == 10


def test_a_claim_may_get_a_higher_number(captured):
    """Proves that the number which the coordinator gives is the one that counts, and that the next is above it."""
    captured.all_die()
    captured.up_to_training(7, first_step=11, restores=True)
    captured.all_die()
    assert captured.effects[-1].at_least == 8


def test_a_failure_that_comes_again_steps_back_one_checkpoint(captured):
    """Proves the guard in the machine: third time from an older checkpoint, what is newer is left; then given up."""
    captured.capture(20, 1)
    captured.committed("g1/s20")

    def fails() -> list[str]:
        captured.exited(0, raised(0, "nan"))
        return captured.die(1) + captured.wait(100)

    fails()
    for generation in (2, 3, 4):
        captured.up_to_training(generation, first_step=21, restores=True)
        lines = fails()
    assert lines[-1] == "fetch g1/s10"
    captured.fetched("g1/s10")
    captured.up_to_training(5, first_step=21, restores=True)
    assert any(line.startswith("end failed: JobFailedError: the same failure 4 times in a row") for line in fails())


def test_an_operator_ends_a_delay(job):
    """Proves that a restart which somebody asks for during a back-off begins at once."""
    job.begin()
    job.store()
    for generation in (1, 2):
        job.up_to_training(generation)
        job.all_die()
    job.up_to_training(3)
    assert job.all_die()[-1] == "log restart delayed"
    job.feed(e.RestartWanted())
    assert job.wait(0.05) == ["claim 4 after None"]


def stepping_back(job: Script) -> Script:
    """Let the same exception come three times with step 20, so that the next generation is to begin with step 10."""
    job.begin()
    job.store("g1/s20", "g1/s10", last_generation=1)
    for generation in (2, 3, 4):
        job.fetched("g1/s20")
        job.up_to_training(generation, first_step=21, restores=True)
        job.exited(0, raised(0, "nan"))
        job.die(1)
    assert job.state == "backoff"
    return job


def test_an_operator_has_the_last_word_on_a_step_back(job):
    """Proves that a job which is to step back by itself begins with what an operator names while it still waits."""
    stepping_back(job).feed(e.RestartWanted(25))
    assert job.wait(0.05) == ["fetch g1/s20"]


def test_a_step_back_to_what_is_damaged_says_so(job):
    """Proves that neither the error nor the incident call newer checkpoints damaged, or the job restarted."""
    assert stepping_back(job).wait(60) == ["fetch g1/s10"]
    verdict = "no checkpoint at step 10 or before it can be restored: g1/s10 is damaged"
    assert job.fetch_failed("g1/s10")[-1] == f"end failed: DamagedError: {verdict}"
    assert job.incidents[3].decision == f"give up: {verdict}"
    assert job.incidents[3].reasons == ("there is nothing to begin with at step 10 or before it",)


def test_a_restart_on_purpose_ends_the_ranks_of_another_launcher():
    """Proves that it takes effect at once, with or without a limit for hangs: no death makes that launcher do it."""
    job = Script(supervised=False)
    job.begin()
    job.store()
    job.up_to_training()
    assert job.feed(e.RestartWanted())[-1] == "end ranks 0 1"
    assert [*job.die(0), *job.die(1)][-1].startswith("incident 1 open")
    assert job.state == "pending"


def test_what_a_step_back_leaves_is_not_the_last_commit_any_more(captured):
    """Proves that status names the newest checkpoint of the lineage, and not a newer one that nobody begins with."""
    captured.capture(20, 1)
    captured.committed("g1/s20")
    captured.feed(e.RestartWanted(10))
    captured.all_die()
    captured.fetched("g1/s10")
    captured.claimed(2)
    assert captured.machine.keeper.last_committed == Source(cid("g1/s10"), TIER)
