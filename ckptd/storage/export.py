"""A copy of a checkpoint that needs neither ckptd nor the store: what all formats have in common.

A format is an `Exporter`, which fills a folder of its own. That folder appears under its name when it is whole and
durable, or not at all, with `checkpoint.json` in it: which checkpoint it is, and the metrics reported at its step.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from ckptd.errors import ConfigError, StoreError
from ckptd.storage.catalog import load_manifest
from ckptd.storage.folders import make_folders, sync_folder
from ckptd.storage.hints import hint_for
from ckptd.storage.manifest import Manifest
from ckptd.storage.tier import Tier
from ckptd.types import CheckpointId

DESCRIPTION = "checkpoint.json"


class Source(NamedTuple):
    """What an exporter exports."""

    tier: Tier
    job: str
    manifest: Manifest
    max_file_bytes: int | None = None
    """How much may go into one file, where the format knows several: 0 for no limit, None for what is usual."""


class Written(NamedTuple):
    """What an exporter has written."""

    tensors: int
    notes: tuple[str, ...] = ()
    """What people should know of it, such as what was left out; a line each."""


class Exporter(Protocol):
    """Writes a checkpoint in one format."""

    def __call__(self, source: Source, folder: Path) -> Written:
        """Write into `folder`, which is empty, and nowhere else.

        Raises `DamagedError` or `NotFoundError` when bytes are not what was committed, `StateError` for what the
        format can't hold, and `StoreError` or `OSError` when it can't be written.
        """
        ...


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written."""

    files: tuple[str, ...]
    """Seen from the folder."""
    size_bytes: int
    tensors: int
    notes: tuple[str, ...]


def export(
    exporter: Exporter,
    tier: Tier,
    job: str,
    checkpoint: CheckpointId,
    to: Path,
    *,
    max_file_bytes: int | None = None,
) -> Exported:
    """Copy a checkpoint to the folder `to`, which appears when it is whole and must not have anything in it before.

    Raises `ConfigError` when the folder can't be used, `StoreError` when it can't be written, and what the exporter
    raises. Then nothing is left behind.
    """
    source = Source(tier, job, load_manifest(tier, job, checkpoint), max_file_bytes)
    try:
        _check_target(to)
        new_folders = [folder for folder in to.parents if not folder.exists()]
        temporary = to.with_name(f".tmp-{os.urandom(8).hex()}-{to.name}")
        try:
            make_folders(temporary)
            written = exporter(source, temporary)
            files = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
            described = _describe(source.manifest, files)
            (temporary / DESCRIPTION).write_bytes(described)
            files.append(DESCRIPTION)
            size_bytes = _sync(temporary, files)
            temporary.rename(to)
            sync_folder(to.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            for folder in new_folders:
                with contextlib.suppress(OSError):  # somebody else uses it by now
                    folder.rmdir()
            raise
    except OSError as error:
        hint = hint_for(error, "--to") or "use another folder for --to"
        raise StoreError(f"can't export to {to}: {error.strerror or error}", hint=hint) from error
    return Exported(tuple(files), size_bytes, written.tensors, written.notes)


def _check_target(to: Path) -> None:
    if to.is_dir() and not to.is_symlink() and not any(to.iterdir()):
        if to.is_mount() or to.samefile(Path.cwd()):  # which can't be, or should not be, replaced by another folder
            raise ConfigError(
                f"{to} is {'a mount' if to.is_mount() else 'the current folder'}, and the export becomes a new folder",
                hint=f"name one that does not exist yet, like --to {to / 'export'}",
            )
        return
    if to.exists() or to.is_symlink():
        raise ConfigError(f"{to} is there already", hint="--to names a folder that is empty, or does not exist yet")


def _describe(loaded: Manifest, files: Sequence[str]) -> bytes:
    document = {
        "job": loaded.job,
        "generation": loaded.id.generation,
        "step": loaded.id.step,
        "world_size": loaded.world_size,
        "created_at": loaded.created_at,
        "producer": loaded.document["producer"],
        "values": dict(loaded.values),
        "files": list(files),
    }
    return json.dumps(document, indent=2, ensure_ascii=False).encode() + b"\n"


def _sync(folder: Path, files: Sequence[str]) -> int:
    """Make files survive a power cut; returns their size."""
    size_bytes = 0
    for file in files:
        descriptor = os.open(folder / file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
            size_bytes += os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)
    for inner in {(folder / file).parent for file in files}:
        sync_folder(inner)
    return size_bytes
