"""Streams of files on tiers: whoever asks, in any order, gets the stored bytes or an error that names the tensor."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import DamagedError, StoreError
from ckptd.storage import catalog, file_stream, keys, manifest
from ckptd.storage.checks import FileChecks, checks_of, units
from ckptd.storage.digest import LEAF_BYTES
from ckptd.storage.file_stream import TierStream, examine, within
from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Cost, Tier
from tests.storage.checkpoints import FIRST, JOB, LATER, fill, flip, good, span

KEY = keys.shard_key(JOB, FIRST, 1)
FILE = KEY.removeprefix(f"{JOB}/")


def checks(checkpoint=FIRST, file: str = FILE) -> FileChecks:
    """What a manifest says about a file."""
    key = keys.manifest_key(JOB, checkpoint)
    return checks_of(catalog.parse_manifest(good()[key], key, JOB, checkpoint), headers=True)[file]


def stream(tier: Tier, **options) -> TierStream:
    """The file as a stream."""
    return TierStream(tier, KEY, tier.size_bytes(KEY), checks(), **options)


class Far(MemoryTier):
    """A tier that says it is far away, and notes what is read of it."""

    capabilities = replace(MemoryTier.capabilities, cost=Cost.NETWORK)

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[tuple[int, int]] = []

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Note it."""
        self.reads.append((offset, len(into)))
        super().read_into(key, offset, into)


@pytest.fixture(params=["local", "far"])
def tier(request, tmp_path: Path) -> Tier:
    """Tiers that are read in units of different sizes."""
    return fill(LocalTier(tmp_path) if request.param == "local" else Far())


def parts(size: int, step: int) -> list[tuple[int, int]]:
    """A file cut as a put cuts it."""
    return [(begin, min(begin + step, size)) for begin in range(0, size, step)]


def read_all(source: TierStream, cuts: Sequence[tuple[int, int]], threads: int) -> bytes:
    """Read all parts with some threads, and put them together."""
    data = bytearray(source.size_bytes)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda cut: source.read_into(cut[0], memoryview(data)[cut[0] : cut[1]]), cuts))
    return bytes(data)


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("step", [2**24, LEAF_BYTES, 2**20 + 17])
@pytest.mark.parametrize("order", ["rising", "falling", "random"])
def test_any_parts_in_any_order(tier: Tier, threads: int, step: int, order: str) -> None:
    """Parts of any size, in any order and from several threads, are the stored bytes."""
    source = stream(tier)
    cuts = parts(source.size_bytes, step)
    if order != "rising":
        cuts.sort(reverse=True)
    if order == "random":
        random.Random(step).shuffle(cuts)
    assert read_all(source, cuts, threads) == good()[KEY]
    assert source.failure is None


@pytest.mark.parametrize("step", [2**24, LEAF_BYTES, 2**20])
def test_in_rising_order_each_byte_is_read_once(step: int) -> None:
    """A put that goes on from beginning to end has the tier read no byte twice, but for blocks at units' ends."""
    far = fill(Far())
    told: list[int] = []
    source = stream(far, progress=told.append)
    read_all(source, parts(source.size_bytes, step), 1)
    assert sum(size for _, size in far.reads) < source.size_bytes + 2 * 4096 * len(far.reads)
    assert len(far.reads) == len({offset for offset, _ in far.reads})
    assert sum(told) == source.size_bytes


def test_progress_counts_each_byte_once() -> None:
    """What is read again is not told of again."""
    told: list[int] = []
    source = stream(fill(MemoryTier()), progress=told.append)
    for _ in range(3):
        read_all(source, parts(source.size_bytes, 2**24), 3)
    assert sum(told) == source.size_bytes


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for a bit of every unit, in the worst order, a stream holds no more than a few units."""
    monkeypatch.setattr(file_stream, "_KEPT_BYTES", 2 * LEAF_BYTES)
    source = stream(fill(MemoryTier()))
    for begin, _ in parts(source.size_bytes, 2**20):
        source.read_into(begin, memoryview(bytearray(1)))
        assert len(source._loaded) <= 2
    assert len(source._free) <= 2


_HEADER = (0, span(KEY, "step")[0])
_PLACES = {
    "the first byte": (0, "header"),
    "the header's padding": (_HEADER[1] - 1, "header"),
    "the first byte of a tensor": (span(KEY, "weight")[0], "'weight'"),
    "a leaf in the middle": (span(KEY, "weight")[0] + LEAF_BYTES + 5, "'weight'"),
    "the last byte of a tensor": (span(KEY, "head")[1] - 1, "'head'"),
    "the values": (span(KEY, "__ckptd__.values")[0] + 3, "'__ckptd__.values'"),
    "the last byte": (len(good()[KEY]) - 1, "'__ckptd__.values'"),
}


@pytest.mark.parametrize("place", sorted(_PLACES))
@pytest.mark.parametrize("step", [2**24, LEAF_BYTES])
@pytest.mark.parametrize("threads", [1, 4])
def test_damage_is_never_given_out(tier: Tier, place: str, step: int, threads: int) -> None:
    """Whoever asks for a damaged byte gets an error that names file and tensor; every other part is right."""
    at, says = _PLACES[place]
    flip(tier, KEY, at)
    source = stream(tier)
    failed: list[DamagedError] = []

    def read(cut: tuple[int, int]) -> None:
        data = bytearray(cut[1] - cut[0])
        try:
            source.read_into(cut[0], memoryview(data))
        except DamagedError as error:
            failed.append(error)
        else:
            assert not cut[0] <= at < cut[1]
            assert data == good()[KEY][cut[0] : cut[1]]

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, parts(source.size_bytes, step)))
    assert failed
    assert all(KEY in error.message and says in error.message for error in failed)
    assert isinstance(source.failure, DamagedError)


def test_what_was_read_well_is_checked_when_it_is_read_again() -> None:
    """A part that is asked for again, after the bytes have changed, is checked again."""
    tier = fill(MemoryTier())
    source = stream(tier)
    cuts = parts(source.size_bytes, 2**24)
    read_all(source, cuts, 1)
    flip(tier, KEY, span(KEY, "head")[0])
    with pytest.raises(DamagedError, match="'head'"):
        read_all(source, cuts, 1)


def test_a_unit_that_failed_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of the tier the same part can be asked for again, and is right."""
    tier = fill(MemoryTier())
    source = stream(tier)
    with monkeypatch.context() as patched:

        def fail(key: str, offset: int, into: memoryview) -> None:
            raise StoreError("no route to host")

        patched.setattr(tier, "read_into", fail)
        with pytest.raises(StoreError):
            source.read_into(0, memoryview(bytearray(10)))
    assert read_all(source, parts(source.size_bytes, 2**24), 1) == good()[KEY]


@pytest.mark.parametrize("size", [0, 1, len(good()[KEY]) - 1, len(good()[KEY]) + 1])
def test_a_file_of_another_size_is_damaged(size: int) -> None:
    """A file of the checkpoint's own with another size is no stream at all."""
    with pytest.raises(DamagedError, match=f"{size} bytes where the manifest says"):
        TierStream(MemoryTier(), KEY, size, checks())


def test_a_file_of_another_checkpoint() -> None:
    """Of a file that is referred to, what is needed is checked and its end may be anywhere behind that."""
    tier = fill(MemoryTier())
    wanted = checks(LATER)
    flip(tier, KEY, span(KEY, "head")[0])  # which the later checkpoint does not need
    source = TierStream(tier, KEY, tier.size_bytes(KEY), wanted)
    assert read_all(source, parts(source.size_bytes, 2**24), 2) == tier.get(KEY)
    flip(tier, KEY, span(KEY, "bias")[0])
    with pytest.raises(DamagedError, match="'bias'"):
        read_all(TierStream(tier, KEY, tier.size_bytes(KEY), wanted), parts(source.size_bytes, 2**24), 2)
    with pytest.raises(DamagedError, match="too short for tensor"):
        TierStream(tier, KEY, span(KEY, "weight")[1] - 1, wanted)


def test_a_manifest_that_contradicts_itself_vouches_for_nothing() -> None:
    """Digests of leaves that don't make up the tensor's, or of no bytes, are damage of the manifest."""
    loaded = manifest.parse(good()[keys.manifest_key(JOB, FIRST)], "")
    for name in ("weight", "empty"):
        tensor = loaded.tensors[name]
        wrong = tuple(chunk._replace(digest="0" * 32) for chunk in tensor.chunks)
        changed = replace(loaded, tensors={**loaded.tensors, name: replace(tensor, chunks=wrong)})
        found = checks_of(changed, headers=True)[FILE]
        with pytest.raises(DamagedError, match="the manifest can't vouch for"):
            TierStream(fill(MemoryTier()), KEY, len(good()[KEY]), found)


def test_units_cover_a_file() -> None:
    """Units lie side by side, cover every byte, and no leaf lies across their ends."""
    for checkpoint in (FIRST, LATER):
        found = units(checks(checkpoint), len(good()[KEY]), LEAF_BYTES, gaps=True)
        assert [unit.end for unit in found] == [*(unit.begin for unit in found[1:]), len(good()[KEY])]
        assert found[0].begin == 0
        assert all(0 < unit.end - unit.begin <= LEAF_BYTES for unit in found)
        assert sum(len(unit.checks) for unit in found) == len(checks(checkpoint).checks)


def test_examine_reads_only_what_is_needed() -> None:
    """Of a file that is referred to, what the checkpoint does not need is not read."""
    far = fill(Far())
    assert examine(far, KEY, checks(LATER)) == []
    assert sum(size for _, size in far.reads) < span(KEY, "weight")[1] + 2**20


def test_a_call_that_hangs_is_left_alone() -> None:
    """A tier that does not answer in time is an error that says where; what it raises and returns comes through."""
    release = threading.Event()
    with pytest.raises(StoreError, match=r"no answer from s3://b/k for 0.05 s") as caught:
        within(0.05, "s3://b/k", release.wait)
    release.set()
    assert caught.value.retryable
    assert within(5.0, "", lambda: 3) == 3
    short = MemoryTier()
    short.put(KEY, b"short")
    with pytest.raises(DamagedError):
        within(5.0, "", lambda: stream(short))
