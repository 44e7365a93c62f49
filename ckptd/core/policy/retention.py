"""What to keep on a tier: the checkpoints there in, a verdict with reasons for each out.

Every rule names checkpoints that stay, and one that any rule names stays. Only a bound on bytes takes away what rules
would keep. What each rule names it goes on naming as newer checkpoints come, but for those that count from the newest:
so nothing is kept for a reason that was never true, and pruning never runs away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptd.types import CheckpointId, Held


@dataclass(frozen=True, slots=True)
class Best:
    """Keep the `count` checkpoints with the lowest or highest value of a metric that ranks have reported."""

    metric: str
    mode: str
    """"min" or "max"."""
    count: int

    def __str__(self) -> str:
        return f"{self.metric}:{self.mode}:{self.count}"


@dataclass(frozen=True, slots=True)
class RetentionPolicy:
    """Which checkpoints stay on a tier; 0 switches a rule off. The newest always stays."""

    keep_last: int = 3
    """So many of the newest."""
    keep_every_s: float = 0.0
    """The first of every such stretch of the wall clock."""
    keep_every_steps: int = 0
    """The first of every so many steps."""
    keep_best: Best | None = None
    keep_tagged: bool = True
    """Those that somebody has given a name."""
    max_bytes: int = 0
    """How much all of them may take; the oldest go first, but never the newest, one in use or one with a tag."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one checkpoint stays, and why."""

    id: CheckpointId
    keep: bool
    reasons: tuple[str, ...]


def judge(held: Iterable[Held], policy: RetentionPolicy, in_use: Mapping[CheckpointId, str]) -> list[Verdict]:
    """Judge the checkpoints committed on one tier, newest first.

    `in_use` says of some why they must stay now, such as a restore that reads them.
    """
    newest_first = sorted({item.id: item for item in held}.values(), key=lambda item: item.id, reverse=True)
    reasons: dict[CheckpointId, list[str]] = {item.id: [] for item in newest_first}
    for place, item in enumerate(newest_first):
        if place == 0:
            reasons[item.id].append("the newest")
        elif place < policy.keep_last:
            reasons[item.id].append(f"one of the last {policy.keep_last}")
        if item.id in in_use:
            reasons[item.id].append(in_use[item.id])
        if policy.keep_tagged and item.tags:
            reasons[item.id].append(f"tagged {', '.join(item.tags)}")
    for rule, named in _named(newest_first, policy):
        for checkpoint in named:
            reasons[checkpoint].append(rule)
    over = _over_bound(newest_first, reasons, policy, in_use)
    return [
        Verdict(
            item.id,
            keep=bool(reasons[item.id]) and item.id not in over,
            reasons=over.get(item.id) or tuple(reasons[item.id]) or ("no rule keeps it",),
        )
        for item in newest_first
    ]


def make_room(
    held: Iterable[Held], policy: RetentionPolicy, in_use: Mapping[CheckpointId, str], needed_bytes: int
) -> list[Verdict]:
    """Return what goes from a tier that is full so that `needed_bytes` are free, oldest first.

    Only what nothing but `keep_last` keeps may go, and never the newest: what a tag, another rule or a use keeps was
    wanted for longer than its turn. It may be less than was asked for.
    """
    facts = {item.id: item for item in held}
    strict = judge(facts.values(), replace(policy, keep_last=1, max_bytes=0), in_use)
    going: list[Verdict] = []
    for verdict in reversed(strict):
        if needed_bytes <= 0:
            break
        if not verdict.keep:
            going.append(replace(verdict, reasons=("the tier is full, and nothing but keep_last keeps it",)))
            needed_bytes -= facts[verdict.id].size_bytes
    return going


def _named(newest_first: Sequence[Held], policy: RetentionPolicy) -> Iterable[tuple[str, Collection[CheckpointId]]]:
    """Yield what each rule that looks beyond the last ones names, with its words."""
    every_s, every_steps, best = policy.keep_every_s, policy.keep_every_steps, policy.keep_best
    if every_s:
        firsts = _firsts(newest_first, lambda item: math.floor(item.committed_at / every_s))
        yield f"the first of its {every_s:g} s", firsts
    if every_steps:
        yield f"the first of its {every_steps} steps", _firsts(newest_first, lambda item: item.id.step // every_steps)
    if best is not None:
        sign = -1 if best.mode == "max" else 1
        rated = [item for item in newest_first if math.isfinite(item.values.get(best.metric, math.nan))]
        rated.sort(key=lambda item: sign * item.values[best.metric])  # stable: of equals the newer is the better
        yield f"one of the best {best.count} by {best.metric}", [item.id for item in rated[: best.count]]


def _firsts(newest_first: Sequence[Held], stretch: Callable[[Held], int]) -> Collection[CheckpointId]:
    # Later ones of a stretch can never take the first one's place.
    return {stretch(item): item.id for item in newest_first}.values()


def _over_bound(
    newest_first: Sequence[Held],
    reasons: Mapping[CheckpointId, Sequence[str]],
    policy: RetentionPolicy,
    in_use: Collection[CheckpointId],
) -> dict[CheckpointId, tuple[str, ...]]:
    """Return which checkpoints the bound on bytes takes away, oldest first, and why."""
    kept = [item for item in newest_first if reasons[item.id]]
    total_bytes = sum(item.size_bytes for item in kept)
    over: dict[CheckpointId, tuple[str, ...]] = {}
    for item in reversed(kept[1:]):
        if not policy.max_bytes or total_bytes <= policy.max_bytes:
            break
        if item.id in in_use or (policy.keep_tagged and item.tags):
            continue
        over[item.id] = (f"{total_bytes} bytes are kept where {policy.max_bytes} are allowed",)
        total_bytes -= item.size_bytes
    return over
