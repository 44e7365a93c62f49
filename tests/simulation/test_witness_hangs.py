"""The witness of hangs sees what it is there to see: each test breaks a rule and expects it to be named."""

from __future__ import annotations

import dataclasses

import pytest

from ckptd.core.patience import Patience
from ckptd.core.policy import hang
from ckptd.core.policy.hang import Limit
from tests.simulation.node import SimulationError, run
from tests.simulation.options import Options


def see_nothing(patch):
    """Never calls anybody hung."""
    patch.setattr(Patience, "look", lambda patience, at_s, samples: None)


def be_slow(patch):
    """Gives every step two minutes."""
    patch.setattr(hang, "learned", lambda times_s, policy: Limit(120.0, "broken"))


def be_hasty(patch):
    """Gives every step half a second, and the first one as well."""
    patch.setattr(Patience, "_limit", lambda patience, life, times: Limit(0.5, "broken"))


@pytest.mark.parametrize(
    ("broken", "said", "first"),
    [(see_nothing, "hangs for ever", 0), (be_slow, "was found after", 35), (be_hasty, "nobody hangs", 0)],
)
def test_a_broken_rule_is_named(monkeypatch: pytest.MonkeyPatch, broken, said: str, first: int) -> None:
    """A job that misses hangs, finds them late, or sees some where there are none, is not let through."""
    broken(monkeypatch)
    problems = []
    for seed in range(first, first + 200):  # few seeds come to the second one
        try:
            run(seed, dataclasses.replace(Options.draw(seed), faults=6, fault_kinds=("hang", "hang", "checkpoint")))
        except SimulationError as error:
            problems.append(str(error.problem))
            if said in problems[-1]:
                return
    raise AssertionError(f"not named: {problems[:5]}")
