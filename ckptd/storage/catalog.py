"""What a tier holds of a job: its generations, committed checkpoints, and operations on whole checkpoints."""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

from ckptd.errors import CkptdError, DamagedError, FencedError, NotFoundError
from ckptd.storage import flight, image, keys, manifest
from ckptd.storage.checks import FileChecks, checks_of, what_is_lost
from ckptd.storage.digest import shard_digest, tensor_digest
from ckptd.storage.file_stream import Progress, examine
from ckptd.storage.manifest import Manifest, ShardContent
from ckptd.storage.tier import Pace, Tier
from ckptd.types import CheckpointId, Held, Marker, StoredFile

_READS_AT_ONCE = 8
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Holdings:
    """The generations of a job that a tier knows, with their parents, and the checkpoints committed there."""

    parents: Mapping[int, CheckpointId | None]
    committed: tuple[CheckpointId, ...]


def holdings(tier: Tier, job: str) -> Holdings:
    """List a job on a tier by keys alone; only the small generation records are read."""
    listed = listing(tier, job)
    generations = sorted(listed.generations)
    found = zip(generations, in_parallel(partial(_read_record, tier, job), generations), strict=True)
    parents = {generation: record.parent for generation, record in found if record is not None}
    return Holdings(parents, tuple(sorted(listed.committed)))


@dataclass(frozen=True, slots=True)
class Listing:
    """The keys of a job on a tier, read by what they are."""

    generations: frozenset[int]
    """Those that somebody has claimed."""
    committed: frozenset[CheckpointId]
    markers: tuple[Marker, ...]
    """Of checkpoints that were removed, of which nothing has gone yet."""
    files: Mapping[str, StoredFile]
    """Every other file in the folder of a checkpoint, by its name as seen from the job's folder."""


def listing(tier: Tier, job: str) -> Listing:
    """List a job on a tier; nothing is read."""
    generations: set[int] = set()
    committed: set[CheckpointId] = set()
    markers: list[Marker] = []
    files: dict[str, StoredFile] = {}
    for entry in tier.list(f"{job}/"):
        generation, manifest_of, lies_in = (
            keys.parse_generation_key(entry.key),
            keys.parse_manifest_key(entry.key),
            keys.parse_folder(entry.key),
        )
        marked = keys.parse_marker_key(entry.key)
        if generation is not None:
            generations.add(generation)
        elif manifest_of is not None:
            committed.add(manifest_of)
        elif marked is not None:
            markers.append(Marker(*marked, entry.size_bytes))
        elif lies_in is not None:
            name = entry.key.removeprefix(f"{job}/")
            files[name] = StoredFile(name, lies_in, entry.size_bytes, entry.modified_at)
    return Listing(frozenset(generations), frozenset(committed), tuple(markers), files)


def jobs(tier: Tier) -> list[str]:
    """Return the names of all jobs that have at least one generation on a tier."""
    return sorted({entry.key.split("/", 1)[0] for entry in tier.list("") if keys.parse_generation_key(entry.key)})


def claim_generation(
    tier: Tier,
    job: str,
    generation: int,
    parent: CheckpointId | None,
    created_at: float,
    *,
    resumed_from: Mapping[str, Any] | None = None,
) -> None:
    """Record a generation on a tier; raises `FencedError` when somebody else has claimed that number.

    `resumed_from` says whose checkpoint was taken over with it; it is for people, nobody reads it.
    """
    document: dict[str, Any] = {
        "job": job,
        "generation": generation,
        "parent": None if parent is None else parent._asdict(),
        "created_at": created_at,
        "claim": os.urandom(8).hex(),  # no two are alike: a lost answer is told from a lost race
    }
    if resumed_from is not None:
        document["resumed_from"] = dict(resumed_from)
    tier.put(keys.generation_key(job, generation), json.dumps(document).encode() + b"\n", create_only=True)


class _Record(NamedTuple):
    parent: CheckpointId | None


def _read_record(tier: Tier, job: str, generation: int) -> _Record | None:
    """Read what a generation began with; None when its record was removed meanwhile."""
    key = keys.generation_key(job, generation)
    try:
        document = json.loads(tier.get(key))
        parent = document["parent"]
        return _Record(None if parent is None else CheckpointId(int(parent["generation"]), int(parent["step"])))
    except NotFoundError:
        return None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(
            f"the generation record {tier.url}/{key} can't be read",
            hint="it says which checkpoint that generation began with; restore the file or move the generation away",
        ) from error


def load_manifest(tier: Tier, job: str, checkpoint: CheckpointId) -> Manifest:
    """Read the manifest of a committed checkpoint; raises `NotFoundError` or `DamagedError`."""
    return read_manifest(tier, job, checkpoint)[1]


def read_manifest(tier: Tier, job: str, checkpoint: CheckpointId) -> tuple[bytes, Manifest]:
    """Read the manifest of a committed checkpoint, and the bytes that it is, for a copy of it."""
    key = keys.manifest_key(job, checkpoint)
    document = tier.get(key)
    return document, parse_manifest(document, f"{tier.url}/{key}", job, checkpoint)


def parse_manifest(document: bytes, where: str, job: str, checkpoint: CheckpointId) -> Manifest:
    """Return the manifest that was found where that of a checkpoint is kept; raises `DamagedError`."""
    loaded = manifest.parse(document, where)
    if loaded.id != checkpoint or loaded.job != job:
        raise DamagedError(f"the manifest {where} is that of {loaded.job} {loaded.id}")
    return loaded


def describe_shard(rank: int, data: memoryview) -> ShardContent:
    """Digest every tensor of an image and of the whole; raises `DamagedError` when it is no complete image."""
    layout = image.parse(data)
    digests = {span.name: tensor_digest(data[span.begin : span.end]) for span in layout.spans}
    whole = shard_digest(layout.header, [found.value for found in digests.values()])
    return ShardContent(rank, layout, layout.image_bytes, whole, digests)


def verify(
    tier: Tier, job: str, checkpoint: CheckpointId, *, pace: Pace | None = None, progress: Progress | None = None
) -> list[str]:
    """Check a checkpoint completely and return every problem in words; an empty list means that it is intact.

    Its own files are checked to the last byte, as files of safetensors too, and in the files of other checkpoints
    everything that it refers to. Each is read once, in units, so the memory needed does not depend on the size of
    anything. `pace` is asked before each, and `progress` told of each.
    """
    try:
        loaded = load_manifest(tier, job, checkpoint)
    except CkptdError as error:
        return [error.message]
    problems: list[str] = []
    for file, checks in checks_of(loaded, headers=True).items():
        try:
            problems += verify_file(tier, job, checks, pace=pace, progress=progress)
        except CkptdError as error:
            problems.append(f"{file}: {error.message}")
    return problems


def verify_file(
    tier: Tier, job: str, checks: FileChecks, *, pace: Pace | None = None, progress: Progress | None = None
) -> list[str]:
    """Check one file that a checkpoint needs and return every problem in words.

    Raises the `StoreError` of a tier that can't be read now, which says nothing about the file.
    """
    try:
        found = examine(tier, f"{job}/{checks.file}", checks, pace=pace, progress=progress)
    except NotFoundError:
        found = [f"the file is missing, and {what_is_lost(checks)} in it"]
    except DamagedError as error:
        found = [error.message]
    return [f"{checks.file}: {problem}" for problem in found]


# --- what retention asks about ----------------------------------------------------------------------------------


def held(tier: Tier, job: str, *, with_values: bool) -> list[Held]:
    """Return what retention asks about the checkpoints committed on a tier, oldest first.

    Without values everything comes from one listing, and a checkpoint is as old as its manifest is on this tier. With
    values every manifest is read, and it is as old as that says. One that can't be parsed has no values, which is for
    `verify` to find; one that was pruned meanwhile is left out.

    Raises `DamagedError` when a tag can't be read, since nobody knows what it keeps.
    """
    committed_at: dict[CheckpointId, float] = {}
    sizes: dict[CheckpointId, int] = defaultdict(int)
    names: list[str] = []
    for entry in tier.list(f"{job}/"):
        manifest_of, lies_in, tag = (
            keys.parse_manifest_key(entry.key),
            keys.parse_folder(entry.key),
            keys.parse_tag_key(entry.key),
        )
        if manifest_of is not None:
            committed_at[manifest_of] = entry.modified_at
        elif lies_in is not None and keys.parse_marker_key(entry.key) is None:
            sizes[lies_in] += entry.size_bytes
        elif tag is not None:
            names.append(tag)
    tagged: dict[CheckpointId, tuple[str, ...]] = defaultdict(tuple)
    for tag, named in _read_tags(tier, job, names).items():
        tagged[named.id] += (tag,)
    found = [Held(item, at, sizes[item], {}, tagged[item]) for item, at in sorted(committed_at.items())]
    if not with_values:
        return found
    return [item for item in in_parallel(partial(_with_values, tier, job), found) if item is not None]


def _with_values(tier: Tier, job: str, known: Held) -> Held | None:
    try:
        loaded = load_manifest(tier, job, known.id)
    except NotFoundError:
        return None
    except DamagedError:
        return known
    return replace(known, committed_at=loaded.created_at, size_bytes=loaded.size_bytes, values=loaded.values)


@dataclass(frozen=True, slots=True)
class Tag:
    """A name that somebody has given to a checkpoint."""

    id: CheckpointId
    created_at: float


def tags(tier: Tier, job: str) -> dict[str, Tag]:
    """Return the tags of a job on a tier by name; raises `DamagedError` when one can't be read."""
    found = map(keys.parse_tag_key, (entry.key for entry in tier.list(f"{job}/tags/")))
    return _read_tags(tier, job, [tag for tag in found if tag is not None])


def put_tag(tier: Tier, job: str, tag: str, checkpoint: CheckpointId, created_at: float, *, move: bool = False) -> None:
    """Give a committed checkpoint a name on a tier, which keeps it there where retention says so.

    Raises `NotFoundError` when it is not committed there, and `FencedError` when the name is another one's, unless
    it may `move`.
    """
    key = keys.tag_key(job, tag)
    tier.size_bytes(keys.manifest_key(job, checkpoint))
    document = {**checkpoint._asdict(), "created_at": created_at}
    create_only = tier.capabilities.create_only_put and not move
    try:
        if not create_only and not move:
            _refuse_existing(tier, key)
        tier.put(key, json.dumps(document).encode() + b"\n", create_only=create_only)
    except FencedError as error:
        if _read_tag(tier, job, tag).id != checkpoint:
            raise FencedError(
                f"tag {tag!r} of job {job} names another checkpoint on {tier.url}", hint="remove it, or move it"
            ) from error


def _refuse_existing(tier: Tier, key: str) -> None:
    try:
        tier.size_bytes(key)
    except NotFoundError:
        return
    raise FencedError(f"{tier.url}/{key} exists already")


def remove_tag(tier: Tier, job: str, tag: str) -> None:
    """Take a name away again; raises `NotFoundError` when there is none."""
    key = keys.tag_key(job, tag)
    tier.size_bytes(key)
    tier.delete(key)


def _read_tags(tier: Tier, job: str, names: Sequence[str]) -> dict[str, Tag]:
    found = zip(names, in_parallel(partial(_read_listed_tag, tier, job), names), strict=True)
    return {name: tag for name, tag in found if tag is not None}


def _read_listed_tag(tier: Tier, job: str, tag: str) -> Tag | None:
    with contextlib.suppress(NotFoundError):  # removed meanwhile
        return _read_tag(tier, job, tag)
    return None


def _read_tag(tier: Tier, job: str, tag: str) -> Tag:
    key = keys.tag_key(job, tag)
    try:
        document = json.loads(tier.get(key))
        return Tag(CheckpointId(int(document["generation"]), int(document["step"])), float(document["created_at"]))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(
            f"the tag {tier.url}/{key} can't be read", hint="it names a checkpoint that is kept; put or remove it anew"
        ) from error


def in_parallel(read: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Read small objects, several at a time: far away each takes its time, and none of it is ours."""
    found: dict[int, Result] = {}

    def serve(at: int) -> None:
        found[at] = read(items[at])

    flight.run(range(len(items)), lambda: serve, _READS_AT_ONCE)
    return [found[at] for at in range(len(items))]
