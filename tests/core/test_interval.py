"""When to capture, and how far ahead of the ranks."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.cadence import Cadence
from ckptd.core.policy.interval import REACTION_S, lead_steps, next_capture

FACTS = {"now_s": 10.0, "due_at_s": 10.0, "newest_step": 7, "step_time_s": 1.0, "misses": 0, "slots_free": True}

times = st.floats(min_value=0, max_value=1e6)
paces = st.floats(min_value=1e-6, max_value=1e4)


@pytest.mark.parametrize(
    ("changed", "step", "reason"),
    [
        ({}, 8, "due, and 1 steps ahead of the first rank"),
        ({"now_s": 9.9}, None, "not due"),
        ({"step_time_s": None}, None, "the time of a step isn't known yet"),
        ({"slots_free": False}, None, "all slots are busy"),
        ({"misses": 1}, 9, "due, and 2 steps ahead of the first rank"),
        ({"misses": 3}, 15, "due, and 8 steps ahead of the first rank"),
        ({"step_time_s": 0.01}, 12, "due, and 5 steps ahead of the first rank"),
        ({"newest_step": 0}, 1, "due, and 1 steps ahead of the first rank"),
    ],
)
def test_decisions_and_their_reasons(changed, step, reason):
    """Proves each decision of the policy on literals, with the words that reach the log."""
    decision = next_capture(**{**FACTS, **changed})
    assert (decision.step, decision.reason) == (step, reason)


@given(paces, st.integers(0, 40))
def test_the_lead_covers_the_reaction_time(step_time_s, misses):
    """Proves that a step is never announced nearer than the agent needs, nor much further without misses."""
    lead = lead_steps(step_time_s, misses)
    assert lead >= 1
    assert lead * step_time_s >= REACTION_S * 0.999
    if misses == 0:
        assert (lead - 1) * step_time_s <= REACTION_S


@given(paces, st.integers(0, 40))
def test_every_miss_doubles_the_lead_up_to_a_bound(step_time_s, misses):
    """Proves that the lead grows with misses, but not for ever."""
    assert lead_steps(step_time_s, misses) == lead_steps(step_time_s, 0) << min(misses, 10)


def test_a_step_that_takes_no_time_is_no_division_by_zero():
    """Proves that a pace of zero, which a coarse clock may give, is survived."""
    assert lead_steps(0.0, 0) == 1


@given(times, times, st.integers(0, 10**9), st.none() | paces, st.integers(0, 40), st.booleans())
def test_an_announced_step_lies_ahead_of_every_rank(now_s, due_at_s, newest_step, step_time_s, misses, slots_free):
    """Proves that nothing is announced before it is due, without a slot, or for a step that a rank has reached."""
    decision = next_capture(
        now_s=now_s, due_at_s=due_at_s, newest_step=newest_step, step_time_s=step_time_s, misses=misses,
        slots_free=slots_free,
    )  # fmt: skip
    assert decision.reason
    if decision.step is None:
        assert now_s < due_at_s or step_time_s is None or not slots_free
    else:
        assert decision.step > newest_step
        assert now_s >= due_at_s
        assert slots_free


# --- the rhythm ------------------------------------------------------------------------------------------------------


def test_the_first_capture_is_due_an_interval_after_the_beginning():
    """Proves that a generation does not begin with a capture."""
    cadence = Cadence(10.0, 100.0)
    cadence.observe({0: 0, 1: 0}, 100.0)
    cadence.observe({0: 5, 1: 4}, 105.0)
    assert cadence.decide(109.0, slots_free=True).step is None
    assert cadence.decide(110.0, slots_free=True).step == 6


def test_the_pace_follows_what_is_observed():
    """Proves that the time of a step is learned from the first rank, and that a standstill does not spoil it."""
    cadence = Cadence(10.0, 0.0)
    cadence.observe({0: 0}, 0.0)
    assert cadence.step_time_s is None
    cadence.observe({0: 2, 1: 1}, 1.0)
    assert cadence.step_time_s == 0.5
    cadence.observe({0: 2, 1: 2}, 60.0)
    assert cadence.step_time_s == 0.5


def test_a_hurry_makes_due_and_never_puts_off():
    """Proves that a wish moves the next capture forward only."""
    cadence = Cadence(10.0, 0.0)
    cadence.hurry(4.0)
    assert cadence.due_at_s == 4.0
    cadence.hurry(9.0)
    assert cadence.due_at_s == 4.0


@given(st.lists(st.tuples(st.floats(0.001, 10), st.integers(0, 50)), min_size=1, max_size=50))
def test_the_pace_stays_within_what_was_seen(moves):
    """Proves that the observed time of a step lies between the fastest and the slowest one seen."""
    cadence = Cadence(10.0, 0.0)
    now_s, step, seen, since_s = 0.0, 0, [], 0.0
    cadence.observe({0: 0}, 0.0)
    for took_s, steps in moves:
        now_s += took_s
        step += steps
        if steps:
            seen.append((now_s - since_s) / steps)
            since_s = now_s
        cadence.observe({0: step}, now_s)
    if seen:
        assert min(seen) * 0.999 <= cadence.step_time_s <= max(seen) * 1.001
        assert math.isfinite(cadence.step_time_s)
    else:
        assert cadence.step_time_s is None
