"""What a tier holds of a job: its generations, committed checkpoints, and operations on whole checkpoints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptd.errors import CkptdError, DamagedError, NotFoundError
from ckptd.storage import image, keys, manifest
from ckptd.storage.digest import TensorDigest, digest, of_leaves, shard_digest, tensor_digest
from ckptd.storage.manifest import Chunk, Manifest, ShardContent
from ckptd.storage.ranges import RangeReader, leaves
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId


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


@dataclass(frozen=True, slots=True)
class Listing:
    """The keys of a job on a tier, read by what they are."""

    generations: frozenset[int]
    """Those that somebody has claimed."""
    committed: frozenset[CheckpointId]
    files: Mapping[str, CheckpointId]
    """Every other file of a checkpoint, seen from the job's folder, with the checkpoint in whose folder it lies."""


def listing(tier: Tier, job: str) -> Listing:
    """List a job on a tier; nothing is read."""
    generations: set[int] = set()
    committed: set[CheckpointId] = set()
    files: dict[str, CheckpointId] = {}
    for entry in tier.list(f"{job}/"):
        generation, manifest_of, lies_in = (
            keys.parse_generation_key(entry.key),
            keys.parse_manifest_key(entry.key),
            keys.parse_folder(entry.key),
        )
        if generation is not None:
            generations.add(generation)
        elif manifest_of is not None:
            committed.add(manifest_of)
        elif lies_in is not None:
            files[entry.key.removeprefix(f"{job}/")] = lies_in
    return Listing(frozenset(generations), frozenset(committed), files)


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
    digests = {span.name: tensor_digest(data[span.begin : span.end]) for span in layout.spans}
    whole = shard_digest(layout.header, [found.value for found in digests.values()])
    return ShardContent(rank, layout, layout.image_bytes, whole, digests)


def verify(tier: Tier, job: str, checkpoint: CheckpointId) -> list[str]:
    """Check a checkpoint completely and return every problem in words; an empty list means that it is intact.

    Its own files are checked to the last byte, and in the files of other checkpoints everything that it refers to.
    Each is read once, in blocks, so the memory needed does not depend on the size of anything.
    """
    try:
        loaded = load_manifest(tier, job, checkpoint)
    except CkptdError as error:
        return [error.message]
    needed: dict[str, list[tuple[Chunk, str]]] = {shard.file: [] for shard in loaded.shards}
    for tensor in loaded.tensors.values():
        for chunk in tensor.chunks:
            needed.setdefault(chunk.file, []).append((chunk, tensor.name))
    problems: list[str] = []
    for file, chunks in needed.items():
        chunks.sort(key=lambda item: (item[0].begin, item[0].end))
        try:
            problems += [f"{file}: {problem}" for problem in _verify_file(tier, f"{job}/{file}", loaded, chunks)]
        except NotFoundError:
            problems.append(f"{file}: the file is missing, and {_count(chunks)} in it")
        except CkptdError as error:
            problems.append(f"{file}: {error.message}")
    return problems


def _count(chunks: Sequence[tuple[Chunk, str]]) -> str:
    names = sorted({name for _, name in chunks if name != image.VALUES_NAME})
    return f"{len(names)} tensors" if len(names) != 1 else f"tensor {names[0]!r}"


def _verify_file(tier: Tier, key: str, loaded: Manifest, chunks: Sequence[tuple[Chunk, str]]) -> Iterator[str]:
    reader = RangeReader(tier, key)
    shard = next((shard for shard in loaded.shards if key.endswith(f"/{shard.file}")), None)
    if shard is not None:
        if reader.size_bytes != shard.size_bytes:
            yield f"{reader.size_bytes} bytes where the manifest says {shard.size_bytes}"
            return
        own = [chunk for chunk, _ in chunks if chunk.shard == shard.rank]
        header_bytes = own[0].begin if own else shard.size_bytes
        if not _lie_side_by_side(own, shard.size_bytes):
            yield "the manifest does not say what all its bytes are"
        elif shard_digest(_read(reader, header_bytes), [chunk.digest or "" for chunk in own]) != shard.digest:
            yield "its header is not what was committed (its digest differs)"
    for chunk, name in chunks:
        if chunk.end > reader.size_bytes:
            yield f"{reader.size_bytes} bytes, which is too short for tensor {name!r}"
        elif _digest(reader, chunk) != (chunk.digest, chunk.leaves):
            yield f"tensor {name!r} is not what was committed (its digest differs)"


def _lie_side_by_side(own: Sequence[Chunk], end: int) -> bool:
    begins = [chunk.begin for chunk in own]
    return bool(own) and [chunk.end for chunk in own] == [*begins[1:], end]


def _read(reader: RangeReader, size: int) -> bytes:
    step = image.BLOCK_BYTES
    return b"".join(bytes(reader.read(at, min(at + step, size))) for at in range(0, size, step))


def _digest(reader: RangeReader, chunk: Chunk) -> TensorDigest:
    return of_leaves(digest(reader.read(begin, end)) for begin, end, _ in leaves(chunk))
