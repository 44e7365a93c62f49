"""The arithmetic behind the figures."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.measure import Step, best, cost, markdown, ratio, show, slower, spread, table

SECONDS = st.floats(min_value=0.001, max_value=10)


def _steps(totals: list[float], first: int, stall_s: float = 0.0) -> list[Step]:
    return [Step(first + number, 0.0, total, stall_s) for number, total in enumerate(totals)]


@given(SECONDS, SECONDS, st.integers(1, 20))
def test_lost_time_is_stall_and_what_steps_took_longer(base_s: float, extra_s: float, count: int) -> None:
    """Steps before the capture cost nothing; the stall and each later step's excess are added up."""
    before = [Step(10, 0.0, base_s * 7, 0.0)]  # a slow step before the capture is not the checkpoint's fault
    taking = [Step(11, 0.0, base_s + 0.5, 0.5)]
    after = [Step(12 + number, 0.0, base_s + extra_s, 0.0, wait_s=0.25) for number in range(count)]
    found = cost(_steps([base_s] * 5, 1), before + taking + after, taken=11)
    assert found.stall_s == 0.5
    assert found.lost_s == pytest.approx(0.5 + count * extra_s)
    assert found.wait_s == pytest.approx(0.25 * count)
    assert found.longest_step_s == pytest.approx(base_s + extra_s)
    assert found.longest_flush_s == pytest.approx(base_s + extra_s - 0.25)


def test_a_blocking_checkpoint_has_no_steps_beside_it() -> None:
    """With nothing after the stall, the stall is all that is lost, and no step was longer than usual."""
    found = cost(_steps([0.1, 0.3], 1), _steps([1.2], 3, stall_s=1.0), taken=3)
    assert (found.lost_s, found.longest_step_s, found.base_step_s) == (1.0, 0.2, 0.2)


@given(st.lists(SECONDS, min_size=1))
def test_a_median_lies_between_the_extremes(values: list[float]) -> None:
    """A spread is ordered and counts every value."""
    found = spread(values)
    assert found is not None
    assert found["min"] <= found["median"] <= found["max"]
    assert found["n"] == len(values)


def test_what_was_not_measured_stays_visible() -> None:
    """Nothing gives no spread, no ratio and a dash: never a zero that reads like a figure."""
    assert spread([]) is None
    assert show(None) == "-"
    assert ratio(None, 1.0) is None
    assert ratio(spread([1.0]), None) is None
    assert ratio(spread([1.0]), 0.0) is None


def test_the_slower_rank_counts() -> None:
    """Ranks wait for each other, so a repetition is as slow as its slowest rank."""
    assert slower([[{"s": 1.0}, {"s": 5.0}], [{"s": 2.0}, {"s": 3.0}]], "s") == [2.0, 5.0]


def test_ranks_that_disagree_on_repetitions_are_refused() -> None:
    """A rank that lacks a repetition is an error, not a shorter list."""
    with pytest.raises(ValueError, match="shorter"):
        slower([[{"s": 1.0}], []], "s")


def test_the_best_is_the_smallest_median_that_there_is() -> None:
    """Contenders that were not measured can't win."""
    items: dict[str, dict[str, Any]] = {
        "a": {"s": spread([3.0, 1.0, 2.0])},
        "b": {"s": None},
        "c": {"s": spread([1.5])},
    }
    found = best(items, ("a", "b", "c", "missing"), "s")
    assert found is not None
    assert found[0] == "c"
    assert best(items, ("b",), "s") is None


def test_tables_align_and_fill_gaps() -> None:
    """Every column begins at one place, and a cell that a row lacks is a dash."""
    lines = table([{"name": "long name", "s": "1"}, {"name": "x"}]).splitlines()
    assert lines[0].index("s") == lines[1].index("1") == lines[2].index("-")
    assert markdown([{"a": "1"}, {}]).splitlines() == ["| a |", "| --- |", "| 1 |", "| - |"]


def test_show_gives_median_and_extremes_in_a_unit() -> None:
    """Figures read `median [min..max]`."""
    assert show(spread([0.001, 0.002, 0.004]), 1e3, 0) == "2 [1..4]"
    assert not math.isnan(float(show(spread([1.0])).split()[0]))
