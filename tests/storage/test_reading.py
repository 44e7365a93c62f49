"""The reading engine: every wanted byte where it belongs, once; damage found wherever a leaf is touched."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.errors import DamagedError, StoreError
from ckptd.storage import reading
from ckptd.storage.digest import LEAF_BYTES, tensor_digest
from ckptd.storage.manifest import Chunk
from ckptd.storage.reading import Want, read
from tests.storage import files as memory
from tests.storage.files import Collector, Target

KIB = 2**10
MIB = 2**20
PLACES = ("memory", "direct", "buffered")
"""A memory file, a file on disk read past the page cache, and one read by way of it."""


@contextmanager
def stored(place: str, folder: Path, data: bytes) -> Iterator[int]:
    """A descriptor of a file with these bytes."""
    if place == "memory":
        descriptor = os.memfd_create("test")
    else:
        descriptor = os.open(folder / "stored", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(data)
        yield descriptor
    finally:
        os.close(descriptor)


def chunk_of(data: bytes, begin: int, end: int, *, file: str = "f", digested: bool = True) -> Chunk:
    """The chunk at these bytes of a file."""
    found = tensor_digest(memoryview(data)[begin:end])
    return Chunk(
        0, "x", "U8", (0,), (end - begin,), file, begin, end, found.value if digested else None,
        found.leaves if digested else (),
    )  # fmt: skip


def pattern(size: int) -> bytes:
    """Bytes in which no two blocks are alike."""
    return bytes(memory.pattern(size))


Sink = Target | Collector


def want(chunk: Chunk, begin: int, end: int, sink: Sink, name: str = "x") -> Want:
    """A want that goes to `sink`."""
    return Want(name, chunk, begin, end, sink.address if isinstance(sink, Target) else sink)


# --- any layout ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_leaves(monkeypatch: pytest.MonkeyPatch) -> int:
    """Leaves of 8 KiB and requests as long, so that small files have many; the engine takes any size."""
    for module in ("digest", "reading"):
        monkeypatch.setattr(f"ckptd.storage.{module}.LEAF_BYTES", 8 * KIB)
    for module in ("source", "reading"):
        monkeypatch.setattr(f"ckptd.storage.{module}.REQUEST_BYTES", 8 * KIB)
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 3000)
    monkeypatch.setattr(reading, "_SMALL_BYTES", 2000)
    monkeypatch.setattr(reading, "_GAP_BYTES", 700)
    return 8 * KIB


@st.composite
def layouts(draw: st.DrawFn) -> tuple[bytes, list[tuple[int, int, bool]], list[tuple[int, int, int, int | None]]]:
    """A file's bytes, the chunks in it, and wants: chunk, begin, end, shift of the target or None for a function."""
    chunks: list[tuple[int, int, bool]] = []
    at = draw(st.sampled_from([0, 1, 4096, 5000]))
    for _ in range(draw(st.integers(1, 8))):
        size = draw(st.one_of(st.integers(1, 200), st.integers(1, 40 * KIB), st.sampled_from([4096, 8192, 16384])))
        chunks.append((at, at + size, draw(st.booleans())))
        at += size + draw(st.sampled_from([0, 0, 0, 1, 600, 5000]))
    data = random.Random(draw(st.integers(0, 9))).randbytes(at + draw(st.integers(0, 100)))
    wants = []
    for _ in range(draw(st.integers(0, 8))):
        number = draw(st.integers(0, len(chunks) - 1))
        size = chunks[number][1] - chunks[number][0]
        begin, end = sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))
        if draw(st.booleans()):
            begin, end = 0, size
        wants.append((number, begin, end, draw(st.sampled_from([None, 0, 1, 64]))))
    return data, chunks, wants


def _prepare(
    data: bytes, ranges: Sequence[tuple[int, int, bool]], wishes: Sequence[tuple[int, int, int, int | None]]
) -> tuple[list[Want], list[tuple[Sink, bytes]]]:
    chunks = [chunk_of(data, begin, end, digested=digested) for begin, end, digested in ranges]
    wants, sinks = [], []
    for number, begin, end, shift in wishes:
        sink: Sink = Collector(begin, end) if shift is None else Target(end - begin, shift)
        wants.append(want(chunks[number], begin, end, sink, f"t{number}"))
        sinks.append((sink, data[chunks[number].begin + begin : chunks[number].begin + end]))
    return wants, sinks


@pytest.mark.parametrize("place", PLACES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(layout=layouts(), threads=st.integers(1, 3))
def test_every_wanted_byte_arrives(
    tmp_path: Path, small_leaves: int, place: str, layout: tuple[bytes, Any, Any], threads: int
) -> None:
    """Over any layout of chunks and any wants, each sink gets exactly its bytes, and nothing else is written."""
    wants, sinks = _prepare(*layout)
    with stored(place, tmp_path, layout[0]) as descriptor:
        read(wants, {"f": descriptor}, threads=threads, direct=place == "direct")
    for sink, wanted in sinks:
        sink.check(wanted)


@pytest.mark.parametrize("place", PLACES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(layout=layouts(), data=st.data())
def test_damage_is_found_where_a_leaf_is_touched(
    tmp_path: Path, small_leaves: int, place: str, layout: tuple[bytes, Any, Any], data: st.DataObject
) -> None:
    """A changed byte anywhere is an error exactly when a digested leaf of which something is wanted has it."""
    stored_bytes, ranges, wishes = layout
    wants, sinks = _prepare(*layout)
    at = data.draw(st.integers(0, len(stored_bytes) - 1))
    damaged = bytearray(stored_bytes)
    damaged[at] ^= data.draw(st.integers(1, 255))
    touched = set()
    for number, begin, end, _ in wishes:
        first, last, digested = ranges[number]
        if not digested or not first <= at < last or begin == end:
            continue
        leaf = (at - first) // small_leaves
        if begin < (leaf + 1) * small_leaves and end > leaf * small_leaves:
            touched.add(f"t{number}")
    with stored(place, tmp_path, bytes(damaged)) as descriptor:
        if touched:
            with pytest.raises(DamagedError, match=rf"tensor '({'|'.join(touched)})' in f is damaged"):
                read(wants, {"f": descriptor}, threads=2, direct=place == "direct")
            return
        read(wants, {"f": descriptor}, threads=2, direct=place == "direct")
    if all(digested for _, _, digested in ranges):
        for sink, wanted in sinks:
            sink.check(wanted)


@pytest.mark.parametrize("place", PLACES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(layout=layouts(), data=st.data())
def test_a_file_that_ends_too_early_is_damaged(
    tmp_path: Path, small_leaves: int, place: str, layout: tuple[bytes, Any, Any], data: st.DataObject
) -> None:
    """Cut anywhere, a file is damaged exactly when a leaf that is needed is not wholly there, digested or not."""
    stored_bytes, ranges, wishes = layout
    wants, sinks = _prepare(*layout)
    size = data.draw(st.integers(0, len(stored_bytes)))
    short = False
    for number, begin, end, _ in wishes:
        first, last, _ = ranges[number]
        short |= begin < end and min(last, first + -(-end // small_leaves) * small_leaves) > size
    with stored(place, tmp_path, stored_bytes[:size]) as descriptor:
        if short:
            with pytest.raises(DamagedError, match=rf"tensor 't\d' in f is damaged: the file ends at byte {size}"):
                read(wants, {"f": descriptor}, threads=2, direct=place == "direct")
            return
        read(wants, {"f": descriptor}, threads=2, direct=place == "direct")
    for sink, wanted in sinks:
        sink.check(wanted)


# --- real sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("begin", [0, 4096, 8])
def test_real_leaves(tmp_path: Path, place: str, shift: int, begin: int) -> None:
    """A tensor of several leaves arrives whole, and in part, whatever the alignment of file and target."""
    data = pattern(begin + 2 * LEAF_BYTES + 100_000)
    chunk = chunk_of(data, begin, len(data))
    size = len(data) - begin
    whole, part = Target(size, shift), Target(LEAF_BYTES, shift)
    collected = Collector(1, size - 1)
    wants = [want(chunk, 0, size, whole), want(chunk, 1, size - 1, collected), want(chunk, 5, 5 + LEAF_BYTES, part)]
    with stored(place, tmp_path, data) as descriptor:
        read(wants, {"f": descriptor}, threads=3, direct=place == "direct")
    whole.check(data[begin:])
    part.check(data[begin + 5 : begin + 5 + LEAF_BYTES])
    collected.check(data[begin + 1 : -1])


def test_several_files(tmp_path: Path) -> None:
    """Chunks of several files are read in one call, each from its own."""
    one, two = pattern(3 * MIB), pattern(2 * MIB)[::-1]
    targets = [Target(MIB), Target(MIB)]
    wants = [
        want(chunk_of(data, MIB, 2 * MIB, file=name), 0, MIB, target)
        for name, data, target in zip("ab", (one, two), targets, strict=True)
    ]
    (tmp_path / "b").mkdir()
    with stored("direct", tmp_path, one) as first, stored("direct", tmp_path / "b", two) as second:
        read(wants, {"a": first, "b": second}, threads=2, direct=True)
    targets[0].check(one[MIB : 2 * MIB])
    targets[1].check(two[MIB : 2 * MIB])


def test_small_neighbours_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand small tensors side by side cost as many reads as their bytes in large ones."""
    data = pattern(10_000 * 4096)
    calls: list[int] = []
    real = os.preadv

    def counting(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        calls.append(offset)
        return real(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", counting)
    target = Target(len(data))
    wants = [
        Want(f"t{at}", chunk_of(data, at, at + 4096), 0, 4096, target.address + at) for at in range(0, len(data), 4096)
    ]
    with stored("direct", tmp_path, data) as descriptor:
        read(wants, {"f": descriptor}, threads=2, direct=True)
    target.check(data)
    assert len(calls) <= len(data) // LEAF_BYTES + 2


@pytest.mark.parametrize("place", PLACES)
def test_one_of_many_small_leaves(tmp_path: Path, place: str) -> None:
    """Among small leaves that are read together, one that differs is named, and one without a digest is not missed."""
    data = pattern(300 * 1000)
    target = Target(len(data))
    wants = [
        Want(f"t{at}", chunk_of(data, at, at + 1000, digested=at % 3 > 0), 0, 1000, target.address + at)
        for at in range(0, len(data), 1000)
    ]
    with stored(place, tmp_path, data) as descriptor:
        read(wants, {"f": descriptor}, threads=1, direct=place == "direct")
        target.check(data)
        os.pwrite(descriptor, b"other", 201_990)  # the end of one without a digest
        read(wants, {"f": descriptor}, threads=1, direct=place == "direct")
        os.pwrite(descriptor, b"other", 100_990)
        with pytest.raises(DamagedError, match=r"'t100000' in f is damaged: bytes 100000 to 101000 are not"):
            read(wants, {"f": descriptor}, threads=1, direct=place == "direct")


@pytest.mark.parametrize("place", ["memory", "direct"])
def test_behind_four_gigabytes(tmp_path: Path, place: str) -> None:
    """The last leaves of a tensor of more than 4 GiB are found where they are."""
    size = 4 * 2**30 + 2 * LEAF_BYTES + 5
    end = pattern(LEAF_BYTES + 5)
    leaves = ["0" * 32] * (size // LEAF_BYTES) + [""]
    leaves[-2] = tensor_digest(memoryview(end)[:LEAF_BYTES]).value
    leaves[-1] = tensor_digest(memoryview(end)[LEAF_BYTES:]).value
    chunk = Chunk(0, "x", "U8", (0,), (size,), "f", 0, size, "0" * 32, tuple(leaves))
    target = Target(LEAF_BYTES)
    with stored(place, tmp_path, b"") as descriptor:
        os.pwrite(descriptor, end, size - len(end))  # all before it is a hole
        read([want(chunk, size - LEAF_BYTES, size, target)], {"f": descriptor}, threads=2, direct=place == "direct")
    target.check(end[5:])


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_nothing_wanted(tmp_path: Path) -> None:
    """No wants, and wants of nothing, read nothing: not even a file that is not there."""
    read([], {}, threads=2, direct=True)
    chunk = chunk_of(b"abc", 0, 3)
    read([Want("x", chunk, 1, 1, lambda *_: pytest.fail("called"))], {}, threads=2, direct=True)


def test_missing_digests_of_leaves(tmp_path: Path) -> None:
    """A manifest that has a tensor's digest but not those of its leaves is damaged, not half believed."""
    data = pattern(LEAF_BYTES + 1)
    chunk = chunk_of(data, 0, len(data))._replace(leaves=())
    target = Target(1)
    with stored("memory", tmp_path, data) as descriptor:
        with pytest.raises(DamagedError, match="no digests of the leaves of tensor 'x' in f"):
            read([want(chunk, 0, 1, target)], {"f": descriptor}, threads=1, direct=False)


def test_an_error_of_the_disk_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel refuses is reported with the file and a hint."""

    def failing(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    target = Target(3)
    with stored("direct", tmp_path, b"abc") as descriptor:
        with pytest.raises(StoreError, match="can't read f: Input/output error") as caught:
            read([want(chunk_of(b"abc", 0, 3), 0, 3, target)], {"f": descriptor}, threads=1, direct=True)
    assert caught.value.hint == "the disk reports errors: look into the kernel's log"


@pytest.mark.parametrize("refused", ["open", "preadv"])
def test_a_filesystem_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    """Where O_DIRECT is refused, at opening or at the first read, the page cache is used."""
    real_open, real_preadv = os.open, os.preadv
    direct: set[int] = set()

    def opening(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if not flags & os.O_DIRECT:
            return real_open(path, flags, *more, **options)
        if refused == "open":
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        descriptor = real_open(path, flags & ~os.O_DIRECT, *more, **options)
        direct.add(descriptor)
        return descriptor

    def reading_(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "another alignment, please")
        return real_preadv(descriptor, views, offset)

    data = pattern(LEAF_BYTES + 5000)
    target = Target(len(data))
    with stored("direct", tmp_path, data) as descriptor:
        monkeypatch.setattr(os, "open", opening)
        monkeypatch.setattr(os, "preadv", reading_)
        read([want(chunk_of(data, 0, len(data)), 0, len(data), target)], {"f": descriptor}, threads=2, direct=True)
    target.check(data)


def test_memory_that_can_not_be_mapped_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel refuses another map of the slots, their bytes are read instead."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    data = pattern(LEAF_BYTES + 5)
    target = Target(len(data))
    with stored("memory", tmp_path, data) as descriptor:
        monkeypatch.setattr("ckptd.storage.source.mmap.mmap", refuse)
        read([want(chunk_of(data, 0, len(data)), 0, len(data), target)], {"f": descriptor}, threads=1, direct=False)
    target.check(data)


def test_after_an_error_every_thread_has_ended(tmp_path: Path) -> None:
    """A function that raises ends the read with its own exception, and nothing is delivered afterwards."""
    data = pattern(12 * LEAF_BYTES)
    chunk = chunk_of(data, 0, len(data))
    calls: list[int] = []

    def fail(offset: int, view: memoryview) -> None:
        calls.append(offset)
        raise KeyError("mine")

    before = threading.active_count()
    with stored("memory", tmp_path, data) as descriptor:
        with pytest.raises(KeyError, match="mine"):
            read([Want("x", chunk, 0, len(data), fail)], {"f": descriptor}, threads=3, direct=False)
    assert threading.active_count() == before
    assert len(calls) <= 3


def test_nothing_is_left_open(tmp_path: Path) -> None:
    """Descriptors and maps are gone after a read, and the caller's descriptors are still open."""

    def counts() -> tuple[int, int]:
        regions = sum(
            "(deleted)" in line or "stored" in line for line in Path("/proc/self/maps").read_text().split("\n")
        )
        return len(os.listdir("/proc/self/fd")), regions

    data = pattern(3 * LEAF_BYTES)
    with ExitStack() as stack:
        files: Mapping[str, int] = {
            place: stack.enter_context(stored(place, tmp_path, data)) for place in ("memory", "direct")
        }
        target = Target(100)
        before = counts()
        for place in files:
            chunk = chunk_of(data, 0, len(data), file=place)
            read([want(chunk, 0, 100, target)], files, threads=2, direct=place == "direct")
            damaged = Want("x", chunk._replace(leaves=("0" * 32,) * 3), 0, len(data), lambda *_: None)
            with pytest.raises(DamagedError):
                read([damaged], files, threads=2, direct=place == "direct")
        assert counts() == before
