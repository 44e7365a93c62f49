"""The control page: one page of memory shared by the agent and one rank, so that a step costs no system call.

The page is an array of unsigned 64-bit words in the machine's byte order. Each word has exactly one writer, so no
lock is needed; an aligned 8-byte store is atomic on every machine that runs CUDA. The agent lends it as a memfd.

Slots: a slot is free when `SLOT_SEALED + i` (how often the rank has sealed it) equals `SLOT_RELEASED + i` (how often
the agent has let go of it). Two counters with one writer each cannot race, as one flag with two writers would.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from enum import IntEnum

PAGE_BYTES = 4096
MAX_SLOTS = 64
RING_ENTRIES = 64
"""How many reported numbers the page holds; the agent reads them many times before they are written over."""
NEVER = 2**63
"""Written to `CAPTURE_STEP` when no capture is wanted."""


class Word(IntEnum):
    """Which word of the page means what, and who writes it."""

    MAGIC = 0  # agent
    VERSION = 1  # agent
    CAPTURE_STEP = 2  # agent: capture at the boundary of this step
    WHOLE = 3  # agent: 1 when replicated tensors proved to differ, so that each rank has to capture its own
    AGENT_NS = 4  # agent: monotonic time of its last look at the page
    STEP = 8  # rank: last finished step
    BEAT_NS = 9  # rank: monotonic time of the last boundary
    PHASE = 10  # rank: a Phase
    SECTION_UNTIL_NS = 12  # rank: monotonic time until which it may stay where it is without a step; 0: none was asked
    WAITED_NS = 13  # rank: how long it has waited for other ranks in all its steps, where it can tell
    REPORTS = 14  # rank: how many numbers it has written to the ring
    SLOT_SEALED = 64  # rank: + slot number
    SLOT_RELEASED = 128  # agent: + slot number
    RING = 256  # rank: `RING_ENTRIES` pairs of a step and the bits of a float64; report n is pair n % RING_ENTRIES


class Phase(IntEnum):
    """What a rank is doing, for `ckptctl status` and the detectors."""

    JOINING = 0
    RESTORING = 1
    TRAINING = 2
    CAPTURING = 3
    LEFT = 4


MAGIC = int.from_bytes(b"ckptd\0pg", "little")
PAGE_VERSION = 2


class ControlPage:
    """A mapped control page; both sides use the same class and keep to the words that they own."""

    def __init__(self, descriptor: int) -> None:
        """Map the page behind `descriptor`, which may be closed afterwards."""
        self._map = mmap.mmap(descriptor, PAGE_BYTES, mmap.MAP_SHARED)
        self.words = memoryview(self._map).cast("Q")

    def format(self, held: Collection[int] = ()) -> None:
        """Write the fixed words of a new page; slots in `held` begin as sealed (agent)."""
        self.words[Word.MAGIC] = MAGIC
        self.words[Word.VERSION] = PAGE_VERSION
        self.words[Word.CAPTURE_STEP] = NEVER
        for slot in held:
            self.words[Word.SLOT_SEALED + slot] = 1

    def announce(self, step: int | None) -> None:
        """Write the step to capture next, None for no capture (agent); a step too large for a word is never reached."""
        self.words[Word.CAPTURE_STEP] = NEVER if step is None else min(step, NEVER)

    def release(self, slot: int) -> None:
        """Let the rank write a sealed slot again (agent)."""
        self.words[Word.SLOT_RELEASED + slot] = self.words[Word.SLOT_SEALED + slot]

    def seal(self, slot: int) -> None:
        """Take a slot out of use until the agent releases it (rank)."""
        self.words[Word.SLOT_SEALED + slot] += 1

    @property
    def valid(self) -> bool:
        """Whether this is a page of the layout that this code knows."""
        return self.words[Word.MAGIC] == MAGIC and self.words[Word.VERSION] == PAGE_VERSION

    def slot_free(self, slot: int) -> bool:
        """Whether the rank may write slot number `slot`."""
        return self.words[Word.SLOT_SEALED + slot] == self.words[Word.SLOT_RELEASED + slot]

    @property
    def phase(self) -> Phase:
        """What the rank says it is doing; an unknown number (a newer client) reads as training."""
        number = self.words[Word.PHASE]
        return Phase(number) if number in Phase._value2member_map_ else Phase.TRAINING

    def close(self) -> None:
        """Unmap the page."""
        self.words.release()
        self._map.close()
