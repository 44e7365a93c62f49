"""A store and a job on it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.daemon.job_store import JobStore
from ckptd.storage.local import LocalTier


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    """The storage threads."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """An empty store."""
    return LocalTier(tmp_path)


@pytest.fixture
def store(tier: LocalTier, pool: ThreadPoolExecutor) -> JobStore:
    """A job on it."""
    return JobStore(tier, "job", pool)
