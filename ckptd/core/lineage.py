"""Lineage: which committed checkpoints a new generation may begin with.

Every generation records the (generation, step) it began with. Walking back from the newest generation, a generation's
own checkpoints count, then its parent's up to the step it began with, and so on: what a step back has left behind is
not in the lineage, however high its step number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ckptd.types import CheckpointId


def candidates(parents: Mapping[int, CheckpointId | None], committed: Iterable[CheckpointId]) -> list[CheckpointId]:
    """Return the committed checkpoints of the lineage, the best to restore from first."""
    by_generation: dict[int, list[int]] = {}
    for checkpoint in committed:
        by_generation.setdefault(checkpoint.generation, []).append(checkpoint.step)
    known = set(parents) | set(by_generation)
    line: list[CheckpointId] = []
    generation = max(known, default=None)
    limit: int | None = None
    while generation is not None:
        steps = sorted(by_generation.get(generation, ()), reverse=True)
        line += [CheckpointId(generation, step) for step in steps if limit is None or step <= limit]
        parent = parents.get(generation)
        if parent is not None and parent.generation >= generation:
            break  # a damaged record must not send us round in circles
        generation = None if parent is None else parent.generation
        limit = None if parent is None else parent.step
    return line


def latest_generation(parents: Mapping[int, CheckpointId | None], committed: Iterable[CheckpointId]) -> int:
    """Return the highest generation number in use, 0 when there is none; the next one must be above it."""
    return max({0, *parents, *(checkpoint.generation for checkpoint in committed)})
