"""Which stored copy to read again next: facts in, one copy or none out, with the reason.

Disks and buckets lose bytes without a word, and nobody notices before a restore. A copy is read again when so much time
has passed since it was committed or last read; of several that are due, the one that has waited longest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ckptd.core.restore import Source


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy that is read again now and then."""

    source: Source
    checked_s: float
    """When it was committed or last read, whichever is later, on the monotonic clock."""
    every_s: float
    """After how long it is read again."""

    @property
    def due_s(self) -> float:
        """When it is to be read again."""
        return self.checked_s + self.every_s


@dataclass(frozen=True, slots=True)
class ScrubDecision:
    """What to read now, None for nothing, and why."""

    source: Source | None
    reason: str


def _urgency(copy: Copy) -> tuple[float, int, int, str]:
    checkpoint, tier = copy.source.id, copy.source.tier
    return copy.due_s, -checkpoint.generation, -checkpoint.step, tier


def decide(copies: Iterable[Copy], busy: Mapping[Source, str], now_s: float) -> ScrubDecision:
    """Return what to read now; `busy` says of copies why they are left alone for the time being."""
    due = sorted((copy for copy in copies if copy.due_s <= now_s), key=_urgency)
    for copy in due:
        if copy.source not in busy:
            since_s = now_s - copy.checked_s
            reason = "it was found damaged" if since_s == float("inf") else f"nobody has read it for {since_s:.0f} s"
            return ScrubDecision(copy.source, reason)
    if due:
        return ScrubDecision(None, f"{due[0].source} is due, but {busy[due[0].source]}")
    return ScrubDecision(None, "no copy is due")
