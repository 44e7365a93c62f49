"""The fault table: one line for each fault, with its time to detect, the steps lost and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_TITLES = ("fault", "found after", "steps lost", "last rank gone after", "trains again after", "verdict")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one fault. Seconds are counted from the fault; None where there is nothing to count."""

    fault: str
    found_s: float | None
    lost: int | None
    gone_s: float | None
    again_s: float | None
    verdict: str


@dataclass(slots=True)
class Table:
    """The lines so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    interval_steps: int = 0
    """How many steps an interval had at most."""

    def add(self, outcome: Outcome) -> None:
        """Add a line."""
        self.outcomes.append(outcome)

    def markdown(self) -> str:
        """Return the table as Markdown, aligned so that it reads well in a terminal too."""
        rows = [_TITLES, *(_cells(outcome) for outcome in self.outcomes)]
        widths = [max(len(row[place]) for row in rows) for place in range(len(_TITLES))]
        lines = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([*lines, "", f"An interval had at most {self.interval_steps} steps.", ""])

    def write(self, path: Path) -> None:
        """Write it to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.markdown())


def _cells(outcome: Outcome) -> tuple[str, ...]:
    return (
        outcome.fault,
        _seconds(outcome.found_s),
        "-" if outcome.lost is None else str(outcome.lost),
        _seconds(outcome.gone_s),
        _seconds(outcome.again_s),
        outcome.verdict,
    )


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 0.9995 else f"{value:.2f} s"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
