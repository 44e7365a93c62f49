"""A prune removes what nobody needs, and nothing else, whatever fails or happens beside it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.daemon.job_store import JobStore
from ckptd.errors import DamagedError, FencedError, StoreError
from ckptd.storage import catalog, keys
from ckptd.storage.memory import MemoryTier
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import FailingTier, committed, flush, pattern, prune, shard_files, steps


class StubbornTier(MemoryTier):
    """A tier in memory that counts what is read, and does not delete some keys."""

    def __init__(self) -> None:
        super().__init__()
        self.stubborn = ""
        self.read: list[str] = []
        self.deleted: list[str] = []

    def get(self, key: str) -> bytes:
        self.read.append(key)
        return super().get(key)

    def delete(self, key: str) -> None:
        if self.stubborn and self.stubborn in key:
            raise StoreError("it won't go")
        self.deleted.append(key)
        super().delete(key)


def frozen_history(store: JobStore, count: int) -> None:
    """Flush so many checkpoints of which all after the first refer to it."""
    for step in range(1, count + 1):
        flush(store, [{"frozen": pattern(1, 9000), "trained": pattern(10 + step)}], CheckpointId(1, step))


def test_bytes_that_are_named_stay(pool: ThreadPoolExecutor) -> None:
    """A pruned checkpoint's file stays as long as a kept one names it, and goes with the last of them."""
    tier = StubbornTier()
    store = JobStore(tier, "job", pool)
    frozen_history(store, 4)
    assert prune(store, steps(1, 2), steps(3, 4)) is None
    assert committed(tier) == tuple(steps(3, 4))
    assert shard_files(tier) == {keys.folder(CheckpointId(1, step)) + keys.shard_file(0) for step in (1, 3, 4)}
    assert tier.deleted[:2] == [keys.manifest_key("job", checkpoint) for checkpoint in steps(1, 2)]
    assert all(catalog.verify(tier, "job", checkpoint) == [] for checkpoint in steps(3, 4))
    assert prune(JobStore(tier, "job", pool), steps(3), steps(4)) is None
    assert catalog.verify(tier, "job", CheckpointId(1, 4)) == []
    assert prune(JobStore(tier, "job", pool), steps(4), []) is None
    assert tier.objects == {}


def test_manifests_are_read_once(pool: ThreadPoolExecutor) -> None:
    """A prune knows what was flushed or read before, and reads a manifest of a former agent once."""
    tier = StubbornTier()
    frozen_history(JobStore(tier, "job", pool), 5)
    store = JobStore(tier, "job", pool)
    assert prune(store, steps(1), steps(2, 3, 4, 5)) is None
    tier.read.clear()
    assert prune(store, steps(2), steps(3, 4, 5)) is None
    assert tier.read == []


@pytest.mark.parametrize("step", [1, 2])
def test_a_checkpoint_that_will_not_go_is_whole(pool: ThreadPoolExecutor, step: int) -> None:
    """A checkpoint whose manifest can't be removed keeps its bytes and no other checkpoint; its error is returned."""
    tier = StubbornTier()
    store = JobStore(tier, "job", pool)
    frozen_history(store, 3)
    tier.stubborn = keys.manifest_key("job", CheckpointId(1, step))
    assert str(prune(store, steps(1, 2), steps(3))) == "it won't go"
    assert committed(tier) == (CheckpointId(1, step), CheckpointId(1, 3))
    assert all(catalog.verify(tier, "job", checkpoint) == [] for checkpoint in steps(step, 3))
    tier.stubborn = ""
    assert prune(store, steps(step), steps(3)) is None
    assert committed(tier) == (CheckpointId(1, 3),)


def test_a_prune_that_was_interrupted_is_finished_by_the_next(pool: ThreadPoolExecutor) -> None:
    """Files that stayed behind without a manifest, after a failed prune or flush, go with the next prune."""
    tier = StubbornTier()
    store = JobStore(tier, "job", pool)
    frozen_history(store, 4)
    tier.stubborn = keys.shard_key("job", CheckpointId(1, 2), 0)
    assert str(prune(store, steps(2), steps(1, 3, 4))) == "it won't go"
    tier.stubborn = ""
    tier.put(keys.shard_key("job", CheckpointId(1, 5), 0), b"an unfinished flush")
    assert prune(JobStore(tier, "job", pool), steps(3), steps(1, 4)) is None
    assert {found.checkpoint.step for found in catalog.listing(tier, "job").files.values()} == {1, 4}


@pytest.mark.parametrize("kept", [True, False])
def test_an_unreadable_manifest_stops_the_prune(pool: ThreadPoolExecutor, kept: bool) -> None:
    """When a checkpoint that stays can't be read, whoever may want it, nothing is removed, and the error says why."""
    tier = StubbornTier()
    frozen_history(JobStore(tier, "job", pool), 4)
    before = dict(tier.objects)
    tier.put(keys.manifest_key("job", CheckpointId(1, 3)), b"{")
    error = prune(JobStore(tier, "job", pool), steps(1, 2), steps(3, 4) if kept else steps(4))
    assert isinstance(error, DamagedError)
    assert set(tier.objects) == set(before)


def test_a_zombie_prunes_nothing(pool: ThreadPoolExecutor) -> None:
    """An agent that was replaced removes nothing: a newer generation may refer to it. The newer one may prune."""
    tier = StubbornTier()
    zombie, heir = JobStore(tier, "job", pool), JobStore(tier, "job", pool)
    assert zombie.claim(1, None)
    frozen_history(zombie, 3)
    assert heir.claim(2, CheckpointId(1, 3))
    before = dict(tier.objects)
    error = prune(zombie, steps(1, 2), steps(3))
    assert isinstance(error, FencedError)
    assert "generation 2" in error.message
    assert tier.objects == before
    assert prune(heir, steps(1, 2), steps(3)) is None
    assert committed(tier) == (CheckpointId(1, 3),)


def test_a_prune_beside_a_flush(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Whatever is pruned while a flush that refers to it is under way, the flush's checkpoint is whole."""
    tier = FailingTier(tmp_path, 99)  # slow
    for turn in range(4):
        store = JobStore(tier, f"job-{turn}", pool)
        for step in (1, 2):
            flush(store, [{"frozen": pattern(1, 9000), "trained": pattern(10 + step)}], CheckpointId(1, step))
        running = threading.Thread(
            target=flush, args=(store, [{"frozen": pattern(1, 9000), "trained": pattern(9)}], CheckpointId(1, 3))
        )
        running.start()
        time.sleep(0.04 * turn)
        assert prune(store, steps(1, 2), []) is None
        running.join()
        assert catalog.verify(tier, f"job-{turn}", CheckpointId(1, 3)) == []
