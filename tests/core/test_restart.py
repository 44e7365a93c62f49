"""Whether to restart, after what delay, and when to give up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.restart import Failure, RestartPolicy, decide

DIED = "signal 9"


def died(step: int, *, progressed: bool) -> Failure:
    """Return a death by signal."""
    return Failure(DIED, step, progressed)


def raised(step: int, *, progressed: bool = False, message: str = "ValueError: nan") -> Failure:
    """Return an exception of the script."""
    return Failure(message, step, progressed, is_exception=True)


failures = st.lists(
    st.builds(
        Failure,
        st.sampled_from([DIED, "ValueError: nan", "exit 3"]),
        st.integers(0, 3),
        st.booleans(),
        is_exception=st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def test_a_first_failure_is_restarted_at_once():
    """Proves the usual case and its words."""
    decision = decide([died(5, progressed=True)], RestartPolicy())
    assert (decision.restart, decision.delay_s, decision.verdict) == (True, 0.0, None)
    assert decision.reasons == ("restart 1 of at most 100",)


@pytest.mark.parametrize(
    ("fruitless", "delay_s"), [(1, 0.0), (2, 1.0), (3, 2.0), (4, 4.0), (6, 16.0), (8, 60.0), (20, 60.0)]
)
def test_the_delay_doubles_with_every_fruitless_generation(fruitless, delay_s):
    """Proves the back-off on literals: none for the first, then doubling up to a minute."""
    history = [died(step, progressed=False) for step in range(fruitless)]
    decision = decide(history, RestartPolicy())
    assert decision.restart
    assert decision.delay_s == delay_s
    assert len(decision.reasons) == (2 if delay_s else 1)


def test_progress_ends_the_delay():
    """Proves that one generation which got further starts the back-off anew."""
    history = [*(died(5, progressed=False) for _ in range(4)), died(9, progressed=True)]
    assert decide(history, RestartPolicy()).delay_s == 0.0


def test_three_same_exceptions_are_a_bug_of_the_script():
    """Proves the limit, and that another step, another message or another failure in between starts the count anew."""
    assert decide([raised(5)] * 2, RestartPolicy()).restart
    decision = decide([raised(5)] * 3, RestartPolicy())
    assert not decision.restart
    assert decision.verdict == "the same failure 3 times in a row at step 5: ValueError: nan"
    assert decision.reasons == ("3 times is the limit for an exception without progress",)
    assert decide([raised(5), raised(6), raised(5)], RestartPolicy()).restart
    assert decide([raised(5), raised(5, message="KeyError: 'x'"), raised(5)], RestartPolicy()).restart
    assert decide([raised(5), died(5, progressed=False), raised(5)], RestartPolicy()).restart


def test_deaths_get_more_chances_than_exceptions():
    """Proves that five same deaths at the same step, which chance can do too, are the limit."""
    history = [died(5, progressed=False)] * 5
    assert decide(history[:4], RestartPolicy()).restart
    decision = decide(history, RestartPolicy())
    assert decision.verdict == "the same failure 5 times in a row at step 5: signal 9"
    assert decision.reasons == ("5 times is the limit for a death without progress",)


def test_the_budget_is_the_number_of_restarts():
    """Proves that with max_restarts N the failure N + 1 ends the job."""
    history = [died(step, progressed=True) for step in range(3)]
    assert decide(history, RestartPolicy(max_restarts=3)).restart
    decision = decide(history, RestartPolicy(max_restarts=2))
    assert decision.verdict == "failure number 3, and max_restarts is 2: signal 9"
    assert decision.reasons == ("the restart budget is used up",)


def test_a_refusal_ends_the_job_at_once():
    """Proves that what ckptd itself refused, such as state that does not fit, is not tried again."""
    refusal = Failure("StateError", 0, progressed=True, is_exception=True, refused="layer 3 does not fit")
    assert decide([refusal], RestartPolicy()).verdict == "layer 3 does not fit"


@given(failures, st.integers(0, 15))
def test_every_decision_has_its_reasons_and_bounds(history, max_restarts):
    """Proves that a decision always says why, that a verdict goes with giving up, and that no delay is endless."""
    policy = RestartPolicy(max_restarts=max_restarts)
    decision = decide(history, policy)
    assert decision.reasons
    assert (decision.verdict is None) == decision.restart
    assert 0.0 <= decision.delay_s <= policy.backoff_max_s
    if len(history) > max_restarts:
        assert not decision.restart


@given(failures)
def test_a_failure_elsewhere_is_never_the_last_straw_of_a_repetition(history):
    """Proves that a failure of another kind at another step is always given a chance, as far as the budget goes."""
    assert decide([*history, Failure("something new", 99, progressed=True)], RestartPolicy()).restart
