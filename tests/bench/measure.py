"""Statistics, lost time and tables: pure functions of what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Spread = dict[str, float]


class Step(NamedTuple):
    """One training step as a rank saw it; the boundary and the wait in the optimizer's hook are parts of the total."""

    boundary: int
    begin_s: float
    total_s: float
    stall_s: float
    wait_s: float = 0.0


class Cost(NamedTuple):
    """What one checkpoint cost a training loop."""

    stall_s: float
    wait_s: float
    lost_s: float
    longest_step_s: float
    longest_flush_s: float
    """The longest step but for its wait for the copy, which comes before the flush and is a stall of its own."""
    base_step_s: float


def cost(quiet: Sequence[Step], beside: Sequence[Step], taken: int) -> Cost:
    """Return the cost of the checkpoint that boundary `taken` took, until the last step of `beside`.

    Lost is the stall at that boundary, and how much longer than the mean of the quiet steps those after it were. The
    mean and not the median: a sum of steps is compared, and steps are never much shorter than usual, only longer.
    """
    base_s = statistics.fmean(step.total_s for step in quiet)
    stall_s = next(step.stall_s for step in beside if step.boundary == taken)
    after = [step for step in beside if step.boundary > taken]
    return Cost(
        stall_s=stall_s,
        wait_s=sum(step.wait_s for step in after),
        lost_s=stall_s + sum(step.total_s - base_s for step in after),
        longest_step_s=max((step.total_s for step in after), default=base_s),
        longest_flush_s=max((step.total_s - step.wait_s for step in after), default=base_s),
        base_step_s=base_s,
    )


def spread(values: Iterable[float]) -> Spread | None:
    """Return median, minimum, maximum and count; None for nothing."""
    listed = list(values)
    if not listed:
        return None
    return {"median": statistics.median(listed), "min": min(listed), "max": max(listed), "n": len(listed)}


def show(values: Spread | None, unit: float = 1.0, digits: int = 2) -> str:
    """Return `median [min..max]` in a unit, "-" for what was not measured."""
    if values is None:
        return "-"
    low, middle, high = (values[key] * unit for key in ("min", "median", "max"))
    return f"{middle:.{digits}f} [{low:.{digits}f}..{high:.{digits}f}]"


def ratio(values: Spread | None, other: Spread | float | None) -> float | None:
    """Return the ratio of two medians, None where one is missing or there is nothing to divide by."""
    if values is None or other is None:
        return None
    below = other["median"] if isinstance(other, dict) else other
    return values["median"] / below if below else None


def times(number: float | None) -> str:
    """Return a ratio as text."""
    return "-" if number is None else f"{number:.2f}"


def best(items: Mapping[str, Mapping[str, Any]], names: Iterable[str], key: str) -> tuple[str, Spread] | None:
    """Return which of the named contenders has the smallest median of a figure, and that figure."""
    found = [(name, items[name][key]) for name in names if name in items and items[name].get(key)]
    return min(found, key=lambda pair: pair[1]["median"], default=None)


def slower(ranks: Sequence[Sequence[Mapping[str, float]]], key: str) -> list[float]:
    """Return a figure of every repetition: that of the slower rank, for which the others wait."""
    return [max(together[key] for together in each) for each in zip(*ranks, strict=True)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as aligned columns."""
    if not rows:
        return "(nothing)"
    titles = list(rows[0])
    lines = [titles, *([str(row.get(title, "-")) for title in titles] for row in rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(titles))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as a table for a README."""
    titles = list(rows[0])
    lines = [titles, ["---"] * len(titles), *([str(row.get(title, "-")) for title in titles] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
