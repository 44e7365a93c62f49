"""Files of a tier that are read to be copied or checked, in units that are checked before anybody gets their bytes."""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from ckptd.errors import CkptdError, DamagedError, StoreError, invariant
from ckptd.storage import flight
from ckptd.storage.addresses import address_of
from ckptd.storage.checks import FileChecks, Unit, lost_beyond, problems, units
from ckptd.storage.digest import LEAF_BYTES
from ckptd.storage.direct import AlignedBuffer
from ckptd.storage.image import BLOCK_BYTES, round_up
from ckptd.storage.tier import Capabilities, Cost, Pace, Tier

_UNIT_BYTES = LEAF_BYTES
_FAR_UNIT_BYTES = 2 * LEAF_BYTES
"""Of a tier that is reached by network, where a request costs more than on a disk."""
_KEPT_BYTES = 8 * LEAF_BYTES
"""How much is kept that nobody is reading just now: of units at whose ends others meet only a part was asked for."""
_EXAMINERS = 4
Progress = Callable[[int], None]
"""Called with a number of bytes after they were read, from any thread."""
Result = TypeVar("Result")


class Readable(Protocol):
    """What of a tier is needed to read a file of it."""

    @property
    def url(self) -> str:
        """Where it is."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can do by itself."""
        ...

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill all of `into` from `offset` of a file."""
        ...


class TierStream:
    """An object of a tier as a stream that gives out nothing that its manifest contradicts.

    Whoever reads asks for parts as they suit him: in any order, from any thread, again when a request has failed. What
    has a digest is cut otherwise. So the object is read in units of whole leaves, each checked as a whole, and parts
    are copied out of those; a unit is kept until all of it was asked for, so that in rising order each is read once.
    The copy costs less than the digest does, and memory is bounded by who asks at once.

    Raises `DamagedError` when the size is not what the manifest says, or the manifest contradicts itself.
    """

    def __init__(
        self,
        tier: Readable,
        key: str,
        size_bytes: int,
        checks: FileChecks,
        *,
        stall_s: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._file = _File(tier, key, size_bytes, stall_s)
        checks.refuse_contradictions(self._file.where)
        wrong_size = checks.size_problem(size_bytes)
        if wrong_size is not None:
            raise _damaged(self._file.where, wrong_size)
        self.failure: CkptdError | None = None
        """What reading it has raised, if it has: not to be mistaken for a failure of who puts it."""
        self._checks, self._progress = checks, progress
        self._unit_bytes = _FAR_UNIT_BYTES if tier.capabilities.cost is Cost.NETWORK else _UNIT_BYTES
        self._units = units(checks, size_bytes, self._unit_bytes, gaps=True)
        self._begins = [unit.begin for unit in self._units]
        self._lock = threading.Lock()
        self._loaded: OrderedDict[int, _Loaded] = OrderedDict()
        """By the unit's number, longest unused first."""
        self._seen: set[int] = set()
        self._free: list[AlignedBuffer] = []

    @property
    def size_bytes(self) -> int:
        """The object's size."""
        return self._file.size_bytes

    def read_into(self, offset: int, into: memoryview) -> None:
        """Fill all of `into` with checked bytes; raises `DamagedError` that names the tensor, or what the tier raises.

        With `stall_s` a request that the tier does not answer in time is a `StoreError`.
        """
        end = offset + len(into)
        invariant(0 <= offset <= end <= self._file.size_bytes, "more is read than there is")
        if offset == end:
            return
        target = address_of(into)
        for number in range(bisect_right(self._begins, offset) - 1, len(self._units)):
            unit = self._units[number]
            if unit.begin >= end:
                return
            begin, last = max(offset, unit.begin), min(end, unit.end)
            with self._using(number, last - begin) as data:
                ctypes.memmove(target + begin - offset, address_of(data) + begin - unit.begin, last - begin)

    @contextmanager
    def _using(self, number: int, size_bytes: int) -> Iterator[memoryview]:
        """Have a unit's bytes in memory while `size_bytes` of them are used."""
        with self._lock:
            loaded = self._loaded.setdefault(number, _Loaded())
            loaded.users += 1
        try:
            with loaded.lock:
                if loaded.data is None:
                    self._load(number, loaded)
            assert loaded.data is not None
            yield loaded.data
            loaded.used_bytes += size_bytes  # a lost update of two threads costs a unit that is kept for a while
        finally:
            self._let_go(number, loaded)

    def _load(self, number: int, loaded: _Loaded) -> None:
        unit = self._units[number]
        with self._lock:
            fits = unit.end - unit.begin <= self._unit_bytes
            buffer = self._free.pop() if fits and self._free else None
        if buffer is None:
            buffer = AlignedBuffer(max(self._unit_bytes, round_up(unit.end - unit.begin)) + 2 * BLOCK_BYTES)
        try:
            data = self._file.read(unit, buffer.view)
            for problem in problems(unit, data, self._checks.spans, self.size_bytes):
                raise _damaged(self._file.where, problem)
        except CkptdError as error:
            # The buffer is left to whoever may still be writing to it.
            self.failure = error
            raise
        loaded.buffer, loaded.data = buffer, data
        with self._lock:
            is_new = number not in self._seen
            self._seen.add(number)
        if is_new and self._progress is not None:
            self._progress(unit.end - unit.begin)

    def _let_go(self, number: int, loaded: _Loaded) -> None:
        """Drop a unit that was used up or can't be read, and those that were unused for long when they are too many."""
        with self._lock:
            loaded.users -= 1
            self._loaded.move_to_end(number)
            idle = [other for other, item in self._loaded.items() if not item.users]
            too_many = max(len(idle) - _KEPT_BYTES // self._unit_bytes, 0)
            for place, other in enumerate(idle):
                item, unit = self._loaded[other], self._units[other]
                if place < too_many or item.buffer is None or item.used_bytes >= unit.end - unit.begin:
                    del self._loaded[other]
                    if item.buffer is not None and unit.end - unit.begin <= self._unit_bytes:
                        self._free.append(item.buffer)


class _Loaded:
    """A unit in memory, or on its way there."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held by the one who reads it."""
        self.buffer: AlignedBuffer | None = None
        self.data: memoryview | None = None
        self.users = 0
        self.used_bytes = 0


def examine(
    tier: Tier,
    key: str,
    checks: FileChecks,
    *,
    pace: Pace | None = None,
    progress: Progress | None = None,
    stall_s: float | None = None,
) -> list[str]:
    """Read everything of a file that a manifest needs, and return what is wrong with it in words.

    Raises `NotFoundError` for a file that isn't there, and what the tier raises when it can't be read.
    """
    size_bytes = within(stall_s, f"{tier.url}/{key}", lambda: tier.size_bytes(key))
    file = _File(tier, key, size_bytes, stall_s)
    found = list(checks.faults)
    wrong_size = checks.size_problem(size_bytes)
    if checks.size_bytes is not None and wrong_size is not None:
        return [*found, wrong_size]
    by_unit: dict[int, list[str]] = {}

    def prepare() -> Callable[[Unit], None]:
        buffer = AlignedBuffer(_UNIT_BYTES + 2 * BLOCK_BYTES)

        def serve(unit: Unit) -> None:
            nonlocal buffer
            if pace is not None:
                pace(unit.end - unit.begin)
            if round_up(unit.end - unit.begin) + BLOCK_BYTES > len(buffer.view):
                buffer = AlignedBuffer(round_up(unit.end - unit.begin) + 2 * BLOCK_BYTES)
            data = file.read(unit, buffer.view)
            by_unit[unit.begin] = list(problems(unit, data, checks.spans, size_bytes))
            if progress is not None:
                progress(unit.end - unit.begin)

        return serve

    flight.run(units(checks, size_bytes, _UNIT_BYTES, gaps=False), prepare, _EXAMINERS)
    for begin in sorted(by_unit):
        found += by_unit[begin]
    return list(dict.fromkeys([*found, *lost_beyond(checks, size_bytes)]))


@dataclass(frozen=True, slots=True)
class _File:
    """An object whose size is known, and how it is read."""

    tier: Readable
    key: str
    size_bytes: int
    stall_s: float | None

    @property
    def where(self) -> str:
        return f"{self.tier.url}/{self.key}"

    def read(self, unit: Unit, into: memoryview) -> memoryview:
        """Read a unit into memory that begins on a page, in whole blocks: so a disk is read past the page cache."""
        begin = unit.begin - unit.begin % BLOCK_BYTES
        view = into[: min(round_up(unit.end), self.size_bytes) - begin]
        within(self.stall_s, self.where, lambda: self.tier.read_into(self.key, begin, view))
        return view[unit.begin - begin : unit.end - begin]


def within(stall_s: float | None, where: str, call: Callable[[], Result]) -> Result:
    """Return what a call to a tier returns, or raise what it raises; a `StoreError` when it takes too long.

    Nothing can end a call that hangs. It is left alone in a thread, which keeps nobody from exiting; so it must not
    write to memory that is used for anything else afterwards.
    """
    if stall_s is None:
        return call()
    done = threading.Event()
    results: list[Result] = []
    errors: list[CkptdError] = []

    def run() -> None:
        try:
            results.append(call())
        except CkptdError as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="ckptd-read", daemon=True).start()
    if not done.wait(stall_s):
        raise StoreError(
            f"no answer from {where} for {stall_s:g} s", hint="the store or the way to it is down, or very slow"
        )
    if errors:
        raise errors[0]
    invariant(bool(results), "a tier raises nothing but errors of ckptd")
    return results[0]


def _damaged(where: str, problem: str) -> DamagedError:
    return DamagedError(f"{where}: {problem}", hint="`ckptctl verify` names everything that is damaged")
