"""What a tier holds of a job: its generations, committed checkpoints, and operations on whole checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ckptd.errors import CkptdError, DamagedError, NotFoundError
from ckptd.storage import image, keys, manifest
from ckptd.storage.digest import StreamDigest, digest, shard_digest
from ckptd.storage.manifest import Manifest, Shard, ShardContent
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId

_VERIFY_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Holdings:
    """The generations of a job that a tier knows, with their parents, and the checkpoints committed there."""

    parents: Mapping[int, CheckpointId | None]
    committed: tuple[CheckpointId, ...]


def holdings(tier: Tier, job: str) -> Holdings:
    """List a job on a tier by keys alone; only the small generation records are read."""
    parents: dict[int, CheckpointId | None] = {}
    committed: list[CheckpointId] = []
    for entry in tier.list(f"{job}/"):
        checkpoint = keys.parse_manifest_key(entry.key)
        if checkpoint is not None:
            committed.append(checkpoint)
        generation = keys.parse_generation_key(entry.key)
        if generation is not None:
            parents[generation] = _read_parent(tier, entry.key)
    return Holdings(parents, tuple(sorted(committed)))


def jobs(tier: Tier) -> list[str]:
    """Return the names of all jobs that have at least one generation on a tier."""
    return sorted({entry.key.split("/", 1)[0] for entry in tier.list("") if keys.parse_generation_key(entry.key)})


def claim_generation(tier: Tier, job: str, generation: int, parent: CheckpointId | None, created_at: float) -> None:
    """Record a generation on a tier; raises `FencedError` when somebody else has claimed that number."""
    document = {
        "job": job,
        "generation": generation,
        "parent": None if parent is None else parent._asdict(),
        "created_at": created_at,
    }
    tier.put(keys.generation_key(job, generation), json.dumps(document).encode() + b"\n", create_only=True)


def _read_parent(tier: Tier, key: str) -> CheckpointId | None:
    try:
        document = json.loads(tier.get(key))
        parent = document["parent"]
        return None if parent is None else CheckpointId(int(parent["generation"]), int(parent["step"]))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(
            f"the generation record {tier.url}/{key} can't be read",
            hint="it says which checkpoint that generation began with; restore the file or move the generation away",
        ) from error


def load_manifest(tier: Tier, job: str, checkpoint: CheckpointId) -> Manifest:
    """Read the manifest of a committed checkpoint; raises `NotFoundError` or `DamagedError`."""
    key = keys.manifest_key(job, checkpoint)
    loaded = manifest.parse(tier.get(key), f"{tier.url}/{key}")
    if loaded.id != checkpoint or loaded.job != job:
        raise DamagedError(f"the manifest {tier.url}/{key} is that of {loaded.job} {loaded.id}")
    return loaded


def describe_shard(rank: int, data: memoryview) -> ShardContent:
    """Digest every tensor of an image and of the whole; raises `DamagedError` when it is no complete image."""
    layout = image.parse(data)
    digests = {span.name: digest(data[span.begin : span.end]) for span in layout.spans}
    return ShardContent(rank, layout, shard_digest(layout.header, digests.values()), digests)


def fetch_shard(tier: Tier, job: str, loaded: Manifest, rank: int, into: memoryview) -> None:
    """Read a rank's shard to the start of `into` and check it against the manifest; raises `DamagedError`."""
    shard = loaded.shards[rank]
    key = keys.shard_key(job, loaded.id, rank)
    size = tier.size_bytes(key)
    if size != shard.size_bytes:
        raise DamagedError(f"{tier.url}/{key} has {size} bytes, the manifest says {shard.size_bytes}")
    place = into[: shard.size_bytes]
    tier.read_into(key, 0, place)
    try:
        content = describe_shard(rank, place)
    except DamagedError as error:
        raise DamagedError(f"{tier.url}/{key}: {error.message}") from error
    for problem in compare(shard, content.digest, content.tensor_digests):
        raise DamagedError(f"{tier.url}/{key}: {problem}")


def compare(shard: Shard, found_digest: str, found: Mapping[str, str]) -> Iterator[str]:
    """Yield what differs between a shard's manifest entry and the digests found."""
    same = True
    for name, wanted in shard.tensor_digests.items():
        if found.get(name) == wanted:
            continue
        same = False
        yield f"tensor {name!r} is " + ("not what was committed (its digest differs)" if name in found else "missing")
    if same and found_digest != shard.digest:
        yield "its header is not what was committed (its digest differs)"


def verify(tier: Tier, job: str, checkpoint: CheckpointId) -> list[str]:
    """Check a checkpoint completely and return every problem in words; an empty list means that it is intact.

    Reads in blocks, so the memory needed does not depend on the size of a shard.
    """
    try:
        loaded = load_manifest(tier, job, checkpoint)
    except CkptdError as error:
        return [error.message]
    problems: list[str] = []
    for shard in loaded.shards:
        key = keys.shard_key(job, checkpoint, shard.rank)
        try:
            problems += [f"{shard.file}: {problem}" for problem in _verify_shard(tier, key, shard)]
        except NotFoundError:
            problems.append(f"{shard.file}: the file is missing")
        except CkptdError as error:
            problems.append(f"{shard.file}: {error.message}")
    return problems


def _verify_shard(tier: Tier, key: str, shard: Shard) -> Iterator[str]:
    size = tier.size_bytes(key)
    if size != shard.size_bytes:
        yield f"{size} bytes where the manifest says {shard.size_bytes}"
        return
    start = bytearray(8)
    tier.read_into(key, 0, memoryview(start))
    header = bytearray(min(image.header_bytes(bytes(start)), size))
    tier.read_into(key, 0, memoryview(header))
    layout = image.parse_header(bytes(header), size)
    block = memoryview(bytearray(_VERIFY_BYTES))
    found = {span.name: _digest_range(tier, key, span.begin, span.end, block) for span in layout.spans}
    yield from compare(shard, shard_digest(layout.header, found.values()), found)


def _digest_range(tier: Tier, key: str, begin: int, end: int, block: memoryview) -> str:
    state = StreamDigest()
    for at in range(begin, end, len(block)):
        part = block[: min(len(block), end - at)]
        tier.read_into(key, at, part)
        state.update(part)
    return state.hexdigest()


def delete(tier: Tier, job: str, checkpoint: CheckpointId) -> None:
    """Remove a checkpoint: its manifest first, so that it is uncommitted before its first byte goes."""
    tier.delete(keys.manifest_key(job, checkpoint))
    for entry in list(tier.list(keys.checkpoint_prefix(job, checkpoint))):
        tier.delete(entry.key)
