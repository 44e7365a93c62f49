"""The health gate: when a generation may start on its node, when it waits and when it is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.gate_events import CheckNode, NodeChecked
from ckptd.core.policy.gate import FRESH_S, RETRY_S, Unfit, decide
from tests.core.script import Script, killed

DISK = Unfit("disk", "read-only file system")
GPU = Unfit("gpu", "GPU 3 is lost")


@pytest.mark.parametrize(
    ("unfit", "waited_s", "limit_s", "action", "retry_s"),
    [
        ((), 0.0, 300.0, "start", 0.0),
        ((), 1e6, 0.0, "start", 0.0),
        ((DISK,), 0.0, 300.0, "wait", RETRY_S),
        ((DISK,), 298.0, 300.0, "wait", 2.0),
        ((DISK,), 300.0, 300.0, "refuse", 0.0),
        ((DISK,), 0.0, 0.0, "refuse", 0.0),
        ((DISK,), 0.0, 2.0, "wait", 2.0),
    ],
)
def test_what_is_decided(unfit, waited_s, limit_s, action, retry_s):
    """Proves on literals when it starts, looks again and gives up, and that the last look is at the limit itself."""
    decision = decide(unfit, waited_s, limit_s)
    assert (decision.action, decision.retry_s) == (action, retry_s)


def test_the_reasons_name_every_check():
    """Proves the words: each check with its reason, and for a refusal how long it was waited for."""
    decision = decide((DISK, GPU), 300.0, 300.0)
    assert decision.verdict == "the node is not ready: disk: read-only file system; gpu: GPU 3 is lost"
    assert decision.reasons == (
        "disk: read-only file system", "gpu: GPU 3 is lost", "it was not ready for 300 s, and check_wait is 300 s",
    )  # fmt: skip


@given(st.floats(0, 1e4), st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_node_is_refused_once_it_was_unfit_for_the_whole_wait(limit_s, fit):
    """Proves that one fit look within the limit starts the job, and that the looks end at the limit."""
    now_s = 0.0
    for good in fit:
        decision = decide(() if good else (DISK,), now_s, limit_s)
        if decision.action != "wait":
            assert decision.action == ("start" if good else "refuse")
            assert good or now_s >= limit_s
            return
        assert 0 < decision.retry_s <= RETRY_S
        now_s += decision.retry_s
        assert now_s <= limit_s or now_s == pytest.approx(limit_s)


def refused(job: Script) -> list[str]:
    """Let time pass until the job gives up, and return what it says then."""
    for _ in range(200):
        lines = job.wait(RETRY_S)
        if job.state not in ("preparing", "fenced"):
            return lines
    raise AssertionError("it never gave up")


# --- in the machine ---------------------------------------------------------------------------------------------------


def test_the_node_is_looked_at_while_the_store_is_read(job):
    """Proves that the first look costs no time of its own, and that nothing begins before its answer."""
    job.node = None
    job.begin()
    assert CheckNode() in job.effects
    assert job.store() == []
    assert job.feed(NodeChecked()) == ["claim 1 after None"]


def test_an_answer_before_the_store_is_read_is_waited_for_no_more(job):
    """Proves that a look which ends first leaves nothing to wait for."""
    job.node = None
    job.begin()
    assert job.feed(NodeChecked()) == []
    assert job.store() == ["claim 1 after None"]


def test_the_node_is_looked_at_while_the_ranks_end(captured):
    """Proves that the look of a restart begins with the kill, and that its answer is known when the last rank goes."""
    captured.node = None
    captured.die(0)
    assert CheckNode() in captured.effects
    assert captured.feed(NodeChecked()) == []
    captured.now_s += FRESH_S - 1
    assert captured.die(1)[-1] == "claim 2 after g1/s10"
    assert CheckNode() not in captured.effects


def test_a_node_that_was_looked_at_long_ago_is_looked_at_again(captured):
    """Proves that after a long wait the node's health is not taken for granted."""
    captured.node = None
    captured.die(0)
    captured.feed(NodeChecked())
    captured.now_s += FRESH_S + 1
    assert not captured.die(1)[-1].startswith("claim")
    assert captured.effects[-1] == CheckNode()
    assert captured.feed(NodeChecked()) == ["claim 2 after g1/s10"]


def test_an_unfit_node_is_waited_for(captured):
    """Proves that a restart waits with its reason in log and status, goes on when the node is fit, and says so."""
    captured.node = "no space"
    captured.die(0)
    assert captured.die(1)[-1] == "log node not ready"
    assert captured.state == "preparing"
    assert [(item.kind, item.summary) for item in captured.machine.warnings] == [
        ("not ready", "the node is not ready: disk: no space"),
    ]  # fmt: skip
    assert captured.wait(RETRY_S) == []
    captured.node = ""
    assert captured.wait(1.0) == []
    lines = captured.wait(RETRY_S)
    assert lines[0] == "log node ready"
    assert lines[-1] == "claim 2 after g1/s10"
    assert list(captured.machine.warnings) == []
    assert captured.incidents[1].reasons == (
        "restart 1 of at most 100 within 1 d", "it waited 11 s: the node is not ready: disk: no space",
    )  # fmt: skip


def test_a_restart_is_refused_with_its_reason_in_the_incident(captured):
    """Proves that a node which stays unfit ends the job after its bound, in the incident that is open."""
    captured.node = "no space"
    captured.all_die()
    lines = refused(captured)
    assert captured.now_s >= captured.machine.spec.check_wait_s
    assert lines[-1] == "end failed: JobFailedError: the node is not ready: disk: no space"
    incident = captured.incidents[1]
    assert incident.decision == "give up: the node is not ready: disk: no space"
    assert incident.reasons[-1].endswith("check_wait is 300 s")
    assert incident.closed
    assert incident.cause == "rank 0 was killed by signal 9"


def test_a_first_start_that_is_refused_is_an_incident_of_its_own(job):
    """Proves that a job which never began says why among its incidents."""
    job.node = "no space"
    job.begin()
    assert job.store() == ["log node not ready"]
    assert refused(job)[-1] == "end failed: JobFailedError: the node is not ready: disk: no space"
    incident = job.incidents[1]
    assert (incident.kind, incident.rank, incident.closed) == ("not ready", None, True)
    assert (incident.cause, incident.generation) == ("the node is not ready: disk: no space", 0)


def test_a_job_that_waits_for_its_node_can_be_stopped(captured):
    """Proves that a stop ends the wait, and that a late answer begins nothing."""
    captured.node = "no space"
    captured.all_die()
    captured.node = None
    captured.wait(RETRY_S)
    assert CheckNode() in captured.effects
    captured.stop()
    assert captured.feed(NodeChecked()) == []
    assert captured.state == "stopped"


def test_what_is_found_while_the_job_trains_stops_nothing(captured):
    """Proves that only a generation that is about to begin asks: an answer at any other time changes nothing."""
    assert captured.feed(NodeChecked((DISK,))) == []
    assert captured.state == "running"
    assert list(captured.machine.warnings) == []


def test_ranks_of_somebody_else_are_not_held_up():
    """Proves that an attached job, whose ranks run already, asks nothing of its node."""
    job = Script(supervised=False)
    job.node = None
    job.joined(0)
    assert CheckNode() not in job.effects
    assert job.store() == ["claim 1 after None"]


def test_a_back_off_looks_again_at_its_end():
    """Proves that a restart which was delayed begins with a look that is not older than it."""
    job = Script()
    job.begin_training()
    job.node = None
    for generation in (2, 3):
        job.all_die()
        job.feed(NodeChecked())
        job.up_to_training(generation)
    job.exited(0, killed(0))
    job.feed(NodeChecked())
    assert job.die(1)[-1] == "log restart delayed"
    lines = job.wait(60.0)
    assert lines == [] or lines[-1].startswith("log")
    assert job.effects[-1] == CheckNode()
    assert job.feed(NodeChecked()) == ["claim 4 after None"]
