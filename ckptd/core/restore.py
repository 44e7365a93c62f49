"""Restore planning: where a new generation begins, each source in the order of its cost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ckptd.core.snapshots import Snapshot
from ckptd.errors import DamagedError
from ckptd.types import CheckpointId

MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Source:
    """A place that holds a complete copy of a checkpoint."""

    id: CheckpointId
    tier: str

    def __str__(self) -> str:
        return f"{self.id} {'in' if self.tier == MEMORY else 'on'} {self.tier}"


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What to try, best first, and why; `sources` is empty for a fresh start."""

    sources: tuple[Source, ...]
    reasons: tuple[str, ...]

    @property
    def fresh(self) -> bool:
        """Whether there is nothing to restore at all."""
        return not self.sources


def plan_restore(
    newest: Snapshot | None,
    stored: Iterable[Source],
    refused: Collection[Source],
    at_most_step: int | None = None,
) -> RestorePlan:
    """Return the sources for the next generation.

    `newest` is the newest snapshot complete in memory, `stored` the lineage's checkpoints on tiers, best first.
    `refused` are copies that were found damaged: they are never offered again, while other copies of the same
    checkpoint are. `at_most_step` asks for an older step on purpose.
    """
    sources: list[Source] = []
    reasons: list[str] = []
    if newest is not None and newest.complete:
        if Source(newest.id, MEMORY) in refused:
            reasons.append(_failed(Source(newest.id, MEMORY)))
        elif at_most_step is not None and newest.id.step > at_most_step:
            reasons.append(f"{newest.id} in memory is newer than the step asked for, {at_most_step}")
        else:
            sources.append(Source(newest.id, MEMORY))
    for source in stored:
        if source in refused:
            reasons.append(_failed(source))
        elif at_most_step is not None and source.id.step > at_most_step:
            reasons.append(f"{source} is newer than the step asked for, {at_most_step}")
        else:
            sources.append(source)
    # Stable: within one step memory stays before disk, and disk before the object store.
    sources.sort(key=lambda source: source.id, reverse=True)
    if sources:
        reasons.append(f"{sources[0]} is the newest complete one")
    elif not reasons:
        reasons.append("there is no checkpoint of this job")
    return RestorePlan(tuple(sources), tuple(reasons))


def _failed(source: Source) -> str:
    return f"{source} failed to restore before"


class Offers:
    """What can be offered to the next generation: the lineage's checkpoints, minus what proved unusable.

    Of the copies of one checkpoint, that on the tier which comes first in `tiers` is tried first.
    """

    def __init__(self, tiers: Iterable[str] = ()) -> None:
        self.stored: list[Source] = []
        self.refused: set[Source] = set()
        self.at_most_step: int | None = None
        self._untried: list[Source] = []
        self._leaving: set[Source] = set()
        """What retention lets go, until it is gone."""
        self._fetched: dict[Source, Source] = {}
        """Of copies that were fetched to be offered: where they were read from in truth."""
        self._places = {tier: place for place, tier in enumerate(tiers)}

    def read(self, sources: Iterable[Source], unread: Collection[str] = ()) -> None:
        """Take in what was found on the tiers; of those in `unread` stays what was known before."""
        known = dict.fromkeys([*sources, *(source for source in self.stored if source.tier in unread)])
        self.stored = sorted(known, key=self._order)

    def _order(self, source: Source) -> tuple[int, int, int]:
        return -source.id.generation, -source.id.step, self._places.get(source.tier, len(self._places))

    def plan(self, newest: Snapshot | None) -> RestorePlan:
        """Plan anew; raises `DamagedError` when there were checkpoints once and none can be offered any more."""
        plan = plan_restore(newest, self.stored, self.refused, self.at_most_step)
        if plan.fresh and (self.stored or self.refused):
            failed = [_failed(source) for source in sorted(self.refused, key=lambda source: source.id, reverse=True)]
            reasons = dict.fromkeys(failed + list(plan.reasons if self.stored else ()))
            raise nothing_left(reasons, self.at_most_step)
        self._untried = list(plan.sources)
        return plan

    def next(self) -> Source | None:
        """Return the best source not tried yet, None when there is none."""
        left = [source for source in self._untried if source not in self.refused]
        self._untried = left[1:]
        return left[0] if left else None

    def reachable(self, complete: Iterable[Snapshot]) -> set[CheckpointId]:
        """Return what a restart could begin with, of all that is stored or complete in memory."""
        sources = [*self.stored, *(Source(snapshot.id, MEMORY) for snapshot in complete)]
        return {source.id for source in sources if source not in self.refused}

    def newest_until(self, step: int, complete: Iterable[Snapshot]) -> CheckpointId | None:
        """Return the newest that can be offered and is no newer than `step`; `complete` are those in memory."""
        known = {Source(snapshot.id, MEMORY) for snapshot in complete}.union(self.stored) - self.refused
        return max((source.id for source in known if source.id.step <= step), default=None)

    def newest_before(self, checkpoint: CheckpointId, complete: Iterable[Snapshot]) -> CheckpointId | None:
        """Return the newest that can be offered and is of an earlier step than `checkpoint`."""
        return self.newest_until(checkpoint.step - 1, complete)

    def drop(self, source: Source) -> None:
        """Forget a copy that is damaged; other copies of the same checkpoint stay."""
        self.stored = [other for other in self.stored if other != source]

    def began_with(self, offer: Source | None) -> None:
        """Note what a generation begins with: what is newer than that is not in the lineage any more."""
        self.at_most_step = None
        if offer is not None:
            self.stored = [source for source in self.stored if source.id <= offer.id]
            self._leaving = {source for source in self._leaving if source.id <= offer.id}

    def begin_afresh(self) -> None:
        """Offer nothing of what there is: the next generation begins where the job did."""
        self.stored, self._leaving, self.at_most_step = [], set(), None

    def add(self, source: Source) -> None:
        """Note a new copy."""
        self.stored = sorted({*self.stored, source}, key=self._order)

    def fetched(self, source: Source, first: str) -> None:
        """Note that a checkpoint was brought to the first tier, which has mended a damaged copy there."""
        landed = self._fetched[source] = Source(source.id, first)
        self.refused.discard(landed)
        self.add(landed)

    def refuse(self, source: Source) -> None:
        """Never offer a copy again, since a rank has found it damaged; nor what the rank has read in its stead.

        So each copy is tried once at most, however often a bad first tier spoils what is fetched to it.
        """
        self.refused |= {source, self._fetched.get(source, source)}

    def keep(self, held: Mapping[str, Collection[CheckpointId]]) -> None:
        """Offer no more what retention has let go."""
        leaving = {source for source in self.stored if source.id not in held.get(source.tier, ())}
        self._leaving |= leaving
        self.stored = [source for source in self.stored if source not in leaving]

    def went(self, tier: str, ids: Iterable[CheckpointId], left: Collection[CheckpointId]) -> None:
        """Note the end of a prune: what is left after all can be offered again."""
        for source in self._leaving.intersection(Source(checkpoint, tier) for checkpoint in ids):
            self._leaving.discard(source)
            if source.id in left:
                self.add(source)

    def newest_on(self, tier: str) -> CheckpointId | None:
        """Return the newest on a tier that a restart could begin with."""
        limit = self.at_most_step
        usable = [source.id for source in self.stored if source.tier == tier and source not in self.refused]
        return max((item for item in usable if limit is None or item.step <= limit), default=None)


def nothing_left(reasons: Iterable[str], at_most_step: int | None = None) -> DamagedError:
    """Return the error of a job whose every checkpoint is unusable: never a silent fresh start.

    With `at_most_step` that is only known of those up to there, to which it was to step back.
    """
    if at_most_step is not None:
        return DamagedError(
            f"no checkpoint at step {at_most_step} or before it can be restored: {'; '.join(reasons)}",
            hint="the same command again begins with the newest checkpoint",
        )
    return DamagedError(
        f"there are checkpoints of this job, but none can be restored: {'; '.join(reasons)}",
        hint="`ckptctl verify JOB --all` names what is wrong; use another --name to start afresh",
    )
