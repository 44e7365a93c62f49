"""An attached job: another launcher starts the ranks and restarts them; the machine only sees them come and go."""

from __future__ import annotations

import pytest

from ckptd.core import events as e
from tests.core.script import Script, killed


@pytest.fixture
def attached() -> Script:
    """An attached job of two ranks, pending."""
    return Script(supervised=False)


@pytest.fixture
def running(attached) -> Script:
    """The same job in training, with step 10 committed in slot 0."""
    attached.joined(0)
    attached.store()
    attached.claimed(1)
    attached.joined(1)
    attached.stepped(1)
    attached.progress(1)
    attached.now_s += 1
    attached.progress(2)
    attached.capture(10, 0)
    attached.committed("g1/s10")
    return attached


def test_the_first_rank_begins_the_job(attached):
    """Proves that the first join looks into the store, and that whoever came meanwhile is admitted with the claim."""
    assert attached.joined(0) == ["read store"]
    assert attached.store() == ["claim 1 after None"]
    assert attached.joined(1) == []
    assert attached.claimed(1) == ["log generation started", "admit 0 to 1 with nothing", "admit 1 to 1 with nothing"]
    assert attached.state == "running"


def test_ranks_that_come_back_get_what_memory_holds(running):
    """Proves that a foreign launcher's restart restores from memory: nobody is killed or spawned by us."""
    assert running.die(1) == ["log generation failed", "incident 1 open: rank 1 was killed by signal 9"]
    assert running.die(0) == ["incident 1 open: rank 1 was killed by signal 9"]
    assert running.state == "pending"
    assert running.joined(0, pid=201) == ["read store"]
    assert running.store("g1/s10", last_generation=1) == ["claim 2 after g1/s10"]
    assert running.claimed(2)[-1] == "admit 0 to 2 with g1/s10 from memory"
    assert running.joined(1, pid=202) == ["admit 1 to 2 with g1/s10 from memory"]


def test_a_rank_may_come_back_before_its_old_self_is_seen_to_go(running):
    """Proves that a new incarnation waits until the old one is gone, and begins the next generation then."""
    old = dict(running.pids)
    assert running.joined(0, pid=201) == []
    running.exited(1, killed(1), pid=old[1])
    assert running.exited(0, killed(0), pid=old[0])[-1] == "read store"
    running.store("g1/s10", last_generation=1)
    assert running.claimed(2)[-1] == "admit 0 to 2 with g1/s10 from memory"


def test_a_rank_that_dies_while_it_waits_is_not_admitted(running):
    """Proves that the next generation does not begin with a rank that has died before its turn."""
    running.all_die()
    running.joined(0, pid=201)
    running.store("g1/s10", last_generation=1)
    assert running.exited(0, killed(0), pid=201) == []
    assert running.claimed(2)[1:] == ["incident 1 open: rank 0 was killed by signal 9, lost 0"]
    assert running.joined(0, pid=203) == ["admit 0 to 2 with g1/s10 from memory"]


def test_a_death_before_all_have_come_does_not_wait_for_the_rest(attached):
    """Proves that a generation which never was complete is over when those that came are gone."""
    attached.joined(0)
    attached.store()
    attached.claimed(1)
    assert attached.die(0)[-1].startswith("incident 1 open")
    assert attached.state == "pending"
    assert attached.joined(1) == ["read store"]


def test_even_a_clean_end_before_all_have_come_is_one(attached):
    """Proves that a rank which ends before the others have joined makes room for the next incarnation of all."""
    attached.joined(0)
    attached.store()
    attached.claimed(1)
    attached.left(0, 0)
    assert attached.exited(0) == [
        "log generation failed", "incident 1 open: rank 0 ended before every rank had joined",
        "incident 1 open: rank 0 ended before every rank had joined",
    ]  # fmt: skip
    assert attached.state == "pending"


def test_a_launcher_that_restarts_after_the_end_is_served(running):
    """Proves that ranks which come back while the last flush runs get the final snapshot instead of a closed door."""
    old = dict(running.pids)
    running.all_sealed(12, slot=1, final=True)
    running.left(0, 12)
    running.left(1, 12)
    running.exited(0, pid=old[0])
    running.exited(1, pid=old[1])
    assert running.state == "draining"
    assert running.joined(0, pid=201) == ["read store"]
    running.committed("g1/s12")
    running.store("g1/s12", "g1/s10", last_generation=1)
    assert running.claimed(2)[-1] == "admit 0 to 2 with g1/s12 from memory"


def test_a_rank_that_waits_when_the_others_end_goes_on(running):
    """Proves that the job is not called finished while a rank of the next incarnation waits."""
    old = dict(running.pids)
    running.left(0, 10)
    running.left(1, 10)
    running.joined(0, pid=201)
    running.exited(0, pid=old[0])
    assert running.exited(1, pid=old[1]) == ["read store"]


def test_an_attached_job_finishes_too(running):
    """Proves that an attached job ends when every rank has left and ended."""
    running.all_sealed(12, slot=1, final=True)
    running.left(0, 12)
    running.left(1, 12)
    assert running.committed("g1/s12")[-2:] == ["dismiss 0", "dismiss 1"]
    running.exited(0)
    assert running.exited(1) == ["end finished"]


def test_a_stop_of_half_an_attached_job_ends(attached):
    """Proves that a stop waits only for the ranks that came; nobody can be killed here, so they end by themselves."""
    attached.joined(0)
    attached.store()
    attached.claimed(1)
    attached.stop()
    assert attached.state == "stopping"
    assert attached.exited(0, killed(0, signal=15)) == ["end stopped"]


def test_an_attached_job_gives_up_too(running):
    """Proves that the restart policy holds for ranks that somebody else restarts."""
    running.machine.recovery.policy = type(running.machine.recovery.policy)(max_restarts=0)
    assert running.all_die()[-1].startswith("end failed: JobFailedError: failure number 1")


def test_an_unknown_exit_changes_nothing(running):
    """Proves that the end of a process which is none of the ranks is not taken for one."""
    assert running.feed(e.RankExited(0, 999, killed(0))) == []
    assert running.state == "running"
