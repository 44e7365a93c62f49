"""A job whose agent is replaced while its ranks train on, and one whose launcher dies under its ranks."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from ckptd.core.adopt_events import StoreUnread
from ckptd.core.adopting import ORPHANS_S, SAY_MISSING_S
from ckptd.errors import StoreError
from ckptd.types import Evidence
from tests.core.adoption import back, held, take_over
from tests.core.script import Script

LAUNCHER = Evidence("exit", "launcher", None, 1.0, "the launcher is gone", 0.0)


def announced(job: Script, step: int) -> int:
    """Let the ranks go on from a step until the next capture is announced; return for which."""
    while True:
        lines = job.progress(step)
        job.now_s += 0.1
        step += 1
        for line in lines:
            if line.startswith("announce "):
                return int(line.split()[1])


@pytest.fixture
def training() -> Script:
    """A job that trains, and has captured step 10 in slot 0, which is not committed yet."""
    job = Script()
    job.begin_training()
    job.capture(10, 0)
    return job


def test_the_ranks_train_on_and_a_flush_is_made_again(training: Script) -> None:
    """Once all ranks are back and the tiers read, what only slots hold is flushed, and captures go on."""
    job, lines = take_over(training)
    assert (job.state, lines) == ("running", ["log adopting", "recall"])
    assert back(job, 0, 14, held(0, "g1/s10")) == []
    assert job.store(last_generation=1) == []
    assert back(job, 1, 14, held(0, "g1/s10")) == ["flush g1/s10", "log job adopted"]
    assert job.committed("g1/s10") == ["log checkpoint committed"]
    assert job.all_sealed(announced(job, 14), 1) == ["announce None", "flush g1/s16", "release 0:0", "release 1:0"]


def test_what_is_on_a_tier_is_not_flushed_again(training: Script) -> None:
    """A flush that the agent before has finished is found on the tier: the snapshot is committed, and is offered."""
    job, _ = take_over(training)
    back(job, 0, 14, held(0, "g1/s10"))
    back(job, 1, 14, held(0, "g1/s10"))
    assert job.store("g1/s10", last_generation=1) == ["log job adopted"]
    job.all_die()
    assert job.feed(e.Tick()) == []
    assert job.state == "preparing"


def test_a_capture_that_only_some_made_is_void(training: Script) -> None:
    """A step that the dead agent had announced and one rank has sealed is nobody's snapshot; its slot is free again."""
    training.committed("g1/s10")
    job, _ = take_over(training)
    job.store("g1/s10", last_generation=1)
    back(job, 0, 20, held(0, "g1/s10"), held(1, "g1/s20"))
    assert back(job, 1, 19, held(0, "g1/s10")) == ["release 0:1", "log job adopted"]
    assert job.sealed(1, 20, 1) == ["release 1:1"]


def test_a_last_capture_waits_for_the_others(training: Script) -> None:
    """What a rank has sealed at its end counts as soon as the others have sealed theirs with the new agent."""
    training.committed("g1/s10")
    job, _ = take_over(training)
    job.store("g1/s10", last_generation=1)
    back(job, 0, 30, held(0, "g1/s10"), held(1, "g1/s30", final=True))
    back(job, 1, 30, held(0, "g1/s10"))
    assert job.sealed(1, 30, 1, final=True) == ["announce None", "flush g1/s30", "release 0:0", "release 1:0"]


def test_a_rank_with_no_step_left_has_the_only_slot() -> None:
    """Ranks restored at their last step capture it once more for the next agent: the single slot is theirs."""
    before = Script(slots=1)
    before.begin_training()
    before.all_sealed(10, 0, final=True)
    before.all_die()
    before.up_to_joined(2)
    before.restored()
    job, _ = take_over(before)
    job.store(last_generation=2)
    back(job, 0, 10, unknown=(0,), slots=(0,), stepped=False)
    assert "flush g1/s10" in back(job, 1, 10, unknown=(0,), slots=(0,), stepped=False)
    job.feed(e.CheckpointWanted())
    assert job.wait(0.1) == []
    job.committed("g1/s10")
    assert job.wait(0.1) == ["release 0:0", "release 1:0"]
    assert job.all_sealed(10, 0, final=True)[-1] == "flush g2/s10"


def test_slots_of_an_older_generation_are_known_from_the_journal(training: Script) -> None:
    """A rank that was lent slots which its predecessor had sealed does not know of what; the agent before did."""
    training.all_die()
    training.up_to_training(2, first_step=11, restores=True)
    job, _ = take_over(training)
    job.store(last_generation=2)
    back(job, 0, 12, unknown=(0,))
    assert back(job, 1, 12, unknown=(0, 1)) == ["release 1:1", "flush g1/s10", "log job adopted"]


def test_differing_replicas_stay_known(training: Script) -> None:
    """That replicated tensors differ is remembered: a snapshot that relies on them is never offered."""
    training.machine.keeper.book.whole = True
    job, _ = take_over(training)
    job.store(last_generation=1)
    back(job, 0, 14, held(0, "g1/s12", w="a"))
    assert back(job, 1, 14, held(0, "g1/s12", w="a"))[-3:] == ["release 0:0", "release 1:0", "log job adopted"]
    assert job.machine.keeper.book.newest is None


def test_a_rank_that_died_meanwhile_is_a_failure_like_any_other(training: Script) -> None:
    """The job begins again from the disk: the dead rank has taken its slots along."""
    training.committed("g1/s10")
    job, _ = take_over(training)
    job.store("g1/s10", last_generation=1)
    back(job, 0, 14, held(0, "g1/s10"))
    assert job.die(1) == ["log generation failed", "incident 1 open: rank 1 was killed by signal 9", "kill 9"]
    assert job.die(0)[-1] == "fetch g1/s10"
    job.fetched("g1/s10")
    assert job.claimed(2)[0] == "log generation started"
    assert job.machine.recovery.restarts == 1


def test_memory_that_was_kept_elsewhere_saves_the_steps(training: Script) -> None:
    """Slots that came back without their dead ranks hold what the journal says: the restart is from memory."""
    job, _ = take_over(training, memory=((0, 0), (1, 0)))
    job.store(last_generation=1)
    job.all_die(first=1)
    assert "claim 2 after g1/s10" in show_all(job)


def test_a_rank_knows_better_than_the_journal_what_its_slots_hold(training: Script) -> None:
    """A slot that a rank says is free is not what it was, whoever has kept its memory: the rank may be writing it."""
    job, _ = take_over(training, memory=((0, 0), (1, 0)))
    job.store(last_generation=1)
    back(job, 0, 14)
    assert back(job, 1, 14, held(1, "g1/s14")) == ["release 1:1", "log job adopted"]
    assert job.machine.keeper.book.newest is None


def show_all(job: Script) -> list[str]:
    """Return what the last input made the machine want."""
    return job._show(job.effects)


def test_nothing_is_planned_before_the_tiers_were_read(training: Script) -> None:
    """A failure while the tiers can't be read waits for them: to take them for empty would be a fresh start."""
    training.committed("g1/s10")
    job, _ = take_over(training)
    assert job.feed(StoreUnread(StoreError("the bucket is away"))) == ["log store unread"]
    job.die(0)
    assert job.die(1)[-1].startswith("incident 1 open")
    assert job.state == "preparing"
    assert "recall" in job.wait(5.0)
    assert job.store("g1/s10", last_generation=1) == ["fetch g1/s10"]


def test_the_tiers_are_not_read_twice_for_one_generation() -> None:
    """A rank of the next incarnation that joins while the tiers are still being read makes no second generation."""
    before = Script(supervised=False)
    for rank in (0, 1):
        before.joined(rank)
    before.store()
    before.claimed(1)
    before.stepped(1)
    job, lines = take_over(before)
    assert lines == ["log adopting", "recall"]
    assert job.all_die()[0] == "log generation failed"
    assert job.joined(0, pid=900) == []
    assert job.store("g1/s10", last_generation=1) == ["fetch g1/s10"]


def test_a_rank_that_lives_and_does_not_come_back(training: Script) -> None:
    """It is said who is missing, and after the wait of the job's settings it counts as failed."""
    job, _ = take_over(training)
    job.store(last_generation=1)
    back(job, 0, 14, held(0, "g1/s10"))
    assert job.wait(SAY_MISSING_S) == ["log ranks missing"]
    assert job.wait(1.0) == []
    assert job.wait(job.machine.spec.return_s)[0] == "log generation failed"
    assert job.incidents[1].cause == "rank 1 did not come back to the new agent within 600 s"


def test_the_history_is_not_forgotten(training: Script) -> None:
    """Restarts, failures and the open incident go over to the next agent, who closes it with the first commit."""
    training.all_die()
    training.up_to_training(2, first_step=11, restores=True)
    assert training.incidents[1].closed is False
    job, _ = take_over(training)
    job.store("g1/s10", last_generation=2)
    for rank in (0, 1):
        back(job, rank, 15, held(1, "g2/s15"))
    assert job.machine.recovery.restarts == 1
    assert job.committed("g2/s15")[-1].startswith("incident 1 closed: rank 0 was killed")


@pytest.mark.parametrize("more", [0, 1], ids=["its next agent", "the one after that"])
def test_a_step_back_is_not_forgotten(training: Script, more: int) -> None:
    """An agent that ends before the next generation begins takes no step back with it, nor does one that follows."""
    training.committed("g1/s10")
    training.capture(20, 1)
    training.committed("g1/s20")
    training.feed(e.RestartWanted(15))
    training.die(0)
    job, lines = take_over(training)
    for _ in range(more):
        job, lines = take_over(job)
    assert lines == ["read store"]
    assert job.store("g1/s20", "g1/s10", last_generation=1) == ["fetch g1/s10"]


def test_ranks_that_were_restoring(training: Script) -> None:
    """Whoever has its state goes on; nobody else is let in, since what the generation began with is not at hand."""
    training.all_die()
    training.up_to_joined(2)
    job, lines = take_over(training)
    assert (job.state, lines) == ("starting", ["log adopting", "recall"])
    assert job.machine.offers_lost
    job.store(last_generation=2)
    back(job, 0, 11)
    back(job, 1, 11)
    assert job.state == "running"


def test_ranks_that_were_starting_afresh_go_on(training: Script) -> None:
    """Where nothing is restored, ranks that have not come yet are let in by the next agent."""
    before = Script()
    before.begin()
    before.store()
    before.up_to_spawned(1)
    before.joined(0)
    job, _ = take_over(before)
    assert job.state == "starting"
    job.store(last_generation=1)
    assert back(job, 0, 0) == ["log job adopted"]
    assert job.joined(1) == ["admit 1 to 1 with nothing"]
    assert job.state == "running"


@pytest.mark.parametrize("state", ["preparing", "fenced", "backoff", "draining", "stopped"])
def test_a_job_without_ranks_begins_with_its_newest_checkpoint(training: Script, state: str) -> None:
    """Where the agent before had no ranks left, the job is started again, with its history."""
    job, lines = take_over(training, state=state)
    assert (job.state, lines) == ("preparing", ["read store"])
    assert job.store("g1/s10", last_generation=1) == ["fetch g1/s10"]


def test_a_stop_goes_on(training: Script) -> None:
    """A job that was being stopped is stopped by the next agent, with a checkpoint once all ranks are back."""
    training.committed("g1/s10")
    training.stop()
    job, _ = take_over(training)
    job.store("g1/s10", last_generation=1)
    back(job, 0, 20, held(0, "g1/s10"))
    assert back(job, 1, 20, held(0, "g1/s10")) == ["log job adopted", "log stopping"]
    assert job.state == "stopping"


def test_a_stop_while_ranks_are_missing_waits_for_them(training: Script) -> None:
    """A job that is stopped before all ranks are back has its last checkpoint all the same."""
    job, _ = take_over(training)
    job.store("g1/s10", last_generation=1)
    back(job, 0, 20, held(0, "g1/s10"))
    assert job.stop() == []
    assert back(job, 1, 20, held(0, "g1/s10"))[-1] == "log stopping"


def test_a_stop_does_not_wait_longer_than_its_grace_for_who_is_missing(training: Script) -> None:
    """Ranks that hang do not come back: a stop meanwhile ends them when its grace is over, and says what it lacks."""
    job, _ = take_over(training)
    job.store(last_generation=1)
    back(job, 0, 14, held(0, "g1/s10"))
    assert job.stop(grace_s=2.0) == []
    assert job.wait(1.9) == []
    assert job.wait(0.2) == ["log stop without checkpoint", "log stopping", "kill 15"]
    assert job.state == "stopping"


def test_a_connection_that_broke_and_an_agent_that_did_not(training: Script) -> None:
    """A rank that comes back to the very agent it lost tells what it has sealed meanwhile, once."""
    training.committed("g1/s10")
    training.now_s += 10
    assert "announce 20" in training.progress(19)
    training.sealed(0, 20, 1)
    assert back(training, 1, 20, held(0, "g1/s10"), held(1, "g1/s20"))[:2] == ["announce None", "flush g1/s20"]
    assert back(training, 1, 21, held(1, "g1/s20")) == []


# --- launchers ------------------------------------------------------------------------------------------------


def test_orphans_capture_once_more(training: Script) -> None:
    """Ranks whose launcher has died are captured at the next boundary, and begin again with that: no step is lost."""
    training.committed("g1/s10")
    assert training.feed(e.LauncherExited(LAUNCHER)) == ["log launcher lost"]
    assert "announce 15" in training.progress(14)
    training.all_sealed(15, 1)
    assert training.wait(0.1) == ["log generation failed", "incident 1 open: the launcher is gone", "kill 9"]
    training.exited(0)
    assert training.exited(1)[-1] == "claim 2 after g1/s15"


def test_orphans_that_take_too_long(training: Script) -> None:
    """One that never comes to its boundary costs the steps since the last snapshot, and no more time than the bound."""
    training.feed(e.LauncherExited(LAUNCHER))
    assert training.wait(ORPHANS_S - 0.1) == []
    assert training.wait(0.2)[-1] == "kill 9"


def test_an_orphan_that_dies(training: Script) -> None:
    """A rank that ends without its launcher ends the wait; the launcher is the cause."""
    training.feed(e.LauncherExited(LAUNCHER))
    assert training.die(0)[:2] == ["log generation failed", "incident 1 open: the launcher is gone"]


def test_a_launcher_that_died_with_its_agent(training: Script) -> None:
    """Ranks that come back to a new agent and have no launcher any more are captured once more as well."""
    training.committed("g1/s10")
    job, _ = take_over(training)
    assert job.feed(e.LauncherExited(LAUNCHER)) == ["log launcher lost"]
    job.store("g1/s10", last_generation=1)
    for rank in (0, 1):
        back(job, rank, 14, held(0, "g1/s10"))
    job.all_sealed(announced(job, 14), 1)
    assert job.wait(0.1)[-1] == "kill 9"


def test_a_launcher_that_dies_before_its_ranks_are_there() -> None:
    """Where no rank has a process yet there is nobody to wait for."""
    job = Script()
    job.begin()
    job.store()
    job.claimed(1)
    lines = job.feed(e.LauncherExited(LAUNCHER))
    assert lines[0] == "log generation failed"
    assert lines[-1] == "claim 2 after None"


def test_a_last_snapshot_that_went_with_its_agent_is_no_success(training: Script) -> None:
    """Proves that a job does not end well whose ranks were let go since no tier took their last snapshot."""
    for rank in (0, 1):
        training.feed(e.RankLeft(rank, 10))
    after, _ = take_over(training)
    after.store(last_generation=1)
    after.feed(e.RankExited(0, after.pids[0], None))
    assert "could not be made durable" in after.feed(e.RankExited(1, after.pids[1], None))[-1]
    stored, _ = take_over(training)
    stored.store("g1/s10", last_generation=1)
    stored.feed(e.RankExited(0, stored.pids[0], None))
    assert stored.feed(e.RankExited(1, stored.pids[1], None))[-1] == "end finished"
