"""When a job stops by itself, as a pure function of what it was told and what was measured."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.policy.halt import (
    Conditions,
    HaltPolicy,
    Pace,
    decide,
    last_step,
    margin,
    may_begin_upload,
    time_left,
    wants_measure,
)
from ckptd.core.policy.interval import lead_steps

MEASURED = Pace(every_s=30.0, step_s=1.0, capture_s=0.5, flush_s=4.0, upload_s=20.0)
seconds = st.floats(min_value=0, max_value=1e5)
maybe = st.none() | seconds
paces = st.builds(Pace, st.floats(min_value=0.01, max_value=1e5), maybe, maybe, maybe, maybe)


@pytest.mark.parametrize(
    ("pace", "extra_s", "whole_s", "margin_s", "reasons"),
    [
        (
            MEASURED, 10.0, 3600.0, 86.5,
            "interval 30 s; two steps 2 s; capture 0.5 s; flush 4 s; two uploads 40 s; extra 10 s",
        ),
        (Pace(1800.0, upload_s=0.0), 0.0, 3600.0, 60.0, "interval 60 s"),
        (
            Pace(5.0, flush_s=100.0), 10.0, 60.0, 30.0,
            "interval 5 s; flush 100 s; extra 10 s; but no more than half of 60 s",
        ),
    ],
)  # fmt: skip
def test_what_the_margin_is_made_of(pace, extra_s, whole_s, margin_s, reasons):
    """Proves the rule on literals, with the words that reach the log."""
    found_s, said = margin(pace, extra_s, whole_s)
    assert found_s == pytest.approx(margin_s)
    assert "; ".join(said) == reasons


@given(paces, seconds, st.floats(min_value=1, max_value=1e6))
def test_the_margin_leaves_half_of_the_time_and_covers_what_was_measured(pace, extra_s, whole_s):
    """Proves that the margin never takes more than half, and is otherwise enough for one more checkpoint."""
    found_s, reasons = margin(pace, extra_s, whole_s)
    assert found_s <= whole_s / 2
    needed_s = (pace.capture_s or 0) + (pace.flush_s or 0) + 2 * (pace.upload_s or 0) + extra_s
    assert found_s >= needed_s or "no more than half" in reasons[-1]


POLICY = HaltPolicy(grace_s=60, margin_s=10, began_s=100, began_at=5000, limit_at_s=100 + 3600)


@pytest.mark.parametrize(
    ("policy", "now_s", "wall", "limit", "left_s", "whole_s"),
    [
        (POLICY, 1100, 0, "the time limit", 2600, 3600),
        (HaltPolicy(ends_at=9000, began_at=5000), 7, 6000, "the end of the batch job", 3000, 4000),
        (HaltPolicy(began_s=0, limit_at_s=50, began_at=0, ends_at=40), 10, 10, "the end of the batch job", 30, 40),
        (HaltPolicy(began_s=0, limit_at_s=50, began_at=0, ends_at=70), 10, 10, "the time limit", 40, 50),
    ],
)
def test_the_nearer_limit_counts(policy, now_s, wall, limit, left_s, whole_s):
    """Proves that the time limit is read on the monotonic clock, a batch job's end on the wall clock."""
    left = time_left(policy, MEASURED, now_s, wall)
    assert (left.limit, left.left_s, left.whole_s) == (limit, left_s, whole_s)


def test_a_wall_clock_that_jumps_moves_no_time_limit():
    """Proves that the time limit does not see the wall clock at all."""
    found = {time_left(POLICY, MEASURED, 1000, wall) for wall in (0, 5000 - 3600, 5000 + 3600, 1e9)}
    assert len(found) == 1


def test_nothing_bounds_the_time_unless_it_was_said():
    """Proves that a job without limit and conditions never stops by itself."""
    assert time_left(HaltPolicy(), MEASURED, 1e9, 1e9) is None
    assert decide(HaltPolicy(), Conditions(), None, wall=1e12, newest_step=10**9) is None


@pytest.mark.parametrize(
    ("now_s", "conditions", "wall", "step", "reason", "grace_s"),
    [
        (3600, Conditions(), 0, 5, None, None),
        (3620, Conditions(), 0, 5, "the time limit is in 80 s, and stopping may take 86.5 s", 75),
        (3696, Conditions(), 0, 5, "the time limit is in 4 s, and stopping may take 86.5 s", 3),
        (9999, Conditions(), 0, 5, "the time limit is in 0 s, and stopping may take 86.5 s", 1),
        (200, Conditions(at=7000), 6999, 5, None, None),
        (200, Conditions(at=7000), 7000, 5, "the moment has come at which it was to stop", 60),
        (200, Conditions(after_step=6), 0, 5, None, None),
        (200, Conditions(after_step=6), 0, 6, "step 6 is done", 60),
        (200, Conditions(at_next_checkpoint=True), 0, 5, None, None),
    ],
)
def test_when_to_stop_why_and_within_what_time(now_s, conditions, wall, step, reason, grace_s):
    """Proves each decision on literals; a stop because of a limit is over before it."""
    left = time_left(POLICY, MEASURED, now_s, wall)
    wanted = decide(POLICY, conditions, left, wall=wall, newest_step=step)
    assert (None if wanted is None else wanted.reason) == reason
    assert (None if wanted is None else wanted.grace_s) == grace_s


@given(paces, st.floats(min_value=10, max_value=1e6), st.floats(min_value=0, max_value=2))
def test_a_stop_begins_in_time_and_ends_before_the_limit(pace, whole_s, part):
    """Proves that a job stops when the margin begins and no sooner, with a grace that is over before its time is."""
    policy = HaltPolicy(limit_at_s=whole_s)
    left = time_left(policy, pace, whole_s * part, 0.0)
    wanted = decide(policy, Conditions(), left, wall=0.0, newest_step=0)
    assert (wanted is not None) == (left.left_s <= left.margin_s)
    if wanted is not None and left.left_s >= 2:
        assert wanted.grace_s < left.left_s


@given(st.integers(1, 10_000), st.integers(0, 10_000), st.floats(min_value=1e-4, max_value=100), st.integers(0, 4))
def test_the_last_step_is_announced_in_time_or_not_at_all(after, newest, step_s, misses):
    """Proves that step N is announced as the last only ahead of the ranks, and at the latest one lead before it."""
    lead = lead_steps(step_s, misses)
    found = last_step(after, newest, lead)
    assert found in (None, after)
    if found is not None:
        assert newest + lead <= after
    if newest + lead == after:
        assert found == after


def test_a_quarter_of_the_time_is_enough_to_have_measured_something():
    """Proves that a job whose interval is longer than its time asks for one checkpoint, to know how long one takes."""
    policy = HaltPolicy(limit_at_s=100.0)
    blind, seen = Pace(3600.0, upload_s=0.0), Pace(3600.0, flush_s=1.0, upload_s=0.0)
    assert [wants_measure(time_left(policy, blind, now_s, 0.0), blind) for now_s in (20, 26)] == [False, True]
    assert not wants_measure(time_left(policy, seen, 26, 0.0), seen)


@pytest.mark.parametrize(
    ("usual_s", "left_s", "may"), [(None, 1e9, False), (10, 19, False), (10, 20, True), (0.1, 60, True)]
)
def test_an_older_upload_begins_only_if_the_last_one_fits_too(usual_s, left_s, may):
    """Proves that nothing is put in the way of the last checkpoint that could keep it from arriving."""
    assert may_begin_upload(usual_s, left_s) is may
