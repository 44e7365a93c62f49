"""Whether a generation may start on this node now. Pure: findings and time in, decision and reasons out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RETRY_S = 5.0
"""So long after a check that failed the node is looked at again."""
FRESH_S = 10.0
"""How long a node that was found fit is taken to be so: as long as a restart takes in which nothing else goes wrong."""


@dataclass(frozen=True, slots=True)
class Unfit:
    """A check that failed, and why."""

    check: str
    reason: str

    def __str__(self) -> str:
        """Return it as people read it."""
        return f"{self.check}: {self.reason}"


@dataclass(frozen=True, slots=True)
class GateDecision:
    """Start, look again after `retry_s`, or refuse; `reasons` in words, and `verdict` in one line."""

    action: Literal["start", "wait", "refuse"]
    reasons: tuple[str, ...] = ()
    retry_s: float = 0.0
    verdict: str = ""


def decide(unfit: Sequence[Unfit], waited_s: float, limit_s: float) -> GateDecision:
    """Decide on what the checks found; `waited_s` is how long the node has been unfit, `limit_s` how long it may be.

    The last look is at the limit itself: what becomes well within it is never refused.
    """
    if not unfit:
        return GateDecision("start")
    reasons = tuple(map(str, unfit))
    verdict = f"the node is not ready: {'; '.join(reasons)}"
    if waited_s >= limit_s:
        waited = f"it was not ready for {waited_s:.0f} s, and check_wait is {limit_s:g} s"
        return GateDecision("refuse", (*reasons, waited), verdict=verdict)
    return GateDecision("wait", reasons, min(RETRY_S, limit_s - waited_s), verdict)
