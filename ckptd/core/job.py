"""The job machine: one job's life over all its generations, as a pure state machine.

    pending ─ begin ─▶ preparing ─ claimed ─▶ starting ─ training ─▶ running ─ complete ─▶ draining ─▶ finished
                          ▲                      │  └────── fail ──────┤
                          └─ retry ─ fenced ◀────┴─────────────────────┘        (see `JOB_TABLE` for all of it)

`JobMachine.handle(input, now)` returns effects. Time, processes, storage and memory are somebody else's: the daemon's
in production, the simulator's in tests.
"""

from __future__ import annotations

import signal

from ckptd.core import events as e
from ckptd.core.adopt_events import RankReturned, StoreUnread
from ckptd.core.adopting import Adopting
from ckptd.core.ending import LIVE
from ckptd.core.events import Effect, Log
from ckptd.core.gate_events import NodeChecked
from ckptd.core.gating import Gating
from ckptd.core.generation import Generation
from ckptd.core.halt_events import HaltWanted
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import TERMINAL, JobEvent, JobState
from ckptd.core.number_events import Reported
from ckptd.core.numbering import Numbering
from ckptd.core.prune_events import Pruned, RoomMade
from ckptd.core.restore import MEMORY, Source
from ckptd.core.scrub_events import Mended, Scrubbed
from ckptd.core.watch_events import Gathered, Watched
from ckptd.errors import DamagedError

__all__ = ["JobMachine", "JobSpec", "Now"]

_UNPROTECTED_AFTER_S = 30.0


class JobMachine(Adopting, Numbering, Gating):
    """Supervises one job. Feed it every input in order; carry out the effects that it returns in order.

    What leads to a terminal state is in `Ending`, the choice of what to begin with in `Planning`, what is read again
    meanwhile in `Scrubbing`, what follows a failure in `Failing`, who counts as hung in `Watching`, what reported
    numbers tell in `Numbering`, how it outlives its agent in `Adopting`, what it asks of its node in `Gating`,
    the rest is here.
    """

    def __init__(self, spec: JobSpec, first_incident: int = 1) -> None:
        super().__init__(spec, first_incident)

    def handle(self, event: e.Input, now: Now) -> list[Effect]:
        """Take one input and return what has to be done about it."""
        if self.state in TERMINAL:
            return self._gathered(event, now) if isinstance(event, Gathered) else []
        match event:
            case e.Progress():
                return self._progress(event, now)
            case e.RankSealed():
                return self._sealed(event, now)
            case e.CaptureMissed():
                return self.keeper.missed(event, now.s)
            case e.Committed() | e.FlushFailed() | e.UploadFailed():
                return self._storage_ended(event, now)
            case e.RankJoined():
                return self._joined(event, now)
            case e.RankRestored() | e.RankStepped() | e.RankLeft():
                return self._advanced(event, now)
            case e.RankExited():
                return self._exited(event, now)
            case Watched():
                return self._watched(event, now)
            case Reported():
                return self._reported(event, now)
            case e.Tick():
                return self._tick(now)
            case _:
                return self._steer(event, now)

    def _steer(self, event: e.Input, now: Now) -> list[Effect]:  # noqa: C901, PLR0912 - a dispatch table in match form
        """Handle what happens rarely."""
        match event:
            case e.StoreRead():
                return self._store_read(event, now)
            case e.Fetched():
                return self._fetched(event, now)
            case e.FetchFailed():
                if not event.error.retryable:
                    self.suspect(event.source)
                return self._fetch_failed(event, now)
            case e.Claimed():
                return self._claimed(event, now)
            case e.SetupFailed():
                return self._setup_failed(event.error, now, passing=event.passing)
            case e.RankSpawned():
                if self.generation is not None:
                    self.generation.pids[event.rank] = event.pid
            case e.SlotsLent():
                self.keeper.book.lend(event.rank, event.slots)
            case e.RestoreFailed():
                return self._restore_failed(event)
            case e.CheckpointWanted():
                self.keeper.want(now.s)
            case RoomMade():
                self._pruned(event)
                return self._room_made(event, now)
            case Pruned():
                self._pruned(event)
                for checkpoint in event.unreadable:
                    self.suspect(Source(checkpoint, event.tier))
            case Scrubbed():
                return self._scrubbed(event, now)
            case NodeChecked():
                return self._node_checked(event, now)
            case Mended():
                return self._mended(event, now)
            case RankReturned():
                return self._returned(event, now)
            case StoreUnread():
                return self._store_unread(event, now)
            case e.LauncherExited():
                return self._launcher_exited(event, now)
            case Gathered():
                return self._gathered(event, now)
            case e.StopWanted():
                return self._stop(event, now)
            case HaltWanted():
                return self._halt_wanted(event)
            case e.RestartWanted():
                return self._restart_wanted(event, now)
        return []

    # --- beginning a generation -------------------------------------------------------------------------------

    def _claimed(self, event: e.Claimed, now: Now) -> list[Effect]:
        if self.state is not JobState.PREPARING:
            return []
        self._move(JobEvent.CLAIMED)
        self._full_claims = 0
        self._gone_with_agent = None  # its steps are done again
        offer = self._offer
        self.offers.began_with(offer)
        last = self.keeper.last_committed
        if offer is not None and last is not None and last.id > offer.id:  # it is left behind
            self.keeper.last_committed = next(iter(self.offers.stored), None)
        self._last_generation = event.generation
        self.generation = Generation(event.generation, self.spec.world_size, offer, now.s)
        self.keeper.begin(event.generation, self.generation.parent, now.s)
        fields: dict[str, object] = {"generation": event.generation}
        if offer is not None:
            fields |= {"restore_step": offer.id.step, "restore_tier": offer.tier}
        if self._offer_world_size != self.spec.world_size:
            fields["restore_world_size"] = self._offer_world_size
        effects: list[Effect] = [Log("generation started", fields), *self.recovery.begins(offer, now.s)]
        if self.spec.supervised:
            effects.append(e.Spawn(event.generation, self.recovery.restarts))
        waiting, self._waiting = self._waiting, {}
        for rank, pid in waiting.items():
            effects += self._joined(e.RankJoined(rank, pid), now)
        return effects

    def _joined(self, event: e.RankJoined, now: Now) -> list[Effect]:
        generation = self.generation
        if generation is None or self.state not in LIVE or event.rank in generation.joined:
            if self.spec.supervised:
                return []  # it was sent before the kill that is on its way to it
            # A rank of the next incarnation may be here before the last exit of this one was seen.
            self._waiting[event.rank] = event.pid
            if self.state is JobState.DRAINING and self._outcome[0] is JobEvent.FINISH:
                self._move(JobEvent.AWAIT)  # its launcher does not call the job finished
            return self.begin() if self.state is JobState.PENDING else []
        generation.joined.add(event.rank)
        generation.pids.setdefault(event.rank, event.pid)  # a supervised rank may join from a child of its process
        generation.steps[event.rank] = generation.first_step
        effects: list[Effect] = [e.Admit(event.rank, generation.number, generation.offer, self.keeper.book.whole)]
        if generation.offer is None:
            generation.restored.add(event.rank)
        if generation.all_in(generation.joined):
            self.recovery.mark("joined", now.s)
        self._note_training()
        return effects

    # --- training ---------------------------------------------------------------------------------------------

    def _advanced(self, event: e.RankRestored | e.RankStepped | e.RankLeft, now: Now) -> list[Effect]:
        generation = self.generation
        if generation is None or event.rank not in generation.joined:
            return []
        match event:
            case e.RankRestored():
                generation.restored.add(event.rank)
                if generation.all_in(generation.restored):
                    self.recovery.mark("restored", now.s)
                self._note_training()
                return []
            case e.RankStepped():
                generation.stepped.add(event.rank)
                generation.steps[event.rank] = event.step
                return self.recovery.stepped(event.at_s) if generation.all_in(generation.stepped) else []
            case e.RankLeft():
                generation.left.add(event.rank)
                generation.steps[event.rank] = event.step
                return self._left(now)

    def _progress(self, event: e.Progress, now: Now) -> list[Effect]:
        generation = self.generation
        if generation is None:
            return []
        for rank, step in event.steps.items():
            if rank in generation.joined:
                generation.steps[rank] = max(step, generation.steps[rank])
        wanted = self.state is JobState.STOPPING and self.keeper.wished and not self._may_leave
        may_capture = generation.training and not self.adopting and (wanted or self.state is JobState.RUNNING)
        self._near_the_last()
        effects = self.keeper.observe(generation.steps, now.s, may_capture=may_capture)
        return effects + self._halt_at_last(now)

    def _sealed(self, event: e.RankSealed, now: Now) -> list[Effect]:
        generation = self.generation
        if generation is None or event.rank not in generation.restored:
            return []  # what is complete has been restored by all: see core.snapshots
        generation.steps[event.rank] = max(event.step, generation.steps[event.rank])
        if self.patience is not None and not event.final:
            self.patience.captured(event.capture_s)
        effects = self.keeper.sealed(event, now.s, training=self.state in (*LIVE, JobState.STOPPING))
        return effects + self._let_leave(now)

    def _storage_ended(self, event: e.Committed | e.FlushFailed | e.UploadFailed, now: Now) -> list[Effect]:
        match event:
            case e.FlushFailed():
                self.warnings.note("flush", None, event.error.message, now.s)
                effects = self.keeper.on_flush_failed(event, now.s)
            case e.UploadFailed():
                self.warnings.note(f"upload to {event.tier}", None, event.error.message, now.s)
                effects = self.keeper.on_upload_failed(event, now.s)
                if isinstance(event.error, DamagedError):
                    self.suspect(Source(event.id, self.keeper.tiers.first))
            case e.Committed():
                self.warnings.clear("flush" if event.tier == self.keeper.tiers.first else f"upload to {event.tier}")
                self._measure(event)
                effects = self._committed(event, now)
        if self.state is JobState.DRAINING:
            return effects + self._drain(now)
        if not isinstance(event, e.FlushFailed) and event.tier != self.keeper.tiers.first:
            return effects  # nobody but the end of the job waits for an upload
        effects += self._left(now)
        return effects + self._stop_when_durable(now) if self.state is JobState.STOPPING else effects

    def _committed(self, event: e.Committed, now: Now) -> list[Effect]:
        source = Source(event.id, event.tier)
        flushed = event.tier == self.keeper.tiers.first
        damaged = flushed and Source(event.id, MEMORY) in self.offers.refused
        if damaged:
            self.offers.refused.add(source)  # written from what was damaged already
        lost = self.keeper.book.snapshots[event.id].refused if flushed else self.keeper.tiers.left_behind(event.id)
        usable = not (damaged or lost)
        if usable:
            self.offers.add(source)
            self._gone_with_agent = None
        on_committed = self.keeper.on_committed if flushed else self.keeper.on_uploaded
        usable = usable and not self.adopting  # until it is known what is healthy, nothing goes because of an upload
        effects = on_committed(event, now, usable=usable, restorable=self.offers.newest_on(event.tier))
        self.offers.keep(self.keeper.tiers.held)
        return effects + self.recovery.committed(event.id) if flushed else effects

    def _pruned(self, event: Pruned | RoomMade) -> None:
        self.keeper.tiers.pruned(event.tier, event.ids, event.left)
        self.offers.went(event.tier, event.ids, event.left)

    # --- time -------------------------------------------------------------------------------------------------

    def _tick(self, now: Now) -> list[Effect]:
        effects = self.keeper.tick(now.s)
        if self.state is JobState.DRAINING:
            return effects + self._drain(now)
        if self._kill_at_s is not None and now.s >= self._kill_at_s:
            self._kill_at_s = None
            return [*effects, e.Kill(signal.SIGKILL)]
        if self._wake_at_s is not None and now.s >= self._wake_at_s:
            self._wake_at_s = None
            if self.state is JobState.BACKOFF:
                self._move(JobEvent.RETRY)
                return effects + self._plan(now)
            if self.state is JobState.STOPPING:
                return effects + self._grace_over(now)
        effects += self._halt(now)
        effects += self._plan_again(now) + self._warn_unprotected(now) + self._scrub(now) + self._look_back(now)
        return effects + self._watch(now)

    def _warn_unprotected(self, now: Now) -> list[Effect]:
        generation = self.generation
        if generation is None or self._warned_unprotected or self.state is not JobState.STARTING:
            return []
        missing = sorted(set(range(self.spec.world_size)) - generation.joined)
        if not missing or now.s - generation.began_s < _UNPROTECTED_AFTER_S:
            return []
        self._warned_unprotected = True
        if not generation.joined:
            self._move(JobEvent.TRAINING)  # it may be a script that knows nothing of ckptd
        hint = "nothing is checkpointed until every rank calls ckptd.attach(...)"
        return [Log("ranks not attached", {"ranks": missing, "hint": hint}, level="warning"), *self._left(now)]
