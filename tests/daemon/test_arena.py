"""The memory that is lent: slots that are really there, keep what they hold, and are given back."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.daemon import region
from ckptd.daemon.arena import Arena, Budget, make_page
from ckptd.errors import AgentError, MemoryBudgetError
from ckptd.protocol.page import MAX_SLOTS, NEVER, ControlPage, Word
from tests.daemon.harness import mapped_regions, open_descriptors

MIB = 2**20


def identity(descriptor: int) -> tuple[int, int]:
    """Which file a descriptor is of; regions may lie in filesystems of their own, each with the same inodes."""
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino


@pytest.fixture
def budget() -> Budget:
    """The machine's memory."""
    return Budget()


@pytest.fixture
def arena(budget: Budget) -> Iterator[Arena]:
    """An arena with two slots for each rank; afterwards no descriptor, map or booking is left."""
    before = open_descriptors(), mapped_regions()
    arena = Arena("job", budget, 2)
    yield arena
    arena.close()
    assert (open_descriptors(), mapped_regions()) == before
    assert budget.used_bytes == 0
    assert budget._unsettled_bytes == 0


def test_slots_are_reserved_memory(arena: Arena, budget: Budget) -> None:
    """Every page of a slot exists before it is lent, so that writing it can't fail for lack of memory."""
    numbers = arena.reserve(3, 5 * MIB, ())
    assert numbers == [0, 1]
    for number in numbers:
        slot = arena.slots(3)[number]
        stat = os.fstat(slot.descriptor)
        assert stat.st_size == slot.size_bytes == len(slot.view) >= 5 * MIB
        assert stat.st_blocks * 512 >= slot.size_bytes
        assert not os.get_inheritable(slot.descriptor)
    assert budget.used_bytes == sum(slot.size_bytes for slot in arena.slots(3).values())
    assert arena.slots(0) == {}


def test_a_slot_has_room_to_grow(arena: Arena) -> None:
    """A state that grows by a little fits into the slots that are there."""
    numbers = arena.reserve(0, 64 * MIB, ())
    assert arena.reserve(0, 64 * MIB + 64 * 1024, ()) == numbers


def test_a_state_that_shrinks_keeps_its_slots(arena: Arena) -> None:
    """Ranks that capture only their share for a while keep room for the whole: no slot is made anew on the way back."""
    numbers = arena.reserve(0, 64 * MIB, ())
    inodes = {identity(slot.descriptor) for slot in arena.slots(0).values()}
    assert arena.reserve(0, 8 * MIB, ()) == numbers
    assert arena.reserve(0, 64 * MIB, {0}) == numbers
    assert {identity(slot.descriptor) for slot in arena.slots(0).values()} == inodes


def test_slots_are_reused(arena: Arena) -> None:
    """A rank of the next generation gets the same regions, with what they hold."""
    arena.reserve(0, MIB, ())
    arena.slots(0)[1].view[:4] = b"kept"
    inodes = {number: identity(slot.descriptor) for number, slot in arena.slots(0).items()}
    assert arena.reserve(0, MIB, {1}) == [0, 1]
    assert {number: identity(slot.descriptor) for number, slot in arena.slots(0).items()} == inodes
    assert bytes(arena.slots(0)[1].view[:4]) == b"kept"


def test_slots_that_became_too_small_are_replaced(arena: Arena, budget: Budget) -> None:
    """When the state grows, slots that hold nothing go before larger ones come, so the peak stays low."""
    arena.reserve(0, MIB, ())
    small = list(arena.slots(0).values())
    numbers = arena.reserve(0, 8 * MIB, ())
    assert len(numbers) == len(set(numbers)) == 2
    assert not any(slot is old for slot in arena.slots(0).values() for old in small)
    assert all(arena.slots(0)[number].size_bytes >= 8 * MIB for number in numbers)
    assert budget.used_bytes == sum(slot.size_bytes for slot in arena.slots(0).values())


def test_a_held_slot_is_never_dropped(arena: Arena) -> None:
    """A slot that holds a snapshot stays whatever the rank asks for, until the snapshot is not needed any more."""
    arena.reserve(0, MIB, ())
    arena.slots(0)[0].view[:4] = b"held"
    numbers = arena.reserve(0, 8 * MIB, {0})
    assert 0 not in numbers
    assert len(numbers) == 2
    assert bytes(arena.slots(0)[0].view[:4]) == b"held"
    arena.reserve(0, 8 * MIB, ())
    assert 0 not in arena.slots(0)


def test_ranks_have_slots_of_their_own(arena: Arena) -> None:
    """Ranks that reserve at the same moment get different memory under the same numbers."""
    together = threading.Barrier(4)

    def reserve(rank: int) -> list[int]:
        together.wait()
        return arena.reserve(rank, MIB, ())

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(reserve, range(4))) == [[0, 1]] * 4
    inodes = {identity(slot.descriptor) for rank in range(4) for slot in arena.slots(rank).values()}
    assert len(inodes) == 8


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.sets(st.integers(0, 7))), max_size=12))
def test_numbers_stay_small_and_unique(asked: list[tuple[int, set[int]]]) -> None:
    """Over any history of growing, shrinking and holding, numbers fit the control page and held slots stay."""
    budget = Budget()
    arena = Arena("job", budget, 2)
    try:
        for size_mib, wish in asked:
            held = wish & set(arena.slots(0))
            inodes = {number: identity(arena.slots(0)[number].descriptor) for number in held}
            numbers = arena.reserve(0, size_mib * MIB, held)
            assert len(numbers) == len(set(numbers)) >= 2
            assert all(0 <= number < MAX_SLOTS for number in arena.slots(0))
            assert all(arena.slots(0)[number].size_bytes >= size_mib * MIB for number in numbers)
            assert inodes == {number: identity(arena.slots(0)[number].descriptor) for number in held}
            assert budget.used_bytes == sum(slot.size_bytes for slot in arena.slots(0).values())
    finally:
        arena.close()


def test_a_refusal_changes_nothing(arena: Arena, budget: Budget) -> None:
    """What memory_max forbids is refused with the bytes, the job and the rank; what was lent stays lent."""
    numbers = arena.reserve(0, MIB, ())
    budget.memory_max_bytes = 8 * MIB
    with pytest.raises(MemoryBudgetError, match=r"2 slots of rank 1 of job job need 8\.0 MiB \(8388608 bytes\)"):
        arena.reserve(1, 3 * MIB, ())
    assert arena.reserve(0, MIB, ()) == numbers
    assert budget.used_bytes == sum(slot.size_bytes for slot in arena.slots(0).values())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
def test_a_kernel_without_memory_refuses_the_request(
    arena: Arena, budget: Budget, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """When the kernel itself refuses in the middle, the error has the bytes, and nothing is leaked or left booked."""
    reserve, calls = region._reserve, 0

    def fail_the_third(descriptor: int, address: int, at: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(number, os.strerror(number))
        reserve(descriptor, address, at, size)

    before = open_descriptors(), mapped_regions()
    monkeypatch.setattr(region, "_reserve", fail_the_third)
    monkeypatch.setattr(region, "PIECE_BYTES", MIB)
    with pytest.raises(MemoryBudgetError, match=r"the kernel refused 4\.0 MiB \(4194304 bytes\): .*(space|memory)"):
        arena.reserve(0, 3 * MIB - 200_000, ())
    assert (open_descriptors(), mapped_regions()) == before
    assert (budget.used_bytes, budget._unsettled_bytes) == (0, 0)


def test_no_descriptor_left_is_a_refusal(arena: Arena, budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of descriptors is a refused request too, with one slot made and kept for the next try."""
    create, made = region._open, 0

    def run_out(name: str, size_bytes: int) -> int:
        nonlocal made
        made += 1
        if made == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return create(name, size_bytes)

    monkeypatch.setattr(region, "_open", run_out)
    with pytest.raises(MemoryBudgetError, match="Too many open files"):
        arena.reserve(0, MIB, ())
    assert budget.used_bytes == sum(slot.size_bytes for slot in arena.slots(0).values())
    assert arena.reserve(0, MIB, ()) == [0, 1]


def test_closing_gives_everything_back(budget: Budget) -> None:
    """After `close` no descriptor, no map and no booked byte is left."""
    before = open_descriptors(), mapped_regions()
    arena = Arena("job", budget, 3)
    for rank in range(3):
        arena.reserve(rank, MIB, ())
    assert mapped_regions() == before[1] + 9
    arena.close()
    assert (open_descriptors(), mapped_regions()) == before
    assert budget.used_bytes == 0


def test_closing_while_a_storage_thread_reads(budget: Budget) -> None:
    """A job can end while a slot is read: the reader keeps its view, and the memory goes with it."""
    before = open_descriptors(), mapped_regions()
    arena = Arena("job", budget, 2)
    arena.reserve(0, MIB, ())
    view = arena.slots(0)[0].view
    view[:4] = b"read"
    arena.close()
    assert bytes(view[:4]) == b"read"
    del view
    assert (open_descriptors(), mapped_regions()) == before


def test_a_job_that_ends_during_a_reservation_leaks_nothing(budget: Budget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that are made in a thread while the job ends are given back, not forgotten."""
    arena = Arena("job", budget, 2)
    reserve = region._reserve

    def close_first(descriptor: int, address: int, at: int, size: int) -> None:
        reserve(descriptor, address, at, size)
        arena.close()

    before = open_descriptors(), mapped_regions()
    monkeypatch.setattr(region, "_reserve", close_first)
    with pytest.raises(AgentError, match="job job ended"):
        arena.reserve(0, MIB, ())
    assert (open_descriptors(), mapped_regions()) == before
    assert (budget.used_bytes, budget._unsettled_bytes) == (0, 0)


def test_a_page_begins_with_held_slots_sealed() -> None:
    """A new rank finds the slots that hold a snapshot sealed, and may write them once the agent releases them."""
    before = open_descriptors()
    descriptor, page = make_page("job", 1, {2, 5})
    rank = ControlPage(descriptor)
    os.close(descriptor)
    assert rank.valid
    assert rank.words[Word.CAPTURE_STEP] == NEVER
    assert [slot for slot in range(MAX_SLOTS) if not rank.slot_free(slot)] == [2, 5]
    page.release(5)
    assert [slot for slot in range(MAX_SLOTS) if not rank.slot_free(slot)] == [2]
    rank.seal(5)
    assert not page.slot_free(5)
    rank.close()
    page.close()
    assert open_descriptors() == before


def test_a_page_is_one_page(arena: Arena) -> None:
    """The page that is lent is exactly as large as the protocol says, and really there."""
    descriptor, page = make_page("job", 1, ())
    stat = os.fstat(descriptor)
    os.close(descriptor)
    page.close()
    assert stat.st_size == mmap.PAGESIZE
    assert stat.st_blocks * 512 == mmap.PAGESIZE
