"""What a job does about ranks that live and make no progress."""

from __future__ import annotations

import pytest

from ckptd.core.policy.hang import HangPolicy, Sample
from ckptd.core.watch_events import Gathered, Watched
from ckptd.types import Evidence
from tests.core.script import Script, killed

SHORT = HangPolicy(floor_s=5.0, ceiling_s=60.0, first_s=30.0)
TICK_S = 0.05


class Looked(Script):
    """A job whose pages are looked at each tick."""

    def __init__(self, *, hang: HangPolicy | None = SHORT, supervised: bool = True, ranks: int = 2) -> None:
        super().__init__(hang=hang, supervised=supervised, ranks=ranks)
        self.step = dict.fromkeys(self.ranks, 0)
        self.beat_s = dict.fromkeys(self.ranks, 0.0)
        self.phase = dict.fromkeys(self.ranks, "training")

    def look(self) -> list[str]:
        """Let the pages be looked at, and the clock tick."""
        pages = tuple(
            Sample(rank, self.step[rank], round(self.beat_s[rank] * 1e9), self.phase[rank], self.now_s)
            for rank in self.ranks
        )
        return [*self.feed(Watched(self.now_s, pages)), *self.wait(0)]

    def still(self, seconds: float) -> list[str]:
        """Let time pass in which nobody does anything."""
        end_s, lines = self.now_s + seconds, []
        while self.now_s < end_s - 1e-9:
            self.now_s += TICK_S
            lines += self.look()
        return lines

    def advance(self, steps: int, seconds: float = 0.1) -> list[str]:
        """Let all ranks finish steps."""
        lines = []
        for _ in range(steps):
            lines += self.still(seconds)
            for rank in self.ranks:
                self.step[rank] += 1
                self.beat_s[rank] = self.now_s
            lines += self.progress(self.step[0]) + self.look()
        return lines

    def train(self, steps: int = 20) -> None:
        """Begin, and finish so many steps."""
        if self.machine.spec.supervised:
            self.begin_training()
        else:
            self.joined(0)
            self.store()
            self.claimed(1)
            self.joined(1)
            self.stepped(1)
        assert self.advance(steps) == []

    def gathered(self, culprit: int | None = None, finding: str = "", number: int = 1) -> list[str]:
        """Answer with evidence."""
        findings = {} if culprit is None else {culprit: finding}
        return self.feed(Gathered(number, "/home/x/incidents/1", findings, culprit))


@pytest.fixture
def job() -> Looked:
    """A job that trains at 0.1 s a step."""
    job = Looked()
    job.train()
    return job


def test_a_hang_is_gathered_then_killed(job: Looked) -> None:
    """While evidence is gathered everything stays as it is; with it the job fails as after a death."""
    assert job.still(5.2) == ["log hang found", "gather 1: hang of rank None"]
    assert job.state == "running"
    assert job.still(1.0) == []
    lines = job.gathered(1, "is stopped by a signal (SIGSTOP or SIGTSTP), in train")
    assert lines[0] == "log generation failed"
    assert lines[1].startswith("incident 1 open: rank 1 is stopped by a signal")
    assert "kill 9" in lines
    assert job.state == "fenced"
    incident = job.incidents[1]
    assert (incident.kind, incident.rank, incident.evidence_path) == ("stopped", 1, "/home/x/incidents/1")


def test_the_incident_counts_from_the_last_sign_of_life(job: Looked) -> None:
    """It took as long to detect as nothing was seen; gathering is no part of that."""
    job.still(5.2)
    job.still(3.0)
    job.gathered()
    for rank in job.ranks:
        job.die(rank)
    seconds = job.incidents[1].seconds
    assert 5.0 <= seconds["detect"] <= 5.2
    assert 3.0 <= seconds["kill"] <= 3.3


def test_without_evidence_it_goes_on(job: Looked) -> None:
    """A collector that does not come back delays the restart by five seconds, no more."""
    job.still(5.2)
    lines = job.still(5.1)
    assert "kill 9" in lines
    assert job.incidents[1].kind == "hang"
    assert job.incidents[1].evidence_path is None
    assert job.feed(Gathered(1, "/late"))[0].startswith("incident 1 open")
    assert job.incidents[1].evidence_path == "/late"


def test_a_rank_that_goes_on_is_not_killed(job: Looked) -> None:
    """A step while evidence is gathered takes the suspicion back, and the evidence is of no use then."""
    job.still(5.2)
    assert job.advance(1) == ["log hang over"]
    assert job.gathered(1, "is busy") == []
    assert job.state == "running"
    assert job.advance(5) == []


def test_a_rank_that_hangs_alone(job: Looked) -> None:
    """Ranks that wait for nobody go on beside one that hangs: what they do says nothing of it, and it is ended."""
    lines: list[str] = []
    for _ in range(60):
        lines += job.still(0.1)
        job.step[0] += 1
        job.beat_s[0] = job.now_s
        lines += job.progress(job.step[0]) + job.look()
    assert [line for line in lines if "hang" in line] == ["log hang found", "gather 1: hang of rank 1"]
    assert "kill 9" in job.gathered(1, "sleeps, in train")
    assert job.incidents[1].rank == 1


def test_a_death_while_evidence_is_gathered(job: Looked) -> None:
    """A rank that dies meanwhile is the cause; there is one incident."""
    job.still(5.2)
    lines = job.die(0)
    assert "kill 9" in lines
    assert job.incidents[1].kind == "signal"
    assert job.still(6.0) == []
    assert len(job.incidents) == 1


def test_a_suspicion_ends_with_its_generation(job: Looked) -> None:
    """A rank that dies meanwhile may be replaced before the next tick, and who comes then is not judged for it."""
    job.still(5.2)
    job.all_die()
    job.up_to_training(2)
    assert job.state == "running"
    assert "kill 9" not in job.gathered(1, "is busy")
    assert job.state == "running"


def test_survivors_of_a_hang_are_consequences(job: Looked) -> None:
    """Ranks that ckptd kills after a hang are not taken for its cause."""
    job.still(5.2)
    job.gathered(1, "sleeps, in train")
    for rank in job.ranks:
        job.exited(rank, killed(rank, job.now_s))
    incident = job.incidents[1]
    assert incident.rank == 1
    assert incident.cause.startswith("rank 1 sleeps, in train; no rank has finished a step after step 20 for 5.")
    assert incident.consequences == ("ckptd ended rank 0", "ckptd ended rank 1")


def test_turned_off() -> None:
    """Without the setting nobody is ever called hung."""
    job = Looked(hang=None)
    job.train()
    assert job.still(100) == []


def test_a_rank_that_has_left_is_not_watched(job: Looked) -> None:
    """What a rank does after its block is its own affair; who has not left is watched as before."""
    job.left(0, 20)
    lines = job.still(5.2)
    assert "gather 1: hang of rank 1" in lines


def test_nobody_is_missed_in_a_script_that_never_attached() -> None:
    """Of ranks that don't attach nothing is known: a script without ckptd may run for as long as it likes."""
    job = Looked()
    job.begin()
    job.store()
    job.claimed(1)
    job.spawned()
    lines = [job.feed(Watched(job.now_s, ())) for job.now_s in range(200)]
    assert not any(lines)


def test_a_rank_that_does_not_come_back(job: Looked) -> None:
    """Once all ranks have attached, one that does not attach after a restart is hung on its way."""
    job.all_die()
    job.up_to_spawned(2)
    job.joined(0)
    job.step = dict.fromkeys(job.ranks, 0)
    lines: list[str] = []
    for _ in range(700):
        job.now_s += TICK_S
        lines += job.feed(Watched(job.now_s, (Sample(0, 0, 0, "training", job.now_s),)))
    assert "gather 2: hang of rank 1" in lines


def test_attached_ranks_are_killed_for_a_hang() -> None:
    """Their launcher understands nothing but their end."""
    job = Looked(supervised=False)
    job.train()
    job.still(5.2)
    assert "end ranks 0 1" in job.gathered()
    assert job.state == "fenced"


def test_survivors_of_an_attached_job_end_after_the_limit() -> None:
    """When its launcher does not end them, ckptd does, after as long as a step may take."""
    job = Looked(supervised=False)
    job.train()
    job.exited(1, Evidence("pidfd", "vanished", 1, 1.0, "rank 1 ended", job.now_s))
    assert job.still(4.9) == []
    assert job.still(0.3) == ["end ranks 0"]


def test_survivors_of_an_attached_job_that_is_not_watched() -> None:
    """With hang = false they are left to their launcher."""
    job = Looked(supervised=False, hang=None)
    job.train()
    job.exited(1, Evidence("pidfd", "vanished", 1, 1.0, "rank 1 ended", job.now_s))
    assert job.still(100) == []


def test_nobody_is_hung_who_has_not_been_started(job: Looked) -> None:
    """A launcher that takes its time to come back is no hang of the ranks that it will start: there is none to kill."""
    job.all_die()
    job.claimed(2)
    assert not [line for line in job.still(100.0) if "hang" in line or "kill" in line]
    job.spawned()
    assert job.still(29.0) == []
    assert "log hang found" in job.still(2.0)
