"""Which way of copying is chosen: the cheaper one, in spite of noise, and never for good. No clock is read here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.client.overlap import TRIALS, OverlapChooser, UsualTime

ENOUGH = 100
"""Captures within which any past is forgotten."""
costs = st.floats(0.0005, 60.0)
noises = st.lists(st.floats(0.8, 1.25), min_size=10, max_size=60)
pasts = st.lists(st.tuples(st.floats(-1.0, 100.0), st.floats(-1.0, 100.0)), max_size=150)


def go(chooser: OverlapChooser, count: int, cost_s: Callable[[bool], float]) -> list[bool]:
    """Capture so many times at such costs, and return the ways that were taken."""
    ways: list[bool] = []
    for _ in range(count):
        ways.append(chooser.choose())
        chooser.record(overlapped=ways[-1], cost_s=cost_s(ways[-1]))
    return ways


def live_through(chooser: OverlapChooser, past: Sequence[tuple[float, float]]) -> None:
    """Capture at costs that follow no rule."""
    for boundary_s, beside_s in past:
        go(chooser, 1, lambda way: beside_s if way else boundary_s)  # noqa: B023 - used at once


# --- the chooser --------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(pasts)
def test_both_ways_are_tried_in_turn_first(past: list[tuple[float, float]]) -> None:
    """Whatever they cost, both ways are tried equally often before one is chosen, in the same order on all ranks."""
    chooser = OverlapChooser()
    ways: list[bool] = []
    for boundary_s, beside_s in past[: 2 * TRIALS]:
        ways += go(chooser, 1, lambda way: beside_s if way else boundary_s)  # noqa: B023 - used at once
    assert ways == [False, True, False, True, False, True][: len(ways)]


@settings(deadline=None)
@given(costs, st.floats(1.6, 100.0), st.booleans(), noises)
def test_the_cheaper_way_is_taken(cheap_s: float, ratio: float, beside_is_cheap: bool, noise: list[float]) -> None:
    """Under noise that can't turn the order around, the cheaper way is taken but for a few looks, ever rarer."""
    chooser = OverlapChooser()
    at = iter(noise * 20)
    ways = go(chooser, 200, lambda way: next(at) * (cheap_s if way is beside_is_cheap else cheap_s * ratio))
    assert chooser.cheaper is beside_is_cheap
    looks = [number for number, way in enumerate(ways[2 * TRIALS :]) if way is not beside_is_cheap]
    assert 1 <= len(looks) <= 5
    gaps = [later - earlier for earlier, later in pairwise(looks)]
    assert gaps == sorted(gaps)


@settings(deadline=None)
@given(costs, st.floats(3.0, 100.0), st.booleans(), st.lists(st.integers(0, 4), min_size=40, max_size=40))
def test_outliers_do_not_decide(cheap_s: float, ratio: float, beside_is_cheap: bool, places: list[int]) -> None:
    """One of five costs may be anything, and the cheaper way is still the one that is taken."""
    chooser = OverlapChooser()
    counts = {False: 0, True: 0}

    def cost_s(way: bool) -> float:
        counts[way] += 1
        block, place = divmod(counts[way], 5)
        if place == 2 and places[block % 40] > 1:
            return cheap_s * ratio * 10 if way is beside_is_cheap else 0.0
        return cheap_s if way is beside_is_cheap else cheap_s * ratio

    ways = go(chooser, 150, cost_s)
    assert sum(way is beside_is_cheap for way in ways[2 * TRIALS :]) > 0.75 * 144


@settings(deadline=None)
@given(pasts, costs, st.floats(1.2, 100.0), st.booleans())
def test_no_choice_is_for_good(
    past: list[tuple[float, float]], cheap_s: float, ratio: float, beside_is_cheap: bool
) -> None:
    """Whatever was measured before, a job that changes is noticed within a hundred captures."""
    chooser = OverlapChooser()
    live_through(chooser, past)
    cost_s = {beside_is_cheap: cheap_s, not beside_is_cheap: cheap_s * ratio}
    go(chooser, ENOUGH, cost_s.__getitem__)
    assert chooser.cheaper is beside_is_cheap
    ways = go(chooser, ENOUGH, cost_s.__getitem__)
    assert sum(way is not beside_is_cheap for way in ways) <= 6


@settings(deadline=None)
@given(pasts)
def test_each_way_stays_in_sight(past: list[tuple[float, float]]) -> None:
    """At any time, either way is tried within so many captures."""
    chooser = OverlapChooser()
    live_through(chooser, past)
    assert set(go(chooser, ENOUGH, lambda way: 1.0 + way)) == {False, True}


@pytest.mark.parametrize(
    ("setting", "surely_cheaper", "expected"),
    [("on", False, True), ("on", True, True), ("off", False, False), ("off", True, False), ("auto", True, True)],
)
def test_nothing_is_measured_where_nothing_is_open(setting: str, surely_cheaper: bool, expected: bool) -> None:
    """A setting is obeyed, and where one way is surely cheaper "auto" takes it, whatever is recorded."""
    chooser = OverlapChooser(setting, surely_cheaper=surely_cheaper)
    assert not chooser.measures
    assert chooser.overlaps is expected
    assert set(go(chooser, ENOUGH, lambda way: 100.0 if way is expected else 0.0)) == {expected}


@pytest.mark.parametrize("setting", ["auto", "on"])
@settings(deadline=None)
@given(pasts)
def test_a_refusal_is_for_good(setting: str, past: list[tuple[float, float]]) -> None:
    """After something was changed under a copy, no capture overlaps any more."""
    chooser = OverlapChooser(setting)
    live_through(chooser, past)
    chooser.refuse()
    assert not chooser.overlaps
    assert not chooser.measures
    assert not any(go(chooser, ENOUGH, lambda way: 0.0 if way else 100.0))


@settings(deadline=None)
@given(st.integers(0, 30), pasts)
def test_failed_captures_are_tried_again(failures: int, past: list[tuple[float, float]]) -> None:
    """Captures that bring no figure change nothing but the turn: both ways are still tried until each has figures."""
    chooser = OverlapChooser()
    for _ in range(failures):
        chooser.choose()
    go(chooser, 2 * TRIALS + 1, lambda way: 1.0 + way)
    assert chooser.cheaper is False


# --- what a step usually takes ------------------------------------------------------------------------------------


def second(seconds: float) -> int:
    """The clock at so many seconds."""
    return int(seconds * 1e9)


@settings(deadline=None)
@given(st.floats(0.001, 10.0), st.floats(0.0, 0.9), st.floats(1.5, 3.0), st.floats(0.05, 0.15), noises)
def test_the_usual_time_is_that_of_a_quiet_step(
    step_s: float, optimizer: float, slower: float, flush: float, noise: list[float]
) -> None:
    """The usual time is that of a step's part before its optimizer, steps beside flushes and captures left out.

    Steps of a millisecond or of ten seconds; between captures few of them are looked at.
    """
    usual, now_s, at = UsualTime(), 1000.0, iter(noise * 1000)
    interval = max(8, min(int(5.0 / step_s), 60))
    looked = 0
    for step in range(interval * 5):
        phase = step % interval
        capturing = phase == 0 and step > 0
        if second(now_s) >= usual.due_ns:
            usual.boundary(second(now_s))
        if capturing:
            usual.captured(second(now_s))
            now_s += step_s / 2
        looked += usual.open
        pace = next(at) * (slower if step >= interval and phase + 0.5 < flush * interval else 1.0)
        now_s += step_s * (1 - optimizer) * pace
        if optimizer and usual.open:
            usual.optimizer_step(second(now_s))
        now_s += step_s * optimizer * pace
    until_ns = usual.usual_ns(0, until_optimizer=True)
    steps_ns = usual.usual_ns(4, until_optimizer=False)
    assert until_ns is not None
    assert steps_ns is not None
    assert 0.79 * step_s * (1 - optimizer) <= until_ns / 1e9 <= 1.26 * step_s * (1 - optimizer)
    assert 0.79 * step_s * 4 <= steps_ns / 1e9 <= 1.26 * step_s * 4
    assert looked <= 3 * 5 + 5


def test_the_usual_time_is_not_known_at_first() -> None:
    """A figure is given once there are three, and not before."""
    usual = UsualTime()
    for number in range(4):
        assert usual.usual_ns(1, until_optimizer=False) is None
        usual.boundary(second(number))
    assert usual.usual_ns(2, until_optimizer=True) == second(3)


def test_a_step_that_captures_is_no_usual_one() -> None:
    """The time of a step that begins with a capture is not taken."""
    usual = UsualTime()
    for number in range(3):
        usual.boundary(second(number))
        usual.captured(second(number))
        usual.optimizer_step(second(number + 0.5))
    assert usual.usual_ns(1, until_optimizer=False) is None


def test_the_first_of_several_optimizers_ends_the_time() -> None:
    """With several optimizers, or several steps of one, the first that steps after the boundary counts."""
    usual = UsualTime()
    for number in range(4):
        usual.boundary(second(number))
        for part in (0.25, 0.5, 0.75):
            usual.optimizer_step(second(number + part))
    assert usual.usual_ns(0, until_optimizer=True) == second(0.25)
    assert usual.usual_ns(1, until_optimizer=True) == second(1.25)
    assert not usual.open
