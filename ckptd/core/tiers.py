"""What each tier holds of a job, what is on its way there, and what may go.

Two rules keep a restart possible from each tier alone: the newest on it that a restart could begin with never goes, and
what is still to be read for an upload stays where it is read from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptd.core.events import Effect, Log, Upload, UploadFailed
from ckptd.core.health import Health
from ckptd.core.job_spec import TierSpec
from ckptd.core.policy import halt, retention
from ckptd.core.prune_events import Collect, MakeRoom, Prune
from ckptd.core.restore import Source
from ckptd.core.uploads import Uploads
from ckptd.errors import FencedError, invariant
from ckptd.types import CheckpointId, Held

_COLLECT_EVERY_S = 3600.0
"""Garbage is rare, and to look for it costs calls; after a prune of a near tier it is looked for anyway."""


@dataclass(slots=True)
class UploadCounters:
    """What happened to uploads in this run, for status and tests: no skip is silent."""

    committed: int = 0
    skipped: int = 0
    failures: int = 0


class Tiers:
    """The tiers of one job, the first of which is where flushes go."""

    def __init__(self, specs: Sequence[TierSpec], health: Health) -> None:
        self.first = specs[0].name
        self._health = health
        self.held: dict[str, dict[CheckpointId, Held]] = {spec.name: {} for spec in specs}
        """What is committed, by tier."""
        self.uploads = {spec.name: Uploads(spec.name, spec.backlog, spec.every_s) for spec in specs[1:]}
        """The queue of every tier but the first."""
        self.damaged: set[Source] = set()
        """Copies that were read again and found damaged, until they are mended."""
        self.mending: Source | None = None
        """The copy that is being mended: until that is done, it and what it is mended from stay."""
        self.going: dict[Source, Held] = {}
        """What was known of copies whose removal is under way."""
        self.counters = UploadCounters()
        self._parents: dict[int, CheckpointId] = {}
        self._beyond: set[CheckpointId] = set()
        """What is newer than all that a restart could begin with when that was found out: a step back has left it."""
        self._unknown = {spec.name for spec in specs}
        """Tiers that were never read: they may hold anything."""
        self._collect_at_s: dict[str, float] = {}
        self._policies = {spec.name: spec.retention for spec in specs}
        invariant(len(self._policies) == len(specs), f"two tiers of one name: {[spec.name for spec in specs]}")

    def found(
        self, sources: Iterable[Source], held: Mapping[str, Iterable[Held]], unread: Collection[str] = ()
    ) -> None:
        """Take in what the tiers hold already, and queue the newest where it is missing.

        What is in `sources` and not in `held` is known by its name only; of a tier in `unread`, what was known before
        stays.
        """
        copies = list(sources)
        for tier in self.held:
            if tier not in unread:
                facts = {source.id: Held(source.id) for source in copies if source.tier == tier}
                self.held[tier] = facts | {item.id: item for item in held.get(tier, ())}
                self._unknown.discard(tier)
        best = max((source.id for source in copies), default=None)
        known = {item for tier, items in self.held.items() if tier not in unread for item in items}
        self._beyond = {item for item in known if best is not None and item > best}
        newest = max((source.id for source in copies if source.tier == self.first), default=None)
        if newest is not None:
            self._offer_where_missing(newest)

    def begin(self, generation: int, parent: CheckpointId | None) -> None:
        """Begin a generation: what it leaves behind need not go anywhere, what it begins with must."""
        for queue in self.uploads.values():
            queue.calm_down()
            if parent is not None:
                queue.leave_behind(parent)
        if parent is not None:
            self._parents[generation] = parent
            if parent in self.held[self.first]:
                self._offer_where_missing(parent)

    def left_behind(self, checkpoint: CheckpointId) -> bool:
        """Whether a generation has begun with something older, so that it is not in the lineage."""
        cuts = self._parents.items()
        return checkpoint in self._beyond or any(
            checkpoint > parent and checkpoint.generation < generation for generation, parent in cuts
        )

    def leave_all(self) -> None:
        """Note that the job is to begin afresh: what is there, or on its way, is not in the lineage any more."""
        coming = {item for queue in self.uploads.values() for item in queue.pinned}
        self._beyond |= coming.union(*self.held.values())

    def _offer_where_missing(self, checkpoint: CheckpointId) -> None:
        for tier, queue in self.uploads.items():
            if checkpoint not in self.held[tier]:
                queue.offer(checkpoint)

    def mended(self, source: Source) -> None:
        """Note that a damaged copy is whole again; from the first tier the newest can be uploaded now."""
        self.damaged.discard(source)
        if source.tier == self.first and source.id == max(self.held[self.first], default=None):
            self._offer_where_missing(source.id)

    def fetched(self, source: Source) -> None:
        """Note that a checkpoint was brought back to the first tier, which has mended a damaged copy there."""
        self.damaged.discard(Source(source.id, self.first))
        self.held[self.first][source.id] = self.held[source.tier].get(source.id, Held(source.id))

    def flushed(self, item: Held, *, upload: bool) -> list[Effect]:
        """Note a commit on the first tier, and queue it for the others if it is worth their while."""
        self.held[self.first][item.id] = item
        self._beyond.discard(item.id)
        effects: list[Effect] = []
        for queue in self.uploads.values() if upload else ():
            effects += self._skipped(queue, queue.offer(item.id))
        return effects

    def _skipped(self, queue: Uploads, checkpoints: Iterable[CheckpointId]) -> list[Effect]:
        effects: list[Effect] = []
        for checkpoint in checkpoints:
            self.counters.skipped += 1
            reason = "a newer one is there before its turn"
            fields = {"step": checkpoint.step, "tier": queue.tier, "reason": reason}
            level = "debug" if queue.every_s else "warning"  # with an interval that is how it should be
            effects.append(Log("upload skipped", fields, level=level))
        return effects

    def uploaded(self, checkpoint: CheckpointId, tier: str, size_bytes: int, at: float) -> Held:
        """Note a commit on a further tier at wall-clock `at`; return what is known of it.

        Retention reads there the same age and size as on the first tier, as its manifest says them too: neither how
        late an upload was nor what earlier attempts have sent changes what is kept.
        """
        self.uploads[tier].done(checkpoint)
        self.counters.committed += 1
        known = self.held[self.first].get(checkpoint, Held(checkpoint))
        item = replace(known, committed_at=known.committed_at or at, size_bytes=known.size_bytes or size_bytes)
        self.held[tier][checkpoint] = item
        return item

    def failed(self, event: UploadFailed, now_s: float) -> list[Effect]:
        """Say what went wrong with an upload, and when it is tried again."""
        queue = self.uploads[event.tier]
        self.counters.failures += 1
        if isinstance(event.error, FencedError):
            queue.close()
        delay_s = queue.failed(event.id, now_s, retryable=event.error.retryable)
        fields = {"step": event.id.step, "tier": event.tier, "error": str(event.error), "retry_in_s": delay_s}
        return [Log("upload failed", fields, level="error"), *self._skipped(queue, queue.trim())]

    def start(self, now_s: float) -> list[Effect]:
        """Start the uploads that are due."""
        effects: list[Effect] = []
        for tier, queue in self.uploads.items():
            checkpoint = queue.next(now_s)
            while checkpoint is not None and not self._worth_while(checkpoint, tier):
                queue.skip(checkpoint)
                checkpoint = queue.next(now_s)
            if checkpoint is not None:
                queue.begun(checkpoint, now_s)
                effects.append(Upload(checkpoint, tier))
        return effects

    def _worth_while(self, checkpoint: CheckpointId, tier: str) -> bool:
        """Whether a checkpoint would stay on a tier; an older one that was overtaken may not."""
        if all(other < checkpoint or self.left_behind(other) for other in self.held[tier]):
            return True
        item = self.held[self.first].get(checkpoint, Held(checkpoint))
        verdicts = retention.judge([*self.held[tier].values(), item], self._policies[tier], in_use={})
        return any(verdict.keep for verdict in verdicts if verdict.id == checkpoint)

    def prune(self, tier: str, restorable: CheckpointId | None) -> list[Effect]:
        """Let go what retention does not keep; `restorable` is the newest there that a restart could begin with."""
        verdicts = self._judge(tier, self._in_use(tier, restorable))
        removed = [verdict for verdict in verdicts if not verdict.keep]
        if not removed:
            return []
        ids, reasons = self._let_go(tier, removed)
        return [Prune(ids, tier, reasons, self._kept(tier))]

    def _judge(self, tier: str, in_use: Mapping[CheckpointId, str]) -> list[retention.Verdict]:
        """Judge what is on a tier. What is damaged stays as long as it would, and takes no sound one's place."""
        held, policy = self.held[tier].values(), self._policies[tier]
        broken = {source.id for source in self.damaged if source.tier == tier}
        sound = retention.judge([item for item in held if item.id not in broken], policy, in_use)
        others = retention.judge(held, policy, in_use) if broken else []
        return sound + [verdict for verdict in others if verdict.id in broken]

    def _in_use(self, tier: str, restorable: CheckpointId | None) -> dict[CheckpointId, str]:
        in_use: dict[CheckpointId, str] = {}
        if restorable is not None:
            in_use[restorable] = "the newest that a restart can begin with"
        if tier == self.first:
            for queue in self.uploads.values():
                in_use |= dict.fromkeys(queue.pinned, f"its upload to {queue.tier} is to come")
        if self.mending is not None:
            in_use[self.mending.id] = "it is being mended"
        return in_use | self._health.needed(item for item in self.held[tier] if Source(item, tier) not in self.damaged)

    def _let_go(
        self, tier: str, removed: Sequence[retention.Verdict]
    ) -> tuple[tuple[CheckpointId, ...], tuple[str, ...]]:
        for verdict in removed:
            self.going[Source(verdict.id, tier)] = self.held[tier].pop(verdict.id)
        return tuple(verdict.id for verdict in removed), tuple("; ".join(verdict.reasons) for verdict in removed)

    def pruned(self, tier: str, ids: Iterable[CheckpointId], left: Mapping[CheckpointId, tuple[str, ...]]) -> None:
        """Note the end of a prune. What is `left`, by the names it has got, is judged anew with the next one."""
        for checkpoint in ids:
            item = self.going.pop(Source(checkpoint, tier), None)
            if item is not None and checkpoint in left:
                self.held[tier].setdefault(checkpoint, replace(item, tags=left[checkpoint] or item.tags))

    def _kept(self, tier: str) -> tuple[CheckpointId, ...]:
        """Return what stays on a tier, newest first, and what is on its way there: it may refer to files there."""
        coming = () if tier == self.first else sorted(self.uploads[tier].pinned)
        return (*sorted(self.held[tier], reverse=True), *coming)

    def collect(self, tier: str, now_s: float) -> list[Effect]:
        """Look for garbage: with the first commit on a tier, which proves it to be ours, and then now and then."""
        if now_s < self._collect_at_s.get(tier, now_s):
            return []
        self._collect_at_s[tier] = now_s + _COLLECT_EVERY_S
        coming = [item for queue in self.uploads.values() for item in queue.pinned]
        everywhere = [item.generation for item in (*(item for held in self.held.values() for item in held), *coming)]
        needed_from = None if self._unknown else min(everywhere, default=None)
        return [Collect(tier, self._kept(tier), needed_from)]

    def no_garbage(self) -> MakeRoom:
        """Have everything gone from the first tier that is no checkpoint any more."""
        return MakeRoom(self.first, (), (), self._kept(self.first))

    def make_room(self, restorable: CheckpointId | None, missing_bytes: int) -> MakeRoom | None:
        """Let go what may go from the first tier for so many bytes; None when nothing may."""
        tier, held = self.first, self.held[self.first].values()
        going = retention.make_room(held, self._policies[tier], self._in_use(tier, restorable), missing_bytes)
        if not going:
            return None
        ids, reasons = self._let_go(tier, going)
        return MakeRoom(tier, ids, reasons, self._kept(tier))

    def await_last(self, usual_s: Mapping[str, float], left_s: float) -> None:
        """Keep the way free for the job's last checkpoint, on each tier where an older one would be in its way."""
        for tier, queue in self.uploads.items():
            if not halt.may_begin_upload(usual_s.get(tier), left_s):
                queue.await_last()

    def hurry(self, now_s: float) -> None:
        """Have the last uploads done: the job is ending."""
        for queue in self.uploads.values():
            queue.hurry(now_s)

    @property
    def pending(self) -> bool:
        """Whether the newest checkpoint is still to come to some tier."""
        return any(queue.pending for queue in self.uploads.values())

    @property
    def left_behind_by(self) -> dict[str, tuple[CheckpointId, CheckpointId | None]]:
        """Return, for each tier to which it is still to come, the newest checkpoint and the newest that is there."""
        pending = {tier: queue.owed for tier, queue in self.uploads.items() if queue.pending}
        return {tier: (owed, max(self.held[tier], default=None)) for tier, owed in pending.items() if owed is not None}

    @property
    def hopeless(self) -> list[str]:
        """The tiers to which the newest checkpoint will not come."""
        return [tier for tier, queue in self.uploads.items() if queue.hopeless]
