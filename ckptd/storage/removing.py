"""Removing checkpoints from a tier: for good, or so that it can be undone for a while.

The manifest goes first, so what is left is no checkpoint. To be able to undo that, its bytes are put beside it under
the name of a marker before; as long as that is there, the files stay. A removal that is killed in between leaves a
committed checkpoint and a marker that means nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptd.errors import DamagedError, FencedError, NotFoundError
from ckptd.storage import catalog, keys
from ckptd.storage.copying import commit
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId, Marker


def uncommit(tier: Tier, job: str, checkpoint: CheckpointId, deleted_at: float | None = None) -> bool:
    """Remove a checkpoint; with `deleted_at`, the time of the wall clock, leave a marker of it.

    Returns whether there is a marker now. A checkpoint that is not there leaves none, nor does one whose manifest
    can't be read: nobody could bring it back, and a marker that may name any file would keep all else from going.
    """
    key = keys.manifest_key(job, checkpoint)
    if deleted_at is not None:
        try:
            document, _ = catalog.read_manifest(tier, job, checkpoint)
        except NotFoundError:
            return False
        except DamagedError:
            deleted_at = None
        else:
            tier.put(keys.marker_key(job, checkpoint, deleted_at), document)
    tier.delete(key)
    return deleted_at is not None


def finish(tier: Tier, job: str, checkpoint: CheckpointId, markers: Iterable[Marker]) -> bool:
    """Make a removal final by removing its markers; return whether the checkpoint's files may go now.

    They may not when somebody is undoing the removal, who puts the manifest back and then looks for the marker: of
    the two, one at least sees the other.
    """
    for marker in markers:
        tier.delete(keys.marker_key(job, checkpoint, marker.deleted_at))
    return not holds(tier, keys.manifest_key(job, checkpoint))


def find_removed(tier: Tier, job: str, checkpoint: CheckpointId) -> tuple[bytes, Sequence[Marker]]:
    """Return the manifest of a removed checkpoint that can be committed again, and its markers, the newest last.

    Raises `NotFoundError` when its removal is final or one of its files is missing.
    """
    markers = [marker for marker in catalog.listing(tier, job).markers if marker.checkpoint == checkpoint]
    if not markers:
        raise NotFoundError(
            f"no removal of {checkpoint} of job {job} can be undone on {tier.url}",
            hint=f"`ckptctl ls {job} --deleted` lists those that can",
        )
    markers.sort(key=lambda marker: marker.deleted_at)
    key = keys.marker_key(job, checkpoint, markers[-1].deleted_at)
    document = tier.get(key)
    for file in sorted(catalog.parse_manifest(document, f"{tier.url}/{key}", job, checkpoint).files):
        tier.size_bytes(f"{job}/{file}")
    return document, markers


def undo(tier: Tier, job: str, checkpoint: CheckpointId) -> None:
    """Commit a removed checkpoint again; raises what `find_removed` does.

    It is a `FencedError` when the removal is just being made final.
    """
    document, markers = find_removed(tier, job, checkpoint)
    commit(tier, job, checkpoint, document)
    if not holds(tier, keys.marker_key(job, checkpoint, markers[-1].deleted_at)):
        tier.delete(keys.manifest_key(job, checkpoint))
        raise FencedError(f"the removal of {checkpoint} of job {job} on {tier.url} was just made final")
    for marker in markers:
        tier.delete(keys.marker_key(job, checkpoint, marker.deleted_at))


def holds(tier: Tier, key: str) -> bool:
    """Whether an object is there."""
    try:
        tier.size_bytes(key)
    except NotFoundError:
        return False
    return True
