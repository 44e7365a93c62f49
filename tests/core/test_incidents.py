"""What an incident records: its phases, its cost and its decision."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.generation import Generation
from ckptd.core.incidents import OpenIncident
from ckptd.core.policy.restart import RestartDecision, RestartPolicy
from ckptd.core.recovery import Recovery
from ckptd.core.restore import Source
from ckptd.errors import StateError
from tests.core.script import TIER, cid, killed, raised

MOMENTS = ("detected", "killed", "ready", "joined", "restored", "stepped")


def opened(at_s: float = 10.0, now_s: float = 10.2, failed_step: int = 50) -> OpenIncident:
    """Return the incident of a rank that was killed at `at_s` and seen at `now_s`."""
    return OpenIncident.begin(
        3, "job", 2, killed(1, at_s), now_s=now_s, failed_at=1e9, failed_step=failed_step, last_lines=("Killed",)
    )


def test_each_phase_lasts_from_one_moment_to_the_next():
    """Proves the seconds of a whole recovery on literals."""
    incident = opened()
    for moment, at_s in [
        ("killed", 10.3), ("ready", 10.35), ("joined", 10.8), ("restored", 11.0), ("stepped", 11.5),
    ]:  # fmt: skip
        incident.mark(moment, at_s)
    assert incident.seconds() == {
        "detect": 0.2, "kill": 0.1, "decide": 0.05, "start": 0.45, "restore": 0.2, "first_step": 0.5, "total": 1.5,
    }  # fmt: skip


def test_a_phase_that_did_not_happen_has_no_seconds():
    """Proves that a fresh start, which restores nothing, counts its first step from the join."""
    incident = opened()
    incident.mark("joined", 12.0)
    incident.mark("stepped", 12.5)
    assert incident.seconds() == {"detect": 0.2, "first_step": 0.5, "total": 2.5}


def test_the_first_time_counts():
    """Proves that a moment which comes again, such as a second rank's, does not move the phase."""
    incident = opened()
    incident.mark("killed", 10.3)
    incident.mark("killed", 99.0)
    assert incident.seconds()["kill"] == 0.1


@given(st.dictionaries(st.sampled_from(MOMENTS), st.floats(0, 1e6)))
def test_no_phase_is_negative(moments):
    """Proves that clocks which disagree between processes don't make a phase shorter than nothing."""
    incident = opened()
    for moment, at_s in moments.items():
        incident.mark(moment, at_s)
    assert all(seconds >= 0 for seconds in incident.seconds().values())


@pytest.mark.parametrize(("restored", "lost"), [("g2/s45", 5), ("g2/s50", 0), ("g2/s51", 0), (None, 50)])
def test_what_was_lost(restored, lost):
    """Proves that the lost steps are those since the restored one, and never negative."""
    incident = opened()
    incident.begin_again(None if restored is None else Source(cid(restored), TIER))
    record = incident.snapshot()
    assert record.lost_steps == lost
    assert record.restored == (None if restored is None else {"step": int(restored[4:]), "tier": TIER, "generation": 2})


def test_the_decision_is_kept_in_words():
    """Proves that an incident says what was decided and why, also when the job was given up."""
    incident = opened()
    incident.decide(RestartDecision(True, 0.0, ("restart 1 of at most 100",)))
    assert incident.snapshot().decision == "restart the whole job"
    incident.decide(RestartDecision(False, 0.0, ("the restart budget is used up",), verdict="too often"))
    record = incident.snapshot(closed=True)
    assert (record.decision, record.reasons, record.closed) == (
        "give up: too often", ("the restart budget is used up",), True,
    )  # fmt: skip


def test_an_incident_has_the_shape_that_is_documented():
    """Proves the fields of `ckptctl incidents --json`, which others parse."""
    incident = opened()
    incident.follow(["rank 0 was killed by signal 9"])
    shape = incident.snapshot().to_json()
    assert set(shape) == {
        "number", "job", "generation", "cause", "rank", "signal", "returncode", "failed_at", "failed_step",
        "lost_steps", "restored", "seconds", "decision", "reasons", "consequences", "exception", "last_lines", "kind",
        "evidence_path", "closed",
    }  # fmt: skip
    assert shape["cause"] == "rank 1 was killed by signal 9"
    assert (shape["rank"], shape["signal"], shape["returncode"], shape["failed_step"]) == (1, 9, -9, 50)
    assert shape["consequences"] == ["rank 0 was killed by signal 9"]


# --- the history of failures ------------------------------------------------------------------------------------------


def generation(number: int, step: int, offer: str | None = None) -> Generation:
    """Return a generation of one rank at a step."""
    source = None if offer is None else Source(cid(offer), TIER)
    return Generation(number, 1, source, 0.0, steps={0: step})


def history(**policy: int) -> Recovery:
    """Return an empty history."""
    return Recovery("job", RestartPolicy(**policy), first_incident=7)


def test_incidents_are_numbered_on_from_the_journal():
    """Proves that a new agent goes on counting where the old one's journal ended."""
    recovery = history()
    recovery.failed(generation(1, 5), killed(0), (), 1.0, 1e9)
    assert recovery.incident.incident.number == 7
    recovery.failed(generation(2, 6), killed(0), (), 2.0, 1e9)
    assert recovery.incident.incident.number == 8


def test_an_incident_that_was_never_recorded_keeps_its_number():
    """Proves that an open incident that a new agent takes over, and its journal lacks, shares its number with none."""
    recovery, heir = history(), history()
    recovery.failed(generation(1, 5), killed(0), (), 1.0, 1e9)
    heir.recall(recovery.history())
    assert (heir.incident.incident.number, heir.next_number) == (7, 8)


def test_progress_is_measured_against_the_failure_before():
    """Proves that a generation which restores and dies where the last one died has made none."""
    recovery = history()
    recovery.failed(generation(1, 10), killed(0), (), 1.0, 1e9)
    recovery.failed(generation(2, 10, "g1/s8"), killed(0), (), 2.0, 1e9)
    recovery.failed(generation(3, 11, "g1/s8"), killed(0), (), 3.0, 1e9)
    assert [failure.progressed for failure in recovery._failures] == [True, False, True]


def test_a_first_generation_that_restores_begins_where_it_restored():
    """Proves that a resumed job which dies before its first own step has made no progress."""
    recovery = history()
    recovery.failed(generation(4, 30, "g3/s30"), killed(0), (), 1.0, 1e9)
    assert not recovery._failures[0].progressed


def test_a_refusal_is_recognised_by_its_code():
    """Proves that only ckptd's own refusals count as such, an exception of the script does not."""
    recovery = history()
    refusal = raised(0, "no", error=StateError("layer 3", hint="rename it").to_json())
    recovery.failed(generation(1, 5), refusal, (), 1.0, 1e9)
    decision, _ = recovery.decide(2.0)
    assert decision.verdict == "layer 3 (hint: rename it)"
    assert isinstance(recovery.refusal, StateError)
    recovery = history()
    recovery.failed(generation(1, 5), raised(0, "no", error={"code": "damaged", "message": "bits"}), (), 1.0, 1e9)
    assert recovery.refusal is None
    assert recovery.decide(2.0)[0].restart


def test_a_commit_closes_only_what_it_came_after():
    """Proves that an incident is closed by a commit of a later generation, and by nothing else."""
    recovery = history()
    assert recovery.committed(cid("g1/s5")) == []
    recovery.failed(generation(1, 5), killed(0), (), 1.0, 1e9)
    assert recovery.committed(cid("g1/s5")) == []
    assert recovery.incident is not None
    (record,) = recovery.committed(cid("g2/s6"))
    assert record.incident.closed
    assert recovery.incident is None
    assert recovery.close() == []
