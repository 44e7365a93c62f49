"""Whether to restart, after what delay, and when to give up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.restart import Failure, RestartPolicy, decide, remembered
from ckptd.types import CheckpointId

DIED = "signal 9"


def died(step: int, *, progressed: bool) -> Failure:
    """Return a death by signal."""
    return Failure(DIED, step, progressed)


def raised(step: int, *, progressed: bool = False, message: str = "ValueError: nan") -> Failure:
    """Return an exception of the script."""
    return Failure(message, step, progressed, by_script=True)


failures = st.lists(
    st.builds(
        Failure,
        st.sampled_from([DIED, "ValueError: nan", "exit 3"]),
        st.integers(0, 3),
        st.booleans(),
        by_script=st.booleans(),
    ),
    min_size=1,
    max_size=12,
)


def test_a_first_failure_is_restarted_at_once():
    """Proves the usual case and its words."""
    decision = decide([died(5, progressed=True)], RestartPolicy())
    assert (decision.restart, decision.delay_s, decision.verdict) == (True, 0.0, None)
    assert decision.reasons == ("restart 1 of at most 100 within 1 d",)


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
    assert decision.reasons == (
        "3 times is the limit for what a script does itself without progress, and there is no older checkpoint to try",
    )
    assert decide([raised(5), raised(6), raised(5)], RestartPolicy()).restart
    assert decide([raised(5), raised(5, message="KeyError: 'x'"), raised(5)], RestartPolicy()).restart
    assert decide([raised(5), died(5, progressed=False), raised(5)], RestartPolicy()).restart


def test_deaths_get_more_chances_than_exceptions():
    """Proves that five same deaths at the same step, which chance can do too, are the limit."""
    history = [died(5, progressed=False)] * 5
    assert decide(history[:4], RestartPolicy()).restart
    decision = decide(history, RestartPolicy())
    assert decision.verdict == "the same failure 5 times in a row at step 5: signal 9"
    assert decision.reasons == (
        "5 times is the limit for a death without progress, and there is no older checkpoint to try",
    )


OLDER = CheckpointId(2, 40)


@pytest.mark.parametrize(
    ("history", "limit"), [([raised(50)], 3), ([died(50, progressed=False)], 5)], ids=["exception", "death"]
)
def test_a_failure_that_comes_again_is_met_from_an_older_checkpoint_before_giving_up(history, limit):
    """Proves the guard: at the limit one step back, with its reason; once more the same, and the job is given up."""
    before = decide(history * (limit - 1), RestartPolicy(), OLDER)
    assert (before.restart, before.at_most_step) == (True, None)
    back = decide(history * limit, RestartPolicy(), OLDER)
    assert (back.restart, back.at_most_step) == (True, 40)
    assert f"from step 40, since the same failure came {limit} times in a row at step 50" in back.reasons
    last = decide(history * (limit + 1), RestartPolicy(), CheckpointId(2, 30))
    assert not last.restart
    assert last.verdict is not None
    assert last.verdict.startswith(f"the same failure {limit + 1} times in a row at step 50")
    assert last.reasons[0].endswith("and an older checkpoint ended the same way")


def test_a_step_back_that_helped_starts_the_count_anew():
    """Proves that a failure elsewhere after a step back is a new failure, which gets its own chances."""
    history = [*[raised(50)] * 3, raised(45), raised(50)]
    decision = decide(history, RestartPolicy(), OLDER)
    assert (decision.restart, decision.at_most_step) == (True, None)


def test_generations_that_lived_long_are_restarted_at_once():
    """Proves that the delay is for quick deaths only: an hour without a new step is no reason to wait before trying."""
    history = [replace(died(step, progressed=False), lived_s=3600.0) for step in range(4)]
    assert decide(history, RestartPolicy(), OLDER).delay_s == 0.0
    assert decide([*history, died(9, progressed=False)], RestartPolicy()).delay_s == 0.0
    assert decide([*history, *[died(9, progressed=False)] * 2], RestartPolicy()).delay_s == 1.0


def test_the_budget_counts_what_lies_within_its_window():
    """Proves that failures of long ago are not held against a job, and that the reasons name the window."""
    policy = RestartPolicy(max_restarts=2, window_s=3600.0)
    old = [replace(died(step, progressed=True), at_s=float(step)) for step in range(5)]
    recent = [replace(died(9, progressed=True), at_s=at_s) for at_s in (4000.0, 5000.0)]
    decision = decide([*old, *recent], policy)
    assert decision.restart
    assert decision.reasons == ("restart 2 of at most 2 within 1 h",)
    given_up = decide([*old, *recent, replace(died(9, progressed=True), at_s=7599.0)], policy)
    assert given_up.verdict == "failure number 3 within 1 h, and max_restarts is 2: signal 9"
    assert decide([*old, *recent, replace(died(9, progressed=True), at_s=7601.0)], policy).restart


def test_the_budget_is_the_number_of_restarts():
    """Proves that with max_restarts N the failure N + 1 ends the job."""
    history = [died(step, progressed=True) for step in range(3)]
    assert decide(history, RestartPolicy(max_restarts=3)).restart
    decision = decide(history, RestartPolicy(max_restarts=2))
    assert decision.verdict == "failure number 3 within 1 d, and max_restarts is 2: signal 9"
    assert decision.reasons == ("the restart budget is used up",)


def test_a_refusal_ends_the_job_at_once():
    """Proves that what ckptd itself refused, such as state that does not fit, is not tried again."""
    refusal = Failure("StateError", 0, progressed=True, by_script=True, refused="layer 3 does not fit")
    assert decide([refusal], RestartPolicy()).verdict == "layer 3 does not fit"


@given(failures, st.floats(1, 1e6), st.one_of(st.none(), st.just(OLDER)))
def test_what_is_forgotten_changes_nothing(history, gap_s, older):
    """Proves that what is decided upon the failures that are remembered is so upon all, and that they stay few."""
    policy = RestartPolicy(max_restarts=5, window_s=3600.0)
    everything = [replace(item, at_s=gap_s * number) for number, item in enumerate(history * 4)]
    kept = []
    for number, failure in enumerate(everything, 1):
        kept = remembered([*kept, failure], policy)
        found, wanted = (decide(items, policy, older) for items in (kept, everything[:number]))
        assert (found.restart, found.delay_s) == (wanted.restart, wanted.delay_s)
        assert found.at_most_step == wanted.at_most_step
    assert len(kept) <= max(16, 1 + 3600 / gap_s)


@given(failures, st.integers(0, 15), st.one_of(st.none(), st.just(OLDER)))
def test_every_decision_has_its_reasons_and_bounds(history, max_restarts, older):
    """Proves that a decision always says why, that a verdict goes with giving up, and that no delay is endless."""
    policy = RestartPolicy(max_restarts=max_restarts)
    decision = decide(history, policy, older)
    assert decision.at_most_step in (None, OLDER.step)
    assert decision.at_most_step is None or (decision.restart and older is not None)
    assert decision.reasons
    assert (decision.verdict is None) == decision.restart
    assert 0.0 <= decision.delay_s <= policy.backoff_max_s
    if len(history) > max_restarts:
        assert not decision.restart


@given(failures)
def test_a_failure_elsewhere_is_never_the_last_straw_of_a_repetition(history):
    """Proves that a failure of another kind at another step is always given a chance, as far as the budget goes."""
    assert decide([*history, Failure("something new", 99, progressed=True)], RestartPolicy()).restart
