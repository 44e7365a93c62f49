"""Which fault hits a job when: a campaign's settings in, planned faults out. Pure: the seed decides everything.

Moments are drawn from the exponential distribution, as failures of machines come: after any fault the next one is as
likely in this second as in any other. Faults at a fixed period would keep time with the captures, and hit the same
moment of an interval again and again: a campaign would pass that had never tried the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ckptd.errors import ConfigError, ProtocolError

Item = TypeVar("Item")

OF_RANKS = ("kill", "stop", "exception", "nan", "slow")
"""What hits single ranks."""
IN_RANKS = ("exception", "nan", "slow")
"""What ranks do themselves, at a step that they finish."""
KINDS = (*OF_RANKS, "full-disk", "agent", "launcher")
FOLLOW_S = 0.5
"""A fault that follows another one comes within so long: as a rule while the job restarts."""
_SIGKILL = 9
_MASK = 2**64 - 1
_LONGEST_S = 1e9
_LAST_STEP = 2**63
"""From there on, a step does not fit into the control page."""
_HOW_LONG = f"from 0 to {_LONGEST_S:g} s"
_HINT = f"known are {', '.join(KINDS)}"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that is done to a job on purpose."""

    kind: str
    ranks: tuple[int, ...] = ()
    """Whom it hits; empty for what hits the whole job."""
    step: int | None = None
    """It waits until those ranks have finished this step."""
    signal: int = _SIGKILL
    """For "kill"."""
    for_s: float = 10.0
    """How long the disk is full, or the rank slow."""
    pause_s: float = 0.2
    """What a slow rank adds to each step."""

    def __post_init__(self) -> None:
        """Refuse what nobody can do."""
        if self.kind not in KINDS:
            raise ConfigError(f"there is no fault {self.kind!r}", hint=_HINT)
        if (self.kind in OF_RANKS) != bool(self.ranks):
            raise ConfigError(f"a fault {self.kind!r} hits {'ranks: name some' if not self.ranks else 'no rank'}")
        if not (0 <= self.for_s <= _LONGEST_S and 0 <= self.pause_s <= _LONGEST_S):
            raise ConfigError(f"a fault lasts {self.for_s:g} s, with pauses of {self.pause_s:g} s", hint=_HOW_LONG)
        if self.step is not None and not 0 <= self.step <= _LAST_STEP:
            raise ConfigError(f"there is no step {self.step}")

    def to_json(self) -> dict[str, Any]:
        """Return the form that crosses the socket."""
        return {
            "kind": self.kind,
            "ranks": list(self.ranks),
            "step": self.step,
            "signal": self.signal,
            "for_s": self.for_s,
            "pause_s": self.pause_s,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Fault:
        """Rebuild what `to_json` wrote; raises `ProtocolError` for anything else."""
        try:
            step = data["step"]
            return cls(
                str(data["kind"]),
                tuple(int(rank) for rank in data["ranks"]),
                None if step is None else int(step),
                int(data["signal"]),
                float(data["for_s"]),
                float(data["pause_s"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ProtocolError(f"a fault is not written like this: {error}") from error


@dataclass(frozen=True, slots=True)
class Campaign:
    """What to do to a job of `world_size` ranks, and how often."""

    world_size: int
    seed: int
    mtbf_s: float
    """Mean time between two faults."""
    kinds: Sequence[str] = ("kill",)
    signals: Sequence[int] = (_SIGKILL,)
    rank: int | None = None
    """The only rank to hit; None: whichever is drawn."""
    correlated: float = 0.0
    """Which share of the faults are not alone."""
    count: int | None = None
    duration_s: float = math.inf
    for_s: float = 10.0
    pause_s: float = 0.2

    def __post_init__(self) -> None:
        """Refuse what can't be planned."""
        for kind in self.kinds:
            if kind not in KINDS:
                raise ConfigError(f"there is no fault {kind!r}", hint=_HINT)
        if not self.kinds or not self.signals:
            raise ConfigError("no fault is named", hint=_HINT)
        if not 0 < self.mtbf_s < math.inf:
            raise ConfigError(f"the mean time between faults is {self.mtbf_s:g} s", hint='write it like "30s"')
        if not 0 <= self.correlated <= 1:
            raise ConfigError(f"a share of {self.correlated:g} can't be correlated", hint="it is from 0 to 1")
        if self.rank is not None and not 0 <= self.rank < self.world_size:
            raise ConfigError(f"there is no rank {self.rank}", hint=f"ranks are 0 to {self.world_size - 1}")


@dataclass(frozen=True, slots=True)
class Planned:
    """A fault and its moment, in seconds since the campaign began; `follows`: within the restart of the one before."""

    at_s: float
    fault: Fault
    follows: bool = False


class Draws:
    """Random draws from a seed (splitmix64), the same on every machine and in every version."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def uniform(self) -> float:
        """Return a number from 0 up to, but not including, 1."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        word = self._state
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
        return ((word ^ (word >> 31)) >> 11) / 2**53

    def exponential(self, mean: float) -> float:
        """Return a time whose mean is `mean`, and which knows nothing of how long one has waited already."""
        return -mean * math.log(1.0 - self.uniform())

    def pick(self, items: Sequence[Item]) -> Item:
        """Return one of `items`, each as likely."""
        return items[int(self.uniform() * len(items))]

    def several(self, count: int, among: int) -> tuple[int, ...]:
        """Return `count` different numbers below `among`, rising."""
        left = list(range(among))
        return tuple(sorted(left.pop(int(self.uniform() * len(left))) for _ in range(count)))


def plan(campaign: Campaign) -> Iterator[Planned]:
    """Yield what happens when, in the order of time; without end when neither count nor duration gives one."""
    draws = Draws(campaign.seed)
    at_s, done = 0.0, 0
    while True:
        at_s += draws.exponential(campaign.mtbf_s)
        for planned in _together(campaign, draws, at_s):
            at_s = planned.at_s
            if at_s >= campaign.duration_s or done == campaign.count:
                return
            yield planned
            done += 1


def _together(campaign: Campaign, draws: Draws, at_s: float) -> Iterator[Planned]:
    """Yield one fault and, when it is correlated, what comes with it: more ranks at once, or a second fault."""
    first = _draw(campaign, draws, campaign.kinds)
    if draws.uniform() >= campaign.correlated:
        yield Planned(at_s, first)
    elif first.kind in OF_RANKS and campaign.rank is None and campaign.world_size > 1 and draws.uniform() < 0.5:
        count = 2 + int(draws.uniform() * (campaign.world_size - 1))
        yield Planned(at_s, replace(first, ranks=draws.several(count, campaign.world_size)))
    else:
        yield Planned(at_s, first)
        # What needs a rank that trains could not come before the restart is over.
        sudden = [kind for kind in campaign.kinds if kind not in IN_RANKS]
        second = _draw(campaign, draws, sudden or campaign.kinds)
        yield Planned(at_s + draws.uniform() * FOLLOW_S, second, follows=True)


def _draw(campaign: Campaign, draws: Draws, kinds: Sequence[str]) -> Fault:
    kind = draws.pick(kinds)
    rank = int(draws.uniform() * campaign.world_size) if campaign.rank is None else campaign.rank
    ranks = (rank,) if kind in OF_RANKS else ()
    signal = draws.pick(campaign.signals)
    return Fault(kind, ranks, signal=signal, for_s=campaign.for_s, pause_s=campaign.pause_s)
