"""What tests of the flush and the prune share: images made by hand, and looks at what a tier holds."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ckptd.core.events import Flush
from ckptd.daemon.job_store import FlushResult, JobStore
from ckptd.errors import CkptdError, StoreError
from ckptd.storage import catalog, image, keys
from ckptd.storage.image import VALUES_NAME, TensorSpec
from ckptd.storage.local import LocalTier
from ckptd.storage.manifest import Manifest
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.types import CheckpointId, Piece

NOW = CheckpointId(2, 40)
State = Mapping[str, bytes]


class FailingTier(LocalTier):
    """A local tier that fails to write one rank's shard; other ranks' shards take a while."""

    def __init__(self, root: Path, broken_rank: int) -> None:
        super().__init__(root)
        self._broken = keys.shard_file(broken_rank)
        self.busy = 0
        self._lock = threading.Lock()

    def _count(self, change: int) -> None:
        with self._lock:
            self.busy += change

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        if key.endswith(self._broken):
            raise StoreError("the disk is full")
        self._count(1)
        time.sleep(0.1)
        super().put(key, data, create_only=create_only, pace=pace)
        self._count(-1)


def make_image(state: State, values: bytes = b"{}", pieces: Mapping[str, Piece] | None = None) -> memoryview:
    """Return an image as a rank would write it, of tensors of bytes."""
    pieces = pieces or {}
    specs = [TensorSpec(name, "U8", (len(data),), pieces.get(name)) for name, data in state.items()]
    layout = image.plan(specs, len(values), {"ckptd.framework": "bytes"})
    slot = memoryview(mmap.mmap(-1, layout.image_bytes))
    slot[: len(layout.header)] = layout.header
    for span in layout.spans[:-1]:
        slot[span.begin : span.end] = state[span.name]
    image.write_values(slot, layout.values, values)
    return slot


def pattern(seed: int, size: int = 3000) -> bytes:
    """Return bytes that no other seed gives."""
    return (f"{seed:08d}".encode() * (size // 8 + 1))[:size]


def images(count: int = 2) -> dict[int, memoryview]:
    """Return the images of so many ranks, which have nothing in common."""
    return {rank: make_image({"weight": pattern(rank), "step": pattern(1000 + rank, 8)}) for rank in range(count)}


def order(
    shards: Mapping[int, memoryview], checkpoint: CheckpointId = NOW, parent: CheckpointId | None = None
) -> Flush:
    """Return the order to flush them."""
    sizes = {rank: len(data) for rank, data in shards.items()}
    return Flush(checkpoint, parent, dict.fromkeys(shards, 0), sizes, {"loss": 0.5})


def flush(
    store: JobStore, states: list[State], checkpoint: CheckpointId = NOW, parent: CheckpointId | None = None
) -> FlushResult:
    """Flush the states of all ranks; what is called "shared" in each is its part of one tensor of the job."""
    shards = {}
    for rank, state in enumerate(states):
        size = len(state.get("shared", b""))
        shards[rank] = make_image(state, pieces={"shared": Piece("shared", (len(states) * size,), (rank * size,))})
    return store.flush(order(shards, checkpoint, parent), shards)


def committed(tier: Tier) -> tuple[CheckpointId, ...]:
    """Return what is committed."""
    return catalog.holdings(tier, "job").committed


def read_back(tier: Tier, checkpoint: CheckpointId) -> list[dict[str, bytes]]:
    """Return every rank's tensors, followed through all references; the values are left out."""
    loaded = catalog.load_manifest(tier, "job", checkpoint)
    found: list[dict[str, bytes]] = [{} for _ in loaded.shards]
    for tensor in loaded.tensors.values():
        for chunk in tensor.chunks:
            data = bytearray(chunk.end - chunk.begin)
            tier.read_into(f"job/{chunk.file}", chunk.begin, memoryview(data))
            if chunk.entry != VALUES_NAME:
                found[chunk.shard][chunk.entry] = bytes(data)
    return found


def shard_files(tier: Tier) -> set[str]:
    """Return the names of all shard files, seen from the job's folder."""
    return set(catalog.listing(tier, "job").files)


def referred(loaded: Manifest) -> set[tuple[int, str]]:
    """Return which entries lie elsewhere than in their shard's own file."""
    return {
        (chunk.shard, chunk.entry)
        for tensor in loaded.tensors.values()
        for chunk in tensor.chunks
        if loaded.refers(chunk)
    }


def prune(store: JobStore, ids: Sequence[CheckpointId], kept: Sequence[CheckpointId]) -> CkptdError | None:
    """Prune; return the last thing that went wrong, if any."""
    errors = store.pruning.prune(ids, kept).errors
    return errors[-1] if errors else None


def steps(*numbers: int) -> list[CheckpointId]:
    """Return steps of the first generation."""
    return [CheckpointId(1, number) for number in numbers]
