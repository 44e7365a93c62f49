"""Unchanged and equal tensors are written once, and every checkpoint stays whole whatever it refers to."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ckptd.daemon.job_store import JobStore
from ckptd.storage import catalog, image, keys
from ckptd.storage.image import VALUES_NAME
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.types import CheckpointId, Piece
from tests.daemon.job_store.stored import (
    NOW,
    State,
    committed,
    flush,
    make_image,
    order,
    pattern,
    prune,
    read_back,
    referred,
    shard_files,
)


def test_unchanged_tensors_are_not_written_again(tier: LocalTier, store: JobStore) -> None:
    """Of a state of which 95 % never change, the next checkpoints write at most 10 %, and all are intact."""
    frozen = {f"frozen-{at}": pattern(at, 100_000) for at in range(19)}
    for step in range(1, 5):
        states = [{**frozen, "trained": pattern(step, 50_000)}, {"trained-1": pattern(100 + step, 50_000)}]
        result = flush(store, states, CheckpointId(1, step))
        loaded = catalog.load_manifest(tier, "job", CheckpointId(1, step))
        assert result.size_bytes == loaded.size_bytes
        if step > 1:
            assert result.size_bytes <= 0.1 * loaded.state_bytes
            assert referred(loaded) == {(0, name) for name in frozen}
            assert loaded.files - {shard.file for shard in loaded.shards} == {
                keys.folder(CheckpointId(1, 1)) + keys.shard_file(0)
            }
        assert read_back(tier, CheckpointId(1, step)) == states
        assert catalog.verify(tier, "job", CheckpointId(1, step)) == []


def test_a_packed_file_is_a_safetensors_file(tier: LocalTier, store: JobStore) -> None:
    """The `safetensors` library opens a file without what is referred to, and finds the rest and the values."""
    pieces = {"part": Piece("whole", (3000,), (0,))}
    for step in (1, 2):
        state = {"frozen": pattern(1, 9000), "trained": pattern(10 + step), "part": pattern(20 + step)}
        shards = {0: make_image(state, b"hello" * 1000, pieces)}
        store.flush(order(shards, CheckpointId(1, step)), shards)
    path = tier.root / keys.shard_key("job", CheckpointId(1, 2), 0)
    assert path.stat().st_size % image.BLOCK_BYTES == 0
    loaded = safetensors.numpy.load_file(path)
    assert set(loaded) == {"trained", "part", VALUES_NAME}
    assert {name: loaded[name].tobytes() for name in ("trained", "part")} == {
        name: state[name] for name in ("trained", "part")
    }
    layout = image.parse(memoryview(path.read_bytes()))
    assert image.read_values(memoryview(path.read_bytes()), layout.values) == b"hello" * 1000
    assert layout.metadata["ckptd.framework"] == "bytes"
    assert {span.name: span.piece for span in layout.spans if span.piece} == pieces


def test_equal_tensors_of_several_ranks_are_written_once(tier: LocalTier, store: JobStore) -> None:
    """What ranks hold alike is written by the lowest of them, from the first checkpoint on, also as it changes."""
    for step in range(1, 4):
        states = [{"same": pattern(step, 50_000), "own": pattern(100 * step + rank)} for rank in range(3)]
        result = flush(store, states, CheckpointId(1, step))
        assert result.size_bytes < 80_000
        assert referred(catalog.load_manifest(tier, "job", CheckpointId(1, step))) == {(1, "same"), (2, "same")}
        assert read_back(tier, CheckpointId(1, step)) == states
        assert catalog.verify(tier, "job", CheckpointId(1, step)) == []


def test_what_freezes_later_is_noticed(tier: LocalTier, store: JobStore) -> None:
    """A tensor that stops to change is written once more, and then referred to; one that thaws is written again."""
    for step, (seed, is_referred) in enumerate(
        [(1, False), (2, False), (2, False), (2, True), (3, False), (3, False), (3, True)]
    ):
        flush(store, [{"some": pattern(seed, 9000), "other": pattern(100 + step)}], CheckpointId(1, step))
        assert bool(referred(catalog.load_manifest(tier, "job", CheckpointId(1, step)))) == is_referred


def test_a_generation_refers_to_what_it_began_with(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """A new agent refers to the checkpoint that its generation began with, and to nothing that was left behind."""
    old = JobStore(tier, "job", pool)
    first, left, now = CheckpointId(1, 10), CheckpointId(1, 20), CheckpointId(2, 11)
    flush(old, [{"frozen": pattern(1, 9000), "trained": pattern(2)}], first)
    flush(old, [{"frozen": pattern(3, 9000), "trained": pattern(4)}], left)
    for store in (old, JobStore(tier, "job", pool)):
        for seed, is_referred in ((1, True), (3, False)):
            now = CheckpointId(now.generation + 1, now.step)
            flush(store, [{"frozen": pattern(seed, 9000), "trained": pattern(5)}], now, parent=first)
            assert bool(referred(catalog.load_manifest(tier, "job", now))) == is_referred
            assert catalog.verify(tier, "job", now) == []


@pytest.mark.parametrize("damage", ["no parent", "no manifest", "no JSON", "no file"])
def test_a_parent_that_can_not_be_read_is_not_referred_to(
    tier: LocalTier, pool: ThreadPoolExecutor, damage: str
) -> None:
    """Whatever is wrong with the checkpoint that a generation began with, the next one is whole without it."""
    first = CheckpointId(1, 10)
    state = {"frozen": pattern(1, 9000)}
    flush(JobStore(tier, "job", pool), [state], first)
    if damage == "no manifest":
        tier.delete(keys.manifest_key("job", first))
    elif damage == "no JSON":
        tier.put(keys.manifest_key("job", first), b"{")
    elif damage == "no file":
        tier.delete(keys.shard_key("job", first, 0))
    flush(JobStore(tier, "job", pool), [state], NOW, parent=None if damage == "no parent" else first)
    assert not referred(catalog.load_manifest(tier, "job", NOW))
    assert catalog.verify(tier, "job", NOW) == []


@pytest.mark.parametrize("damage", ["wiped", "one file gone", "cut"])
def test_what_somebody_has_removed_is_not_referred_to(tier: LocalTier, store: JobStore, damage: str) -> None:
    """When files of the last checkpoint go while the job runs, the next one is whole without them."""
    state = {"frozen": pattern(1, 9000)}
    flush(store, [state, {"own": pattern(2)}], CheckpointId(1, 1))
    flush(store, [state, {"own": pattern(3)}], CheckpointId(1, 2))
    assert referred(catalog.load_manifest(tier, "job", CheckpointId(1, 2)))
    first = tier.root / keys.shard_key("job", CheckpointId(1, 1), 0)
    if damage == "wiped":
        shutil.rmtree(tier.root / "job")
    elif damage == "one file gone":
        first.unlink()
    else:
        os.truncate(first, first.stat().st_size - 1)
    for step in (3, 4):
        flush(store, [state, {"own": pattern(step)}], CheckpointId(1, step))
        loaded = catalog.load_manifest(tier, "job", CheckpointId(1, step))
        assert bool(referred(loaded)) == (step == 4)
        assert catalog.verify(tier, "job", CheckpointId(1, step)) == []


def test_plain_files_on_request(tier: LocalTier, pool: ThreadPoolExecutor) -> None:
    """With reuse off every file is the slot's image, whatever repeats."""
    store = JobStore(tier, "job", pool, reuse=False)
    for step in (1, 2):
        shards = {rank: make_image({"frozen": pattern(1, 9000)}) for rank in range(2)}
        store.flush(order(shards, CheckpointId(1, step)), shards)
        for rank, data in shards.items():
            assert (tier.root / keys.shard_key("job", CheckpointId(1, step), rank)).read_bytes() == data


def test_damage_shows_wherever_it_is_referred_to(tier: LocalTier, store: JobStore) -> None:
    """A flipped bit in an old file is found by `verify` of every checkpoint that names it, and of no other."""
    for step in range(1, 5):
        flush(
            store,
            [{"frozen": pattern(1 if step < 4 else 9, 9000), "trained": pattern(10 + step)}],
            CheckpointId(1, step),
        )
    path = tier.root / keys.shard_key("job", CheckpointId(1, 1), 0)
    data = bytearray(path.read_bytes())
    data[data.index(pattern(1, 100)) + 50] ^= 4
    path.write_bytes(data)
    for step in range(1, 5):
        problems = catalog.verify(tier, "job", CheckpointId(1, step))
        assert bool(problems) == (step < 4)
        assert all("'frozen'" in problem and "s000000000001/rank-00000" in problem for problem in problems)


# --- any history ------------------------------------------------------------------------------------------------

_SIZES = {"none": 0, "a": 1, "b": 40, "c": 3000, "d": 9000, "shared": 3000}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_history_keeps_what_it_keeps(pool: ThreadPoolExecutor, data: st.DataObject) -> None:
    """However tensors change, generations begin and checkpoints are pruned, every kept one is bit for bit what it was.

    And when all are pruned, nothing is left but the records of the generations.
    """
    tier = MemoryTier()
    store = JobStore(tier, "job", pool)
    kept: dict[CheckpointId, list[State]] = {}
    generation, step, parent = 0, 0, None
    world_size = data.draw(st.integers(1, 3))
    states: list[dict[str, bytes]] = []
    for _ in range(data.draw(st.integers(2, 10))):
        if not generation or data.draw(st.integers(0, 4)) == 0:  # another generation, maybe of another size
            generation += 1
            parent = data.draw(st.sampled_from([None, *kept]))
            store = JobStore(tier, "job", pool) if data.draw(st.booleans()) else store
            assert store.claim(generation, parent)
            world_size = data.draw(st.integers(1, 3))
            states = [
                {name: pattern(data.draw(st.integers(0, 5)), size) for name, size in _SIZES.items()}
                for _ in range(world_size)
            ]
        for state in states:
            for name in state:
                if data.draw(st.integers(0, 3)) == 0:
                    state[name] = pattern(data.draw(st.integers(0, 9)), len(state[name]))
        step += 1
        checkpoint = CheckpointId(generation, step)
        flush(store, list(states), checkpoint, parent)
        kept[checkpoint] = [dict(state) for state in states]
        gone = [checkpoint for checkpoint in kept if data.draw(st.integers(0, 3)) == 0]
        for pruned in gone:
            del kept[pruned]
        assert prune(store, gone, list(kept)) is None
        assert committed(tier) == tuple(sorted(kept))
        for checkpoint, wanted in kept.items():
            assert catalog.verify(tier, "job", checkpoint) == []
            assert read_back(tier, checkpoint) == wanted
        loaded = [catalog.load_manifest(tier, "job", checkpoint) for checkpoint in kept]
        assert shard_files(tier) == {file for item in loaded for file in item.files}
    assert prune(store, list(kept), []) is None
    assert all(keys.parse_generation_key(key) for key in tier.objects)
