"""What a sweep of the local tier removes: all that killed processes can leave which is no object, and nothing else."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest

from ckptd.errors import FullError
from ckptd.storage.local import LocalTier
from tests.storage.files import files_below
from tests.storage.spared import skip_without_spares, spare_sizes, with_a_spare

_HOUR_S = 3600.0


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """A local tier with one object."""
    made = LocalTier(tmp_path / "store")
    made.put("job/g1/object", b"x")
    return made


def _left(tier: LocalTier, name: str, age_s: float = 2 * _HOUR_S) -> Path:
    """Leave a file, or a folder when the name ends so, of that age."""
    path = tier.root / name
    if name.endswith("/"):
        path.mkdir(parents=True)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"left")
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_what_killed_processes_leave(tier: LocalTier) -> None:
    """Temporary files with the folders that are empty then, empty folders in folders, probes and spares: all go."""
    left = [
        _left(tier, "job/g1/.tmp-1-object"),
        _left(tier, "job/g2/s1/.tmp-2-object"),
        _left(tier, "job/g3/"),
        _left(tier, ".tmp-3-probe"),
        _left(tier, ".tmp-spares/.tmp-spares-4"),
    ]
    said = tier.sweep("job/", _HOUR_S)
    assert [path for path in left if path.exists()] == []
    assert sorted(path.name for path in tier.root.rglob("*")) == ["g1", "job", "object"]
    assert {line.rpartition(" ")[0] for line in said} == {"temporary file", "empty folder", "spare"}


def test_what_is_younger_stays(tier: LocalTier) -> None:
    """What a living process may be at work on is left alone."""
    names = ("job/g1/.tmp-1-object", ".tmp-3-probe", ".tmp-spares/.tmp-spares-4", "job/g3/")
    left = [_left(tier, name, age_s=60.0) for name in names]
    assert tier.sweep("job/", _HOUR_S) == []
    assert all(path.exists() for path in left)


def test_other_jobs_are_left_alone(tier: LocalTier) -> None:
    """A sweep of one job touches nothing in the folder of another."""
    left = [_left(tier, "other/g1/.tmp-1-object"), _left(tier, "other/g2/")]
    tier.sweep("job/", _HOUR_S)
    assert all(path.exists() for path in left)


def test_a_folder_that_goes_meanwhile(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that somebody else's delete removes while it is looked into keeps nothing else from being swept."""
    left, gone = _left(tier, "job/g1/.tmp-1-object"), _left(tier, "job/g2/")
    scandir = os.scandir

    def racing(path: object) -> object:
        if str(path) == str(gone) and gone.exists():
            gone.rmdir()
        return scandir(path)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "scandir", racing)
    assert tier.sweep("job/", _HOUR_S) == [f"temporary file {left}"]


def test_its_own_spares_stay(tmp_path: Path) -> None:
    """A tier's own spares are to be written over: however old they are, its sweep leaves them."""
    skip_without_spares(tmp_path)
    tier = LocalTier(tmp_path / "store")
    with_a_spare(tier)
    for path in (tier.root / ".tmp-spares").iterdir():
        os.utime(path, (time.time() - 2 * _HOUR_S,) * 2)
    assert tier.sweep("job/", _HOUR_S) == []
    assert len(spare_sizes(tier)) == 1


def test_a_put_that_fails_leaves_no_folder(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders that a failed put has made go again, those that hold something else stay."""

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(FullError):
        tier.put("job/g1/s1/object", b"x")
    assert files_below(tier.root) == {"job/g1/object"}
    assert not (tier.root / "job/g1/s1").exists()


def test_a_temporary_file_that_stays_is_no_failure(tier: LocalTier, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that has got its name is put, though its temporary name can't be removed; a sweep does that later."""

    def refused(path: Path, *, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refused)
        tier.put("job/new", b"y", create_only=True)
    assert tier.get("job/new") == b"y"
    tier.sweep("job/", -1.0)
    assert files_below(tier.root) == {"job/g1/object", "job/new"}
