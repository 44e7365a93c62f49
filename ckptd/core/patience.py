"""Signs of life: what each rank has shown at the last looks, and who has gone without for too long.

Time counts only while it is looked at, and only while no other rank may take longer: the rest of the job waits for a
rank that evaluates, captures or compiles.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ckptd.core.policy import hang
from ckptd.core.policy.hang import HangPolicy, Limit, Sample

_CAPTURES = 8
"""How many of the last captures a capture's limit is learned from."""
_BEGINNING = ("absent", "joining", "restoring")
_NONE = Limit(0.0, "")


class Hung(NamedTuple):
    """That nothing is seen of the job any more."""

    rank: int | None
    """Who is behind all others; None when that can't be told from their pages."""
    step: int
    """The last step that all have finished."""
    idle_s: float
    limit: Limit
    sign_s: float
    """When the last sign of life was seen, in the agent's monotonic time."""
    sample: Sample


@dataclass(slots=True)
class _Life:
    """One rank's signs of life in a generation."""

    sample: Sample
    sign_s: float
    idle_s: float = 0.0
    boundary_ns: int = 0
    """Its time at the boundary that began the present step."""
    steps: int = 0
    """How often its step was seen to grow."""
    marred: bool = False
    """Whether the present step says nothing about the usual time of one."""
    section_s: float = 0.0
    """How long the section might still take when it was first seen."""
    limit: Limit = _NONE
    """How long it may go without a sign where it is now."""
    excuses: bool = False
    """Whether others may be waiting for it as long as it may take."""

    @property
    def doing(self) -> str:
        """What it does, as far as that decides how long it may take."""
        return "in a section" if self.sample.section_until_ns else self.sample.phase


class Patience:
    """Follows the ranks of one job. What was learned of their steps outlives a generation."""

    def __init__(self, policy: HangPolicy) -> None:
        self.policy = policy
        self.limit = hang.learned((), policy)
        """How long a step may take now."""
        self.stepped_s: float | None = None
        """When any rank was last seen to have finished a step."""
        self._lives: dict[int, _Life] = {}
        self._times: dict[int, deque[float]] = {}
        self._limits: dict[int, Limit] = {}
        self._captures: deque[float] = deque(maxlen=_CAPTURES)
        self._hung_at: dict[int, int] = {}
        self._no_hang_s = 0.0
        """The longest step that was called a hang before it was let come to its end."""
        self._first_step_s = 0.0
        """How long the first step of this generation took."""
        self._looked_s: float | None = None
        self._grace_s = 0.0

    @property
    def knows(self) -> bool:
        """Whether the limit is learned."""
        return any(len(times) >= hang.ENOUGH for times in self._times.values())

    def begin(self) -> None:
        """Forget where the ranks were: others come now."""
        self._lives.clear()
        self.stepped_s, self._first_step_s = None, 0.0

    def captured(self, seconds: float) -> None:
        """Learn how long a capture has kept a rank."""
        self._captures.append(seconds)

    def convicted(self, step: int) -> None:
        """Remember that the job was ended because it hung after `step`."""
        self._hung_at[step] = self._hung_at.get(step, 0) + 1

    def went_on(self, hung: Hung, since_s: float) -> bool:
        """Whether who was called hung has shown a sign of life since; what others do meanwhile says nothing of it."""
        life = self._lives.get(hung.sample.rank)
        return life is not None and life.sign_s > since_s

    def look(self, at_s: float, samples: Iterable[Sample]) -> Hung | None:
        """Take in what the pages of all ranks that should make progress say; return whether they hang."""
        counted_s = self._count(at_s)
        late = {rank for rank, life in self._lives.items() if life.idle_s > life.limit.seconds}
        here = [self._follow(sample) for sample in samples]
        if any(life.sample.rank in late and not life.idle_s for life in here):
            self._forgive(here)
        step = min((life.sample.step for life in here), default=0)
        if self._hung_at:
            self._hung_at = {stuck: times for stuck, times in self._hung_at.items() if stuck >= step}
        for life in here:
            life.limit = self._limit(life, self._hung_at.get(step, 0))
        self._wait(here, counted_s)
        expired = [life for life in here if life.idle_s > life.limit.seconds]
        return self._verdict(expired, here, step) if expired and self._grace_s <= 0 else None

    def _count(self, at_s: float) -> float:
        """Return how much of the time since the last look counts."""
        gap_s = 0.0 if self._looked_s is None else at_s - self._looked_s
        self._looked_s = at_s
        if gap_s > hang.AWAY_S:
            self._grace_s = hang.AWAY_S
            for life in self._lives.values():
                life.marred = True
            return 0.0
        counted_s = hang.counted_s(gap_s)
        self._grace_s = max(0.0, self._grace_s - counted_s)
        return counted_s

    @staticmethod
    def _forgive(here: Sequence[_Life]) -> None:
        """Begin anew with everybody: one that was late has gone on after all, and the others may have waited for it."""
        for life in here:
            life.marred = life.marred or life.idle_s > 0
            life.idle_s = 0.0

    @staticmethod
    def _wait(here: Sequence[_Life], counted_s: float) -> None:
        """Count the time for everybody who is not waiting for somebody who may take longer."""
        slow = max(
            (life for life in here if life.excuses), key=lambda life: life.limit.seconds - life.idle_s, default=None
        )
        rest_s = 0.0 if slow is None else slow.limit.seconds - slow.idle_s
        for life in here:
            if life is slow or rest_s <= max(0.0, life.limit.seconds - life.idle_s):
                life.idle_s += counted_s
            elif slow is not None and slow.sample.phase != "capturing":
                life.marred = True

    # --- one rank ---------------------------------------------------------------------------------------------

    def _follow(self, sample: Sample) -> _Life:
        life = self._lives.get(sample.rank)
        if life is None:
            life = self._lives[sample.rank] = _Life(sample, sample.at_s)
            self._enter(life, sample)
            if sample.beat_ns:  # it has finished steps that nobody has looked at
                life.steps, life.marred = 1, True
        elif life.sample.sign != sample.sign:
            if sample.step > life.sample.step:
                self._stepped(life, sample)
            if sample.section_until_ns != life.sample.section_until_ns:
                self._enter(life, sample)
            life.sign_s, life.idle_s = sample.at_s, 0.0
        life.sample = sample
        return life

    def _enter(self, life: _Life, sample: Sample) -> None:
        """Note that a rank has entered a section, or left one."""
        life.marred = life.marred or sample.section_until_ns > 0
        if 0 < sample.section_until_ns < hang.NO_DEADLINE_NS:
            life.section_s = max(self.policy.floor_s, sample.section_until_ns / 1e9 - sample.at_s)
        else:
            life.section_s = self.policy.ceiling_s

    def _stepped(self, life: _Life, sample: Sample) -> None:
        """Learn from a finished step, unless it was the first or nobody can say how long it took by itself."""
        if life.sample.phase in _BEGINNING and not sample.beat_ns:
            return  # it has restored
        self.stepped_s = sample.at_s
        if life.steps and not life.marred:
            seconds = (sample.beat_ns - life.boundary_ns) / 1e9 / (sample.step - life.sample.step)
            times = self._times.setdefault(sample.rank, deque(maxlen=hang.WINDOW))
            times.append(max(0.0, seconds))
            self._limits[sample.rank] = hang.learned(times, self.policy)
            if life.sample.step in self._hung_at and seconds > self.limit.seconds:
                self._no_hang_s = max(self._no_hang_s, seconds)
            self.limit = hang.borne_out(max(self._limits.values()), self._no_hang_s)
        if not life.steps:
            self._first_step_s = max(self._first_step_s, life.idle_s)
        life.steps += 1
        life.boundary_ns = sample.beat_ns
        life.marred = sample.section_until_ns > 0

    def _limit(self, life: _Life, times: int) -> Limit:
        """Return how long a rank may go without a sign where it is now."""
        sample, policy = life.sample, self.policy
        life.excuses = True
        if sample.section_until_ns:
            return Limit(life.section_s, f"the deadline of section {sample.section!r}")
        if sample.phase == "capturing":
            return hang.of_capture(self._captures, self.limit, policy)
        if sample.phase in ("joining", "restoring", "leaving", "raised"):
            life.excuses = sample.phase != "raised"
            return Limit(policy.ceiling_s, "the ceiling")
        if not life.steps:
            return Limit(policy.first_s, "before the first step and in it")
        limit = hang.again(self.limit, times, policy)
        warm = limit if life.steps >= hang.ENOUGH else hang.after_the_first(limit, self._first_step_s, policy)
        life.excuses = warm > limit
        return warm

    # --- the verdict ------------------------------------------------------------------------------------------

    @staticmethod
    def _verdict(expired: Sequence[_Life], here: Sequence[_Life], step: int) -> Hung:
        """Say who is hung: by name only who is behind all others, or alone at what it does."""
        worst = max(
            expired, key=lambda life: (life.sample.phase == "absent", life.excuses, -life.sample.step, life.idle_s)
        )
        behind = sum(life.sample.step == step for life in here)
        alike = sum(life.doing == worst.doing for life in here)
        alone = (worst.sample.step == step and behind == 1) or (worst.excuses and alike == 1)
        rank = worst.sample.rank if alone else None
        return Hung(rank, step, worst.idle_s, worst.limit, worst.sign_s, worst.sample)
