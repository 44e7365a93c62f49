"""The disk loses what a drive may lose, and nothing else."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.powercut.disk import BLOCK_BYTES, SECTOR_BYTES, Disk

_SECTORS = 24
_HOW = ("cached", "fua", "flush after", "flush before")
_WRITES = st.lists(
    st.tuples(
        st.integers(0, _SECTORS - 1),
        st.integers(1, 12),
        st.sampled_from(["cached", "fua", "flush after", "flush before"]),
    ),
    max_size=20,
)


def _sector(disk: bytes | bytearray, number: int) -> bytes:
    return bytes(disk[number * SECTOR_BYTES : (number + 1) * SECTOR_BYTES])


@given(writes=_WRITES, seed=st.integers(0, 2**32))
def test_each_sector_is_what_it_may_be(writes: list[tuple[int, int, str]], seed: int) -> None:
    """After a cut a sector holds what was durable or what a later write put there; reads before and after are true."""
    durable = bytearray(_SECTORS * SECTOR_BYTES)
    disk = Disk(durable, bytearray(len(durable)))
    allowed = [{0: bytes(SECTOR_BYTES)} for _ in range(_SECTORS)]
    for version, (begin, count, how) in enumerate(writes, 1):
        taken = disk.taken
        end = min(begin + count, _SECTORS)
        content = bytes([version]) * SECTOR_BYTES
        disk.write(begin * SECTOR_BYTES, content * (end - begin), fua=how == "fua")
        for number in range(begin, end):
            allowed[number] = {version: content} if how == "fua" else {**allowed[number], version: content}
            assert disk.read(number * SECTOR_BYTES, SECTOR_BYTES) == content
        if how.startswith("flush"):
            covered = version if how == "flush after" else taken
            disk.flush(covered)
            for number, versions in enumerate(allowed):
                oldest = max((item for item in versions if item <= covered), default=0)
                allowed[number] = {item: content for item, content in versions.items() if item >= oldest}
    disk.cut(random.Random(seed))
    for number, versions in enumerate(allowed):
        assert _sector(durable, number) in versions.values()
    assert disk.read(0, len(durable)) == durable


@given(seed=st.integers(0, 2**32), first=st.integers(0, 15), count=st.integers(1, 40))
def test_no_block_is_torn(seed: int, first: int, count: int) -> None:
    """Of a write that begins and ends anywhere, what falls into one block of 4 KiB is all old or all new."""
    durable = bytearray(8 * BLOCK_BYTES)
    disk = Disk(durable, bytearray(len(durable)))
    end = min(len(durable), (first + count) * SECTOR_BYTES)
    disk.write(first * SECTOR_BYTES, b"\1" * (end - first * SECTOR_BYTES))
    disk.cut(random.Random(seed))
    for begin in range(0, end, BLOCK_BYTES):
        assert len(set(durable[max(begin, first * SECTOR_BYTES) : min(begin + BLOCK_BYTES, end)])) <= 1


def test_cuts_keep_tear_and_lose() -> None:
    """Over some seeds there are writes that were kept, torn and lost, and cuts that spare or take everything."""
    cuts = []
    for seed in range(200):
        disk = Disk(bytearray(48 * BLOCK_BYTES), bytearray(48 * BLOCK_BYTES))
        for at in range(0, 48, 8):
            disk.write(at * BLOCK_BYTES, b"\1" * 8 * BLOCK_BYTES)
        cuts.append(disk.cut(random.Random(seed)))
    assert {cut.writes for cut in cuts} == {6}
    assert all(any(count) for count in zip(*((cut.kept, cut.torn, cut.lost) for cut in cuts), strict=True))
    assert {cut.kept for cut in cuts} >= {0, 6}
    assert {cut.lost for cut in cuts} >= {0, 6}


@pytest.mark.parametrize(("offset", "size_bytes"), [(1, 512), (512, 100), (-512, 512), (1024, 512)])
def test_only_sectors_of_the_disk_are_written(offset: int, size_bytes: int) -> None:
    """A write that is not whole sectors of the disk is refused."""
    disk = Disk(bytearray(1024), bytearray(1024))
    with pytest.raises(ValueError, match="no sectors"):
        disk.write(offset, bytes(size_bytes))
