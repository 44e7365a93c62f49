"""The metering wrapper: calls, bytes, errors and time by operation."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest

from ckptd.errors import FencedError, NotFoundError
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.wrappers import MeteredTier


def test_counts_by_operation() -> None:
    """Each operation has its calls, bytes and seconds, and its errors by code; what failed moved no bytes."""
    ticks = count(step=2)
    metered = MeteredTier(MemoryTier(), clock=lambda: float(next(ticks)))
    assert metered.snapshot() == {}
    metered.put("job/a", [b"12", b"345"])
    metered.put("job/b", b"6", create_only=True)
    with pytest.raises(FencedError):
        metered.put("job/b", b"789", create_only=True)
    metered.get("job/a")
    with pytest.raises(NotFoundError):
        metered.get("job/never")
    metered.read_into("job/a", 1, memoryview(bytearray(3)))
    os.close(metered.open("job/a"))
    assert len(list(metered.list("job/"))) == 2
    metered.delete("job/a")
    found = metered.snapshot()
    assert found["put"] == {"calls": 3, "running": 0, "bytes": 6, "seconds": 6.0, "errors": {"fenced": 1}}
    assert found["get"] == {"calls": 2, "running": 0, "bytes": 5, "seconds": 4.0, "errors": {"not_found": 1}}
    assert found["read_into"] == {"calls": 1, "running": 0, "bytes": 3, "seconds": 2.0, "errors": {}}
    assert found["open"]["bytes"] == 5
    assert (found["list"]["calls"], found["delete"]["calls"]) == (1, 1)
    assert set(found) == {"put", "get", "read_into", "open", "list", "delete"}


def test_a_lent_file_moves_nothing(tmp_path: Path) -> None:
    """A descriptor of a file where it lies has copied no bytes."""
    metered = MeteredTier(LocalTier(tmp_path))
    metered.put("job/a", b"12345")
    os.close(metered.open("job/a"))
    assert metered.snapshot()["open"]["bytes"] == 0


def test_an_exception_without_a_code_is_counted() -> None:
    """A fault that is no error of ours is counted and raised all the same."""

    class Broken(MemoryTier):
        def get(self, key: str) -> bytes:
            raise KeyError(key)

    metered = MeteredTier(Broken())
    with pytest.raises(KeyError):
        metered.get("job/a")
    assert metered.snapshot()["get"]["errors"] == {"untyped": 1}


def test_shows_what_is_running() -> None:
    """A call that is not over yet is seen as running, and in no other count."""
    metered = MeteredTier(MemoryTier())
    seen: list[object] = []
    metered.put("job/a", b"123", pace=lambda _: seen.append(metered.snapshot()["put"]))
    assert seen == [{"calls": 0, "running": 1, "bytes": 0, "seconds": 0.0, "errors": {}}]


def test_a_snapshot_stays_what_it_is() -> None:
    """A snapshot is a copy, and many threads lose no count."""
    metered = MeteredTier(MemoryTier())
    metered.put("job/a", b"1")
    before = metered.snapshot()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(400):
            pool.submit(metered.get, "job/a")
            pool.submit(metered.get, "job/never")
    assert before["put"]["calls"] == 1
    assert "get" not in before
    found = metered.snapshot()["get"]
    assert (found["calls"], found["bytes"], found["errors"]) == (800, 400, {"not_found": 400})
