"""The model's memory: training state, slots made of cells, and control pages.

Every byte of state follows from the rank and the step alone, so wherever a cell turns up everybody can tell whether
it is the right one.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import NamedTuple

from ckptd.core.number_events import Report
from ckptd.protocol.page import RING_ENTRIES

PARTS = 4
"""How many cells make up a shard: it is written and read part by part, so a torn one is possible."""
SLOW = PARTS - 1
"""The part that changes once in `SLOW_STEPS` only: a flush need not write it again meanwhile."""
SLOW_STEPS = 8
NEVER = 2**63
_MASK = 2**64 - 1


def advance(state: int, rank: int, step: int) -> int:
    """Return a rank's state after `step`, given the one before it."""
    return (state * 6364136223846793005 + step * 1442695040888963407 + rank) & _MASK


@cache
def state_after(rank: int, step: int) -> int:
    """Return the state that a rank must have after `step`."""
    return rank + 1 if step == 0 else advance(state_after(rank, step - 1), rank, step)


class Cell(NamedTuple):
    """One part of a shard."""

    rank: int
    step: int
    state: int
    part: int


Content = tuple[Cell | None, ...]


def cell_of(rank: int, step: int, state: int, part: int) -> Cell:
    """Return one part of what a rank in some state captures at a step."""
    if part == SLOW:
        step -= step % SLOW_STEPS
        state = state_after(rank, step)
    return Cell(rank, step, state, part)


@cache
def shard_of(rank: int, step: int) -> Content:
    """Return the shard that a rank must capture at a step."""
    return tuple(cell_of(rank, step, state_after(rank, step), part) for part in range(PARTS))


class Slot:
    """A memory region of one rank."""

    def __init__(self, rank: int, number: int, size: int) -> None:
        self.rank, self.number, self.size = rank, number, size
        self.cells: list[Cell | None] = [None] * PARTS
        self.flipped = False

    def write(self, part: int, cell: Cell) -> None:
        """Overwrite one part."""
        self.cells[part] = cell
        self.flipped = False

    def __repr__(self) -> str:
        return f"slot {self.number} of rank {self.rank}"


class Page:
    """A control page as `ckptd.protocol.page` has it: two counters per slot, and the step to capture."""

    def __init__(self, held: set[int]) -> None:
        self.capture_step = NEVER
        self.last_step = 0
        self.leave = False
        self.whole = False
        self.step = 0
        self.beat_s = 0.0
        self.phase = "joining"
        self.reports: list[Report] = []
        """What the rank has reported."""
        self.reports_read = 0
        """How many of these the present agent has read."""
        self._sealed = dict.fromkeys(held, 1)
        self._released: dict[int, int] = {}

    def announce(self, step: int | None, *, last: bool) -> None:
        """Write the step to capture next (agent)."""
        if step is not None:
            self.last_step = step if last else 0
        self.capture_step = NEVER if step is None else step

    def let_leave(self) -> None:
        """Have the rank leave (agent)."""
        self.leave, self.capture_step = True, 0

    def seal(self, slot: int) -> None:
        """Take a slot out of use (rank)."""
        self._sealed[slot] = self._sealed.get(slot, 0) + 1

    def release(self, slot: int) -> None:
        """Let the rank write a slot again (agent)."""
        self._released[slot] = self._sealed.get(slot, 0)

    def release_lost(self, there: Collection[int]) -> None:
        """Let go of slots that are not there any more (agent)."""
        for slot in self._sealed.keys() - set(there):
            self.release(slot)

    def unread(self) -> list[Report]:
        """Return what was reported since the last time (agent)."""
        begin, self.reports_read = self.reports_read, len(self.reports)
        return self.reports[begin:]

    def read_again(self) -> None:
        """Have the next agent read all that is left, whoever has read it before."""
        self.reports_read = max(0, len(self.reports) - RING_ENTRIES)

    def free(self, slot: int) -> bool:
        """Whether the rank may write it."""
        return self._sealed.get(slot, 0) == self._released.get(slot, 0)


class Arena:
    """The slots of one agent, by rank; gone when the agent is."""

    def __init__(self, slots_per_rank: int) -> None:
        self.slots: dict[int, dict[int, Slot]] = {}
        self._slots_per_rank = slots_per_rank

    def reserve(self, rank: int, size: int, held: set[int], count: int | None = None) -> list[int]:
        """Make sure that a rank has enough slots of a size, as `daemon.arena.Arena.reserve` does."""
        mine = self.slots.setdefault(rank, {})
        for number, slot in list(mine.items()):
            if slot.size < size and number not in held:
                del mine[number]
        good = [number for number, slot in mine.items() if slot.size >= size]
        for _ in range((self._slots_per_rank if count is None else count) - len(good)):
            number = next(number for number in range(64) if number not in mine)
            mine[number] = Slot(rank, number, size)
            good.append(number)
        return sorted(good)
