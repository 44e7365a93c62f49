"""Prunes while others are at work: a checkpoint comes back, a newer generation begins, clocks and calls go wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from ckptd.core.policy.garbage import SKEW_S
from ckptd.daemon.job_store import JobStore
from ckptd.errors import FencedError, RefusedError, StoreError
from ckptd.pruning.prune import Pruning, Task
from ckptd.storage import catalog, keys
from ckptd.storage.memory import MemoryTier
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import committed, flush, pattern, prune, shard_files, steps
from tests.daemon.job_store.test_removing import HOUR_S, LEFT_OVER, Shared, check_all, history, waiting


class Meddled(Shared):
    """A tier on which something happens just before a checkpoint is removed."""

    meddle = staticmethod(lambda: None)

    def delete(self, key: str) -> None:
        """Delete, a moment late."""
        if key.endswith(keys.MANIFEST):
            self.meddle()
        super().delete(key)


def test_what_is_on_its_way_again_is_not_removed(pool: ThreadPoolExecutor) -> None:
    """A checkpoint that is fetched or uploaded while its removal waits for its turn stays, and that is an error."""
    tier = MemoryTier()
    store = JobStore(tier, "job", pool)
    history(store)
    plan = store.pruning.plan(steps(1, 2), steps(3, 4), Task(garbage=True))
    files = catalog.load_manifest(tier, "job", CheckpointId(1, 2)).files
    with store.needs.expecting(CheckpointId(1, 2), files):
        done = store.pruning.carry_out(plan)
    assert done.checkpoints == {CheckpointId(1, 1)}
    assert [type(error) for error in done.errors] == [FencedError]
    assert committed(tier) == tuple(steps(2, 3, 4))
    check_all(tier)


def test_who_began_a_generation_while_a_prune_was_planned(pool: ThreadPoolExecutor) -> None:
    """What another agent has come to refer to after a step back stays, though the plan called it garbage."""
    tier = Shared()
    history(JobStore(tier, "job", pool))
    pruning = Pruning(tier, "job", JobStore(tier, "job", pool).needs, exclusive=False)
    plan = pruning.plan(steps(1, 2, 3), steps(4), Task(garbage=True))
    heir = JobStore(tier, "job", pool)
    assert heir.claim(2, CheckpointId(1, 2))
    new = CheckpointId(2, 3)
    flush(heir, [{"frozen": pattern(99, 9000), "trained": pattern(12)}], new, CheckpointId(1, 2))
    assert keys.folder(CheckpointId(1, 2)) + keys.shard_file(0) in catalog.load_manifest(tier, "job", new).files
    done = pruning.carry_out(plan)
    assert [type(error) for error in done.errors] == [FencedError]
    assert catalog.verify(tier, "job", new) == []


def test_what_was_committed_while_a_prune_was_planned(pool: ThreadPoolExecutor) -> None:
    """An old left-over that has become part of a checkpoint since the plan stays."""
    tier, source = Shared(), MemoryTier()
    history(JobStore(source, "job", pool), 1)
    key = keys.shard_key("job", CheckpointId(1, 1), 0)
    tier.put(key, source.get(key))
    tier.age(86400.0 + SKEW_S)
    pruning = JobStore(tier, "job", pool).pruning
    plan = pruning.plan([], [], Task(garbage=True))
    assert [item.remove for item in plan.files] == [True]
    tier.put(keys.manifest_key("job", CheckpointId(1, 1)), source.get(keys.manifest_key("job", CheckpointId(1, 1))))
    assert pruning.carry_out(plan).files == 0
    check_all(tier)


def test_a_removal_by_a_clock_that_was_ahead_makes_room(pool: ThreadPoolExecutor) -> None:
    """What was removed at a time that is still to come can be undone, and goes when nothing may wait any more."""
    tier = MemoryTier()
    store = JobStore(tier, "job", pool, grace_s=HOUR_S)
    history(store)
    document = tier.get(keys.manifest_key("job", CheckpointId(1, 2)))
    tier.put(keys.marker_key("job", CheckpointId(1, 2), time.time() + 1000), document)
    tier.delete(keys.manifest_key("job", CheckpointId(1, 2)))
    assert prune(store, [], steps(1, 3, 4)) is None
    assert waiting(tier) == {CheckpointId(1, 2)}
    assert store.pruning.make_room([], steps(1, 3, 4)).files == 1
    assert not waiting(tier)


def test_a_removal_that_is_tried_again_within_a_second_can_be_undone(pool: ThreadPoolExecutor) -> None:
    """The marker that a failed attempt has left is that of the next one, whatever second both fall into."""
    tier = Meddled()
    tier.capabilities = MemoryTier.capabilities
    store = JobStore(tier, "job", pool, grace_s=HOUR_S)
    history(store)

    def fail() -> None:
        raise StoreError("input/output error")

    for _ in range(3):
        tier.meddle = fail
        assert isinstance(prune(store, steps(2), steps(1, 3, 4)), StoreError)
        tier.meddle = lambda: None
        assert prune(store, steps(2), steps(1, 3, 4)) is None
        assert waiting(tier) == {CheckpointId(1, 2)}
        check_all(tier)


def test_a_checkpoint_that_is_removed_for_good_leaves_no_marker(pool: ThreadPoolExecutor) -> None:
    """What an interrupted removal has left goes with its checkpoint, also where others may be writing."""
    tier = Shared()
    store = JobStore(tier, "job", pool)
    history(store)
    document = tier.get(keys.manifest_key("job", CheckpointId(1, 2)))
    tier.put(keys.marker_key("job", CheckpointId(1, 2), time.time()), document)
    assert prune(store, steps(2), steps(1, 3, 4)) is None
    assert catalog.listing(tier, "job").markers == ()
    assert len(shard_files(tier)) == 3


def test_what_can_not_be_swept_keeps_nothing_else(pool: ThreadPoolExecutor) -> None:
    """Without the permission to end uploads garbage and records go all the same; uploads are judged with care."""
    ages: list[float] = []

    class Unswept(Shared):
        """A bucket whose open uploads we may not list."""

        def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
            ages.append(older_than_s)
            raise RefusedError("AccessDenied")

    tier = Unswept()
    for generation in (1, 2):
        catalog.claim_generation(tier, "job", generation, None, 1.0)
    store = JobStore(tier, "job", pool)
    store.needs.own(2)
    flush(store, [{"trained": pattern(1)}], CheckpointId(2, 1))
    tier.put(LEFT_OVER, b"never committed")
    tier.age(86400.0 + SKEW_S)
    done = store.pruning.collect([CheckpointId(2, 1)], 2)
    assert (done.files, done.freed_bytes, done.records) == (1, 15, 1)
    assert [type(error) for error in done.errors] == [RefusedError]
    assert ages == [86400.0 + SKEW_S], "whose clock is ahead ends nobody's upload"


def test_the_end_of_a_job_waits_for_a_prune_no_longer_than_it_may(pool: ThreadPoolExecutor) -> None:
    """Whoever lets go of a job waits until nothing is pruned; what takes too long ends with the file that it is at."""
    going, go_on = threading.Event(), threading.Event()

    class Slow(MemoryTier):
        """A tier whose deletes wait until they may be done."""

        def delete(self, key: str) -> None:
            going.set()
            assert go_on.wait(30)
            super().delete(key)

    tier = Slow()
    store = JobStore(tier, "job", pool)
    history(store, 1)
    for number in range(9):
        tier.put(keys.shard_key("job", CheckpointId(1, 9), number), b"never committed")
    running = threading.Thread(target=store.pruning.collect, args=(steps(1), None))
    running.start()
    assert going.wait(30)
    closing = threading.Thread(target=store.pruning.close, args=(0.0,))
    closing.start()
    closing.join(0.1)
    assert closing.is_alive()
    go_on.set()
    closing.join(30)
    left = len(shard_files(tier))
    running.join(30)
    assert left == len(shard_files(tier)) > 1
    store.pruning.close(0.0)
