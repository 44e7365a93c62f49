"""What the tests of spares look at."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path

import pytest

from ckptd.storage import spares
from ckptd.storage.local import LocalTier
from tests.storage.files import aligned

MIB = 2**20
_GET_VERSION = 0x80087601  # FS_IOC_GETVERSION


def skip_without_spares(folder: Path) -> None:
    """Skip a test on a filesystem where no spares are kept."""
    if spares._filesystem(folder) not in spares._OF_ONE_MACHINE:
        pytest.skip("no spares are kept on this filesystem")


def spare_sizes(tier: LocalTier) -> list[int]:
    """The sizes of the spares that lie in a store."""
    folder = tier.root / ".tmp-spares"
    return sorted(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else []


def identity(tier: LocalTier, key: str) -> tuple[int, int]:
    """Which file an object is: the number of its inode, which is given out again, and of that inode's use."""
    descriptor = os.open(tier.root / key, os.O_RDONLY)
    try:
        found = fcntl.ioctl(descriptor, _GET_VERSION, bytes(8))
        return os.fstat(descriptor).st_ino, int.from_bytes(found[:4], sys.byteorder)
    finally:
        os.close(descriptor)


def with_a_spare(tier: LocalTier, data: memoryview | None = None) -> tuple[int, int]:
    """Have a tier delete one of two objects that it has put; return which file became the spare."""
    tier.put("job/s1/a", aligned(2 * MIB, b"1") if data is None else data)
    tier.put("job/s2/a", aligned(2 * MIB, b"2"))
    spare = identity(tier, "job/s1/a")
    tier.delete("job/s1/a")
    assert len(spare_sizes(tier)) == 1
    return spare
