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
"""Written to `CAPTURE_STEP` when no capture is wanted; from there on, `SECTION_UNTIL_NS` names no time."""
SECTION_WORDS = 8


class Word(IntEnum):
    """Which word of the page means what, and who writes it."""

    MAGIC = 0  # agent
    VERSION = 1  # agent
    CAPTURE_STEP = 2  # agent: capture at the boundary of this step
    WHOLE = 3  # agent: 1 when replicated tensors proved to differ, so that each rank has to capture its own
    AGENT_NS = 4  # agent: monotonic time of its last look at the page
    HARM_ALLOWED = 5  # agent: 1 when the job lets `ckptctl chaos` do it harm
    LAST_STEP = 6  # agent: the announced step is the job's last: wait at its boundary; 0 when it is not
    LEAVE = 7  # agent: 1 when the ranks may leave
    STEP = 8  # rank: last finished step
    BEAT_NS = 9  # rank: monotonic time of the last boundary
    PHASE = 10  # rank: a Phase
    SECTION_UNTIL_NS = 12  # rank: monotonic time until which it may stay where it is without a step; 0: none was asked
    WAITED_NS = 13  # rank: how long it has waited for other ranks in all its steps, where it can tell
    REPORTS = 14  # rank: how many numbers it has written to the ring
    SECTION = 16  # rank: `SECTION_WORDS` words with the name of the section that it is in, as UTF-8
    SLOT_SEALED = 64  # rank: + slot number
    SLOT_RELEASED = 128  # agent: + slot number
    HARM = 192  # agent: the number of the last harm that the rank is to do to itself; the next words say what
    HARM_KIND = 193  # agent: a Harm
    HARM_STEP = 194  # agent: not before this step is finished
    HARM_MS = 195  # agent: for how long
    HARM_PAUSE_MS = 196  # agent: what a slow rank adds to each step
    HARMED = 200  # rank: the number of the harm that it did last
    HARMLESS = 201  # rank: 1 when that could not be done
    RING = 256  # rank: `RING_ENTRIES` pairs of a step and the bits of a float64; report n is pair n % RING_ENTRIES


class Phase(IntEnum):
    """What a rank is doing, for `ckptctl status` and the detectors."""

    JOINING = 0
    RESTORING = 1
    TRAINING = 2
    CAPTURING = 3
    LEFT = 4
    LEAVING = 5


class Harm(IntEnum):
    """What a rank does to itself for `ckptctl chaos`."""

    EXCEPTION = 1
    NAN = 2
    SLOW = 3


_REPORTS, _RING = int(Word.REPORTS), int(Word.RING)
MAGIC = int.from_bytes(b"ckptd\0pg", "little")
PAGE_VERSION = 2


class ControlPage:
    """A mapped control page; both sides use the same class and keep to the words that they own."""

    def __init__(self, descriptor: int) -> None:
        """Map the page behind `descriptor`, which may be closed afterwards."""
        self._map = mmap.mmap(descriptor, PAGE_BYTES, mmap.MAP_SHARED)
        self.words = memoryview(self._map).cast("Q")
        self._floats = memoryview(self._map).cast("d")

    def format(self, held: Collection[int] = ()) -> None:
        """Write the fixed words of a new page; slots in `held` begin as sealed (agent)."""
        self.words[Word.MAGIC] = MAGIC
        self.words[Word.VERSION] = PAGE_VERSION
        self.words[Word.CAPTURE_STEP] = NEVER
        for slot in held:
            self.words[Word.SLOT_SEALED + slot] = 1

    def announce(self, step: int | None, *, last: bool = False) -> None:
        """Write the step to capture next, None for no capture (agent); a step too large for a word is never reached.

        A withdrawal says nothing of who waits at the last step: it leaves with it, or goes on with the next one.
        """
        if step is not None:
            self.words[Word.LAST_STEP] = min(step, NEVER) if last else 0
        self.words[Word.CAPTURE_STEP] = NEVER if step is None else min(step, NEVER)

    def leave(self) -> None:
        """Have the rank leave: who waits at the last step at once, anybody else at the next boundary (agent)."""
        self.words[Word.LEAVE] = 1
        self.words[Word.CAPTURE_STEP] = 0

    def release(self, slot: int) -> None:
        """Let the rank write a sealed slot again (agent)."""
        self.words[Word.SLOT_RELEASED + slot] = self.words[Word.SLOT_SEALED + slot]

    def seal(self, slot: int) -> None:
        """Take a slot out of use until the agent releases it (rank)."""
        self.words[Word.SLOT_SEALED + slot] += 1

    def report(self, step: int, value: float) -> None:
        """Write a reported number to the ring (rank)."""
        words = self.words
        count = words[_REPORTS]
        at = _RING + 2 * (count % RING_ENTRIES)
        words[at] = step
        self._floats[at + 1] = value
        words[_REPORTS] = count + 1  # last: whoever sees it sees the others

    def reports(self, since: int | None) -> tuple[int, list[tuple[int, float]], int]:
        """Return how many numbers were reported, those after the first `since`, and how many of these are lost (agent).

        None: all that are left, and none is missed. A number that may have been written over meanwhile is lost, too.
        """
        count = self.words[_REPORTS]
        first = max(count - RING_ENTRIES, 0 if since is None else since)
        found: list[tuple[int, float]] = []
        for number in range(first, count):
            at = _RING + 2 * (number % RING_ENTRIES)
            found.append((self.words[at], self._floats[at + 1]))
        # The one that is being written now lies where the oldest of the last `RING_ENTRIES` does.
        safe = max(first, self.words[_REPORTS] - RING_ENTRIES + 1)
        found = found[safe - first :]
        return count, found, 0 if since is None else count - since - len(found)

    def harm(self, kind: Harm, step: int, for_ms: int, pause_ms: int) -> int:
        """Have the rank do itself harm after `step`; return the number by which it says that it has (agent)."""
        words = self.words
        words[Word.HARM_KIND], words[Word.HARM_STEP] = kind, step
        words[Word.HARM_MS], words[Word.HARM_PAUSE_MS] = for_ms, pause_ms
        words[Word.HARM] += 1  # last: whoever sees it sees the others
        return int(words[Word.HARM])

    @property
    def valid(self) -> bool:
        """Whether this is a page of the layout that this code knows."""
        return self.words[Word.MAGIC] == MAGIC and self.words[Word.VERSION] == PAGE_VERSION

    def slot_free(self, slot: int) -> bool:
        """Whether the rank may write slot number `slot`."""
        return self.words[Word.SLOT_SEALED + slot] == self.words[Word.SLOT_RELEASED + slot]

    @property
    def section(self) -> str:
        """What the section is called that the rank is in, as far as there is room for it."""
        name = self.words[Word.SECTION : Word.SECTION + SECTION_WORDS].tobytes()
        return name.rstrip(b"\0").decode(errors="ignore")

    @property
    def phase(self) -> Phase:
        """What the rank says it is doing; an unknown number (a newer client) reads as training."""
        number = self.words[Word.PHASE]
        return Phase(number) if number in Phase._value2member_map_ else Phase.TRAINING

    def close(self) -> None:
        """Unmap the page."""
        self.words.release()
        self._floats.release()
        self._map.close()
