"""What to keep: a list of checkpoints in, a verdict with reasons for each out. Rules combine by OR."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ckptd.types import CheckpointId


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """`keep_last` newest checkpoints stay."""

    keep_last: int = 3


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one checkpoint stays, and why."""

    id: CheckpointId
    keep: bool
    reason: str


def judge(
    checkpoints: Iterable[CheckpointId], policy: RetentionPolicy, in_use: Iterable[CheckpointId]
) -> list[Verdict]:
    """Judge the checkpoints committed on one tier, newest first.

    `in_use` are those that a restore may be reading; they stay. The newest stays whatever the policy says, so
    nothing older than the newest commit can be the last one.
    """
    used = set(in_use)
    verdicts = []
    for place, checkpoint in enumerate(sorted(set(checkpoints), reverse=True)):
        if place == 0:
            verdicts.append(Verdict(checkpoint, keep=True, reason="the newest"))
        elif place < policy.keep_last:
            verdicts.append(Verdict(checkpoint, keep=True, reason=f"one of the last {policy.keep_last}"))
        elif checkpoint in used:
            verdicts.append(Verdict(checkpoint, keep=True, reason="a restore uses it"))
        else:
            verdicts.append(Verdict(checkpoint, keep=False, reason=f"not one of the last {policy.keep_last}"))
    return verdicts
