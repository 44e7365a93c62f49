"""What a job does about a rank that holds up the others; and evidence of a death, gathered beside its restart."""

from __future__ import annotations

from ckptd.core.events import Kill, RestartWanted
from ckptd.core.policy.hang import Sample
from ckptd.core.policy.straggler import StragglerPolicy
from ckptd.core.straggling import Straggling
from ckptd.core.watch_events import Gather, Gathered, Watched
from tests.core.script import Script

LOOK_S = 0.1
OWN_S = {0: 0.02, 1: 0.08}
"""What each rank needs for a step of `LOOK_S`; the rest it waits."""


def train(job: Script, seconds: float) -> list[str]:
    """Let both ranks train for so long, a step at each look, rank 1 slowly; return what is done about it."""
    lines = []
    for number in range(1, round(seconds / LOOK_S) + 1):
        job.now_s += LOOK_S
        at_ns, waited = round(job.now_s * 1e9), number * LOOK_S
        samples = tuple(
            Sample(rank, 2 + number, at_ns, "training", job.now_s, round((waited - number * own_s) * 1e9))
            for rank, own_s in OWN_S.items()
        )
        lines += job.feed(Watched(job.now_s, samples))
    return lines


def test_a_straggler_is_a_warning(training: Script) -> None:
    """By itself a straggler is no failure: it is logged, stands in the warnings, and training goes on."""
    assert train(training, 20) == ["log rank slow"]
    (warned,) = training.machine.warnings
    assert (warned.kind, warned.rank) == ("straggler", 1)
    assert training.state == "running"
    assert training.incidents == {}


def test_a_straggler_is_a_failure_if_told_so(training: Script) -> None:
    """With `restart` the job fails on it, by an incident of that kind, and is restarted as after a death."""
    training.machine.straggling = Straggling(StragglerPolicy(restart=True), 2)
    lines = train(training, 20)
    assert lines[0] == "log rank slow"
    assert "kill 9" in lines
    assert training.state == "fenced"
    assert (training.incidents[1].kind, training.incidents[1].rank) == ("straggler", 1)
    assert "rank 1 needs 80 ms of its own, its peers 20 ms (4 x)" in training.incidents[1].cause


def test_evidence_of_a_death_is_gathered_beside(training: Script) -> None:
    """A death is answered by a kill at once; the evidence is asked for before it, and found in the incident later."""
    training.die(0)
    order = [type(effect) for effect in training.effects if isinstance(effect, (Gather, Kill))]
    assert order == [Gather, Kill]
    assert training.incidents[1].evidence_path is None
    training.feed(Gathered(1, "/state/jobs/job/incidents/1", {}, 0))
    assert training.incidents[1].evidence_path == "/state/jobs/job/incidents/1"


def test_evidence_that_comes_late_is_not_lost(training: Script) -> None:
    """An incident that was closed meanwhile, or with which the job has ended, still learns where its evidence lies."""
    training.machine.recovery.policy = type(training.machine.recovery.policy)(max_restarts=0)
    training.all_die()
    assert training.state == "failed"
    assert training.incidents[1].closed
    training.feed(Gathered(1, "/state/jobs/job/incidents/1", {}, 0))
    assert training.incidents[1].evidence_path == "/state/jobs/job/incidents/1"
    assert training.incidents[1].closed


def test_no_evidence_of_a_restart_on_purpose(training: Script) -> None:
    """A restart that somebody asked for needs none."""
    training.feed(RestartWanted())
    assert not [effect for effect in training.effects if isinstance(effect, Gather)]
