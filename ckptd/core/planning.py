"""What the next generation begins with: the best of memory and tiers, tried one by one until one can be offered."""

from __future__ import annotations

from ckptd.core import events as e
from ckptd.core.events import Effect, Log
from ckptd.core.halting import Halting
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JobEvent, JobState
from ckptd.core.prune_events import RoomMade
from ckptd.core.restore import MEMORY, Offers, Source, nothing_left
from ckptd.errors import CkptdError, DamagedError, FullError, StoreError

_CLAIM_RETRY_S = 5.0
"""How long a job waits that found no room for the record of its next generation, unless room is made before."""


class Planning(Halting):
    """The way of a job from nothing running to a claimed generation."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        super().__init__(spec, first_incident)
        self.offers = Offers(tier.name for tier in spec.tiers)
        self._last_generation = 0
        self._offer: Source | None = None
        self._offer_world_size = spec.world_size
        self._full_claims = 0
        """How often in a row there was no room for the record of the next generation."""
        self._plan_at_s: float | None = None
        self._blind = False
        """Whether there was nothing at the last look into the tiers, one of which could not be read."""
        self.expects: int | None = None
        """The step of a checkpoint that was there before the node started anew: a store without any is not mounted."""

    def begin(self) -> list[Effect]:
        """Start the job: look what the tiers hold, then begin a generation with the best of it."""
        self._move(JobEvent.BEGIN)
        self._scavenge_until_s, self._awaits_uploads, self.leave_by_s = None, True, None  # it was not the end after all
        return [e.ReadStore()]

    def _store_read(self, event: e.StoreRead, now: Now) -> list[Effect]:
        """Take in what the tiers hold. What can't be read may be missed, but not be taken for nothing at all."""
        self._last_generation = max(self._last_generation, event.last_generation)
        self.offers.read(event.sources, event.unread)
        self.keeper.found(event.sources, event.held, event.unread)
        self._blind = bool(event.unread) and not self.offers.stored
        if self.state is JobState.PREPARING and not event.unread:  # else ranks may come back with what is on no tier
            self.keeper.forget_health()
        effects: list[Effect] = []
        for tier, error in event.unread.items():
            effects.append(Log("tier unreadable", {"tier": tier, "error": str(error)}, level="error"))
            if self.state is JobState.PREPARING and not self.offers.stored and self.keeper.book.newest is None:
                return effects + self._give_up(error, now)
        if self.state is JobState.PREPARING and self.expects is not None and not self.offers.stored:
            missing = StoreError(
                f"no checkpoint of this job is there, and the last one was step {self.expects}",
                hint="see that its store is mounted; to begin afresh run the job anew",
            )
            return effects + self._give_up(missing, now)
        self.expects = None
        return effects + self._plan(now)

    def _plan(self, now: Now) -> list[Effect]:
        if self.state is not JobState.PREPARING:
            return []  # stopped meanwhile
        if self._blind and not self.offers.stored and self.keeper.book.newest is None:
            return [e.ReadStore()]  # this agent has taken over, and there may be something after all
        for source in self.offers.refused:
            if source.tier == MEMORY:
                self.keeper.book.refuse(source.id)  # not before: a rank might still be on its way to it
        effects = self.keeper.tick(now.s)
        try:
            plan = self.offers.plan(self.keeper.book.newest)
        except DamagedError as error:
            return effects + self._nothing_to_offer(error, now)
        return [
            *effects,
            Log("restore planned", {"reasons": list(plan.reasons)}, level="debug"),
            *self._next_source(now),
        ]

    def _next_source(self, now: Now, problem: CkptdError | None = None) -> list[Effect]:
        """Go on to the next best; `problem` is why the one before it was none."""
        source = self.offers.next()
        if source is None and problem is not None:
            # What can't be read now may be there the next time: that is another error than damage.
            error = problem if problem.retryable else nothing_left([problem.message], self.offers.at_most_step)
            return self._nothing_to_offer(error, now)
        return self._claim(source) if source is None or source.tier == MEMORY else [e.Fetch(source)]

    def _nothing_to_offer(self, error: CkptdError, now: Now) -> list[Effect]:
        """End the job, and have an open incident say so: it was to be restarted."""
        limit = self.offers.at_most_step
        reason = "there is nothing to begin with" + ("" if limit is None else f" at step {limit} or before it")
        return self.recovery.given_up(error.message, reason) + self._give_up(error, now)

    def _distrust(self, source: Source) -> None:
        """Do not offer a copy that is damaged, nor count it as one in retention, until it is mended."""
        self.keeper.tiers.damaged.add(source)
        if source in self.offers.stored:
            self.offers.refused.add(source)

    def _claim(self, offer: Source | None, world_size: int | None = None) -> list[Effect]:
        if self.state is not JobState.PREPARING:
            return []  # stopped meanwhile
        self._offer, self._offer_world_size = offer, world_size or self.spec.world_size
        return [e.Claim(self._last_generation + 1, None if offer is None else offer.id)]

    def _setup_failed(self, error: CkptdError, now: Now, *, passing: bool = False) -> list[Effect]:
        """Wait when there is no room for the record of a restart, or it can't be written now; all else ends the job.

        Like a flush it costs garbage first, then old checkpoints. When nothing may go, the job waits until somebody
        makes room: what it would begin with may lie in memory alone.
        """
        waits = passing or isinstance(error, FullError)
        if self.state is not JobState.PREPARING or self.generation is None or not waits:
            return super()._setup_failed(error, now)
        self._plan_at_s = now.s + _CLAIM_RETRY_S
        fields: dict[str, object] = {"generation": self._last_generation + 1, "error": str(error)}
        if passing:
            return [Log("claim postponed", fields | {"retry_in_s": _CLAIM_RETRY_S}, level="error")]
        tier, self._full_claims = self.keeper.tiers.first, self._full_claims + 1
        fields["tier"] = tier
        room = self.keeper.want_room(self.offers.newest_on(tier), garbage_only=self._full_claims == 1)
        self.offers.keep(self.keeper.tiers.held)
        return [Log("claim postponed", fields | {"retry_in_s": _CLAIM_RETRY_S}, level="error"), *room]

    def _room_made(self, event: RoomMade, now: Now) -> list[Effect]:
        effects = self.keeper.on_room_made(event, now.s, restorable=self.offers.newest_on(event.tier))
        self.offers.keep(self.keeper.tiers.held)
        if self._plan_at_s is not None and (event.freed_bytes or not event.left.keys() >= set(event.ids)):
            self._plan_at_s = now.s
        return effects

    def _plan_again(self, now: Now) -> list[Effect]:
        """Try to begin again when the time for it has come."""
        if self._plan_at_s is None or now.s < self._plan_at_s:
            return []
        self._plan_at_s = None
        return self._plan(now)

    def _fetched(self, event: e.Fetched, now: Now) -> list[Effect]:
        if event.copied:
            self.offers.fetched(event.source, self.keeper.tiers.first)
            self.keeper.tiers.fetched(event.source)
        if self.state is not JobState.PREPARING:
            return []  # stopped meanwhile
        if event.source in self.offers.refused:  # by a late word of a rank that was offered it before
            return self._next_source(now, DamagedError(f"{event.source} failed to restore before"))
        return self._claim(event.source, event.world_size)

    def _fetch_failed(self, event: e.FetchFailed, now: Now) -> list[Effect]:
        if self.state is not JobState.PREPARING:
            return []  # stopped meanwhile
        fields = {"step": event.source.id.step, "tier": event.source.tier, "error": event.error.message}
        if event.error.retryable:
            log = Log("fetch failed", fields, level="error")  # the copy may be there at the next restart
        else:
            self._distrust(event.source)
            log = Log("checkpoint damaged", fields, level="error")
        return [log, *self._next_source(now, event.error)]
