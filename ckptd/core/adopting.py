"""A job whose agent was replaced while its ranks trained on, and one whose launcher has died under its ranks.

The new agent begins with what the old one has left in the journal. Ranks come back one by one, with their slots; once
all are here and the tiers were read, what the slots hold is taken in, and the job goes on as if nothing had happened.
What does not come back has failed, like anything else that ends.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ckptd.core import events as e
from ckptd.core.adopt_events import HeldShard, RankReturned, Recall, StoreUnread
from ckptd.core.ending import LIVE
from ckptd.core.events import Effect, Log
from ckptd.core.failing import Failing
from ckptd.core.generation import Generation
from ckptd.core.handover import Handover
from ckptd.core.job_spec import JobSpec, Now
from ckptd.core.job_states import JobEvent, JobState
from ckptd.core.number_events import Marked
from ckptd.core.policy.restart import RestartDecision
from ckptd.core.snapshots import Slot
from ckptd.types import CheckpointId, Evidence

SAY_MISSING_S = 10.0
"""So long after its return the agent says which ranks are not back; a step may well take longer."""
ORPHANS_S = 10.0
"""How long ranks without a launcher may take for one more capture, before they are ended and begin again."""
_RECALL_S = 5.0


class Adopting(Failing):
    """What makes a job outlive its agent, and its steps outlive its launcher."""

    def __init__(self, spec: JobSpec, first_incident: int) -> None:
        super().__init__(spec, first_incident)
        self.awaited: set[int] = set()
        """Ranks that were taken over and are not back yet."""
        self.adopting = False
        """Until what the slots hold is taken in."""
        self._adopted = 0
        """The generation that was taken over."""
        self._store_known = True
        self._recall_at_s: float | None = None
        self._began_s = 0.0
        self._said_missing = False
        self._told: dict[Slot, HeldShard] = {}
        """What the agent before knew of the slots."""
        self._found: dict[Slot, HeldShard] = {}
        """What lies in slots that have come back."""
        self._stop_wanted: e.StopWanted | None = None
        self._orphaned: Evidence | None = None
        """How the launcher ended, while its ranks make one more capture."""
        self._orphans_until_s = 0.0

    def handover(self) -> Handover:
        """Return what the next agent has to know, should there be one."""
        generation = self.generation
        if generation is None:
            return Handover(
                self.state.value,
                refused=frozenset(self.offers.refused),
                at_most_step=self.offers.at_most_step,
                recovery=self.recovery.history(),
                halting=self.bounds_now(),
            )
        shards: dict[int, list[HeldShard]] = {}
        for snapshot in self.keeper.book.complete:
            for rank, shard in snapshot.shards.items():
                held = HeldShard(shard.slot, snapshot.id, shard.image_bytes, shard.reported, witness=shard.witness)
                shards.setdefault(rank, []).append(held)
        for (rank, _), held in self._told.items() if self.adopting else ():
            shards.setdefault(rank, []).append(held)
        return Handover(
            state=self.state.value,
            generation=generation.number,
            offer=generation.offer,
            began_s=generation.began_s,
            step=generation.newest_step,
            pids=dict(generation.pids),
            joined=frozenset(generation.joined),
            restored=frozenset(generation.restored),
            left=frozenset(generation.left),
            whole=self.keeper.book.whole,
            shards={rank: tuple(held) for rank, held in shards.items()},
            parents=dict(self.keeper.parents),
            refused=frozenset(self.offers.refused),
            at_most_step=self.offers.at_most_step,
            recovery=self.recovery.history(),
            halting=self.bounds_now(),
        )

    def adopt(self, handover: Handover, now: Now, memory: Collection[Slot] = ()) -> list[Effect]:
        """Go on where the agent before was; slots in `memory` are here already, whatever becomes of their ranks.

        Where it had no ranks the job begins anew, with its history.
        """
        self.recovery.recall(handover.recovery)
        left_s = self.recall_bounds(handover.halting, now)
        self.offers.refused |= handover.refused
        self.offers.at_most_step = handover.at_most_step
        self.keeper.book.whole = handover.whole
        self._last_generation = handover.generation
        for number, parent in handover.parents.items():
            self.keeper.resume(number, parent, now.s)
        if handover.generation:
            self.generation = self._taken_over(handover)
        self._told = {(rank, shard.slot): shard for rank, shards in handover.shards.items() for shard in shards}
        self._found = {place: shard for place, shard in self._told.items() if place in memory}
        self.adopting, self._began_s = True, now.s
        if not handover.has_ranks or self.generation is None:
            self.generation = None
            if self.recovery.incident is not None and not self.recovery.incident.incident.decision:
                why = ("its agent was lost before it had decided",)
                self.recovery.incident.decide(RestartDecision(restart=True, delay_s=0.0, reasons=why))
            return self.begin() if self.spec.supervised else []
        self._store_known, self._adopted = False, handover.generation
        self.awaited = set(self.generation.joined)
        self._move(JobEvent.ADOPT)
        if handover.state == JobState.STOPPING.value:
            self._stop_wanted = e.StopWanted(max(SAY_MISSING_S, left_s), reason="it was being stopped")
            self.leave_by_s = now.s + self._stop_wanted.grace_s
        fields = {"generation": handover.generation, "step": handover.step, "ranks": sorted(self.awaited)}
        effects: list[Effect] = [Log("adopting", fields), Recall()]
        if self.generation.all_in(self.generation.restored) or handover.state != JobState.STARTING.value:
            self._warned_unprotected = not self.generation.all_in(self.generation.joined)
            self._move(JobEvent.TRAINING)
        return effects

    def begin(self) -> list[Effect]:
        """Start the job, unless the tiers are being read for it already: two answers would be two generations."""
        effects = super().begin()
        return effects if self._store_known else []

    @property
    def offers_lost(self) -> bool:
        """Whether ranks are still to come to a generation that began with what this agent has not at hand."""
        generation = self.generation
        mine = generation is None or generation.number != self._adopted or generation.offer is None
        return not mine and self.state is JobState.STARTING

    def _taken_over(self, handover: Handover) -> Generation:
        generation = Generation(handover.generation, self.spec.world_size, handover.offer, handover.began_s)
        generation.pids.update(handover.pids)
        generation.joined |= handover.joined
        generation.restored |= handover.restored
        generation.left |= handover.left
        generation.steps.update(dict.fromkeys(handover.joined, handover.step))
        return generation

    # --- ranks and memory come back ---------------------------------------------------------------------------

    def _returned(self, event: RankReturned, now: Now) -> list[Effect]:
        generation = self.generation
        if generation is None or event.rank in generation.gone:
            return []
        if event.rank not in generation.joined:  # it had its place so shortly before that nobody wrote it down
            generation.joined.add(event.rank)
            generation.pids.setdefault(event.rank, event.pid)
        if event.restored:
            generation.restored.add(event.rank)
        self.awaited.discard(event.rank)
        self.keeper.book.whole = self.keeper.book.whole or event.whole
        generation.left.discard(event.rank)  # if it leaves, it says so again
        generation.steps[event.rank] = max(event.step, generation.steps.get(event.rank, 0))
        if event.stepped:
            generation.stepped.add(event.rank)
        self.keeper.book.lend(event.rank, event.slots)
        self._note_training()
        known = {shard.slot: shard for shard in event.sealed}
        if not self.adopting:
            return self._resealed(event, known, now)
        freed: list[Effect] = []
        for slot in event.unknown:
            told = self._told.get((event.rank, slot))
            if told is None:
                freed.append(e.Release(event.rank, slot))
            else:
                known[slot] = told
        for slot in event.slots:  # what is free is not what the journal says: the rank may be writing it
            self._found.pop((event.rank, slot), None)
        self._found |= {(event.rank, slot): shard for slot, shard in known.items()}
        return freed + self._settle_adoption(now)

    def _resealed(self, event: RankReturned, known: dict[int, HeldShard], now: Now) -> list[Effect]:
        """Take in what a rank has sealed while it could not say so to this very agent."""
        held = self.keeper.book.held(event.rank)
        effects: list[Effect] = []
        for slot in sorted(known):
            shard = known[slot]
            if held.get(slot) != shard.id:
                sealed = e.RankSealed(
                    event.rank, shard.id.step, slot, shard.image_bytes, shard.capture_s, shard.values, shard.final,
                    shard.witness,
                )  # fmt: skip
                effects += self.keeper.sealed(sealed, now.s, training=self.state in (*LIVE, JobState.STOPPING))
        return effects + [e.Release(event.rank, slot) for slot in event.unknown if slot not in held]

    def _store_read(self, event: e.StoreRead, now: Now) -> list[Effect]:
        self._store_known = True
        return super()._store_read(event, now) + self._settle_adoption(now)

    def _store_unread(self, event: StoreUnread, now: Now) -> list[Effect]:
        self._recall_at_s = now.s + _RECALL_S
        fields = {"error": str(event.error), "retry_in_s": _RECALL_S}
        return [Log("store unread", fields, level="error")]

    def _settle_adoption(self, now: Now) -> list[Effect]:
        """Take in what the slots hold, once all is here that is to come."""
        waits = self.awaited and self.state in LIVE
        if not self.adopting or waits or not self._store_known:
            return []
        self.adopting = False
        told = tuple(self._told.values())
        trusted = {shard.id for shard in told}
        shards, self._found, self._told = self._found, {}, {}
        whole = {item for item in trusted if sum(shard.id == item for shard in told) == self.spec.world_size}
        line, health = self.offers.reachable(self.keeper.book.complete), self.keeper.health
        written = health.to_json()
        health.resume(self._adopted, self.keeper.parents.get(self._adopted), line)
        effects = self.keeper.adopt(shards, trusted, now.s)
        if health.to_json() != written:  # by what was reported meanwhile
            effects.insert(0, Marked())
        self._miss_newest(whole)
        wanted, self._stop_wanted = self._stop_wanted, None
        if self.state not in LIVE or self.generation is None:
            effects += self.keeper.abandon("its ranks have ended", now.s)
            return effects if wanted is None else effects + self._stop(wanted, now)
        generation = self.generation
        fields = {
            "generation": generation.number,
            "step": generation.newest_step,
            "snapshots": sorted({shard.id.step for shard in shards.values()}),
            "seconds": round(now.s - self._began_s, 3),
        }
        effects.append(Log("job adopted", fields))
        effects += self._left(now)
        return effects + ([] if wanted is None else self._stop(wanted, now))

    def _miss_newest(self, told: Collection[CheckpointId]) -> None:
        """Note whether the newest of the snapshots that were complete is nowhere any more.

        Their ranks may have been let go since no tier would take it, and the job must not end as if one had.
        """
        found = {snapshot.id for snapshot in self.keeper.book.complete}
        found |= {source.id for source in self.offers.stored}
        newest = max(told, default=None)
        if newest is not None and newest > max(found, default=CheckpointId(0, 0)):
            self._gone_with_agent = newest

    def _left(self, now: Now) -> list[Effect]:
        """Dismiss the ranks once all have left and nothing waits for its commit."""
        generation = self.generation
        if generation is None or generation.number == self._condemned or self.adopting:
            return []  # while a job is taken over, what its slots hold has to be known first
        dismissed: list[Effect] = [e.Dismiss(rank) for rank in sorted(generation.left - generation.gone)]
        if not generation.all_in(generation.left):
            # Without the others nothing will be committed. That some don't attach at all has been said.
            return dismissed if self._warned_unprotected and not generation.all_in(generation.joined) else []
        effects = self.keeper.abandon("training ended before it", now.s)
        return effects if self.keeper.unflushed and not self.keeper.hopeless else effects + dismissed

    def _note_training(self) -> None:
        generation = self.generation
        if generation and generation.all_in(generation.restored) and self.state is JobState.STARTING:
            self._move(JobEvent.TRAINING)

    # --- what interferes --------------------------------------------------------------------------------------

    def _plan(self, now: Now) -> list[Effect]:
        if not self._store_known:
            return []  # to take what was not read yet for nothing would be a fresh start
        return self._settle_adoption(now) + super()._plan(now)

    def _drain(self, now: Now) -> list[Effect]:
        if not self._store_known and not self._at_once:
            return []  # there may be something to upload
        return super()._drain(now)

    def _stop(self, event: e.StopWanted, now: Now) -> list[Effect]:
        if self.adopting and self.state in LIVE and event.checkpoint:
            self._stop_wanted = event  # its last checkpoint needs all ranks
            until_s = now.s + event.grace_s
            self.leave_by_s = until_s if self.leave_by_s is None else min(self.leave_by_s, until_s)
            return []
        return super()._stop(event, now)

    def _fail(self, evidence: Evidence, last_lines: tuple[str, ...], now: Now) -> list[Effect]:
        self._orphaned = None
        wanted, self._stop_wanted = self._stop_wanted, None
        if wanted is not None:
            return super()._stop(e.StopWanted(0.0, checkpoint=False, reason=wanted.reason), now)
        return super()._fail(evidence, last_lines, now)

    def _exited(self, event: e.RankExited, now: Now) -> list[Effect]:
        generation = self.generation
        if generation is None or generation.pids.get(event.rank) != event.pid:
            return super()._exited(event, now)
        self.awaited.discard(event.rank)
        effects: list[Effect] = []
        if event.evidence is not None and event.evidence.kind == "vanished" and event.rank in generation.left:
            event = replace(event, evidence=None)  # nobody can say how it ended, but it had nothing left to do
        if event.evidence is None:
            effects += self._settle_adoption(now)
        elif self._orphaned is not None and self.state in LIVE:
            effects += self._fail(self._orphaned, (), now)
        return effects + super()._exited(event, now)

    def _launcher_exited(self, event: e.LauncherExited, now: Now) -> list[Effect]:
        """Have ranks that live on without a launcher capture once more, and then begin again with that."""
        generation = self.generation
        if generation is None or self.state not in (*LIVE, JobState.FENCED, JobState.STOPPING):
            return []
        if self.state is JobState.RUNNING and (generation.training or (self.awaited and self.adopting)):
            self._orphaned, self._orphans_until_s = event.evidence, now.s + ORPHANS_S
            self.keeper.want(now.s)
            fields = {"step": generation.newest_step, "deadline_s": ORPHANS_S}
            return [Log("launcher lost", fields, level="error")]
        effects = self._fail(event.evidence, (), now) if self.state in LIVE else self._kill()
        generation.gone |= set(range(self.spec.world_size)) - generation.pids.keys()
        return effects + (self._all_gone(now) if generation.all_in(generation.gone) else [])

    # --- time -------------------------------------------------------------------------------------------------

    def _look_back(self, now: Now) -> list[Effect]:
        """Do what is due: look into the tiers again, miss a rank, end orphans."""
        effects: list[Effect] = []
        if self._recall_at_s is not None and now.s >= self._recall_at_s:
            self._recall_at_s = None
            effects.append(Recall())
        if self.state not in LIVE:
            return effects
        effects += self._yield_slot(now)
        wanted = self._stop_wanted
        if wanted is not None and self.leave_by_s is not None and now.s >= self.leave_by_s:
            self._stop_wanted = None
            effects.append(Log("stop without checkpoint", {"reason": wanted.reason}, level="warning"))
            effects += super()._stop(replace(wanted, grace_s=0.0, checkpoint=False), now)
        elif self._orphaned is not None:
            captured = not (self.awaited or self.keeper.wished or self.keeper.announced)
            if captured or now.s >= self._orphans_until_s:
                effects += self._fail(self._orphaned, (), now)
        elif self.awaited and now.s >= self._began_s + self.spec.return_s:
            rank = min(self.awaited)
            summary = f"rank {rank} did not come back to the new agent within {self.spec.return_s:g} s"
            effects += self._fail(Evidence("agent", "vanished", rank, 1.0, summary, now.s), (), now)
        elif self.awaited and not self._said_missing and now.s >= self._began_s + SAY_MISSING_S:
            self._said_missing = True
            effects += self._miss(now)
        return effects

    def _yield_slot(self, now: Now) -> list[Effect]:
        """Have a slot for ranks that have come back with no step left to do: what they began with may be gone.

        They capture once more, but never train, so that no capture is announced to them; and a single slot holds what
        is committed by now.
        """
        generation = self.generation
        if generation is None or generation.number != self._adopted or self.adopting or not self.keeper.wished:
            return []
        if generation.training or not generation.all_in(generation.restored):
            return []
        self.keeper.book.make_room()
        return self.keeper.tick(now.s)

    def _miss(self, now: Now) -> list[Effect]:
        """Say who is missing; whoever had left, and does not wait for its last commit, does not come back."""
        assert self.generation is not None
        self.awaited -= self.generation.left
        fields = {"ranks": sorted(self.awaited), "wait_s": self.spec.return_s}
        said = [Log("ranks missing", fields, level="warning")] if self.awaited else []
        return said + self._settle_adoption(now)
