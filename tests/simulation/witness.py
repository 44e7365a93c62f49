"""The witness: checks every event of a simulation against the design, from its own log and not from the core's.

It sees what ranks, disk and agent really did. What a restart must begin with, which slot nobody may write and which
checkpoint must stay are computed here anew, in another way than `ckptd.core` does it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from ckptd.core import events as e
from ckptd.core.adopt_events import RankReturned
from ckptd.core.job_states import TERMINAL, JobState
from ckptd.core.keeper import FINAL_FLUSH_TRIES
from ckptd.core.prune_events import MakeRoom, Prune
from ckptd.core.restore import MEMORY, Source
from ckptd.types import CheckpointId
from tests.simulation.memory import Content, Slot, shard_of, state_after
from tests.simulation.storage import BUCKET, TIER
from tests.simulation.witness_bucket import BucketWitness
from tests.simulation.witness_incidents import IncidentWitness
from tests.simulation.witness_ranks import RankWitness
from tests.simulation.witness_scrubs import ScrubWitness
from tests.simulation.witness_takeovers import TakeoverWitness

if TYPE_CHECKING:
    from tests.simulation.agent import ModelAgent
    from tests.simulation.node import Node


class Witness(RankWitness):
    """What has been sealed, committed, claimed and ordered in one run.

    `chain` is the lineage, oldest first: the snapshots that the present generation descends from, and its own.
    """

    def __init__(self, node: Node) -> None:
        self._node = node
        self.bucket, self.scrubs = BucketWitness(self, node), ScrubWitness(self, node)
        self.chain: list[CheckpointId] = []
        self.memory: dict[CheckpointId, list[Slot]] = {}
        self.refused: set[Source] = set()
        self.whole = False
        """Whether replicated tensors were seen to differ in this life of the agent."""
        self.at_most: int | None = None
        self.leaving: set[CheckpointId] = set()
        self.incidents = IncidentWitness(self)
        self.takeovers = TakeoverWitness(self, node)
        self.flush_failures: dict[CheckpointId, int] = {}
        self.newest: CheckpointId | None = None
        self.started = 0
        self.seen: Counter[str] = Counter()
        """How often what has happened, so that a test can tell whether the faults reach all that they should."""
        self._seals: dict[CheckpointId, dict[int, int]] = {}
        self._void: set[CheckpointId] = set()
        self._offered: Source | None = None
        self._tier = TIER
        self._witnesses: dict[CheckpointId, dict[int, dict[str, str]]] = {}
        self._given_up: CheckpointId | None = None
        self._steps_back = False
        self._last_step_lost = False
        self._over = True
        self._claims: dict[int, CheckpointId | None] = {}
        self._starts_in_life = 0
        self._flushed: CheckpointId | None = None
        self._flushing: list[Slot] = []
        self._flush_open = False
        self.commit_unknown = False
        """Whether a manifest stands on the disk of which the machine has not heard, so it has not pruned for it."""
        self._finished: dict[int, tuple[int, int]] = {}
        self._disk_changes = -1

    # --- what a restart may use -------------------------------------------------------------------------------

    def usable(self, held: Collection[CheckpointId], tier: str) -> list[CheckpointId]:
        """Return those of the lineage that are in `held` and may be restored from there, oldest first."""
        limit = float("inf") if self.at_most is None else self.at_most
        allowed = [item for item in self.chain if item in held and item.step <= limit]
        return [item for item in allowed if Source(item, tier) not in self.refused]

    @property
    def intact(self) -> list[CheckpointId]:
        """What the disk could give a restart."""
        return self.usable(self._node.disk.manifests.keys() - self._node.disk.damaged, TIER)

    def _expected(self) -> tuple[CheckpointId | None, str]:
        """Return what a generation that is claimed now must begin with, and whence.

        On the disk that is everything whose files look right: what is wrong inside them, ranks will find.
        """
        in_memory = self.usable(self.memory, MEMORY)
        stored = self.usable(self._node.disk.manifests.keys() - self._node.disk.cut, TIER)
        candidates = in_memory + stored + self.bucket.offered
        if not candidates:
            return None, TIER
        best = max(candidates, key=self.chain.index)
        if best in in_memory:
            return best, MEMORY
        return best, TIER if best in stored and best != self.bucket.fetched else BUCKET

    # --- inputs of the machine --------------------------------------------------------------------------------

    def before(self, event: e.Input, agent: ModelAgent) -> None:
        """Note what the machine is about to hear."""
        self._steps_back = isinstance(event, e.RestartWanted)
        self.seen[type(event).__name__] += 1
        self.bucket.before(event, agent)
        self.scrubs.before(event)
        match event:
            case e.RankSealed():
                self._sealed(event)
            case RankReturned():
                self.takeovers.returned(event, agent)
            case e.CaptureMissed():
                missed = CheckpointId(self.started, event.step)
                if missed not in self.memory:
                    self._void.add(missed)
                    self._seals.pop(missed, None)
            case e.RestoreFailed():
                self._restore_failed(event)
            case e.Committed() if event.tier == TIER:
                self._flush_known(event.id)
            case e.FlushFailed():
                self.flush_failures[event.id] = self.flush_failures.get(event.id, 0) + 1
                self._flush_known(event.id)
            case e.Claimed():
                self._starts(event.generation)
            case _:
                return

    def _sealed(self, event: e.RankSealed) -> None:
        sealed = CheckpointId(self.started, event.step)
        if self._over:
            return
        if self.takeovers.is_void(event):
            return
        if event.final and sealed in self._void:
            self._void.discard(sealed)  # training ended at the very step that was missed: a new attempt
        if sealed in self._void:
            return
        self.sealed_by(event.rank, sealed, event.slot, event.witness)

    def sealed_by(self, rank: int, sealed: CheckpointId, slot: int, witness: Mapping[str, str]) -> None:
        """Note a seal that counts; the last rank's makes the snapshot complete."""
        seals = self._seals.setdefault(sealed, {})
        seals[rank] = slot
        self._witnesses.setdefault(sealed, {})[rank] = dict(witness)
        if len(seals) < self._node.options.world_size or sealed in self.memory:
            return
        if self._replicas_differ(sealed):
            self._void.add(sealed)
        elif all(sealed > item for item in self.usable(self.memory, MEMORY)):
            arena = self._node.agent.arena
            slots = [arena.slots[rank][slot] for rank, slot in seals.items()]
            for each in slots:
                self.check_content(tuple(each.cells), each.rank, sealed, "sealed")
            # What is older may go now, but for the one that a flush reads.
            self.memory = {item: held for item, held in self.memory.items() if item == self._flushed}
            self.memory[sealed] = slots
            if sealed not in self.chain:
                self.chain.append(sealed)
            self.newest = sealed

    def _replicas_differ(self, sealed: CheckpointId) -> bool:
        """Whether a snapshot can't be put together from shares: they differ, or are not of all ranks."""
        said = [witness["replicated"] for witness in self._witnesses.pop(sealed).values() if witness]
        if len(set(said)) <= 1 and not (self.whole and said):
            return False
        self.whole = self.whole or len(set(said)) > 1
        self._last_step_lost = self._last_step_lost or sealed.step == self._node.options.total_steps
        return True

    def _restore_failed(self, event: e.RestoreFailed) -> None:
        """Check that what a rank calls damaged is so by a fault, and by none of ours."""
        source = self._offered
        assert source is not None
        self.require(source.id == event.id, f"{event.id} is called damaged, and {source} was offered")
        if source.tier == MEMORY:
            flipped = source in self.refused or any(slot.flipped for slot in self.memory[event.id])
            self.require(flipped, f"{source} is called damaged, which it is not")
            self.seen["damage found in memory"] += 1
        else:
            self.require(event.id in self.scrubs.was_damaged, f"{source} is called damaged, which it is not")
            self.seen["damage found on the disk"] += 1
            self.refused.add(Source(event.id, TIER))  # what was fetched is read there too
        self.refused.add(source)

    def _flush_known(self, flushed: CheckpointId) -> None:
        """Let go of what was flushed, unless it is the newest."""
        self._flushed = None
        if any(item > flushed for item in self.usable(self.memory, MEMORY)):
            del self.memory[flushed]

    def after(self, event: e.Input, agent: ModelAgent) -> None:
        """Look what the machine made of an event."""
        if isinstance(event, e.Committed) and event.tier == TIER:
            self.commit_unknown = False
        if self._given_up in self.memory and not self._steps_back:
            self._give_up(self._given_up)
        self._given_up = None
        for process in agent.ranks.values():
            knows = process.page is None or process.page.whole == self.whole or agent.machine.adopting
            self.require(knows, f"{process} does not know whether replicas differ: {self.whole}")
        state = agent.machine.state
        if isinstance(event, e.RestartWanted) and state is JobState.FENCED and not self._over:
            self.at_most = event.step
        if state in (JobState.FENCED, JobState.DRAINING, JobState.BACKOFF, JobState.PREPARING, *TERMINAL):
            self._over = True
        self.incidents.after_input(ended=agent.end is not None)

    def check_content(self, content: Content, rank: int, checkpoint: CheckpointId, how: str) -> None:
        wanted = shard_of(rank, checkpoint.step)
        self.require(content == wanted, f"rank {rank}'s shard of {checkpoint} was {how} wrong: {content}")

    # --- effects of the machine -------------------------------------------------------------------------------

    def ordered(self, effect: e.Effect, agent: ModelAgent) -> None:
        """Check what the machine wants done, before it is done."""
        match effect:
            case e.Claim():
                wanted, self._tier = self._expected()
                self.seen["fresh start" if wanted is None else f"from {self._tier}"] += 1
                if effect.parent is None:
                    self.bucket.fresh_start()
                self.require(effect.parent == wanted, f"begins with {effect.parent}, {wanted} is the newest")
            case e.Admit():
                self.require(effect.generation == self.started, f"admits to generation {effect.generation}")
                offered = None if effect.offer is None else effect.offer.id
                self.require(offered == self._claims[self.started], f"{offered} is offered and was not claimed")
                self.whole = self.whole and (effect.whole or not self.takeovers.count)  # it may have been lost
                self.require(effect.whole == self.whole, f"{effect} says whole, and replicas differ: {self.whole}")
                if effect.offer is not None:
                    self.require(effect.offer.tier == self._tier, f"{effect.offer} is offered, not from {self._tier}")
                self._offered = effect.offer
            case e.Whole():
                self.require(self.whole, "replicas are called different, which they are not")
            case e.Announce():
                self.takeovers.announced(effect)
            case e.Release():
                best = self.usable(self.memory, MEMORY)[-1:]
                if best and agent.arena.slots[effect.rank].get(effect.slot) in self.memory[best[0]]:
                    self._given_up = best[0]
            case e.Spawn():
                restarts = self._starts_in_life - 1
                self.require(effect.generation == self.started, f"spawns generation {effect.generation}")
                known = effect.restarts == restarts or self.takeovers.count
                self.require(known, f"says {effect.restarts} restarts, there were {restarts}")
            case MakeRoom() | Prune() if effect.tier == TIER:
                self.leaving.update(effect.ids)
            case Prune():
                self.bucket.leave(effect.ids)
            case e.Record():
                self.incidents.recorded(effect.incident, self._claims[self.started])
            case e.Flush():
                self.require(effect.id in self.memory, f"a flush of {effect.id}, which is not complete")
                self._flushed = effect.id
            case _:
                return

    def _give_up(self, checkpoint: CheckpointId) -> None:
        """Check that the newest snapshot goes for the next one only where it has to, and is on the disk."""
        distrusted = self.whole and self.takeovers.count > 0  # the journal may be too old to know it
        may = distrusted or self._node.options.slots == 1
        self.require(may, f"{checkpoint} is given up though there are more slots")
        stored = distrusted or checkpoint in self._node.disk.manifests
        self.require(stored, f"{checkpoint} is given up, which is on no tier")
        self.seen["given up"] += 1
        del self.memory[checkpoint]

    def _starts(self, generation: int) -> None:
        self.require(generation > self.started, f"generation {generation} starts after {self.started}")
        self.require(generation in self._claims, f"generation {generation} starts unclaimed")
        self.started = generation
        self._starts_in_life += 1
        self._over = False
        self.at_most = None
        self._finished.clear()

    # --- ranks and storage ------------------------------------------------------------------------------------

    def slot_written(self, slot: Slot, why: str) -> None:
        """Check that nobody needs what a slot holds."""
        self.require(slot not in self._flushing, f"{why} writes {slot} while a flush reads it")
        best = self.usable(self.memory, MEMORY)
        # Who takes over leaves the second newest alone, of which nobody tells when the newest proves damaged.
        left_alone = self.takeovers.count and best and max(self.intact, default=best[-1]) > best[-1]
        if best and not left_alone:
            self.require(slot not in self.memory[best[-1]], f"{why} writes {slot}, which holds {best[-1]}, the newest")

    def flush_begins(self, order: e.Flush, slots: list[Slot]) -> None:
        """Check that no other flush is under way."""
        self.require(not self._flush_open, f"a second flush begins, of {order.id}")
        self._flush_open = True
        self._flushing = slots

    def flush_ends(self, order: e.Flush, *, committed: bool) -> None:
        """Note the end of a flush: its slots are not read any more. The agent will know of it later."""
        self._flush_open = False
        self._flushing = []
        self.commit_unknown = committed

    def checkpoint_leaves(self, checkpoint: CheckpointId, tier: str) -> None:
        """Check that a checkpoint may be removed from a tier: something newer of the lineage is committed there."""
        at = self.chain.index(checkpoint) if checkpoint in self.chain else -1
        left = self.bucket.staying if tier == BUCKET else [item for item in self.intact if item not in self.leaving]
        newer = max(map(self.chain.index, left), default=-1) > at or (
            tier == BUCKET and self.bucket.outdated(checkpoint)
        )
        beyond = self.at_most is not None and checkpoint.step > self.at_most  # where nothing begins any more
        self.require(newer or beyond, f"{checkpoint} is removed from {tier} and nothing newer is committed")

    def generation_claimed(self, number: int, parent: CheckpointId | None) -> None:
        """Note a generation record: from now on the lineage goes through its parent."""
        parents = self._node.disk.parents
        self.require(number not in parents and number > max(parents, default=0), f"generation {number} is taken twice")
        self.require(parent is None or parent in self.chain, f"{parent} is no ancestor")
        self._claims[number] = parent
        self.chain = [] if parent is None else self.chain[: self.chain.index(parent) + 1]
        self.bucket.lines[number] = list(self.chain)

    def agent_killed(self) -> None:
        """Note in the middle of what the agent dies."""
        self.seen["agent killed during a flush"] += self._flush_open
        if self._given_up in self.memory and not self._steps_back:
            self._give_up(self._given_up)
        self._given_up = None
        self.bucket.agent_killed()

    def after_event(self) -> None:
        """Check the tiers, if they have changed."""
        self.bucket.after_event()
        disk, options = self._node.disk, self._node.options
        if disk.changes == self._disk_changes:
            return
        self._disk_changes = disk.changes
        for manifest in disk.whole:
            if manifest.id in self.chain:  # what a step back has left behind may go, file by file
                lacks = manifest.files - disk.files.keys()
                self.require(not lacks, f"{manifest.id} lacks files: {lacks}")
            for rank in range(options.world_size):
                self.require(rank in manifest.digests, f"{manifest.id} lacks shard {rank}")
                self.check_content(manifest.digests[rank], rank, manifest.id, "digested")
                if manifest.id in self.chain and manifest.id not in disk.damaged:
                    self.check_content(disk.content(manifest, rank), rank, manifest.id, "committed")

    # --- lives and ends ---------------------------------------------------------------------------------------

    def disk_lost(self) -> None:
        """Know only what the bucket knows."""
        self._disk_changes = -1
        self.chain = self.bucket.lineage
        self.started = max(self._node.bucket.parents, default=0)

    def agent_takes_over(self) -> None:
        """Forget what only the agent before knew: seals that it heard of, prunes and flushes that ended with it."""
        for known in (self.flush_failures, self.leaving, self._seals, self._void, self._witnesses):
            known.clear()
        for part in (self.bucket, self.scrubs, self.incidents):
            part.agent_begins()
        self._flush_open = self.commit_unknown = False
        self._flushed, self._flushing = None, []
        self.takeovers.begins()

    def agent_begins(self) -> None:
        """Forget what was in the memory of the agent before."""
        self.takeovers.agent_begins()
        lists = (self.memory, self.refused, self.flush_failures, self.leaving, self._seals, self._void, self._witnesses)
        for known in lists:
            known.clear()
        for part in (self.bucket, self.scrubs, self.incidents):
            part.agent_begins()
        self.whole = False
        self._offered = self._given_up = None
        self.at_most = self.newest = None
        self._over = True
        self._flush_open = self.commit_unknown = False
        self._flushed, self._flushing = None, []
        self._starts_in_life = 0

    def hopeless(self) -> bool:
        """Whether the newest snapshot failed to become durable so often that the job may end with an error."""
        self.seen["hopeless"] += 1
        failures = 0 if self.newest is None else self.flush_failures.get(self.newest, 0)
        gone = self.takeovers.lost > max(self._node.disk.manifests, default=CheckpointId(0, 0))
        return failures >= FINAL_FLUSH_TRIES or gone or self.bucket.hopeless

    def job_finished(self) -> None:
        """Check what a finished job leaves."""
        options = self._node.options
        for rank in range(options.world_size):
            wanted = (options.total_steps, state_after(rank, options.total_steps))
            found = self._finished.get(rank)
            self.require(found == wanted, f"rank {rank} ends as {found}")
        final = [item for item in self.chain if item.step == options.total_steps]
        stands = any(item in self._node.disk.manifests for item in final)
        self.require(stands or self._last_step_lost, "the final checkpoint is not committed")
        self.bucket.job_finished([item for item in final if item in self._node.disk.manifests])
        self.require(not self.incidents.open or self._node.agent_deaths > 0, f"still open: {self.incidents.open}")
