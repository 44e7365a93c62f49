"""The layout of keys, the same on every tier.

    <job>/g<generation:06d>/generation.json
    <job>/g<generation:06d>/s<step:012d>/rank-00000.safetensors ...
    <job>/g<generation:06d>/s<step:012d>/manifest.json
    <job>/g<generation:06d>/s<step:012d>/deleted-<unix seconds>.json
    <job>/tags/<name>.json

A zombie of an old generation can only write under its own prefix, and names sort in the order of time.
"""

from __future__ import annotations

import re

from ckptd.errors import ConfigError
from ckptd.types import CheckpointId

MANIFEST = "manifest.json"
GENERATION = "generation.json"
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHARD_FILE = re.compile(r"g\d{6,}/s\d{12,}/rank-\d{5,}\.safetensors")
_FOLDER = re.compile(r"[^/]+/g(?P<generation>\d{6,})/s(?P<step>\d{12,})/")
_MANIFEST_KEY = re.compile(r"(?P<job>[^/]+)/g(?P<generation>\d{6,})/s(?P<step>\d{12,})/manifest\.json")
_MARKER_KEY = re.compile(r"[^/]+/g(?P<generation>\d{6,})/s(?P<step>\d{12,})/deleted-(?P<at>\d{1,15})\.json")
_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TAG_KEY = re.compile(rf"[^/]+/tags/(?P<tag>{_TAG.pattern})\.json")
_GENERATION_KEY = re.compile(r"(?P<job>[^/]+)/g(?P<generation>\d{6,})/generation\.json")


def check_job(job: str) -> str:
    """Return `job` when it can name a folder and an object prefix; raises `ConfigError` otherwise."""
    if not _JOB.fullmatch(job):
        raise ConfigError(
            f"{job!r} can't name a job",
            hint="use up to 128 letters, digits, dots, dashes and underscores, starting with a letter or digit",
        )
    return job


def generation_prefix(job: str, generation: int) -> str:
    """Return the prefix under which a generation keeps everything."""
    return f"{job}/g{generation:06d}/"


def generation_key(job: str, generation: int) -> str:
    """Return the key whose creation claims a generation."""
    return generation_prefix(job, generation) + GENERATION


def folder(checkpoint: CheckpointId) -> str:
    """Return the prefix of one checkpoint's objects, seen from the job's folder."""
    return f"g{checkpoint.generation:06d}/s{checkpoint.step:012d}/"


def checkpoint_prefix(job: str, checkpoint: CheckpointId) -> str:
    """Return the prefix of one checkpoint's objects."""
    return f"{job}/{folder(checkpoint)}"


def manifest_key(job: str, checkpoint: CheckpointId) -> str:
    """Return the key whose existence commits a checkpoint."""
    return checkpoint_prefix(job, checkpoint) + MANIFEST


def marker_key(job: str, checkpoint: CheckpointId, deleted_at: float) -> str:
    """Return the key that a checkpoint's manifest has from its removal at `deleted_at` until its files go."""
    return f"{checkpoint_prefix(job, checkpoint)}deleted-{int(deleted_at)}.json"


def shard_file(rank: int) -> str:
    """Return the file name of a rank's shard."""
    return f"rank-{rank:05d}.safetensors"


def shard_key(job: str, checkpoint: CheckpointId, rank: int) -> str:
    """Return the key of a rank's shard."""
    return checkpoint_prefix(job, checkpoint) + shard_file(rank)


def is_shard_file(file: str) -> bool:
    """Whether a name seen from the job's folder is that of a shard, and so leads nowhere else."""
    return _SHARD_FILE.fullmatch(file) is not None


def parse_manifest_key(key: str) -> CheckpointId | None:
    """Return which checkpoint a key commits, None when it is no manifest's key."""
    match = _MANIFEST_KEY.fullmatch(key)
    return CheckpointId(int(match["generation"]), int(match["step"])) if match else None


def parse_marker_key(key: str) -> tuple[CheckpointId, int] | None:
    """Return the removal of which checkpoint a key marks, and when that was; None when it marks none."""
    match = _MARKER_KEY.fullmatch(key)
    return (CheckpointId(int(match["generation"]), int(match["step"])), int(match["at"])) if match else None


def parse_folder(key: str) -> CheckpointId | None:
    """Return in which checkpoint's folder a key lies, None when it lies in none."""
    match = _FOLDER.match(key)
    return CheckpointId(int(match["generation"]), int(match["step"])) if match else None


def parse_generation_key(key: str) -> int | None:
    """Return which generation a key claims, None when it claims none."""
    match = _GENERATION_KEY.fullmatch(key)
    return int(match["generation"]) if match else None


def tag_key(job: str, tag: str) -> str:
    """Return the key of a tag, which names a checkpoint; raises `ConfigError` when it can't be the name of one."""
    if not _TAG.fullmatch(tag):
        raise ConfigError(
            f"{tag!r} can't be a tag",
            hint="use up to 128 letters, digits, dots, dashes and underscores, starting with a letter or digit",
        )
    return f"{job}/tags/{tag}.json"


def parse_tag_key(key: str) -> str | None:
    """Return which tag a key is, None when it is none."""
    match = _TAG_KEY.fullmatch(key)
    return match["tag"] if match else None
