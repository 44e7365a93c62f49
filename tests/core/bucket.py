"""A job with a disk and a bucket, for the scenarios of this folder."""

from __future__ import annotations

from typing import Any

from ckptd.core import events as e
from ckptd.core.job_spec import TierSpec
from ckptd.core.policy.retention import RetentionPolicy
from tests.core.script import BUCKET, Script


def with_bucket(
    *, keep: int = 3, keep_in_bucket: int = 3, every_s: float = 0.0, backlog: int = 2, **more: Any
) -> Script:
    """Return a job whose checkpoints are uploaded to a bucket."""
    return Script(keep=keep, further=[TierSpec(BUCKET, RetentionPolicy(keep_in_bucket), every_s, backlog)], **more)


def train(job: Script) -> Script:
    """Let a job train; a step takes a second."""
    job.begin_training()
    job.now_s += 1.0
    job.progress(2)
    return job


def commit(job: Script, step: int, slot: int, generation: int = 1) -> list[str]:
    """Capture and flush a step; return what follows the commit, without the slots that come back."""
    job.capture(step, slot)
    return [line for line in job.committed(f"g{generation}/s{step}") if not line.startswith("release")]


def logged(job: Script, event: str) -> list[dict[str, object]]:
    """Return the fields of what was logged last under a name."""
    return [dict(item.fields) for item in job.effects if isinstance(item, e.Log) and item.event == event]
