"""Stored copies that are read again while the job trains, and mended from other tiers when they are damaged.

One at a time. What is damaged is not offered to a restart any more and takes no sound checkpoint's place in retention,
until it is mended. Nothing waits for any of it, and a copy that retention lets go meanwhile is nobody's concern.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ckptd.core.events import Effect, Log
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JobState
from ckptd.core.planning import Planning
from ckptd.core.policy import scrub
from ckptd.core.restore import Source
from ckptd.core.scrub_events import Mend, Mended, Scrub, Scrubbed
from ckptd.errors import NotFoundError

_LOOK_EVERY_S = 1.0
"""There may be thousands of copies, and nothing is due sooner than that."""
_RETRY_S = 600.0
"""After so long at most a copy that could not be read is tried again."""


@dataclass(slots=True)
class ScrubCounters:
    """What scrubs have found in this run, for status and tests."""

    checked: int = 0
    mended: int = 0
    last_at: float | None = None
    """When the last one ended, on the wall clock."""


class Scrubbing(Planning):
    """The part of a job that distrusts what lies on its tiers."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        super().__init__(spec, first_incident)
        self.scrubs = ScrubCounters()
        self._scrub_every_s = {tier.name: tier.scrub_s for tier in spec.tiers if tier.scrub_s}
        self._checked_s: dict[Source, float] = {}
        self._suspects: set[Source] = set()
        """What somebody has found damaged, and nobody has read since."""
        self._scrubbing: Source | None = None
        """What is being read or mended now."""
        self._look_at_s = 0.0

    def _scrub(self, now: Now) -> list[Effect]:
        """Begin to read a copy again, if one is due."""
        wanted = self._scrubbing is None and (self._scrub_every_s or self._suspects)
        if not wanted or self.state is not JobState.RUNNING or now.s < self._look_at_s:
            return []
        self._look_at_s = now.s + _LOOK_EVERY_S
        decision = scrub.decide(self._copies(now), self._busy(), now.s)
        source = decision.source
        if source is None:
            return []
        self._scrubbing = source
        fields = {"step": source.id.step, "tier": source.tier, "reason": decision.reason}
        return [Log("scrub started", fields, level="debug"), Scrub(source)]

    def _copies(self, now: Now) -> list[scrub.Copy]:
        """Return what is to be read again; what was never seen before is as old as its commit."""
        known, self._checked_s = self._checked_s, {}
        copies: list[scrub.Copy] = []
        for tier, every_s in self._scrub_every_s.items():
            for item in self.keeper.tiers.held[tier].values():
                source = Source(item.id, tier)
                checked_s = known.get(source, now.s - max(0.0, now.wall - item.committed_at))
                self._checked_s[source] = checked_s
                copies.append(scrub.Copy(source, checked_s, every_s))
        for sources in (self.keeper.tiers.damaged, self._suspects):
            sources -= {source for source in sources if not self._is_held(source)}
        return copies + [scrub.Copy(source, -math.inf, 0.0) for source in self._suspects]

    def _busy(self) -> dict[Source, str]:
        tiers = self.keeper.tiers
        return {
            Source(checkpoint, tiers.first): f"its upload to {queue.tier} reads it"
            for queue in tiers.uploads.values()
            for checkpoint in queue.pinned
        }

    def suspect(self, source: Source) -> None:
        """Have a copy read as soon as may be, on whatever tier: somebody has found it damaged."""
        self._suspects.add(source)

    def _is_held(self, source: Source) -> bool:
        return source.id in self.keeper.tiers.held.get(source.tier, ())

    def _scrubbed(self, event: Scrubbed, now: Now) -> list[Effect]:
        source, tiers = event.source, self.keeper.tiers
        self._scrubbing = None
        self._suspects.discard(source)
        self._look_at_s = now.s
        if not self._is_held(source):
            return []
        fields: dict[str, object] = {"step": source.id.step, "tier": source.tier}
        if event.error is not None:
            if isinstance(event.error, NotFoundError):  # by somebody else's hand
                del tiers.held[source.tier][source.id]
                self.offers.drop(source)
            every_s = self._scrub_every_s.get(source.tier, 0.0)
            self._checked_s[source] = now.s + min(_RETRY_S, every_s) - every_s
            return [Log("scrub failed", fields | {"error": str(event.error)}, level="warning")]
        self._checked_s[source] = now.s
        self.scrubs.checked += 1
        self.scrubs.last_at = now.wall
        fields |= {"size_bytes": event.size_bytes, "scrub_s": round(event.seconds, 3)}
        effects: list[Effect] = [Log("scrub finished", fields, level="debug")]
        if not event.problems:
            self._is_sound(source)
            return effects
        if source not in tiers.damaged:  # or it was said when that was found out
            more = f" (and {len(event.problems) - 1} more)" if len(event.problems) > 1 else ""
            fields = {"step": source.id.step, "tier": source.tier, "error": event.problems[0] + more}
            effects.append(Log("checkpoint damaged", fields, level="error"))
        self._distrust(source)
        self._scrubbing = tiers.mending = source
        return [*effects, Mend(source)]

    def _mended(self, event: Mended, now: Now) -> list[Effect]:
        source = event.source
        self._scrubbing = self.keeper.tiers.mending = None
        self._look_at_s = now.s
        if not self._is_held(source):
            return []
        fields: dict[str, object] = {"step": source.id.step, "tier": source.tier}
        if event.error is not None or event.problems:
            why = str(event.error) if event.error is not None else event.problems[0]
            return [Log("mend failed", fields | {"error": why}, level="error")]
        self._is_sound(source)
        self.scrubs.mended += 1
        fields |= {"origins": sorted(set(event.origins.values())), "files": len(event.origins)}
        return [Log("checkpoint mended", fields, level="warning")]

    def _is_sound(self, source: Source) -> None:
        """Offer a copy again that we called damaged; what a rank has refused for itself stays refused."""
        if source in self.keeper.tiers.damaged:
            self.keeper.tiers.mended(source)
            self.offers.refused.discard(source)
