"""Checkpoints on their way to a further tier, each file checked while it passes.

The files of a checkpoint are the same on every tier, byte for byte and under the same keys, and so is its manifest,
which goes last. So a copy is a matter of single files: what is there need not be sent, and an upload that was
interrupted goes on where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ckptd.errors import FencedError, NotFoundError, StoreError
from ckptd.storage import catalog, flight, keys
from ckptd.storage.checks import FileChecks, checks_of
from ckptd.storage.file_stream import Progress, TierStream
from ckptd.storage.manifest import Manifest
from ckptd.storage.tier import Pace, Tier
from ckptd.types import CheckpointId

FILES_AT_ONCE = 2
"""Each is read and put in several requests at once already; a second one fills the pauses at its beginning and end."""

_LOOKS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied; what the target had already is not in it."""

    files: tuple[str, ...]
    """Seen from the job's folder."""
    size_bytes: int


def copy_files(
    source: Tier,
    target: Tier,
    job: str,
    loaded: Manifest,
    files: Collection[str],
    *,
    pace: Pace | None = None,
    threads: int = FILES_AT_ONCE,
    progress: Progress | None = None,
) -> Copied:
    """Copy those of a checkpoint's files that the target does not have, or not of the right size.

    A name of a file never means two contents, so one that is there is not read. Raises `DamagedError` that names
    tensor and file when the source's copy is not what the manifest says, and nothing appears on the target then.
    """
    checks = checks_of(loaded, headers=False)
    copied: dict[str, int] = {}

    def copy(file: str) -> None:
        key = f"{job}/{file}"
        stream = TierStream(source, key, source.size_bytes(key), checks[file], progress=progress)
        if _has(target, key, stream.size_bytes, checks[file]):
            return
        target.put(key, stream, pace=pace)
        copied[file] = stream.size_bytes

    flight.run(sorted(files), lambda: copy, threads)
    return Copied(tuple(sorted(copied)), sum(copied.values()))


def _has(target: Tier, key: str, source_bytes: int, checks: FileChecks) -> bool:
    try:
        size_bytes = target.size_bytes(key)
    except NotFoundError:
        return False
    # Of another checkpoint's file only this much is known: of two that both suffice, the shorter one was cut.
    return size_bytes == source_bytes or (checks.size_bytes is None and size_bytes > source_bytes)


def upload(
    source: Tier,
    target: Tier,
    job: str,
    checkpoint: CheckpointId,
    *,
    pace: Pace | None = None,
    threads: int = FILES_AT_ONCE,
    progress: Progress | None = None,
    ours: Callable[[], int] | None = None,
) -> Copied:
    """Commit a checkpoint of one tier on another: all files that it needs, then the same manifest.

    It may be killed anywhere and be repeated: nothing is committed before everything is there, and what is there is
    not sent again. Right before the commit it is looked whether what was there still is: another agent may have pruned
    it, which raises a `StoreError`.

    Raises `FencedError` when another manifest stands on the target, or a generation is claimed there that is newer
    than `ours`, which is asked after the look: ours may be claimed meanwhile.
    """
    document, loaded = catalog.read_manifest(source, job, checkpoint)
    if _is_committed(target, job, checkpoint, document):
        return Copied((), 0)
    copied = copy_files(source, target, job, loaded, loaded.files, pace=pace, threads=threads, progress=progress)
    _look_again(source, target, job, loaded, sent=copied.files)
    if ours is not None:
        _refuse_newer(target, job, ours)
    commit(target, job, checkpoint, document)
    return copied


def _look_again(source: Tier, target: Tier, job: str, loaded: Manifest, *, sent: Collection[str]) -> None:
    """Raise `StoreError` unless what need not be sent is still there."""
    checks = checks_of(loaded, headers=False)

    def look(file: str) -> None:
        key = f"{job}/{file}"
        if not _has(target, key, source.size_bytes(key), checks[file]):
            raise StoreError(
                f"{target.url}/{key} was there when the upload of {loaded.id} began, and is gone",
                hint="another agent prunes there, or somebody has removed it; the next attempt sends it",
            )

    flight.run(sorted(loaded.files.difference(sent)), lambda: look, _LOOKS_AT_ONCE)


def _refuse_newer(target: Tier, job: str, ours: Callable[[], int]) -> None:
    listed = (keys.parse_generation_key(entry.key) for entry in target.list(f"{job}/g"))
    newest = max((number for number in listed if number is not None), default=0)
    known = ours()
    if newest > known:
        raise FencedError(
            f"generation {newest} of job {job} is claimed on {target.url}, this is {known}",
            hint="another agent runs the job, with a disk of its own: stop one of them",
        )


def commit(target: Tier, job: str, checkpoint: CheckpointId, document: bytes) -> None:
    """Put a manifest of which everything is there; raises `FencedError` when another one stands already.

    A tier that has no create-only put is looked at instead: two agents that commit at once are not kept apart there.
    """
    create_only = target.capabilities.create_only_put
    if not create_only and _is_committed(target, job, checkpoint, document):
        return
    try:
        target.put(keys.manifest_key(job, checkpoint), document, create_only=create_only)
    except FencedError:
        if not _is_committed(target, job, checkpoint, document):
            raise


def _is_committed(target: Tier, job: str, checkpoint: CheckpointId, document: bytes) -> bool:
    """Whether a manifest stands on the target; raises `FencedError` when it is another one."""
    key = keys.manifest_key(job, checkpoint)
    try:
        found = target.get(key)
    except NotFoundError:
        return False
    if found != document:
        raise FencedError(
            f"{target.url}/{key} exists already, and is another manifest",
            hint="another agent has committed that step, or the manifest is damaged: `ckptctl verify` tells",
        )
    return True
