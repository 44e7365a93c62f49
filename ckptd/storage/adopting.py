"""A checkpoint of anybody's job that becomes the first of another job: read there, written here, changed nowhere.

Its files keep their names as seen from the job's folder, and so does the manifest all that it says, but for whose it
is. The source is only read: nothing tells a training that still runs there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.errors import DamagedError, NotFoundError, StoreError
from ckptd.storage import catalog, flight, manifest
from ckptd.storage.checks import FileChecks, checks_of
from ckptd.storage.copying import FILES_AT_ONCE, commit
from ckptd.storage.file_stream import Progress, TierStream, examine
from ckptd.storage.manifest import Manifest
from ckptd.storage.tier import Pace, Tier
from ckptd.types import CheckpointId

STALL_S = 600.0
"""How long the source may take to answer one request: there is no other to turn to, and slow is better than nothing."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """What was copied; what the target had already is not in it."""

    files: tuple[str, ...]
    """Seen from the job's folder."""
    size_bytes: int


def adopt(
    source: Tier,
    source_job: str,
    target: Tier,
    job: str,
    checkpoint: CheckpointId,
    *,
    last_generation: int = 0,
    threads: int = FILES_AT_ONCE,
    stall_s: float | None = STALL_S,
    pace: Pace | None = None,
    progress: Progress | None = None,
) -> Adopted:
    """Commit a checkpoint of another job as one of `job`, every byte checked while it passes.

    `last_generation` is the newest that `job` has claimed anywhere, without a checkpoint to show for it. What is there
    and intact stays, so one that was interrupted goes on where it was. The manifest is put last, after the record of a
    generation that has it in its lineage: what becomes visible is restored from.

    Raises `NotFoundError` when the source has no such checkpoint or not all of its files, `DamagedError` that names
    tensor and file when its copy is not what was committed, and what either tier raises. Nothing is committed then.
    """
    _, loaded = catalog.read_manifest(source, source_job, checkpoint)
    copied: dict[str, int] = {}

    def bring(checks: FileChecks) -> None:
        key, origin = f"{job}/{checks.file}", f"{source_job}/{checks.file}"
        if _is_there(target, key, checks, pace, progress):
            return
        size_bytes = source.size_bytes(origin)
        stream = TierStream(source, origin, size_bytes, checks, stall_s=stall_s, progress=progress)
        target.put(key, stream, pace=pace)
        copied[checks.file] = size_bytes

    flight.run(checks_of(loaded, headers=True).values(), lambda: bring, threads)
    _claim(target, job, checkpoint, last_generation, _origin(source, source_job, checkpoint))
    commit(target, job, checkpoint, manifest.encode({**loaded.document, "job": job, "parent": None}))
    return Adopted(tuple(sorted(copied)), sum(copied.values()))


def _is_there(target: Tier, key: str, checks: FileChecks, pace: Pace | None, progress: Progress | None) -> bool:
    try:
        return not examine(target, key, checks, pace=pace, progress=progress)
    except (DamagedError, NotFoundError, StoreError):
        return False  # it is put anew, which says what is wrong with the tier if that does not go either


def _claim(target: Tier, job: str, checkpoint: CheckpointId, last_generation: int, origin: Mapping[str, Any]) -> None:
    """Record a generation whose lineage has the checkpoint.

    That is the checkpoint's own, as long as the job has claimed none that is as new. Else it is one above those, which
    has begun with the checkpoint: a lineage leads from the newest generation back.
    """
    is_free = last_generation < checkpoint.generation
    generation, parent = (checkpoint.generation, None) if is_free else (last_generation + 1, checkpoint)
    catalog.claim_generation(target, job, generation, parent, time.time(), resumed_from=origin)


def _origin(source: Tier, source_job: str, checkpoint: CheckpointId) -> dict[str, Any]:
    return {"url": source.url, "job": source_job, **checkpoint._asdict()}


def make_way(tier: Tier, job: str, loaded: Manifest) -> tuple[str, ...]:
    """Remove files of `job` that bear a name which an adopted checkpoint needs, and hold something else.

    A name means one content wherever a job is, and an upload relies on it. A run that was killed before its first
    commit may have left such files on another tier. Returns what was removed, seen from the job's folder.
    """
    there = catalog.listing(tier, job).files
    removed = []
    for checks in checks_of(loaded, headers=True).values():
        key = f"{job}/{checks.file}"
        with contextlib.suppress(NotFoundError):  # somebody else was faster
            if checks.file in there and examine(tier, key, checks):
                tier.delete(key)
                removed.append(checks.file)
    return tuple(removed)
