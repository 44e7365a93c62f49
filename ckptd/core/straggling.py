"""Ranks that hold up the others for a while: windows of steps are compared, and what is said has to last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptd.core.events import Effect, Log
from ckptd.core.policy.hang import Sample
from ckptd.core.policy.straggler import Mark, Pace, Slow, StragglerPolicy, pace, slow_ranks, until_factor
from ckptd.core.warnings import Warnings
from ckptd.types import Evidence

KIND = "straggler"
WINDOW_S = 2.0
WINDOW_STEPS = 5
"""A window is over when it is that old and every rank has done so many steps in it."""
WINDOWS = 3
"""In so many windows in turn a rank has to be slow to be called so, and as many not to be any more."""
_AGAIN_S = 600.0
"""After a restart for a straggler there is none for another so long: who is slow on this node is slow after it too."""
_STEADY = ("training", "capturing")


class Straggling:
    """Compares the ranks of one job."""

    def __init__(self, policy: StragglerPolicy, world_size: int) -> None:
        self._policy = policy
        self._world_size = world_size
        self._began_s = 0.0
        self._before: dict[int, int] = {}
        """The last step of each rank as it was seen in the last look."""
        self._first: dict[int, Mark] = {}
        self._last: dict[int, Mark] = {}
        self._counts: dict[int, int] = {}
        """In how many windows in turn a rank was other than it is said to be."""
        self._slow: set[int] = set()
        self._restart_at_s = float("-inf")

    def begin(self) -> None:
        """Begin anew with a generation."""
        self._new_window(0.0)
        self._before.clear()
        self._counts.clear()
        self._slow.clear()

    def look(self, at_s: float, samples: Sequence[Sample], warnings: Warnings) -> tuple[list[Effect], Evidence | None]:
        """Take in what the pages say; return what to log, and evidence if a straggler is to be a failure.

        A rank that is somewhere else for a reason of its own (a section, a restore) begins all windows anew.
        """
        steady = all(item.phase in _STEADY and not item.section_until_ns for item in samples)
        if len(samples) < max(2, self._world_size) or not steady:
            self._new_window(at_s)
            return [], None
        self._note(samples)
        steps = min((self._last[rank].step - first.step for rank, first in self._first.items()), default=0)
        if len(self._first) < self._world_size:
            self._began_s = at_s
            return [], None
        if steps < WINDOW_STEPS or at_s - self._began_s < WINDOW_S:
            return [], None
        paces = {
            rank: item for rank, first in self._first.items() if (item := pace(first, self._last[rank])) is not None
        }
        self._first, self._began_s = dict(self._last), at_s
        return self._judge(self._slow_now(paces), at_s, warnings)

    def _note(self, samples: Sequence[Sample]) -> None:
        """Mark ranks that have just passed a boundary: what they have waited since belongs to the next step."""
        for item in samples:
            if item.rank in self._before and item.step != self._before[item.rank]:
                mark = self._last[item.rank] = Mark(item.step, item.beat_ns, item.waited_ns)
                self._first.setdefault(item.rank, mark)
            self._before[item.rank] = item.step

    def _new_window(self, at_s: float) -> None:
        self._first, self._last, self._began_s = {}, {}, at_s

    def _slow_now(self, paces: Mapping[int, Pace]) -> dict[int, Slow]:
        factor = self._policy.factor
        still = slow_ranks(paces, until_factor(factor))
        return slow_ranks(paces, factor) | {rank: item for rank, item in still.items() if rank in self._slow}

    def _judge(self, slow: dict[int, Slow], at_s: float, warnings: Warnings) -> tuple[list[Effect], Evidence | None]:
        effects: list[Effect] = []
        evidence = None
        for rank in range(self._world_size):
            changed = (rank in slow) != (rank in self._slow)
            self._counts[rank] = self._counts.get(rank, 0) + 1 if changed else 0
            if rank in slow and rank in self._slow:
                warnings.note(KIND, rank, summary(rank, slow[rank]), at_s)
            if self._counts[rank] < WINDOWS:
                continue
            self._counts[rank] = 0
            if rank in slow:
                self._slow.add(rank)
                warnings.note(KIND, rank, summary(rank, slow[rank]), at_s)
                effects.append(Log("rank slow", {"rank": rank, **_fields(slow[rank], self._policy)}, level="warning"))
                evidence = evidence or self._evidence(rank, slow[rank], at_s)
            else:
                self._slow.discard(rank)
                warnings.clear(KIND, rank)
                effects.append(Log("rank not slow any more", {"rank": rank}))
        return effects, evidence

    def _evidence(self, rank: int, slow: Slow, at_s: float) -> Evidence | None:
        if not self._policy.restart or at_s < self._restart_at_s:
            return None
        self._restart_at_s = at_s + _AGAIN_S
        return Evidence(KIND, KIND, rank, 0.9, summary(rank, slow), at_s)


def summary(rank: int, slow: Slow) -> str:
    """Say in a line who is slow, and what that costs."""
    how = "of its own" if slow.measured else "for a step"
    return (
        f"rank {rank} needs {_show(slow.own_s)} {how}, its peers {_show(slow.peers_s)} ({_ratio(slow)} x); "
        f"a step takes {_show(slow.step_s)}"
    )


def _fields(slow: Slow, policy: StragglerPolicy) -> dict[str, object]:
    return {
        "own_s": round(slow.own_s, 6),
        "peers_s": round(slow.peers_s, 6),
        "ratio": float(_ratio(slow)),
        "factor": policy.factor,
        "step_s": round(slow.step_s, 6),
        "waits_left_out": slow.measured,
    }


def _ratio(slow: Slow) -> str:
    return f"{min(slow.ratio, 999.0):.3g}"


def _show(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
