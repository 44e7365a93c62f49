"""Removals that can be undone, garbage, records and room: what is left is whole wherever a removal is killed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.daemon.job_store import JobStore
from ckptd.errors import FencedError, NotFoundError, StoreError
from ckptd.pruning import prune as prune_module
from ckptd.storage import catalog, keys, removing
from ckptd.storage.copying import upload
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Cost, Data, Pace, Tier
from ckptd.types import CheckpointId
from tests.daemon.job_store.stored import committed, flush, pattern, prune, shard_files, steps

HOUR_S = 3600.0
LEFT_OVER = keys.shard_key("job", CheckpointId(1, 9), 0)


class Shared(MemoryTier):
    """A tier behind a network, which others may be writing to."""

    capabilities = replace(MemoryTier.capabilities, exclusive_hold=False, cost=Cost.NETWORK)

    def age(self, seconds: float) -> None:
        """Let everything have been there for so long."""
        self.objects = {key: (data, at - seconds) for key, (data, at) in self.objects.items()}


class Mortal(MemoryTier):
    """A tier whose process dies at a change of it: that one and all later ones are not made."""

    left = 10**9

    def _change(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise StoreError("killed")

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Put, while alive."""
        self._change()
        super().put(key, data, create_only=create_only, pace=pace)

    def delete(self, key: str) -> None:
        """Delete, while alive."""
        self._change()
        super().delete(key)


def history(store: JobStore, count: int = 4) -> None:
    """Flush checkpoints of which all after the first refer to it."""
    for step in range(1, count + 1):
        flush(store, [{"frozen": pattern(1, 9000), "trained": pattern(10 + step)}], CheckpointId(1, step))


def waiting(tier: Tier) -> set[CheckpointId]:
    """Return the checkpoints whose removal can be undone."""
    listed = catalog.listing(tier, "job")
    return {marker.checkpoint for marker in listed.markers} - listed.committed


def check_all(tier: Tier) -> None:
    """Check that what is committed is whole, and that what can be undone is whole after that."""
    for checkpoint in waiting(tier):
        removing.undo(tier, "job", checkpoint)
    assert not waiting(tier)
    for checkpoint in committed(tier):
        assert catalog.verify(tier, "job", checkpoint) == []


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that a removal's reading of the wall clock is ahead by: a list of one."""
    ahead = [0.0]
    now = prune_module.time.time
    monkeypatch.setattr(prune_module.time, "time", lambda: now() + ahead[0])
    return ahead


def test_a_removal_can_be_undone_until_its_grace_is_over(pool: ThreadPoolExecutor, later: list[float]) -> None:
    """What was removed is no checkpoint, keeps its bytes, comes back bit for bit, and is gone when its time is over."""
    tier = MemoryTier()
    store = JobStore(tier, "job", pool, grace_s=HOUR_S)
    history(store)
    manifest = tier.get(keys.manifest_key("job", CheckpointId(1, 1)))
    assert prune(store, steps(1, 2), steps(3, 4)) is None
    assert committed(tier) == tuple(steps(3, 4))
    assert [item.id for item in catalog.held(tier, "job", with_values=False)] == steps(3, 4)
    assert waiting(tier) == set(steps(1, 2))
    assert len(shard_files(tier)) == 4
    removing.undo(tier, "job", CheckpointId(1, 1))
    assert tier.get(keys.manifest_key("job", CheckpointId(1, 1))) == manifest
    assert prune(store, steps(1), steps(3, 4)) is None
    later[0] = HOUR_S + 1
    assert prune(JobStore(tier, "job", pool, grace_s=HOUR_S), steps(3), steps(4)) is None
    assert waiting(tier) == {CheckpointId(1, 3)}
    assert {name.split("/")[1][-1] for name in shard_files(tier)} == {"1", "3", "4"}, "the first is referred to"
    with pytest.raises(NotFoundError, match="can be undone"):
        removing.undo(tier, "job", CheckpointId(1, 2))
    check_all(tier)


def test_a_removal_that_was_killed_leaves_a_checkpoint(pool: ThreadPoolExecutor) -> None:
    """A marker beside a manifest means nothing: the checkpoint is committed, and the next prune clears it away."""
    tier = MemoryTier()
    store = JobStore(tier, "job", pool, grace_s=HOUR_S)
    history(store)
    document = tier.get(keys.manifest_key("job", CheckpointId(1, 2)))
    tier.put(keys.marker_key("job", CheckpointId(1, 2), 1.0), document)
    assert committed(tier) == tuple(steps(1, 2, 3, 4))
    assert catalog.held(tier, "job", with_values=False)[1].size_bytes == tier.size_bytes(
        keys.shard_key("job", CheckpointId(1, 2), 0)
    )
    assert prune(store, steps(1), steps(2, 3, 4)) is None
    assert committed(tier) == tuple(steps(2, 3, 4))
    assert {marker.checkpoint for marker in catalog.listing(tier, "job").markers} == {CheckpointId(1, 1)}


def test_what_can_not_be_read_is_removed_for_good(pool: ThreadPoolExecutor) -> None:
    """A checkpoint with a damaged manifest leaves no marker: it would stop all further prunes."""
    tier = MemoryTier()
    history(JobStore(tier, "job", pool))
    key = keys.manifest_key("job", CheckpointId(1, 2))
    tier.put(key, tier.get(key)[:-30])
    store = JobStore(tier, "job", pool, grace_s=HOUR_S)
    assert prune(store, steps(2), steps(1, 3, 4)) is None
    assert prune(store, steps(3), steps(1, 4)) is None
    assert (committed(tier), waiting(tier)) == (tuple(steps(1, 4)), {CheckpointId(1, 3)})
    assert {name.split("/")[1][-1] for name in shard_files(tier)} == {"1", "3", "4"}
    check_all(tier)


@pytest.mark.parametrize("grace_s", [0.0, HOUR_S])
def test_a_removal_may_be_killed_at_any_change(pool: ThreadPoolExecutor, later: list[float], grace_s: float) -> None:
    """Wherever removals are killed, what is committed or can be undone is whole, and the next ones finish them."""
    for left in range(30):
        tier = Mortal()
        history(JobStore(tier, "job", pool), 6)
        tier.put(LEFT_OVER, b"never committed")
        later[0] = 0.0
        tier.left = left
        store = JobStore(tier, "job", pool, grace_s=grace_s)
        prune(store, steps(1, 2), steps(3, 4, 5, 6))
        later[0] = HOUR_S + 1
        prune(store, steps(3, 4), steps(5, 6))
        alive = tier.left > 0
        tier.left = 10**9
        before = dict(tier.objects)
        check_all(tier)
        tier.objects = before
        again = JobStore(tier, "job", pool, grace_s=grace_s)
        assert prune(again, [item for item in steps(1, 2, 3, 4) if item in committed(tier)], steps(5, 6)) is None
        later[0] = 3 * HOUR_S
        assert again.pruning.collect(steps(5, 6), None).errors == []
        assert committed(tier) == tuple(steps(5, 6))
        assert not waiting(tier)
        assert shard_files(tier) == {keys.folder(CheckpointId(1, step)) + keys.shard_file(0) for step in (1, 5, 6)}
        check_all(tier)
        if alive:
            return
    raise AssertionError("no removal was made in the end")


@pytest.mark.parametrize("before", [True, False])
def test_undoing_while_the_removal_is_made_final(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    """Of one who undoes and one who makes it final at the same moment, one wins: no checkpoint without files comes."""
    tier = Shared()
    store = JobStore(tier, "job", pool, grace_s=HOUR_S)
    history(store)
    prune(store, steps(2), steps(1, 3, 4))
    commit = removing.commit

    def racing(tier: Tier, job: str, checkpoint: CheckpointId, document: bytes) -> None:
        if before:
            store.pruning.make_room([], steps(1, 3, 4))
        commit(tier, job, checkpoint, document)
        if not before:
            store.pruning.make_room([], steps(1, 3, 4))

    monkeypatch.setattr(removing, "commit", racing)
    if before:
        with pytest.raises(FencedError, match="just made final"):
            removing.undo(tier, "job", CheckpointId(1, 2))
    else:
        removing.undo(tier, "job", CheckpointId(1, 2))
    assert (CheckpointId(1, 2) in committed(tier)) == (not before)
    check_all(tier)


def test_full_tiers_forget_what_could_be_undone(pool: ThreadPoolExecutor) -> None:
    """Room is made of what waits and of garbage, then of what was asked for, none of which can be undone."""
    tier = MemoryTier()
    store = JobStore(tier, "job", pool, grace_s=HOUR_S)
    history(store)
    tier.put(LEFT_OVER, b"x" * 1000)
    prune(store, steps(2), steps(1, 3, 4))
    assert LEFT_OVER not in tier.objects
    tier.put(LEFT_OVER, b"x" * 1000)
    size = tier.size_bytes(keys.shard_key("job", CheckpointId(1, 2), 0))
    made = store.pruning.make_room([], steps(1, 3, 4))
    assert (made.freed_bytes, made.files, made.errors) == (size + 1000, 2, [])
    assert not waiting(tier)
    made = store.pruning.make_room(steps(3), steps(1, 4))
    assert made.freed_bytes == size
    assert (committed(tier), waiting(tier)) == (tuple(steps(1, 4)), set())
    check_all(tier)


def test_on_a_shared_tier_only_what_is_old_is_garbage(pool: ThreadPoolExecutor) -> None:
    """A left-over that a zombie may be writing stays for a day; what a removed checkpoint needed goes with it."""
    tier = Shared()
    history(JobStore(tier, "job", pool))
    tier.put(LEFT_OVER, b"a zombie's")
    store = JobStore(tier, "job", pool)
    assert prune(store, steps(2, 3, 4), steps(1)) is None
    assert shard_files(tier) == {
        keys.folder(item) + keys.shard_file(0) for item in (CheckpointId(1, 1), CheckpointId(1, 9))
    }
    assert store.pruning.collect(steps(1), None).files == 0
    tier.age(86400.0 + 900.0)
    assert prune(store, [], steps(1)) is None
    assert LEFT_OVER in tier.objects, "garbage is not looked for with each prune of a far tier"
    assert store.pruning.collect(steps(1), None).files == 1
    assert catalog.verify(tier, "job", CheckpointId(1, 1)) == []


def test_the_last_that_referred_to_a_file_takes_it_along(pool: ThreadPoolExecutor) -> None:
    """On a shared tier, too, a file that outlived its checkpoint goes with the last one that needed it."""
    tier = Shared()
    history(JobStore(tier, "job", pool))
    assert prune(JobStore(tier, "job", pool), steps(1), steps(2, 3, 4)) is None
    assert len(shard_files(tier)) == 4
    assert prune(JobStore(tier, "job", pool), steps(2, 3, 4), []) is None
    assert shard_files(tier) == set()


def test_records_and_temporary_files_are_collected(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Generation records go that no checkpoint can lead to, the newest never; so does what a killed put has left."""
    tier = LocalTier(tmp_path)
    for generation in (1, 2, 3, 4):
        catalog.claim_generation(tier, "job", generation, None, 1.0)
    store = JobStore(tier, "job", pool)
    store.needs.own(4)
    flush(store, [{"trained": pattern(1)}], CheckpointId(3, 1))
    left = tmp_path / "job" / "g000003" / ".tmp-left"
    left.write_bytes(b"torn")
    collected = store.pruning.collect([], None)
    assert (collected.records, collected.swept) == (0, ())
    store.pruning._began = (prune_module.time.monotonic() + 9, prune_module.time.time() + 9)
    collected = store.pruning.collect([CheckpointId(3, 1)], 2)
    assert collected.records == 1
    assert catalog.listing(tier, "job").generations == {2, 3, 4}
    assert store.pruning.collect([CheckpointId(3, 1)], 9).records == 1
    assert catalog.listing(tier, "job").generations == {3, 4}


def test_a_flush_after_somebody_else_has_claimed_is_fenced_off(pool: ThreadPoolExecutor) -> None:
    """An agent that was replaced writes nothing more on the first tier either; its own claims don't stop it."""
    tier = MemoryTier()
    zombie, heir = JobStore(tier, "job", pool), JobStore(tier, "job", pool)
    assert zombie.claim(1, None)
    flush(zombie, [{"trained": pattern(1)}], CheckpointId(1, 1))
    assert zombie.claim(2, CheckpointId(1, 1))
    flush(zombie, [{"trained": pattern(2)}], CheckpointId(1, 2))
    assert heir.claim(3, CheckpointId(1, 2))
    before = [entry.key for entry in tier.list("")]
    with pytest.raises(FencedError, match="generation 3"):
        flush(zombie, [{"trained": pattern(3)}], CheckpointId(2, 3))
    assert not zombie.claim(3, CheckpointId(1, 2))
    with pytest.raises(FencedError, match="generation 3"):
        flush(zombie, [{"trained": pattern(3)}], CheckpointId(2, 3))
    assert [entry.key for entry in tier.list("")] == before, "written for nothing"
    flush(heir, [{"trained": pattern(4)}], CheckpointId(3, 3))


def test_an_upload_looks_again_before_it_commits(pool: ThreadPoolExecutor) -> None:
    """What another agent prunes during an upload is noticed before the manifest, and so is a newer generation."""
    source = MemoryTier()
    history(JobStore(source, "job", pool))
    last = CheckpointId(1, 4)

    class Pruned(MemoryTier):
        """A tier on which another agent is at work while the last checkpoint's own file arrives."""

        def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
            super().put(key, data, create_only=create_only, pace=pace)
            if key == keys.shard_key("job", last, 0):
                self.delete(keys.shard_key("job", CheckpointId(1, 1), 0))

    target = Pruned()
    upload(source, target, "job", CheckpointId(1, 1))
    with pytest.raises(StoreError, match="is gone"):
        upload(source, target, "job", last)
    assert last not in committed(target)
    upload(source, target, "job", last)
    assert catalog.verify(target, "job", last) == []
    catalog.claim_generation(target, "job", 7, None, 1.0)
    with pytest.raises(FencedError, match="generation 7"):
        upload(source, target, "job", CheckpointId(1, 3), ours=lambda: 1)
    assert CheckpointId(1, 3) not in committed(target)
    upload(source, target, "job", CheckpointId(1, 3), ours=lambda: 7)
