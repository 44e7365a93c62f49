"""What the bench of object stores makes of what it measured."""

from __future__ import annotations

from typing import Any

from tests.bench.object_clients import CLIENTS, OURS
from tests.bench.object_store import rows


def _found(seconds: float, cpu_s: float) -> dict[str, Any]:
    figures = {"put_s": seconds, "put_cpu_s": cpu_s}
    return {**figures, "small_put_ms": 1.0, "small_put_cpu_ms": 0.5}


def test_ratios_are_to_the_best_of_the_same_round() -> None:
    """A round in which the machine was slow for everybody changes no ratio."""
    measured = {"one": [_found(1, 2), _found(10, 2)], "other": [_found(2, 1), _found(20, 1)]}
    memory = {"one": {"put_peak_mib": 5.0}, "other": {"put_peak_mib": 7.0}}
    one, other = rows(measured, memory, "put", 100)
    assert one["time, ratio"] == "1.00 [1.00..1.00]"
    assert other["time, ratio"] == "2.00 [2.00..2.00]"
    assert (one["memory MiB"], other["memory MiB"]) == ("5", "7")
    assert (one["CPU, ratio"], other["CPU, ratio"]) == ("2.0 [2.0..2.0]", "1.0 [1.0..1.0]")


def test_our_tiers_are_among_the_contenders() -> None:
    """The memory of a large upload is asked of contenders that are there."""
    assert set(OURS) <= set(CLIENTS)
