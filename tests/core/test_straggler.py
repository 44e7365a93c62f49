"""Who is called a straggler, from marks of its steps: tables, properties, and whole runs of made-up pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.core.policy.hang import Sample
from ckptd.core.policy.straggler import Mark, Pace, StragglerPolicy, pace, slow_ranks, until_factor
from ckptd.core.straggling import KIND, WINDOW_S, WINDOWS, Straggling
from ckptd.core.warnings import Warnings
from ckptd.types import Evidence

LOOK_S = 0.05


def lock_step(own_s: Mapping[int, float], *, measured: bool = True) -> dict[int, Pace]:
    """Return the paces of ranks that wait for the slowest of them in each step, and 1 ms for the network."""
    step_s = max(own_s.values()) + 0.001
    return {rank: Pace(step_s, step_s - own if measured else 0.0) for rank, own in own_s.items()}


@pytest.mark.parametrize(
    ("paces", "slow"),
    [
        (lock_step({0: 0.1, 1: 0.1}), []),
        (lock_step({0: 0.1, 1: 0.16}), [1]),
        (lock_step({0: 0.1, 1: 0.14}), []),
        (lock_step({0: 0.1, 1: 0.1, 2: 0.1, 3: 0.3}), [3]),
        (lock_step({0: 0.0, 1: 0.1}), [1]),
        (lock_step({0: 0.1, 1: 0.3}, measured=False), []),
        ({0: Pace(0.1, 0.0), 1: Pace(0.2, 0.0), 2: Pace(0.1, 0.0)}, [1]),
        ({0: Pace(0.1, 0.05), 1: Pace(0.1, 0.0), 2: Pace(0.1, 0.05)}, []),
        ({0: Pace(1.0, 0.999), 1: Pace(1.0, 0.99)}, []),
        ({0: Pace(0.1, 0.0)}, []),
        ({}, []),
    ],
    ids=[
        "alike", "slower", "a bit slower", "one of four", "peers that do nothing", "lock-step without waits measured",
        "out of step without waits measured", "one that can't tell", "slower by nothing that counts", "alone", "nobody",
    ],
)  # fmt: skip
def test_who_is_slow(paces: dict[int, Pace], slow: list[int]) -> None:
    """Own time is compared with the median of the peers', waits left out where they are known."""
    assert sorted(slow_ranks(paces, 1.5)) == slow


own_times = st.dictionaries(st.integers(0, 7), st.floats(0.001, 10), min_size=2, max_size=8)


@given(own_times, st.floats(1.01, 10))
def test_the_fastest_is_never_slow_and_scale_does_not_matter(own_s: dict[int, float], factor: float) -> None:
    """Whoever is fastest is never called slow, and ten times slower ranks are judged alike."""
    found = slow_ranks(lock_step(own_s), factor)
    assert min(own_s, key=lambda rank: own_s[rank]) not in found
    scaled = {rank: Pace(item.step_s * 16, item.waited_s * 16) for rank, item in lock_step(own_s).items()}
    assert set(slow_ranks(scaled, factor)) == set(found)


@given(own_times, st.floats(1.01, 10), st.floats(0, 5))
def test_a_larger_factor_finds_fewer(own_s: dict[int, float], factor: float, more: float) -> None:
    """Who is slow by a large factor is slow by a smaller one, and the way back is always below the way there."""
    assert set(slow_ranks(lock_step(own_s), factor + more)) <= set(slow_ranks(lock_step(own_s), factor))
    assert 1 < until_factor(factor) < factor


@given(own_times, st.floats(1.01, 10))
def test_figures_are_those_of_the_rank(own_s: dict[int, float], factor: float) -> None:
    """What is said of a slow rank is what it needs, and at least the factor more than its peers do."""
    for rank, slow in slow_ranks(lock_step(own_s), factor).items():
        assert slow.own_s == pytest.approx(own_s[rank], rel=1e-6)
        assert slow.ratio >= factor
        assert slow.own_s > slow.peers_s
        assert slow.step_s >= slow.own_s


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (Mark(10, 10**9, 0), Mark(20, 3 * 10**9, 10**9), Pace(0.2, 0.1)),
        (Mark(10, 10**9, 0), Mark(10, 10**9, 0), None),
        (Mark(10, 10**9, 0), Mark(9, 2 * 10**9, 0), None),
        (Mark(10, 10**9, 5), Mark(20, 3 * 10**9, 0), Pace(0.2, 0.0)),
    ],
)
def test_pace(first: Mark, last: Mark, expected: Pace | None) -> None:
    """A pace is what a step took on average; without one in between, or with words that went back, there is none."""
    assert pace(first, last) == expected


class Run:
    """Two ranks in lock-step whose pages are looked at; time is virtual."""

    def __init__(self, policy: StragglerPolicy, ranks: int = 2) -> None:
        self.straggling = Straggling(policy, ranks)
        self.warnings = Warnings()
        self.log: list[str] = []
        self.evidence: list[Evidence] = []
        self.now_s = 0.0
        self._ranks = ranks
        self._boundary_s = 0.0
        self._step = 0
        self._waited_ns = dict.fromkeys(range(ranks), 0)

    def train(
        self, seconds: float, own_s: Callable[[int, int], float], *, section: int = 0, phase: str = "training"
    ) -> Run:
        """Train for so long; `own_s` says how long a rank needs for a step."""
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            need = {rank: own_s(rank, self._step) for rank in range(self._ranks)}
            step_s = max(need.values()) + 0.001
            while self._boundary_s + step_s <= self.now_s:
                self._boundary_s += step_s
                self._step += 1
                for rank, took_s in need.items():
                    self._waited_ns[rank] += round((step_s - took_s) * 1e9)
            beat_ns = round(self._boundary_s * 1e9) + 1
            samples = [
                Sample(rank, self._step, beat_ns, phase, self.now_s, self._waited_ns[rank], section)
                for rank in range(self._ranks)
            ]
            effects, evidence = self.straggling.look(self.now_s, samples, self.warnings)
            self.log += [f"{item.event} {item.fields['rank']}" for item in effects]
            self.evidence += [] if evidence is None else [evidence]
            self.now_s += LOOK_S
        return self

    @property
    def shown(self) -> list[tuple[str, int | None]]:
        """What `ckptctl status` warns of."""
        return [(item.kind, item.rank) for item in self.warnings]


LONG_S = (WINDOWS + 2) * WINDOW_S


@pytest.mark.parametrize("step_s", [0.004, 0.1, 0.35])
def test_a_straggler_is_said_once_shown_while_it_lasts_and_cleared(step_s: float) -> None:
    """A rank that is slow for long is logged once and shown; when it is not any more that is logged once, and gone."""
    run = Run(StragglerPolicy())
    run.train(LONG_S, lambda _, __: step_s)
    assert run.log == []
    run.train(4 * LONG_S, lambda rank, _: step_s * (1 + rank))
    assert run.log == ["rank slow 1"]
    assert run.shown == [(KIND, 1)]
    (warned,) = run.warnings
    assert "rank 1 needs " in warned.summary
    assert "(2 x)" in warned.summary
    run.train(2 * LONG_S, lambda _, __: step_s)
    assert run.log == ["rank slow 1", "rank not slow any more 1"]
    assert run.shown == []
    assert run.evidence == []


def test_a_rank_that_is_slow_now_and_then_is_not_called_so() -> None:
    """One window of slow steps in three is no straggler: an evaluation, a slow disk, a neighbour."""
    run = Run(StragglerPolicy())
    run.train(60, lambda rank, _: 0.3 if rank == 1 and run.now_s % (3 * WINDOW_S) < WINDOW_S else 0.05)
    assert run.log == []


def test_between_the_two_factors_nothing_changes() -> None:
    """Who is a straggler stays one until it is half-way back, so that nothing flickers at the limit."""
    run = Run(StragglerPolicy(factor=2.0))
    run.train(LONG_S, lambda rank, _: 0.05 * (1 + 0.7 * rank))
    assert run.log == []
    run.train(2 * LONG_S, lambda rank, _: 0.05 * (1 + 1.5 * rank)).train(
        2 * LONG_S, lambda rank, _: 0.05 * (1 + 0.7 * rank)
    )
    assert run.log == ["rank slow 1"]
    run.train(2 * LONG_S, lambda rank, _: 0.05 * (1 + 0.3 * rank))
    assert run.log == ["rank slow 1", "rank not slow any more 1"]


def test_sections_and_restores_are_left_out() -> None:
    """A rank in a section, or one that does not train, has nobody judged."""
    run = Run(StragglerPolicy())
    run.train(4 * LONG_S, lambda rank, _: 0.05 * (1 + 3 * rank), section=10**15)
    run.train(4 * LONG_S, lambda rank, _: 0.05 * (1 + 3 * rank), phase="restoring")
    assert run.log == []


def test_a_new_generation_begins_anew() -> None:
    """What was said of the ranks before is nothing about those that have their places now."""
    run = Run(StragglerPolicy())
    run.train(4 * LONG_S, lambda rank, _: 0.05 * (1 + 3 * rank))
    run.straggling.begin()
    run.train(LONG_S / 2, lambda _, __: 0.05)
    assert run.log == ["rank slow 1"]
    run.train(4 * LONG_S, lambda rank, _: 0.05 * (1 + 3 * rank))
    assert run.log == ["rank slow 1", "rank slow 1"]


def test_restart_if_told_so_but_not_over_and_over() -> None:
    """With `restart` a straggler is evidence of a failure; the same again soon after is a warning only."""
    run = Run(StragglerPolicy(restart=True))
    run.train(4 * LONG_S, lambda rank, _: 0.05 * (1 + 3 * rank))
    (evidence,) = run.evidence
    assert (evidence.kind, evidence.rank) == (KIND, 1)
    assert "rank 1 needs 200 ms of its own, its peers 50 ms (4 x)" in evidence.summary
    run.straggling.begin()
    run.train(4 * LONG_S, lambda rank, _: 0.05 * (1 + 3 * rank))
    assert len(run.evidence) == 1
    run.straggling.begin()
    run.now_s += 600
    run.train(4 * LONG_S, lambda rank, _: 0.05 * (1 + 3 * rank))
    assert len(run.evidence) == 2


@settings(deadline=None)
@given(st.lists(st.floats(0.9, 1.1), min_size=40, max_size=40), st.integers(2, 5))
def test_noise_is_no_straggler(noise: list[float], ranks: int) -> None:
    """Ranks whose steps scatter by a tenth are never called slow."""
    run = Run(StragglerPolicy(), ranks)
    run.train(30, lambda rank, step: 0.1 * noise[(step * 7 + rank * 3) % len(noise)])
    assert run.log == []
