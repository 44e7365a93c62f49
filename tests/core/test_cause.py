"""Which of several failures is the cause, and what the others are called beside it."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.cause import Blame, Failed, blame, compare, consequence, symptom
from ckptd.core.policy.restart import RestartPolicy
from ckptd.core.recovery import Recovery
from ckptd.types import Evidence, RaisedException
from tests.core.script import Script
from tests.core.test_incidents import generation

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:41521"
NCCL = (
    "NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a network "
    "error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote process "
    "exiting prematurely."
)
WATCHDOG = (
    "[rank1]:[E1126 10:00:00 ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL",
    "terminate called after throwing an instance of 'c10::DistBackendError'",
)


def raised(rank: int, kind: str, message: str, at_s: float = 10.0, code: int = 1) -> Evidence:
    """Return the evidence of an exception."""
    exception = RaisedException(kind, message, f"Traceback of {message}")
    summary = f"rank {rank} raised {kind}"
    signal = -code if code < 0 else None
    return Evidence("exit", "exception", rank, 1.0, summary, at_s, signal, code, exception)


def died(rank: int, signal: int, at_s: float = 10.0, kind: str = "signal") -> Evidence:
    """Return the evidence of a rank that a signal has ended."""
    return Evidence("exit", kind, rank, 1.0, f"rank {rank} died of signal {signal}", at_s, signal, -signal)


def left(rank: int, code: int, at_s: float = 10.0) -> Evidence:
    """Return the evidence of a rank that ended with an exit code."""
    return Evidence("exit", "exit", rank, 1.0, f"rank {rank} ended with exit code {code}", at_s, None, code)


SYMPTOMS = [
    (raised(1, "RuntimeError", GLOO), ()),
    (raised(1, "RuntimeError", "Timed out waiting 1800000ms for recv operation to complete"), ()),
    (raised(1, "RuntimeError", "Application timeout caused pair closure"), ()),
    (raised(1, "torch.distributed.DistBackendError", NCCL), ()),
    (raised(1, "torch.distributed.DistNetworkError", "failed to recv, got 0 bytes"), ()),
    (raised(1, "ConnectionResetError", "[Errno 104] Connection reset by peer"), ()),
    (raised(1, "BrokenPipeError", "[Errno 32] Broken pipe"), ()),
    (raised(1, "ConnectionError", ""), ()),
    (raised(1, "RuntimeError", GLOO, code=-9), ()),
    (left(1, 1), ("Traceback (most recent call last):", f"RuntimeError: {GLOO}")),
    (died(1, 6), WATCHDOG),
]
CAUSES = [
    (raised(1, "ValueError", "nan"), ()),
    (raised(1, "AssertionError", "the other rank is gone"), ()),
    (raised(1, "torch.distributed.DistBackendError", "ncclUnhandledCudaError: Call to CUDA function failed."), ()),
    (raised(1, "ValueError", "nan", code=-9), ()),
    (raised(1, "ConnectionRefusedError", "[Errno 111] Connection refused"), ()),
    (left(1, 3), ()),
    (died(1, 11), WATCHDOG),
    (died(1, 6), ("double free or corruption",)),
    (died(1, 9, kind="oom", at_s=99.0), ()),
    (died(1, 9, at_s=9.9), ()),
    (Evidence("watch", "hang", 1, 0.9, "rank 1 hangs", 10.0), ()),
    (Evidence("pidfd", "vanished", 1, 1.0, "rank 1 ended", 10.0), ()),
]


def test_who_told_first_failed_first():
    """Of two ranks that told of their failures the one that told first is the cause, however long it takes to end."""
    peer = dataclasses.replace(raised(1, "AssertionError", "the other rank is gone", at_s=10.0), told_s=9.8)
    culprit = dataclasses.replace(raised(0, "ValueError", "nan", at_s=10.3, code=-9), told_s=9.7)
    verdict = compare(Failed(peer), Failed(culprit), 10.1)
    assert verdict.newer_is_cause
    assert verdict.reason == "rank 0 told of its failure 100 ms before rank 1"
    assert not compare(Failed(culprit), Failed(peer), 10.1).newer_is_cause
    # whoever is killed tells nothing, and its peer may tell before the kernel is done with it: the ends count
    assert not compare(
        Failed(died(0, 11, at_s=10.0)), Failed(dataclasses.replace(peer, at_s=10.2)), None
    ).newer_is_cause


@pytest.mark.parametrize(("evidence", "lines"), SYMPTOMS)
def test_what_a_rank_says_that_has_lost_another_one(evidence, lines):
    """Proves on what gloo, NCCL, torch's store and sockets really say that it is known as a symptom."""
    failed = Failed(evidence, lines)
    assert symptom(failed)
    assert blame(failed, 10.0) is Blame.SYMPTOM


@pytest.mark.parametrize(("evidence", "lines"), CAUSES)
def test_what_a_rank_says_that_failed_by_itself(evidence, lines):
    """Proves that every other end counts as a cause, and so does a kill that came before ckptd's."""
    assert blame(Failed(evidence, lines), 10.0) is Blame.CAUSE


@pytest.mark.parametrize(
    ("at_s", "killed_s", "expected"),
    [(9.9, 10.0, Blame.CAUSE), (10.0, 10.0, Blame.OURS), (10.1, 10.0, Blame.OURS), (10.1, None, Blame.CAUSE)],
)
def test_a_sigkill_is_ours_only_after_we_sent_it(at_s, killed_s, expected):
    """Proves that a SIGKILL is laid at ckptd's door from the moment on at which ckptd ordered it, and not before."""
    assert blame(Failed(died(0, 9, at_s)), killed_s) is expected


@pytest.mark.parametrize(("later", "earlier"), [(9.0, 10.0), (10.0, 10.0), (10.0, 9.0)])
@pytest.mark.parametrize("seen_first", ["death", "symptom"])
def test_a_death_comes_before_its_symptom_whichever_was_seen_first(seen_first, later, earlier):
    """Proves that no order of hearing and no order of ending makes a lost connection the cause of a death."""
    death, lost = Failed(died(0, 11, later)), Failed(raised(1, "RuntimeError", GLOO, earlier))
    if seen_first == "death":
        assert not compare(death, lost, 10.5).newer_is_cause
    else:
        verdict = compare(lost, death, 10.5)
        assert verdict.newer_is_cause
        assert verdict.reason == (
            "rank 0 failed by itself; rank 1 did not: 'Connection closed by peer' is what a rank says that has lost "
            "another one"
        )


@pytest.mark.parametrize(
    ("cause", "newer", "changes", "reason"),
    [
        (left(1, 3, 10.0), died(0, 11, 9.995), True, "rank 0 ended 5 ms before rank 1"),
        (died(0, 11, 9.995), left(1, 3, 10.0), False, "rank 0 ended 5 ms before rank 1"),
        (left(1, 3), died(0, 11), True, "rank 0 and rank 1 ended at the same moment, and rank 0 ended more abruptly"),
        (died(0, 11), left(1, 3), False, "rank 0 and rank 1 ended at the same moment, and rank 0 ended more abruptly"),
        (died(0, 11), died(1, 11), False, "rank 0 and rank 1 ended at the same moment, and rank 0 was heard of first"),
        (
            raised(1, "ValueError", "nan"),
            died(0, 9, kind="oom"),
            True,
            "rank 0 and rank 1 ended at the same moment, and rank 0 ended more abruptly",
        ),
        (left(1, 3), died(0, 9, 10.1), False, "rank 1 failed by itself; rank 0 did not: ckptd ended it"),
    ],
)
def test_of_two_causes_the_earlier_counts_then_the_more_abrupt(cause, newer, changes, reason):
    """Proves the order among ends that could each be the cause, and the words of each reason."""
    verdict = compare(Failed(cause), Failed(newer), 10.05)
    assert (verdict.newer_is_cause, verdict.reason) == (changes, reason)


@pytest.mark.parametrize(
    ("failed", "text"),
    [
        (raised(1, "RuntimeError", GLOO), "rank 1 lost its connection to rank 0"),
        (died(1, 9, 10.1), "ckptd ended rank 1"),
        (left(1, 3), "rank 1 ended with exit code 3"),
        (raised(0, "RuntimeError", GLOO), "rank 0 raised RuntimeError"),
    ],
)
def test_consequences_in_words(failed, text):
    """Proves what an incident says of ranks that went down with rank 0."""
    assert consequence(Failed(failed), died(0, 11), 10.05) == text


ENDS = st.builds(
    lambda rank, at_s, how: dataclasses.replace(
        [died(rank, 9), died(rank, 11), left(rank, 1), raised(rank, "RuntimeError", GLOO),
         raised(rank, "ValueError", "nan"), died(rank, 9, kind="oom")][how], at_s=at_s,
    ),
    st.integers(0, 7), st.sampled_from([9.0, 9.5, 10.0]), st.integers(0, 5),
)  # fmt: skip
KILLED_S = 10.25
"""After all of them."""


@given(ENDS, ENDS)
def test_two_failures_have_one_cause_in_whichever_order(one, other):
    """Proves that the two orders of hearing name the same cause, but for a tie that nothing else decides."""
    there, back = compare(Failed(one), Failed(other), KILLED_S), compare(Failed(other), Failed(one), KILLED_S)
    if there.newer_is_cause == back.newer_is_cause:
        assert not there.newer_is_cause
        assert "was heard of first" in there.reason
    else:
        assert there.reason == back.reason


@given(ENDS, ENDS)
def test_a_kill_of_ours_is_never_the_cause(one, other):
    """Proves that whatever began an incident, a SIGKILL after ckptd's order changes nothing about it."""
    late = dataclasses.replace(other, kind="signal", signal=9, exception=None, at_s=KILLED_S + 0.001)
    assert not compare(Failed(one), Failed(late), KILLED_S).newer_is_cause


@given(st.lists(ENDS, min_size=1, max_size=6), st.randoms())
def test_the_cause_of_many_does_not_depend_on_the_order(ends, random):
    """Proves that the cause among many ends is the same in every order of hearing, if no two weigh the same."""

    def heard(order):
        cause = Failed(order[0])
        for end in order[1:]:
            cause = Failed(end) if compare(cause, Failed(end), KILLED_S).newer_is_cause else cause
        return cause.evidence

    shuffled = list(ends)
    random.shuffle(shuffled)
    one, other = heard(ends), heard(shuffled)
    weights = [(blame(Failed(item), KILLED_S), item.at_s, item.kind) for item in (one, other)]
    assert weights[0] == weights[1]


# --- in an open incident ----------------------------------------------------------------------------------------------


def test_a_symptom_that_was_heard_of_first_becomes_a_consequence():
    """Proves that a death which is heard of after its symptom takes its place: cause, failure and last words."""
    job = Script(ranks=3)
    job.begin_training()
    job.now_s = 10.002
    lost = raised(1, "RuntimeError", GLOO, 10.0)
    assert "incident 1 open: rank 1 raised RuntimeError" in job.exited(1, lost)
    assert job.exited(0, died(0, 11, 10.001)) == ["log cause changed", "incident 1 open: rank 0 died of signal 11"]
    job.now_s = 10.01
    assert job.exited(2, died(2, 9, 10.009))[-1] == "claim 2 after None"
    incident = job.incidents[1]
    assert (incident.cause, incident.kind, incident.rank, incident.signal) == (
        "rank 0 died of signal 11", "signal", 0, 11,
    )  # fmt: skip
    assert incident.exception is None
    assert incident.consequences == ("rank 1 lost its connection to rank 0", "ckptd ended rank 2")
    assert incident.reasons[0].startswith("rank 0 failed by itself; rank 1 did not")
    assert job.machine.recovery._failures[-1].signature == "signal 11"
    assert not job.machine.recovery._failures[-1].by_script


def test_a_lost_connection_after_the_death_changes_nothing(captured):
    """Proves that the usual order leaves the cause as it is, and says what the other rank has lost."""
    captured.die(0)
    captured.exited(1, raised(1, "RuntimeError", GLOO, captured.now_s + 0.001))
    assert captured.incidents[1].cause == "rank 0 was killed by signal 9"
    assert captured.incidents[1].consequences == ("rank 1 lost its connection to rank 0",)


def test_a_decided_incident_keeps_its_cause(captured):
    """Proves that once the restart was decided upon nothing that is heard later rewrites its incident."""
    captured.exited(0, raised(0, "RuntimeError", GLOO))
    old = dict(captured.pids)
    captured.die(1)
    captured.claimed(2)
    assert captured.exited(1, died(1, 11), pid=old[1]) == []
    assert captured.incidents[1].cause == "rank 0 raised RuntimeError"


def test_a_restart_on_purpose_stays_one():
    """Proves that an end which is older than the wish of an operator does not turn that into a failure."""
    recovery = Recovery("job", RestartPolicy(), first_incident=1)
    wish = Evidence("operator", "requested", None, 1.0, "a restart was asked for", 10.0)
    recovery.failed(generation(1, 5), wish, (), 10.0, 1e9, killed=True)
    assert recovery.also_failed(died(0, 11, 9.0)) == []
    assert recovery.incident.incident.kind == "requested"
    assert recovery.decide(11.0)[0].reasons == ("somebody asked for it",)


def test_a_refusal_that_was_heard_of_late_still_ends_the_job():
    """Proves that the new cause's own refusal counts, and not the symptom's lack of one."""
    recovery = Recovery("job", RestartPolicy(), first_incident=1)
    recovery.failed(generation(1, 5), raised(1, "RuntimeError", GLOO), (), 10.0, 1e9, killed=True)
    error = {"code": "state", "message": "layer 3 does not fit", "hint": None}
    refusal = RaisedException("ckptd.errors.StateError", "layer 3 does not fit", "", error)
    recovery.also_failed(Evidence("exit", "exception", 0, 1.0, "rank 0 raised", 10.0, None, 7, refusal))
    assert recovery.decide(11.0)[0].verdict == "layer 3 does not fit"


def test_a_cause_that_ended_earlier_makes_the_detection_longer():
    """Proves that the seconds of an incident begin with the end of the cause, not of its symptom."""
    recovery = Recovery("job", RestartPolicy(), first_incident=1)
    recovery.failed(generation(1, 5), raised(1, "RuntimeError", GLOO, 10.0), (), 10.01, 1e9, killed=True)
    recovery.also_failed(died(0, 11, 9.9))
    assert recovery.incident.seconds()["detect"] == pytest.approx(0.11)
