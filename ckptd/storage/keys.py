"""The layout of keys, the same on every tier.

    <job>/g<generation:06d>/generation.json
    <job>/g<generation:06d>/s<step:012d>/rank-00000.safetensors ...
    <job>/g<generation:06d>/s<step:012d>/manifest.json

A zombie of an old generation can only write under its own prefix, and names sort in the order of time.
"""

from __future__ import annotations

import re

from ckptd.errors import ConfigError
from ckptd.types import CheckpointId

MANIFEST = "manifest.json"
GENERATION = "generation.json"
_JOB = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_MANIFEST_KEY = re.compile(r"(?P<job>[^/]+)/g(?P<generation>\d{6,})/s(?P<step>\d{12,})/manifest\.json")
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


def checkpoint_prefix(job: str, checkpoint: CheckpointId) -> str:
    """Return the prefix of one checkpoint's objects."""
    return f"{generation_prefix(job, checkpoint.generation)}s{checkpoint.step:012d}/"


def manifest_key(job: str, checkpoint: CheckpointId) -> str:
    """Return the key whose existence commits a checkpoint."""
    return checkpoint_prefix(job, checkpoint) + MANIFEST


def shard_file(rank: int) -> str:
    """Return the file name of a rank's shard."""
    return f"rank-{rank:05d}.safetensors"


def shard_key(job: str, checkpoint: CheckpointId, rank: int) -> str:
    """Return the key of a rank's shard."""
    return checkpoint_prefix(job, checkpoint) + shard_file(rank)


def parse_manifest_key(key: str) -> CheckpointId | None:
    """Return which checkpoint a key commits, None when it is no manifest's key."""
    match = _MANIFEST_KEY.fullmatch(key)
    return CheckpointId(int(match["generation"]), int(match["step"])) if match else None


def parse_generation_key(key: str) -> int | None:
    """Return which generation a key claims, None when it claims none."""
    match = _GENERATION_KEY.fullmatch(key)
    return int(match["generation"]) if match else None
