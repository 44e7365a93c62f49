"""The arena: the memory that an agent reserves and lends to the ranks of one job.

A slot is a file in memory. Its pages are reserved and cleared before it is lent, so that a lack of memory is a refused
request here and not SIGBUS in the middle of training; the descriptor survives every rank and dies with the agent, so
nothing can leak. Slots have small numbers that are unique within a rank. Their size follows the layout of the state;
they are lent again as they are for as long as that fits, smaller states included.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ckptd.daemon import region
from ckptd.daemon.fdstore import FdStore, slot_name
from ckptd.errors import AgentError, MemoryBudgetError
from ckptd.protocol.page import MAX_SLOTS, PAGE_BYTES, ControlPage
from ckptd.storage.image import round_up
from ckptd.units import show_size

_MARGIN_BYTES = 256 * 2**20


@dataclass(slots=True)
class Slot:
    """One reserved memory region; `view` is the agent's mapping of it."""

    number: int
    descriptor: int
    size_bytes: int
    map: mmap.mmap

    @property
    def view(self) -> memoryview:
        """The whole region, writable."""
        return memoryview(self.map)

    def close(self) -> None:
        """Give the memory back to the machine, once the rank has unmapped it too."""
        os.close(self.descriptor)
        with contextlib.suppress(BufferError):  # a storage thread still reads it, and the last view takes it along
            self.map.close()


class Budget:
    """How much memory the slots of all jobs may take together: `memory_max`, the cgroup and the machine."""

    def __init__(self, memory_max_bytes: int = 0, root: Path = Path("/")) -> None:
        """Take limits from the kernel's files below `root`."""
        self.memory_max_bytes = memory_max_bytes
        self._root = root
        self.used_bytes = 0
        self._unsettled_bytes = 0
        self._lock = threading.Lock()

    def take(self, size_bytes: int, wanted: str, advice: str = "") -> None:
        """Book memory that is about to be reserved; raises `MemoryBudgetError` when there is too little.

        `wanted` says what for, `advice` how to need less. Until `settled` the kernel's own figures don't show it yet,
        so it is counted here: ranks which ask at the same time can't all be promised the same memory.
        """
        with self._lock:
            self._check(size_bytes, wanted, advice)
            self.used_bytes += size_bytes
            self._unsettled_bytes += size_bytes

    def settled(self, size_bytes: int) -> None:
        """Note that booked memory is reserved now, and so missing from what the kernel calls available."""
        with self._lock:
            self._unsettled_bytes -= size_bytes

    def adopt(self, size_bytes: int) -> None:
        """Note memory that was reserved before there was this budget."""
        with self._lock:
            self.used_bytes += size_bytes

    def give(self, size_bytes: int) -> None:
        """Note that reserved memory was given back."""
        with self._lock:
            self.used_bytes -= size_bytes

    def left_bytes(self) -> int:
        """Return how much could be taken now; less than nothing when even what must stay free is in use."""
        with self._lock:
            left_bytes = available_bytes(self._root) - self._unsettled_bytes - _MARGIN_BYTES
            return min(left_bytes, self.memory_max_bytes - self.used_bytes) if self.memory_max_bytes else left_bytes

    def _check(self, size_bytes: int, wanted: str, advice: str) -> None:
        if self.memory_max_bytes and self.used_bytes + size_bytes > self.memory_max_bytes:
            raise MemoryBudgetError(
                f"not enough memory for slots: {wanted} need {show_size(size_bytes)} ({size_bytes} bytes),"
                f" {show_size(self.memory_max_bytes - self.used_bytes)} of memory_max are left",
                hint="raise CKPTD_MEMORY_MAX" + advice,
            )
        free_bytes = max(0, available_bytes(self._root) - self._unsettled_bytes)
        if size_bytes + _MARGIN_BYTES > free_bytes:
            raise MemoryBudgetError(
                f"not enough memory for slots: {wanted} need {show_size(size_bytes)} ({size_bytes} bytes),"
                f" {show_size(free_bytes)} are available and {show_size(_MARGIN_BYTES)} of them stay free",
                hint="free some memory" + advice,
            )


class Arena:
    """All slots of one job, by rank; `kept` has systemd hold on to each, too."""

    def __init__(self, job: str, budget: Budget, slots_per_rank: int, kept: FdStore | None = None) -> None:
        self._job = job
        self._kept = kept or FdStore({}, 0)
        self.budget = budget
        self._slots_per_rank = slots_per_rank
        self._slots: dict[int, dict[int, Slot]] = {}
        self._lock = threading.Lock()
        self._reserving: dict[int, threading.Lock] = {}
        self._closed = False
        self._unkept: set[tuple[int, int]] = set()
        """Slots that systemd holds on to no more, although they are there."""

    @property
    def kept(self) -> bool:
        """Whether slots outlive their agent and their ranks."""
        return self._kept.wanted

    def keep(self, places: Collection[tuple[int, int]], *, known: bool) -> None:
        """Have systemd go on holding slots that are about to change; `known` says whether the journal knows of it.

        If not, the next agent would take them for what they were: it must not find them, until the journal is right.
        """
        with self._lock:
            if not known:
                self._unkept.update(places)
                for rank, number in places:
                    self._kept.remove(slot_name(self._job, rank, number))
                return
            for rank, number in self._unkept:
                if number in self.slots(rank):
                    self._kept.put(slot_name(self._job, rank, number), self._slots[rank][number].descriptor)
            self._unkept.clear()

    def slots(self, rank: int) -> Mapping[int, Slot]:
        """Return a rank's slots by number."""
        return self._slots.get(rank, {})

    @property
    def slot_bytes(self) -> int:
        """How much one slot of every rank takes together; 0 before any is reserved."""
        return sum(max((slot.size_bytes for slot in slots.values()), default=0) for slots in self._slots.values())

    def reserve(self, rank: int, size_bytes: int, held: Collection[int]) -> list[int]:
        """Make sure that a rank has its slots, of at least `size_bytes`, and return their numbers.

        Slots in `held` keep what they hold and are lent again if large enough; too small ones that hold nothing are
        given back first. Slow (the kernel clears the pages), so it runs in a thread; raises `MemoryBudgetError`.
        """
        with self._turn(rank):
            return self._reserve(rank, size_bytes, held)

    def reserve_ahead(self, rank: int, size_bytes: int) -> None:
        """Reserve what a rank is expected to ask for, unless it has slots already; raises `MemoryBudgetError`."""
        with self._turn(rank):
            if not self.slots(rank):
                self._reserve(rank, size_bytes, ())

    def _turn(self, rank: int) -> threading.Lock:
        """Return what is held to reserve slots of a rank: two who do so at once would each add what is missing."""
        with self._lock:
            return self._reserving.setdefault(rank, threading.Lock())

    def _reserve(self, rank: int, size_bytes: int, held: Collection[int]) -> list[int]:
        with self._lock:
            mine = self._slots.setdefault(rank, {})
            for number, slot in list(mine.items()):
                if slot.size_bytes < size_bytes and number not in held:
                    self._drop(rank, number)
            good = [number for number, slot in mine.items() if slot.size_bytes >= size_bytes]
        missing = self._slots_per_rank - len(good)
        if missing > 0:
            # A little room to grow, so that a longer log or an extra parameter group needs no new slots.
            each = round_up(size_bytes + size_bytes // 32, region.HUGE_BYTES)
            self.budget.take(
                each * missing, f"{missing} slot{'s' * (missing > 1)} of rank {rank} of job {self._job}", self._advice()
            )
            good += self._add(rank, each, missing)
        return sorted(good)

    def _advice(self) -> str:
        if self._slots_per_rank == 1:
            return " or use a smaller model: each rank needs a slot of its state's size"
        return (
            f", or use `--slots 1`: each rank has {self._slots_per_rank} slots of its state's size, and with one there"
            " is no snapshot in memory while the next is captured"
        )

    def _add(self, rank: int, size_bytes: int, count: int) -> list[int]:
        """Make slots that are booked; what can't be made is given back."""
        numbers: list[int] = []
        settled_bytes = 0

        def settle(piece_bytes: int) -> None:
            nonlocal settled_bytes
            settled_bytes += piece_bytes
            self.budget.settled(piece_bytes)

        try:
            while len(numbers) < count:
                made = region.make(f"ckptd-{self._job}-r{rank}", size_bytes, settle)
                numbers.append(self._keep(rank, *made))
        finally:
            self.budget.settled(size_bytes * count - settled_bytes)
            self.budget.give(size_bytes * (count - len(numbers)))
        return numbers

    def _keep(self, rank: int, descriptor: int, mapped: mmap.mmap) -> int:
        with self._lock:
            if not self._closed:
                mine = self._slots[rank]
                number = next(number for number in range(MAX_SLOTS) if number not in mine)
                mine[number] = Slot(number, descriptor, len(mapped), mapped)
                if (rank, number) not in self._unkept:
                    self._kept.put(slot_name(self._job, rank, number), descriptor)
                return number
        mapped.close()
        os.close(descriptor)
        raise AgentError(f"job {self._job} ended while slots were reserved for it")

    def adopt(self, rank: int, number: int, descriptor: int) -> None:
        """Take over a slot that an agent before us has reserved, and its descriptor; one that is here already stays.

        Its memory is not taken from the budget: it is in use already. Raises `AgentError` for what can't be a slot.
        """
        try:
            size_bytes = os.fstat(descriptor).st_size
            if not 0 <= number < MAX_SLOTS or size_bytes <= 0 or size_bytes % PAGE_BYTES:
                raise AgentError(f"what rank {rank} of job {self._job} hands back is no slot {number}")
            with self._lock:
                mine = self._slots.setdefault(rank, {})
                if number in mine and os.path.sameopenfile(mine[number].descriptor, descriptor):
                    return
                if self._closed or number in mine:
                    raise AgentError(f"job {self._job} has no place for slot {number} of rank {rank}")
                mine[number] = Slot(number, descriptor, size_bytes, mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED))
            self.budget.adopt(size_bytes)
            self._kept.put(slot_name(self._job, rank, number), descriptor)
            descriptor = -1
        except OSError as error:
            raise AgentError(f"slot {number} of rank {rank} can't be taken over: {error.strerror}") from error
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _drop(self, rank: int, number: int) -> None:
        slot = self._slots[rank].pop(number)
        self._kept.remove(slot_name(self._job, rank, number))
        self.budget.give(slot.size_bytes)
        slot.close()

    def close(self) -> None:
        """Give everything back; a reservation that is under way in a thread fails."""
        with self._lock:
            self._closed = True
            for rank in list(self._slots):
                for number in list(self._slots[rank]):
                    self._drop(rank, number)


def make_page(job: str, rank: int, held: Collection[int]) -> tuple[int, ControlPage]:
    """Make a rank's control page; slots in `held` begin as sealed. Returns the descriptor to lend, and the page."""
    descriptor, mapped = region.make(f"ckptd-{job}-r{rank}-page", PAGE_BYTES)
    mapped.close()
    page = ControlPage(descriptor)
    page.format(held)
    return descriptor, page


def available_bytes(root: Path = Path("/")) -> int:
    """Return how much memory can be reserved: what the machine has available, within the limits of our cgroups.

    `root` is where the kernel's files are looked for.
    """
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            machine_bytes = int(line.split()[1]) * 1024
            break
    else:
        machine_bytes = 0
    return min([machine_bytes, *_cgroup_left_bytes(root)])


def _cgroup_left_bytes(root: Path) -> list[int]:
    """Return what the memory limits above this process leave, for cgroup v1, hybrid and v2."""
    mounts = root / "sys/fs/cgroup"
    left: list[int] = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found = [_left_bytes(mount, path, _V2) for mount in (mounts, mounts / "unified")]
        elif "memory" in controllers.split(","):
            found = [_left_bytes(mounts / "memory", path, _V1)]
        else:
            continue
        left += [number for numbers in found for number in numbers]
    return left


_V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
"""The files of a limit and of what is used, and the entries of `memory.stat` that make up the page cache."""


def _left_bytes(mount: Path, path: str, names: tuple[str, str, tuple[str, ...]]) -> Iterator[int]:
    """Yield what is left of each limit from a cgroup up to its mount; page cache counts as free."""
    limit_name, usage_name, cache_names = names
    folder = Path(f"{mount}{path}")
    while folder.is_relative_to(mount):
        limit, usage = _number(folder / limit_name), _number(folder / usage_name)
        if limit is not None and usage is not None:
            yield max(0, limit - usage + _page_cache_bytes(folder / "memory.stat", cache_names))
        folder = folder.parent


def _page_cache_bytes(path: Path, names: tuple[str, ...]) -> int:
    try:
        entries = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return sum(int(entries.get(name, 0)) for name in names)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
