"""Lineage: which committed checkpoints a new generation may begin with.

Every generation records the (generation, step) it began with. Walking back from the newest generation, a generation's
own checkpoints count, then its parent's up to the step it began with, and so on: what a step back has left behind is
not in the lineage, however high its step number.

A generation of which nothing is left, on a tier where neither its own checkpoints nor the one that it began with have
arrived yet, does not count: what older ones have there is better than a fresh start.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ckptd.types import CheckpointId


def candidates(parents: Mapping[int, CheckpointId | None], committed: Iterable[CheckpointId]) -> list[CheckpointId]:
    """Return the committed checkpoints of the lineage, the best to restore from first; empty only if none is there."""
    by_generation: dict[int, list[int]] = {}
    for checkpoint in committed:
        by_generation.setdefault(checkpoint.generation, []).append(checkpoint.step)
    known = sorted({*parents, *by_generation}, reverse=True)
    return next(filter(None, (_line(newest, parents, by_generation) for newest in known)), [])


def _line(
    newest: int, parents: Mapping[int, CheckpointId | None], by_generation: Mapping[int, Sequence[int]]
) -> list[CheckpointId]:
    """Return what is committed of the lineage that ends with a generation."""
    line: list[CheckpointId] = []
    generation: int | None = newest
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
