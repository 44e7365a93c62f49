"""What tests of several modules begin with."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.storage.local import LocalTier


@pytest.fixture
def target(tmp_path: Path) -> LocalTier:
    """An empty local tier."""
    return LocalTier(tmp_path / "target")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Where three disks are mounted that hold nothing yet."""
    return [tmp_path / f"nvme{number}" for number in range(3)]
