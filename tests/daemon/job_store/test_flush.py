"""What an agent does with a tier: flush, offer, and the job's generations; images are made by hand."""

from __future__ import annotations

import gc
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.daemon.job_store import JobStore
from ckptd.errors import DamagedError, FencedError, NotFoundError, StateError, StoreError
from ckptd.storage import catalog, keys, manifest
from ckptd.storage.digest import LEAF_BYTES, tensor_digest
from ckptd.storage.local import LocalTier
from ckptd.types import CheckpointId, Piece
from tests.daemon.job_store.stored import (
    NOW,
    FailingTier,
    State,
    committed,
    flush,
    images,
    make_image,
    order,
    pattern,
    prune,
    referred,
)


def test_what_is_flushed_can_be_read(tier: LocalTier, store: JobStore) -> None:
    """A flush commits every byte, manifest, parent and values; where nothing repeats, a file is the slot's image."""
    shards = images(3)
    result = store.flush(order(shards, parent=CheckpointId(1, 30)), shards)
    assert result.size_bytes == sum(len(data) for data in shards.values())
    assert committed(tier) == (NOW,)
    loaded = catalog.load_manifest(tier, "job", NOW)
    assert (loaded.parent, loaded.values, loaded.world_size) == (CheckpointId(1, 30), {"loss": 0.5}, 3)
    for rank, data in shards.items():
        assert (tier.root / keys.shard_key("job", NOW, rank)).read_bytes() == data
    assert catalog.verify(tier, "job", NOW) == []
    assert not list(tier.root.rglob(".tmp-*"))


def test_the_memory_document_is_that_of_the_slots(tier: LocalTier, store: JobStore) -> None:
    """Each byte range of the document for memory, with its digests, is what lies in the slot, whatever was written."""
    states: list[State] = [{"frozen": pattern(1, 2 * LEAF_BYTES + 5), "trained": pattern(2)}, {"frozen": pattern(3)}]
    flush(store, states, CheckpointId(2, 1))
    shards = {rank: make_image(state, json.dumps("v" * 5000).encode()) for rank, state in enumerate(states)}
    result = store.flush(order(shards), shards)
    assert referred(catalog.load_manifest(tier, "job", NOW))
    for document, digested in ((result.document, True), (store.snapshot_document(order(shards), shards), False)):
        loaded = manifest.parse(document, "memory")
        assert (loaded.id, loaded.values, loaded.size_bytes) == (NOW, {"loss": 0.5}, sum(map(len, shards.values())))
        assert not referred(loaded)
        for tensor in loaded.tensors.values():
            for chunk in tensor.chunks:
                found = tensor_digest(shards[chunk.shard][chunk.begin : chunk.end])
                assert (chunk.digest, chunk.leaves) == (found if digested else (None, ()))


@pytest.mark.parametrize("broken_rank", [0, 1, 2])
@pytest.mark.parametrize("again", [False, True])
def test_a_shard_that_can_not_be_written_commits_nothing(
    tmp_path: Path, pool: ThreadPoolExecutor, broken_rank: int, again: bool
) -> None:
    """When any shard fails there is no manifest; and the flush ends only when nobody reads the slots any more."""
    tier = FailingTier(tmp_path, broken_rank)
    store = JobStore(tier, "job", pool)
    shards = images(3)
    if again:
        assert JobStore(LocalTier(tmp_path), "job", pool).flush(order(shards, CheckpointId(1, 1)), shards)
    parent = CheckpointId(1, 1) if again else None
    with pytest.raises(StoreError, match="the disk is full"):
        store.flush(order(shards, parent=parent), shards)
    assert tier.busy == 0
    assert NOW not in committed(tier)
    assert JobStore(LocalTier(tmp_path), "job", pool).flush(order(shards, parent=parent), shards)
    assert NOW in committed(tier)
    assert catalog.verify(tier, "job", NOW) == []


def test_an_image_that_is_none_commits_nothing(tier: LocalTier, store: JobStore) -> None:
    """A slot that holds no complete image is an error that says so, and nothing is committed."""
    shards = images(2)
    shards[1] = memoryview(bytearray(8192))
    with pytest.raises(DamagedError, match="shard"):
        store.flush(order(shards), shards)
    assert committed(tier) == ()


def test_ranks_that_do_not_fit_together_commit_nothing(tier: LocalTier, store: JobStore) -> None:
    """Parts that leave out a piece of a tensor of the job are an error that names it, and nothing is committed."""
    shards = {0: make_image({"w": pattern(1)}, pieces={"w": Piece("w", (6001,), (0,))})}
    with pytest.raises(StateError, match="'w'"):
        store.flush(order(shards), shards)
    assert committed(tier) == ()


def test_a_step_is_committed_once(tier: LocalTier, store: JobStore) -> None:
    """A second commit of the same step of the same generation is fenced off, and its files stay what they were."""
    shards = images()
    store.flush(order(shards), shards)
    other = {rank: make_image({"weight": pattern(77)}) for rank in shards}
    with pytest.raises(FencedError):
        store.flush(order(other), other)
    assert catalog.verify(tier, "job", NOW) == []


@pytest.mark.parametrize("repeated", [False, True])
def test_a_failure_lets_go_of_the_slots(tmp_path: Path, pool: ThreadPoolExecutor, repeated: bool) -> None:
    """After a failed flush nothing holds a view of a slot, not even the error, and without a garbage collection."""
    states = [{"weight": pattern(rank), "other": pattern(rank + 10)} for rank in range(2)]
    store = JobStore(LocalTier(tmp_path), "job", pool)
    flush(store, states, CheckpointId(2, 1))
    views = {rank: make_image(state) for rank, state in enumerate(states)}
    if not repeated:
        store = JobStore(LocalTier(tmp_path), "job", pool)
    store.tier = FailingTier(tmp_path, 0)
    maps = [view.obj for view in views.values()]
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(StoreError) as kept:
            store.flush(order(views), dict(views))
        for view in views.values():
            view.release()
        for item in maps:
            item.close()  # complains while anybody looks at it
    finally:
        gc.enable()
    assert kept.value.message == "the disk is full"


@pytest.mark.parametrize("describe", [False, True])
def test_an_image_that_is_none_is_let_go(store: JobStore, describe: bool) -> None:
    """The error that says that a slot holds no image refers to no slot, be it flushed or described."""
    view = make_image({"weight": pattern(1)})
    view[:64] = bytes(64)
    item = view.obj
    with pytest.raises(DamagedError) as kept:
        if describe:
            store.snapshot_document(order({0: view}), {0: view})
        else:
            store.flush(order({0: view}), {0: view})
    view.release()
    item.close()  # complains while anybody looks at it
    assert "header" in kept.value.message


def test_one_thread_is_enough(tier: LocalTier) -> None:
    """A flush needs no more threads than there are: it waits for none of its own parts in the pool."""
    with ThreadPoolExecutor(1) as one:
        store = JobStore(tier, "job", one)
        for step in (1, 2):
            states = [{"frozen": pattern(rank, 9000), "own": pattern(10 * step + rank)} for rank in range(3)]
            flush(store, states, CheckpointId(1, step))
            assert catalog.verify(tier, "job", CheckpointId(1, step)) == []
    assert len(referred(catalog.load_manifest(tier, "job", CheckpointId(1, 2)))) == 3


def test_bandwidth_is_asked_for(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """Every byte of every shard is asked for before it is written."""
    asked: list[int] = []
    shards = images()
    JobStore(tier, "job", pool, pace=asked.append).flush(order(shards), shards)
    assert sum(asked) == sum(len(data) for data in shards.values())


# --- offers -----------------------------------------------------------------------------------------------------


def test_an_offer_is_the_manifest(tier: LocalTier, store: JobStore) -> None:
    """What is offered is what is committed, and its files can be opened by the names in it, after a prune too."""
    for step in (1, 2):
        flush(store, [{"frozen": pattern(1, 9000), "trained": pattern(10 + step)}], CheckpointId(1, step))
    loaded = manifest.parse(store.check_offer(CheckpointId(1, 2)), "offer")
    assert loaded == catalog.load_manifest(tier, "job", CheckpointId(1, 2))
    assert len(loaded.files) == 2
    opened = {file: store.open(file) for file in loaded.files}
    try:
        assert prune(store, [CheckpointId(1, 1), CheckpointId(1, 2)], []) is None
        (chunk,) = loaded.tensors["frozen"].chunks
        assert os.pread(opened[chunk.file], chunk.end - chunk.begin, chunk.begin) == pattern(1, 9000)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


@pytest.mark.parametrize("which", ["own", "referred"])
@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_a_checkpoint_without_all_its_bytes_is_not_offered(
    tier: LocalTier, store: JobStore, which: str, damage: str
) -> None:
    """A file that is missing or too short, own or referred to, is named before anybody restores from it."""
    for step in (1, 2):
        flush(store, [{"frozen": pattern(1, 9000), "trained": pattern(10 + step)}], CheckpointId(1, step))
    path = tier.root / keys.shard_key("job", CheckpointId(1, 2 if which == "own" else 1), 0)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data + b"x" if damage == "long" else data[:5000])
    if (which, damage) == ("referred", "long"):
        assert store.check_offer(CheckpointId(1, 2))
        return
    with pytest.raises(NotFoundError if damage == "missing" else DamagedError, match=str(path)):
        store.check_offer(CheckpointId(1, 2))


@pytest.mark.parametrize(
    "file", ["", "/etc/passwd", "../x", "g000001/generation.json", "g000001/s000000000001/../../../etc/passwd"]
)
def test_only_shards_can_be_opened(store: JobStore, file: str) -> None:
    """A rank can't open anything of the agent's that is no shard of its own job."""
    flush(store, [{"x": pattern(1)}], CheckpointId(1, 1))
    with pytest.raises(NotFoundError, match="no file"):
        store.open(file)


# --- the job on the tier ----------------------------------------------------------------------------------------


def test_a_generation_has_one_winner(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """Of several agents that claim a generation at the same moment exactly one gets it, with its own parent."""
    together = threading.Barrier(4)

    def claim(step: int) -> bool:
        store = JobStore(tier, "job", pool)
        together.wait()
        return store.claim(3, CheckpointId(1, step))

    wins = list(pool.map(claim, range(4)))
    assert sorted(wins) == [False, False, False, True]
    assert catalog.holdings(tier, "job").parents == {3: CheckpointId(1, wins.index(True))}
    assert not JobStore(tier, "job", pool).claim(3, None)
    assert JobStore(tier, "job", pool).claim(4, None)
