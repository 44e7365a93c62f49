"""When a rank is hung: how long one may go without a sign of life, learned from the job's own steps.

The rule: ten times the usual step, or three times the longest of the last ones if that is more, but no less than the
floor and no more than the ceiling; and whatever the ceiling says, twice the longest step is always allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

WINDOW = 64
"""How many of the last steps the limit is learned from."""
ENOUGH = 3
"""So many steps have to be known before they say anything; until then it is as with the first one."""
LOOK_S = 0.25
"""A look counts for this long at most: whoever was not looked at meanwhile is blamed for nothing."""
AWAY_S = 1.0
"""After a longer gap between two looks (a stopped agent, a machine that slept) everybody gets as long to go on."""
NO_DEADLINE_NS = 2**63
"""From this on `Sample.section_until_ns` is no time: the section has no deadline of its own."""
_USUAL_FACTOR = 10.0
_LONGEST_FACTOR = 3.0
_ALLOWED_FACTOR = 2.0
_AGAIN_FACTOR = 4.0


@dataclass(frozen=True, slots=True)
class HangPolicy:
    """What an operator may say about patience, in seconds."""

    floor_s: float = 5.0
    """Nobody is hung sooner, however short the steps are."""
    ceiling_s: float = 600.0
    """How long at most, and how long where nothing can be learned: a restore, a section without deadline, leaving."""
    first_s: float = 600.0
    """For the first step of a generation, with all that comes before it: compilers, caches, connections."""


class Sample(NamedTuple):
    """What the control page of one rank says at one look."""

    rank: int
    step: int
    beat_ns: int
    """The rank's monotonic time at its last boundary; 0 before the first one of its process."""
    phase: str
    """As `ckptctl status` shows it; "absent" for a rank that has not attached and should, "raised" for one that has
    told of an exception and has not ended."""
    at_s: float
    """The agent's monotonic time of the look."""
    waited_ns: int = 0
    section_until_ns: int = 0
    section: str = ""
    """What the section is called that the rank is in."""

    @property
    def sign(self) -> tuple[int, int, str, int]:
        """What changes whenever the rank does something that can be seen."""
        return self.step, self.beat_ns, self.phase, self.section_until_ns


class Limit(NamedTuple):
    """How long a rank may go without a sign of life, and why so long."""

    seconds: float
    rule: str


def learned(times_s: Sequence[float], policy: HangPolicy) -> Limit:
    """Return how long a step may take, from how long the last ones took; with too few, as for the first one."""
    if len(times_s) < ENOUGH:
        return Limit(policy.first_s, f"fewer than {ENOUGH} steps are known")
    usual_s, longest_s = median(times_s), max(times_s)
    limit = max(
        Limit(_USUAL_FACTOR * usual_s, f"{_USUAL_FACTOR:g} x the usual step of {usual_s:.3g} s"),
        Limit(_LONGEST_FACTOR * longest_s, f"{_LONGEST_FACTOR:g} x the longest step of {longest_s:.3g} s"),
    )
    if limit.seconds < policy.floor_s:
        limit = Limit(policy.floor_s, "the floor")
    if limit.seconds > policy.ceiling_s:
        limit = Limit(policy.ceiling_s, "the ceiling")
    allowed_s = _ALLOWED_FACTOR * longest_s
    if limit.seconds < allowed_s:
        return Limit(allowed_s, f"{_ALLOWED_FACTOR:g} x the longest step of {longest_s:.3g} s")
    return limit


def of_capture(times_s: Sequence[float], step: Limit, policy: HangPolicy) -> Limit:
    """Return how long a rank may stay in a capture, from how long the last ones took and how long a step may."""
    if not times_s:
        return Limit(policy.ceiling_s, "no capture is known yet")
    longest_s = max(times_s)
    limit = Limit(_USUAL_FACTOR * longest_s, f"{_USUAL_FACTOR:g} x the longest capture of {longest_s:.3g} s")
    return Limit(max(step.seconds, min(limit.seconds, policy.ceiling_s)), limit.rule) if limit > step else step


def after_the_first(limit: Limit, first_step_s: float, policy: HangPolicy) -> Limit:
    """Return the limit of the few steps after a generation's first one, which took so long.

    What was compiled or cached in the first step may have to be once more in the next ones.
    """
    seconds = min(policy.first_s, _ALLOWED_FACTOR * first_step_s)
    return max(limit, Limit(seconds, f"{_ALLOWED_FACTOR:g} x the first step of {first_step_s:.3g} s"))


def borne_out(limit: Limit, longest_s: float) -> Limit:
    """Return the limit of a job that was called hung for what then took `longest_s` and was none; 0: it never was.

    What comes now and then, such as an evaluation that nobody declared, would be called a hang each time.
    """
    return max(limit, Limit(_ALLOWED_FACTOR * longest_s, f"{_ALLOWED_FACTOR:g} x {longest_s:.3g} s, which was no hang"))


def again(limit: Limit, times: int, policy: HangPolicy) -> Limit:
    """Return the limit at a step where the job was called hung `times` before and never came further.

    It may be long and not hung: an evaluation that nobody declared ends there after a few attempts, not never.
    """
    if not times or limit.seconds >= policy.ceiling_s:
        return limit
    seconds = min(policy.ceiling_s, limit.seconds * _AGAIN_FACTOR**times)
    return Limit(seconds, f"more than {limit.seconds:.3g} s, since it hung here before")


def counted_s(gap_s: float) -> float:
    """Return how much of the time between two looks counts: what nobody has looked at does not."""
    return min(max(0.0, gap_s), LOOK_S)
