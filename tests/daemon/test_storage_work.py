"""The work of the storage threads, on a real local tier with images made by hand."""

from __future__ import annotations

import gc
import json
import mmap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptd.core.events import Flush
from ckptd.daemon import storage_work
from ckptd.errors import CkptdError, ConfigError, DamagedError, FencedError, NotFoundError, StoreError
from ckptd.storage import catalog, image, keys
from ckptd.storage.local import LocalTier
from ckptd.storage.tier import Buffer
from ckptd.types import CheckpointId

NOW = CheckpointId(2, 40)


class FailingTier(LocalTier):
    """A local tier that fails to write or read one rank's shard; other ranks' shards take a while."""

    def __init__(self, root: Path, broken_rank: int) -> None:
        super().__init__(root)
        self._broken = keys.shard_file(broken_rank)
        self.busy = 0
        self._lock = threading.Lock()

    def _count(self, change: int) -> None:
        with self._lock:
            self.busy += change

    def put(self, key: str, data: Buffer, *, create_only: bool = False) -> None:
        if key.endswith(self._broken):
            raise StoreError("the disk is full")
        self._count(1)
        time.sleep(0.1)
        super().put(key, data, create_only=create_only)
        self._count(-1)

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        if key.endswith(self._broken):
            raise StoreError("the disk is broken")
        self._count(1)
        time.sleep(0.1)
        super().read_into(key, offset, into)
        self._count(-1)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """The storage threads."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


@pytest.fixture
def tier(tmp_path: Path) -> LocalTier:
    """An empty store."""
    return LocalTier(tmp_path)


def make_image(rank: int, size: int = 3000) -> bytearray:
    """Return an image as a rank would write it: one tensor of its own bytes, and some values."""
    specs = [image.TensorSpec("weight", "U8", (size,)), image.TensorSpec("step", "I64", ())]
    layout = image.plan(specs, 100, {"ckptd.framework": "bytes"})
    data = bytearray(layout.image_bytes)
    data[: len(layout.header)] = layout.header
    for span in layout.spans[:-1]:
        data[span.begin : span.end] = bytes((rank + at) % 251 for at in range(span.end - span.begin))
    image.write_values(memoryview(data), layout.values, json.dumps({"rank": rank}).encode())
    return data


def images(count: int = 2) -> dict[int, memoryview]:
    """Return the images of so many ranks."""
    return {rank: memoryview(make_image(rank)) for rank in range(count)}


def order(shards: dict[int, memoryview], checkpoint: CheckpointId = NOW) -> Flush:
    """Return the order to flush them."""
    sizes = {rank: len(data) for rank, data in shards.items()}
    return Flush(checkpoint, CheckpointId(1, 30), dict.fromkeys(shards, 0), sizes, {"loss": 0.5})


def committed(tier: LocalTier) -> tuple[CheckpointId, ...]:
    """Return what is committed."""
    return catalog.holdings(tier, "job").committed


def test_what_is_flushed_is_fetched(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """A flush commits every byte and a fetch brings the same bytes back, with manifest, parent, values and digests."""
    shards = images(3)
    result = storage_work.flush(tier, "job", order(shards), shards, pool)
    assert result.size_bytes == sum(len(data) for data in shards.values())
    assert committed(tier) == (NOW,)
    loaded = storage_work.load_manifest(tier, "job", NOW, 3)
    assert (loaded.parent, loaded.values, loaded.world_size) == (CheckpointId(1, 30), {"loss": 0.5}, 3)
    assert {shard.rank: dict(shard.tensor_digests) for shard in loaded.shards} == result.digests
    places = {rank: memoryview(bytearray(b"\xff" * (len(data) + 5000))) for rank, data in shards.items()}
    storage_work.fetch(tier, "job", loaded, places, pool)
    for rank, data in shards.items():
        assert places[rank][: len(data)] == data
        assert places[rank][len(data) :] == b"\xff" * 5000
    assert not list(tier.root.rglob(".tmp-*"))


@pytest.mark.parametrize("broken_rank", [0, 1, 2])
def test_a_shard_that_can_not_be_written_commits_nothing(
    tmp_path: Path, pool: ThreadPoolExecutor, broken_rank: int
) -> None:
    """When any shard fails there is no manifest; and the flush ends only when nobody reads the slots any more."""
    tier = FailingTier(tmp_path, broken_rank)
    shards = images(3)
    with pytest.raises(StoreError, match="the disk is full"):
        storage_work.flush(tier, "job", order(shards), shards, pool)
    assert tier.busy == 0
    assert committed(tier) == ()
    result = storage_work.flush(LocalTier(tmp_path), "job", order(shards), shards, pool)
    assert result.size_bytes > 0
    assert committed(tier) == (NOW,)


def test_an_image_that_is_none_commits_nothing(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """A slot that holds no complete image is an error that says so, and nothing is committed."""
    shards = images(2)
    shards[1] = memoryview(bytearray(8192))
    with pytest.raises(DamagedError, match="shard"):
        storage_work.flush(tier, "job", order(shards), shards, pool)
    assert committed(tier) == ()


def test_a_step_is_committed_once(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """A second commit of the same step of the same generation is fenced off."""
    shards = images()
    storage_work.flush(tier, "job", order(shards), shards, pool)
    with pytest.raises(FencedError):
        storage_work.flush(tier, "job", order(shards), shards, pool)


def memory(size: int) -> mmap.mmap:
    """Return memory that complains when it is closed while somebody looks at it."""
    return mmap.mmap(-1, size)


@pytest.mark.parametrize("verb", ["flush", "fetch"])
def test_a_failure_lets_go_of_the_slots(tmp_path: Path, pool: ThreadPoolExecutor, verb: str) -> None:
    """After a failed flush or fetch nothing holds a view of a slot, even before the next garbage collection."""
    data = {rank: make_image(rank) for rank in range(2)}
    slots = {rank: memory(len(item)) for rank, item in data.items()}
    for rank, slot in slots.items():
        slot[:] = bytes(data[rank])
    views = {rank: memoryview(slot) for rank, slot in slots.items()}
    storage_work.flush(LocalTier(tmp_path), "job", order(views, CheckpointId(1, 1)), views, pool)
    loaded = storage_work.load_manifest(LocalTier(tmp_path), "job", CheckpointId(1, 1), 2)
    tier = FailingTier(tmp_path, 0)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(StoreError):
            if verb == "flush":
                storage_work.flush(tier, "job", order(views), views, pool)
            else:
                storage_work.fetch(tier, "job", loaded, views, pool)
        del views
        for slot in slots.values():
            slot.close()
    finally:
        gc.enable()


def test_a_generation_has_one_winner(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """Of several agents that claim a generation at the same moment exactly one gets it, with its own parent."""
    together = threading.Barrier(4)

    def claim(step: int) -> bool:
        together.wait()
        return storage_work.claim(tier, "job", 3, CheckpointId(1, step))

    wins = list(pool.map(claim, range(4)))
    assert sorted(wins) == [False, False, False, True]
    assert catalog.holdings(tier, "job").parents == {3: CheckpointId(1, wins.index(True))}
    assert not storage_work.claim(tier, "job", 3, None)
    assert storage_work.claim(tier, "job", 4, None)


def test_another_world_size_is_refused_with_the_right_one(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """A checkpoint of three ranks can't be restored by two, and the hint names the number that can."""
    shards = images(3)
    storage_work.flush(tier, "job", order(shards), shards, pool)
    with pytest.raises(ConfigError, match="g2/s40 was written by 3 ranks and can't be restored by 2") as refused:
        storage_work.load_manifest(tier, "job", NOW, 2)
    assert refused.value.hint == "run with --nproc 3"


@pytest.mark.parametrize("damage", ["short", "long", "tensor", "header", "missing"])
def test_a_damaged_shard_is_named(tier: LocalTier, pool: ThreadPoolExecutor, damage: str) -> None:
    """A shard that is not what was committed fails the fetch with its file's name, whatever happened to it."""
    shards = images()
    storage_work.flush(tier, "job", order(shards), shards, pool)
    loaded = storage_work.load_manifest(tier, "job", NOW, 2)
    path = tier.root / keys.shard_key("job", NOW, 1)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(data[:-1])
    elif damage == "long":
        path.write_bytes(data + b"x")
    else:
        data[20 if damage == "header" else 4196] ^= 1
        path.write_bytes(data)
    places = {rank: memoryview(bytearray(len(item))) for rank, item in shards.items()}
    with pytest.raises(CkptdError, match=r"rank-00001\.safetensors") as failed:
        storage_work.fetch(tier, "job", loaded, places, pool)
    assert isinstance(failed.value, NotFoundError if damage == "missing" else DamagedError)


def test_an_empty_store_has_nothing(tier: LocalTier) -> None:
    """A job that never ran has no source and no generation."""
    read = storage_work.read_store(tier, "job")
    assert (read.sources, read.last_generation) == ((), 0)


def test_the_store_is_read_in_the_order_of_the_lineage(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """What the store holds comes newest first, without the steps that a later generation has left behind."""
    shards = images(1)
    first, lost, second = CheckpointId(1, 10), CheckpointId(1, 20), CheckpointId(2, 15)
    assert storage_work.claim(tier, "job", 1, None)
    for checkpoint in (first, lost):
        storage_work.flush(tier, "job", order(shards, checkpoint), shards, pool)
    assert storage_work.claim(tier, "job", 2, first)
    storage_work.flush(tier, "job", order(shards, second), shards, pool)
    assert storage_work.claim(tier, "job", 5, second)
    read = storage_work.read_store(tier, "job")
    assert [source.id for source in read.sources] == [second, first]
    assert {source.tier for source in read.sources} == {"local"}
    assert read.last_generation == 5


def test_prune_removes_what_it_can(tier: LocalTier, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that can't be removed keeps no other, and its error is returned rather than raised."""
    shards = images(1)
    ids = [CheckpointId(1, step) for step in (1, 2, 3)]
    for checkpoint in ids:
        storage_work.flush(tier, "job", order(shards, checkpoint), shards, pool)
    delete = catalog.delete

    def stubborn(where: LocalTier, job: str, checkpoint: CheckpointId) -> None:
        if checkpoint == ids[0]:
            raise StoreError("it won't go")
        delete(where, job, checkpoint)

    monkeypatch.setattr(catalog, "delete", stubborn)
    assert str(storage_work.prune(tier, "job", ids[:2])) == "it won't go"
    assert committed(tier) == (ids[0], ids[2])
    monkeypatch.undo()
    assert storage_work.prune(tier, "job", ids[:2]) is None
    assert committed(tier) == (ids[2],)
