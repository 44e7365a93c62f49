"""The work of the storage threads: everything that reads or writes a tier, as plain blocking functions.

None of them touches the agent's state; they take values and return values, so any number may run beside the loop.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from typing import TypeVar

from ckptd.core import lineage
from ckptd.core.events import Flush, StoreRead
from ckptd.core.restore import Source
from ckptd.errors import CkptdError, ConfigError, FencedError
from ckptd.storage import catalog, keys, manifest
from ckptd.storage.manifest import Manifest, ShardContent
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class FlushResult:
    """A checkpoint that was committed: its bytes, and the digests of what stays in memory, by rank and tensor."""

    size_bytes: int
    seconds: float
    digests: Mapping[int, Mapping[str, str]]


def read_store(tier: Tier, job: str) -> StoreRead:
    """Look what a tier holds of a job."""
    held = catalog.holdings(tier, job)
    line = lineage.candidates(held.parents, held.committed)
    return StoreRead(
        tuple(Source(checkpoint, tier.name) for checkpoint in line),
        lineage.latest_generation(held.parents, held.committed),
    )


def claim(tier: Tier, job: str, generation: int, parent: CheckpointId | None) -> bool:
    """Record a generation on a tier; return False when somebody else has that number."""
    try:
        catalog.claim_generation(tier, job, generation, parent, time.time())
    except FencedError:
        return False
    return True


def flush_shard(tier: Tier, job: str, checkpoint: CheckpointId, rank: int, image: memoryview) -> ShardContent:
    """Digest a sealed image and make it durable under its key."""
    content = catalog.describe_shard(rank, image)
    tier.put(keys.shard_key(job, checkpoint, rank), image)
    return content


def flush(tier: Tier, job: str, order: Flush, images: Mapping[int, memoryview], pool: Executor) -> FlushResult:
    """Flush every shard of a snapshot, then commit it with its manifest."""
    begin_s = time.monotonic()
    contents = _together(
        [pool.submit(flush_shard, tier, job, order.id, rank, image) for rank, image in sorted(images.items())]
    )
    document = manifest.build(job, order.id, order.parent, contents, created_at=time.time(), values=order.values)
    tier.put(keys.manifest_key(job, order.id), manifest.encode(document), create_only=True)
    return FlushResult(
        sum(content.layout.image_bytes for content in contents),
        time.monotonic() - begin_s,
        {content.rank: content.tensor_digests for content in contents},
    )


def load_manifest(tier: Tier, job: str, checkpoint: CheckpointId, world_size: int) -> Manifest:
    """Read the manifest of a checkpoint that is to be restored by `world_size` ranks."""
    loaded = catalog.load_manifest(tier, job, checkpoint)
    if loaded.world_size != world_size:
        raise ConfigError(
            f"{checkpoint} was written by {loaded.world_size} ranks and can't be restored by {world_size}",
            hint=f"run with --nproc {loaded.world_size}",
        )
    return loaded


def fetch(tier: Tier, job: str, loaded: Manifest, places: Mapping[int, memoryview], pool: Executor) -> None:
    """Bring all shards of a checkpoint into slots, each verified; raises `DamagedError` that names what differs."""
    _together(
        [pool.submit(catalog.fetch_shard, tier, job, loaded, rank, place) for rank, place in sorted(places.items())]
    )


def _together(work: list[Future[Result]]) -> list[Result]:
    """Return all results, or raise the first error, when every part has ended: none may touch a slot afterwards."""
    wait(work)
    error = next((error for item in work if (error := item.exception()) is not None), None)
    try:
        if error is not None:
            raise error
        return [item.result() for item in work]
    finally:
        del work, error  # the error's traceback would hold itself, and so the slots


def prune(tier: Tier, job: str, checkpoints: Sequence[CheckpointId]) -> CkptdError | None:
    """Remove checkpoints; one that can't be removed does not keep the others, and the last error is returned."""
    failure: CkptdError | None = None
    for checkpoint in checkpoints:
        try:
            catalog.delete(tier, job, checkpoint)
        except CkptdError as error:
            failure = error
    return failure
