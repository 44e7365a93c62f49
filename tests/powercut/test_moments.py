"""When the power goes."""

from __future__ import annotations

import random

from tests.powercut import moments


def test_moments_are_spread() -> None:
    """A hundred moments come by every phase and every way to cut, and a seed repeats them."""
    drawn = [moments.draw(random.Random(seed)) for seed in range(100)]
    assert {moment.phase for moment in drawn} == set(moments.PHASES)
    assert {moment.trigger for moment in drawn} == set(moments.Trigger)
    assert drawn == [moments.draw(random.Random(seed)) for seed in range(100)]
