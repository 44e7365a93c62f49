"""What is wrong with a job that goes on all the same, for `ckptctl status`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Warned:
    """One thing that is wrong now."""

    kind: str
    rank: int | None
    summary: str
    since_s: float
    """Monotonic time since which it is so."""


class Warnings:
    """The present warnings of a job, one for each kind and rank."""

    def __init__(self) -> None:
        self._present: dict[tuple[str, int | None], Warned] = {}

    def __iter__(self) -> Iterator[Warned]:
        """Yield what is wrong now, the oldest first."""
        return iter(self._present.values())

    def note(self, kind: str, rank: int | None, summary: str, now_s: float) -> bool:
        """Note that something is wrong; return whether it was not before, so that it is logged once."""
        old = self._present.get((kind, rank))
        self._present[kind, rank] = Warned(kind, rank, summary, now_s if old is None else old.since_s)
        return old is None

    def clear(self, kind: str, rank: int | None = None) -> bool:
        """Note that something is well again; return whether it was not."""
        return self._present.pop((kind, rank), None) is not None

    def clear_all(self) -> None:
        """Forget everything: the generation that it was about is over."""
        self._present.clear()
