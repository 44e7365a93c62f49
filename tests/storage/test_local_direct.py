"""How the local tier writes and reads what is large: past the page cache where it can, and what happens where not."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.errors import DamagedError, StoreError
from ckptd.storage import direct
from ckptd.storage.addresses import address_of
from ckptd.storage.direct import IO_BYTES
from ckptd.storage.local import LocalTier
from tests.storage.files import aligned, files_below, pattern

DIRECT_BYTES = 2**20


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """A local tier in a folder that does not exist yet."""
    return LocalTier(tmp_path / "store")


@pytest.fixture
def flags_used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every file that was opened for data, with its flags, while the real calls go on."""
    used: list[tuple[str, int]] = []
    real = os.open

    def recording(path: str | Path, flags: int, mode: int = 0o777, **more: int) -> int:
        if not flags & os.O_DIRECTORY:
            used.append((Path(path).name, flags))
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", recording)
    return used


def test_a_large_aligned_image_goes_past_the_page_cache(tier: LocalTier, flags_used: list[tuple[str, int]]) -> None:
    """A whole number of blocks in page-aligned memory is opened with O_DIRECT, once, for writing and for reading."""
    tier.put("job/before", b"x")
    try:
        os.close(os.open(tier.root / "job/before", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this filesystem has no O_DIRECT")
    flags_used.clear()
    tier.put("job/image", aligned(DIRECT_BYTES))
    into = aligned(DIRECT_BYTES, b"\0")
    tier.read_into("job/image", 0, into)
    assert into == aligned(DIRECT_BYTES)
    assert [bool(flags & os.O_DIRECT) for _, flags in flags_used] == [True, True]


@pytest.mark.parametrize("size", [10, DIRECT_BYTES - 4096, DIRECT_BYTES - 1])
def test_small_objects_are_written_buffered(tier: LocalTier, flags_used: list[tuple[str, int]], size: int) -> None:
    """Small objects are never tried with O_DIRECT."""
    tier.put("job/object", b"b" * size)
    into = memoryview(bytearray(size))
    tier.read_into("job/object", 0, into)
    assert into == b"b" * size
    assert not any(flags & os.O_DIRECT for _, flags in flags_used)


@given(st.lists(st.integers(1, 2 * IO_BYTES), min_size=1, max_size=5), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_parts_become_one_file(tmp_path: Path, sizes: list[int], rounded: bool) -> None:
    """Parts of any size and alignment, written directly, are one file of exactly their bytes."""
    source = pattern(sum(sizes) + 4096 * len(sizes))
    parts, at = [], 0
    for size in sizes:
        parts.append(source[at : at + size])
        at += (
            -(-size // 4096) * 4096 if rounded else size
        )  # some begin on a block in memory, and are not one in the file
    tier = LocalTier(tmp_path / "parts")
    tier.put("object", parts)
    assert tier.get("object") == b"".join(parts)
    assert tier.size_bytes("object") == sum(sizes)


def test_aligned_memory_is_written_from_where_it_is(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot costs no copy: every write is given the slot's own memory. Only a block that is no whole one is copied."""
    image = aligned(2 * IO_BYTES + 4096 + 100)
    begin = address_of(image)
    written: dict[int, int] = {}
    real = os.pwrite

    def noting(descriptor: int, data: memoryview, offset: int) -> int:
        written[offset] = address_of(data)
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", noting)
    tier.put("job/whole", image[: 2 * IO_BYTES + 4096])
    assert written == {at: begin + at for at in (0, IO_BYTES, 2 * IO_BYTES)}
    tier.put("job/tail", image)
    assert {at: address for at, address in written.items() if address == begin + at}.keys() == {0, IO_BYTES}
    monkeypatch.undo()
    assert tier.get("job/tail") == image


def test_memory_that_is_not_aligned(tier: LocalTier) -> None:
    """A view that begins anywhere is written and read whole, with O_DIRECT and without."""
    data = memoryview(b"x" + b"u" * DIRECT_BYTES)[1:]
    tier.put("job/unaligned", data)
    room = memoryview(bytearray(DIRECT_BYTES + 3))[3:]
    tier.read_into("job/unaligned", 0, room)
    assert room == data


def test_every_byte_is_paced_before_it_is_written(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put asks for all its bytes, once, in pieces, and never writes what it has not asked for."""
    asked: list[int] = []
    done: list[int] = []
    real = os.pwrite

    def writing(descriptor: int, data: memoryview, offset: int) -> int:
        done.append(len(data))
        assert sum(done) <= -(-sum(asked) // 4096) * 4096
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", writing)
    for size in (10, IO_BYTES - 1, 3 * IO_BYTES + 5, 4 * IO_BYTES):
        asked.clear()
        done.clear()
        tier.put("job/paced", [aligned(size // 2), aligned(size - size // 2)], pace=asked.append)
        assert sum(asked) == size
        assert max(asked) <= IO_BYTES


@pytest.mark.parametrize("refused", ["open", "pwrite"])
def test_a_filesystem_that_refuses_direct_io_gets_buffered_writes(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """EINVAL from opening or from the first direct write leads to a buffered write, still with its fsync."""
    direct: set[int] = set()
    synced: list[int] = []
    real_open, real_pwrite, real_fsync = os.open, os.pwrite, os.fsync

    def opening(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        descriptor = real_open(path, flags & ~os.O_DIRECT, mode)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def writing(descriptor: int, data: memoryview, offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "another alignment, please")
        return real_pwrite(descriptor, data, offset)

    def syncing(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real_fsync(descriptor)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "pwrite", writing)
    monkeypatch.setattr(os, "fsync", syncing)
    tier.put("job/image", aligned(DIRECT_BYTES))
    assert DIRECT_BYTES in synced
    monkeypatch.undo()
    assert tier.get("job/image") == b"d" * DIRECT_BYTES


def test_another_error_of_a_direct_write_is_not_hidden(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO is reported as a `StoreError` with its hint, never answered by trying again without O_DIRECT."""
    calls: list[int] = []

    def failing(descriptor: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", failing)
    before = threading.active_count()
    with pytest.raises(StoreError, match="Input/output error") as caught:
        tier.put("job/image", aligned(8 * IO_BYTES))
    assert caught.value.hint == "the disk reports errors: look into the kernel's log"
    assert len(calls) <= 2, "writes went on after one had failed"
    assert threading.active_count() == before, "a thread still has the memory"
    assert files_below(tier.root) == set()


def test_short_writes_are_continued(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that takes only a part of a write gets the rest in further calls."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:1000], offset))
    tier.put("job/object", b"".join(b"%07d\n" % number for number in range(2000)))
    assert tier.get("job/object").splitlines()[-1] == b"0001999"


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
@pytest.mark.parametrize("size", [5000, 2 * DIRECT_BYTES])
def test_a_failed_fsync_fails_the_put(tier: LocalTier, monkeypatch: pytest.MonkeyPatch, size: int, number: int) -> None:
    """When the disk says that it could not keep the bytes no object appears, and fsync is not asked again."""
    tier.put("before", b"x")
    calls: list[int] = []

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError):
        tier.put("object", aligned(size))
    assert len(calls) == 1
    assert files_below(tier.root) == {"before"}


def test_a_truncated_file_is_damage_for_direct_reads_too(tier: LocalTier) -> None:
    """A file cut in the middle of a block is noticed by the O_DIRECT read, which says where it ends."""
    tier.put("job/image", aligned(2 * DIRECT_BYTES))
    os.truncate(tier.root / "job/image", DIRECT_BYTES + 5000)
    with pytest.raises(DamagedError, match=f"ends at byte {DIRECT_BYTES + 5000}"):
        tier.read_into("job/image", 0, aligned(2 * DIRECT_BYTES))


class NoAllocation:
    """A C library on a filesystem that can't allocate blocks beforehand, such as NFS: no such filesystem is here."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fallocate(self, *_: int) -> int:
        ctypes.set_errno(self._number)
        return -1


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_filesystems_that_allocate_nothing_beforehand(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Where blocks can't be allocated at once the file is written all the same."""
    monkeypatch.setattr(direct, "_libc", NoAllocation(number))
    tier.put("job/image", aligned(2 * DIRECT_BYTES))
    assert tier.get("job/image") == aligned(2 * DIRECT_BYTES)


def test_a_disk_without_room_is_found_before_anything_is_written(
    tier: LocalTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lack of space ends a put before its first byte, names the file and leaves nothing."""
    monkeypatch.setattr(direct, "_libc", NoAllocation(errno.ENOSPC))
    monkeypatch.setattr(os, "pwrite", lambda *_: pytest.fail("written"))
    with pytest.raises(StoreError, match="No space left"):
        tier.put("job/image", aligned(2 * DIRECT_BYTES))
    assert not files_below(tier.root)
