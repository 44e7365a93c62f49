"""Ranks in lock-step as the hang detector sees them, without any machine around it."""

from __future__ import annotations

from collections.abc import Iterable

from ckptd.core.patience import Hung, Patience
from ckptd.core.policy.hang import HangPolicy, Sample

POLICY = HangPolicy()
TICK_S = 0.05


class Job:
    """Ranks in lock-step whose pages are looked at each tick; time is a number."""

    def __init__(self, policy: HangPolicy = POLICY, ranks: int = 2) -> None:
        self.policy = policy
        self.patience = Patience(policy)
        self.now_s = 1000.0
        self.ranks = range(ranks)
        self.step = dict.fromkeys(self.ranks, 0)
        self.beat_s = dict.fromkeys(self.ranks, 0.0)
        self.phase = dict.fromkeys(self.ranks, "training")
        self.until_ns = dict.fromkeys(self.ranks, 0)
        self.hung: Hung | None = None

    def look(self) -> Hung | None:
        """Look at all pages now."""
        self.hung = self.hung or self.patience.look(self.now_s, [self.sample(rank) for rank in self.ranks])
        return self.hung

    def sample(self, rank: int) -> Sample:
        """What a page says."""
        beat_ns = round(self.beat_s[rank] * 1e9)
        return Sample(rank, self.step[rank], beat_ns, self.phase[rank], self.now_s, 0, self.until_ns[rank], "eval")

    def wait(self, seconds: float) -> Hung | None:
        """Let time pass, with a look at each tick; returns what was found, and stops there."""
        end_s = self.now_s + seconds
        while self.now_s < end_s - 1e-9 and self.hung is None:
            self.now_s = min(end_s, self.now_s + TICK_S)
            self.look()
        return self.hung

    def restart(self, step: int) -> None:
        """Begin another generation, whose ranks are restored to a step between two looks."""
        self.hung = None
        self.patience.begin()
        self.phase = dict.fromkeys(self.ranks, "restoring")
        self.step, self.beat_s = dict.fromkeys(self.ranks, 0), dict.fromkeys(self.ranks, 0.0)
        self.look()
        self.now_s += TICK_S
        self.step, self.phase = dict.fromkeys(self.ranks, step), dict.fromkeys(self.ranks, "training")

    def steps(self, times_s: Iterable[float], ranks: Iterable[int] | None = None) -> None:
        """Let ranks finish a step after each of these times; nobody may be called hung meanwhile."""
        for seconds in times_s:
            self.wait(seconds)
            assert self.hung is None, self.hung
            for rank in self.ranks if ranks is None else ranks:
                self.step[rank] += 1
                self.beat_s[rank] = self.now_s
            self.look()

    def until_hung(self, at_most_s: float) -> float:
        """Wait for the verdict, and return how long that took."""
        begin_s = self.now_s
        assert self.wait(at_most_s) is not None, f"not hung after {at_most_s} s: {self.patience.limit}"
        return self.now_s - begin_s
