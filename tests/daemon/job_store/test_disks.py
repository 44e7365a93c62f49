"""A job on several disks: its checkpoints lie on all of them, and what one disk loses another tier brings back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.daemon.further_tiers import FurtherTiers
from ckptd.daemon.job_store import JobStore
from ckptd.errors import CkptdError
from ckptd.storage import catalog, keys
from ckptd.storage.disk_set import MARK
from ckptd.storage.disks import DisksTier
from ckptd.storage.local import LocalTier
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import committed, flush, pattern, prune, steps

RANKS = 8


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Where four disks are mounted."""
    return [tmp_path / f"nvme{number}" for number in range(4)]


def states(step: int) -> list[dict[str, bytes]]:
    """What the ranks hold at a step; one tensor never changes."""
    return [{"frozen": pattern(rank, 9000), "trained": pattern(100 * step + rank, 50_000)} for rank in range(RANKS)]


def test_checkpoints_on_four_disks(folders: list[Path], pool: ThreadPoolExecutor) -> None:
    """Eight ranks' shards are on all four disks, intact, referred to, and a prune leaves none of them."""
    tier = DisksTier(folders)
    store = JobStore(tier, "job", pool)
    assert store.claim(1, None)
    for step in (1, 2, 3):
        flush(store, states(step), CheckpointId(1, step))
        there = [len(list((folder / "job" / keys.folder(CheckpointId(1, step))).glob("rank*"))) for folder in folders]
        assert sum(there) == RANKS
        assert all(there), f"a disk has no shard: {there}"
    other = DisksTier(folders)
    assert all(catalog.verify(other, "job", checkpoint) == [] for checkpoint in committed(other))
    assert prune(JobStore(other, "job", pool), steps(1), steps(2, 3)) is None
    assert all(catalog.verify(other, "job", checkpoint) == [] for checkpoint in steps(2, 3))
    assert prune(JobStore(other, "job", pool), steps(2, 3), []) is None
    tier.close()
    other.close()
    left = {path for folder in folders for path in folder.rglob("*") if path.is_file() and path.name != MARK}
    assert left <= {folders[0] / keys.generation_key("job", 1)}
    assert not [path for folder in folders[1:] for path in folder.iterdir() if path.name != MARK]


def test_a_replaced_disk_is_filled_from_another_tier(
    folders: list[Path], tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    """With a new disk in its place a checkpoint is incomplete, and a fetch brings just what was lost."""
    near, far = JobStore(DisksTier(folders), "job", pool), JobStore(LocalTier(tmp_path / "far"), "job", pool)
    checkpoint = CheckpointId(1, 1)
    assert near.claim(1, None)
    flush(near, states(1), checkpoint)
    FurtherTiers("job", near, {"far": far}, {}, lambda *_: None).upload(checkpoint, "far")
    near.tier.close()
    folders[2].rename(tmp_path / "broken")
    for folder in folders:
        (folder / MARK).unlink(missing_ok=True)
    again = JobStore(DisksTier(folders), "job", pool)
    again.tier.check_writable()
    with pytest.raises(CkptdError):
        again.check_offer(checkpoint)
    told: list[str] = []
    FurtherTiers("job", again, {"far": far}, {}, lambda event, _: told.append(event)).fetch(checkpoint, "far")
    assert catalog.verify(again.tier, "job", checkpoint) == []
    assert told.count("file fetched") == len(list((tmp_path / "broken").rglob("rank*")))
    keyed = [entry.key for entry in again.tier.list("job/")]
    assert len(keyed) == len(set(keyed))
    assert sum(len(list(folder.rglob("rank*"))) for folder in folders) == RANKS
