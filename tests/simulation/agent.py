"""A model agent: one life of the daemon. It feeds the job machine and carries out what that wants done.

It does what `ckptd.daemon.supervisor` and `ckptd.daemon.processes` do, in virtual time, and decides nothing.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from ckptd.core import events as e
from ckptd.core.adopt_events import Recall
from ckptd.core.gate_events import CheckNode
from ckptd.core.halt_events import Leave
from ckptd.core.handover import Handover
from ckptd.core.job import JobMachine, JobSpec, Now
from ckptd.core.job_spec import TierSpec
from ckptd.core.number_events import Reported
from ckptd.core.policy.numbers import NumbersPolicy
from ckptd.core.policy.restart import RestartPolicy
from ckptd.core.policy.retention import RetentionPolicy
from ckptd.core.prune_events import Collect, MakeRoom, Prune
from ckptd.core.scrub_events import Mend, Scrub
from ckptd.core.watch_events import EndRanks, Gather, Watched
from ckptd.errors import AgentError
from ckptd.types import CheckpointId, Evidence
from tests.simulation import copying, gating, scrubbing, storage, takeover, watching
from tests.simulation.disk import Manifest
from tests.simulation.launchers import Launcher, evidence_of
from tests.simulation.memory import Arena, Page
from tests.simulation.offers import Offer
from tests.simulation.options import Options
from tests.simulation.ranks import RankProcess
from tests.simulation.witness_leaving import LeavingWitness
from tests.simulation.witness_numbers import HEALTHY_AFTER

if TYPE_CHECKING:
    from tests.simulation.node import Node

PATIENT = RestartPolicy(
    max_restarts=1000, same_exception_limit=1000, same_death_limit=1000, backoff_base_s=0.2, backoff_max_s=2.0
)
"""The simulation's faults are bad luck by definition: giving up on them would be an error."""


def _tiers(options: Options) -> tuple[TierSpec, ...]:
    first = TierSpec(storage.TIER, RetentionPolicy(options.keep_last), scrub_s=options.scrub_s)
    if not options.bucket:
        return (first,)
    policy = RetentionPolicy(options.bucket_keep_last)
    return first, TierSpec(storage.BUCKET, policy, options.upload_every_s, options.backlog, options.scrub_s)


class ModelAgent:
    """One agent with one job. `alive` ends with kill -9, `end` is set when the job is over."""

    def __init__(self, node: Node, journal: Handover | None = None) -> None:
        """Begin, or take over what another agent has left in the `journal`."""
        options = node.options
        self.node = node
        self.alive = True
        self.end: e.End | None = None
        self.arena = Arena(options.slots)
        self.ranks: dict[int, RankProcess] = {}
        self.connections: set[RankProcess] = set()
        self.launcher: Launcher | None = None
        self.family: Launcher | None = None
        """The launcher whose ranks are this agent's, dead or alive."""
        self.orphans: dict[int, int] = {}
        """Ranks of another launcher that were taken over and are not back yet, by process."""
        self._journal = journal
        self.exited: set[int] = set()
        self.known_digests: set[CheckpointId] = set()
        self.earlier: Manifest | None = None
        """The checkpoint to which the next flush may refer."""
        self.shelves = {storage.TIER: storage.Shelf(), storage.BUCKET: storage.Shelf()}
        self.offer: Offer | None = None
        self.leaving = LeavingWitness(self)
        self.began_s = node.clock.now_s
        self._wanted: int | None = None
        self._inputs: deque[e.Input] = deque()
        self._busy = False
        spec = JobSpec(
            "job", options.world_size, options.every_s, supervised=options.supervised, slots=options.slots,
            tiers=_tiers(options), restart=PATIENT, numbers=NumbersPolicy("step_back", healthy=HEALTHY_AFTER),
            hang=watching.PATIENCE, return_s=60.0,
        )  # fmt: skip
        self.machine = JobMachine(spec, node.witness.incidents.next_number)
        self.machine.keeper.health.recall(node.numbers.journal)

    def start(self) -> None:
        """Begin, as `Supervisor.__init__` does."""
        if self._journal is not None:
            self._carry_out(takeover.begin(self, self._journal))
        elif self.node.options.supervised:
            self.start_launcher()
            effects = self.machine.begin()
            takeover.remember(self)
            self._carry_out(effects)
        else:
            takeover.remember(self)
        self.node.clock.after(0.0, self, "tick", self._tick)

    def start_launcher(self) -> None:
        """Start a launcher of our own."""
        self.launcher = self.family = self.node.launcher = Launcher(self.node, self)

    # --- inputs -----------------------------------------------------------------------------------------------

    def feed(self, event: e.Input) -> None:
        """Tell the machine what happened, and carry out what it wants done."""
        if not self.alive or self.end is not None:
            return
        self._inputs.append(event)
        if self._busy:
            return
        self._busy = True
        while self._inputs and self.alive:
            event = self._inputs.popleft()
            self.node.witness.before(event, self)
            self.leaving.before(event)
            self.node.numbers.before(event)
            if isinstance(event, e.Committed) and event.tier == storage.TIER:
                self.known_digests.add(event.id)
            effects = self.machine.handle(event, self.now())
            if isinstance(event, (e.Claimed, e.RestoreFailed)):
                takeover.remember(self)
            if not isinstance(event, (e.Tick, e.Progress, Watched)) or effects:
                self.node.note("in", event)
            self._carry_out(effects)
            if self.alive:
                self._withdraw_offer()
                self.node.witness.after(event, self)
        self._busy = False

    def now(self) -> Now:
        """Return what time it is."""
        return Now(self.node.clock.now_s, 1e9 + self.node.clock.now_s)

    def _tick(self) -> None:
        if self.end is not None:
            return
        steps = {rank.rank: rank.page.step for rank in self.ranks.values() if rank.page is not None and rank.page.step}
        # A stalled agent acts upon what it has read a while ago.
        stall_s = self.node.rng.uniform(0, 0.3) if self.node.rng.random() < self.node.options.stall_chance else 0.0
        self.node.clock.after(stall_s, self, "tick", self._look, steps)

    def _read_reports(self, *, leaving: bool = False) -> None:
        """Feed what ranks have reported since the last time."""
        pages = {rank.rank: rank.page for rank in self.ranks.values() if rank.page is not None}
        reports = {number: unread for number, page in pages.items() if (unread := page.unread())}
        if reports or leaving:
            self.feed(Reported(reports, leaving=leaving))

    def _look(self, steps: dict[int, int]) -> None:
        if steps:
            self.feed(e.Progress(steps))
        self._read_reports()
        watching.look(self)
        self.feed(e.Tick())
        takeover.remember(self)
        self.node.clock.after(self.node.options.tick_s, self, "tick", self._tick)

    def received(self, process: RankProcess, message: Any) -> None:
        """Handle what a rank says; what a closed connection still held is lost."""
        if isinstance(message, tuple) and message[0] == "join":
            if self.end is not None and self is not self.node.agent:
                process.turn_to(self.node.agent)  # the job was over: the agent runs it anew
            else:
                self._join(process, message[1])
        elif process not in self.connections:
            return
        elif isinstance(message, tuple) and message[0] == "open":
            process.answer(self.offer)
        elif isinstance(message, tuple) and message[0] == "reserve":
            self.node.clock.start(self, "reserve", self._reserve(process, message[1]))
        elif isinstance(message, tuple):
            process.left = True
            process.leaving = process._call
            self._read_reports(leaving=True)
            self.feed(e.RankLeft(process.rank, message[1]))
        else:
            if isinstance(message, e.RankSealed):
                self.node.witness.require(message.slot in process.lent, f"{process} sealed a slot that it was not lent")
                self._read_reports()
            self.feed(message)

    def _join(self, process: RankProcess, generation: int) -> None:
        current = self.machine.generation
        if generation and (current is None or current.number != generation):
            process.answer(AgentError(f"generation {generation} is over"))
            return
        if self.machine.offers_lost and current is not None and process.rank not in current.joined:
            process.answer(AgentError(f"what generation {generation} began with is gone"))
            return
        self.ranks[process.rank] = process
        self.connections.add(process)
        if not self.node.options.supervised and not process.alive:
            self.node.clock.after(0.0, self, "report", self.rank_exited, process, self.node.clock.now_s)
        self.feed(e.RankJoined(process.rank, process.pid))

    def rank_exited(self, process: RankProcess, at_s: float) -> None:
        """Learn of a rank's end from the launcher, or from an own pidfd when there is no launcher of ours."""
        if process.pid in self.exited:
            return
        self.exited.add(process.pid)
        self._read_reports()
        evidence = evidence_of(process, at_s)
        if not self.node.options.supervised:
            if self.ranks.get(process.rank) is process:
                del self.ranks[process.rank]
            process.close()
            evidence = None if process.left else evidence
        self.feed(e.RankExited(process.rank, process.pid, evidence))

    def launcher_ready(self, launcher: Launcher) -> None:
        """Send the launcher the ranks that were wanted meanwhile."""
        launcher.reported = True
        if self.launcher is launcher and self._wanted is not None:
            launcher.spawn(self._wanted)
            self._wanted = None

    def launcher_died(self, launcher: Launcher) -> None:
        """Learn of the launcher's end."""
        if launcher in (self.launcher, self.family):
            self.launcher = None
            evidence = Evidence("exit", "launcher", None, 1.0, "the launcher ended", self.node.clock.now_s)
            self.feed(e.LauncherExited(evidence))

    # --- effects ----------------------------------------------------------------------------------------------

    def _carry_out(self, effects: list[e.Effect]) -> None:
        for effect in effects:
            if not self.alive:
                return
            self.node.numbers.carried_out(effect, self)
            self.node.hangs.carried_out(effect, self)
            if isinstance(effect, e.Log):
                self.node.witness.seen[effect.event] += 1
                self.leaving.said(effect)
                continue
            self.node.note("out", effect)
            self.node.witness.ordered(effect, self)
            if isinstance(effect, e.Record):
                takeover.remember(self)
            self._do(effect)
            bucket = isinstance(effect, (e.Upload, Prune, Collect)) and effect.tier == storage.BUCKET
            self.node.fault_point("bucket" if bucket else "effect")

    def _do(self, effect: e.Effect) -> None:
        match effect:
            case e.Announce():
                for process in self.ranks.values():
                    if process.page is not None:
                        process.page.announce(effect.step, last=effect.last)
            case Leave():
                for process in self.ranks.values():
                    if process.page is not None:
                        process.page.let_leave()
            case e.Release():
                process = self.ranks.get(effect.rank)
                if process is not None and process.page is not None:
                    process.page.release(effect.slot)
            case e.Admit():
                self._admit(effect)
            case e.Whole():
                for process in self.ranks.values():
                    if process.page is not None:
                        process.page.whole = True
            case e.Dismiss():
                if effect.rank in self.ranks:
                    self._dismiss(self.ranks[effect.rank])
            case e.Kill():
                if self.launcher is not None:
                    self.launcher.kill_ranks(effect.signal)
                else:
                    takeover.kill_orphans(self, effect.signal)
            case e.Spawn():
                self._spawn(effect.generation)
            case Recall():
                self._start(storage.read_store(self), "store")
            case e.End():
                self._end(effect)
            case e.ReadStore():
                self._start(storage.read_store(self), "store")
            case e.Claim():
                self._start(storage.claim(self, effect), "claim")
            case e.Fetch():
                copied = effect.source.tier == storage.BUCKET
                self._start((copying.fetch if copied else storage.check)(self, effect.source), "fetch")
            case e.Flush():
                self._start(storage.flush(self, effect), "flush")
            case e.Upload():
                self._start(copying.upload(self, effect), "bucket")
            case Prune():
                self._start(storage.prune(self, effect), "bucket" if effect.tier == storage.BUCKET else "prune")
            case Collect():
                self._start(storage.collect(self, effect), "bucket" if effect.tier == storage.BUCKET else "prune")
            case EndRanks():
                for number in effect.ranks:
                    if number in self.ranks:
                        self.ranks[number].kill(9)
                    else:
                        takeover.end_orphan(self, number)
            case Gather():
                watching.gather(self, effect)
            case CheckNode():
                self._start(gating.look(self), "gate")
            case Scrub():
                self._start(scrubbing.scrub(self, effect.source), "scrub")
            case Mend():
                self._start(scrubbing.mend(self, effect.source), "scrub")
            case MakeRoom():
                self._start(storage.make_room(self, effect), "prune")
            case _:
                return

    def _start(self, steps: storage.Steps, kind: str) -> None:
        self.node.clock.start(self, kind, steps)

    def _spawn(self, generation: int) -> None:
        for process in self.ranks.values():
            process.close()
        self.ranks = {}
        self._wanted = generation
        if self.launcher is None:
            self.start_launcher()
        elif self.launcher.reported:
            self.launcher_ready(self.launcher)

    def _admit(self, order: e.Admit) -> None:
        process = self.ranks.get(order.rank)
        self.node.witness.require(process is not None, f"rank {order.rank} is admitted and not connected")
        assert process is not None
        process.page = Page(set(self.machine.keeper.book.held(order.rank)))
        process.page.whole = order.whole
        process.skips = self.machine.numbers_to_tell()["skipped"]
        if order.offer is None:
            process.admit(order.generation, None)
            return
        if self.offer is None or self.offer.generation != order.generation:
            self.offer = Offer.make(self, order)
        self._start(self._admit_with(process, self.offer), "offer")

    def _admit_with(self, process: RankProcess, offer: Offer) -> storage.Steps:
        """Let a rank in once its offer is described: that takes a thread, for a snapshot that was not flushed."""
        yield offer.ready
        process.admit(offer.generation, offer.source)

    def _withdraw_offer(self) -> None:
        generation = self.machine.generation
        if generation is not None and generation.all_in(generation.restored):
            self.offer = None

    def _dismiss(self, process: RankProcess) -> None:
        if process.leaving is not None:
            process.leaving.fire()
            process.leaving = None

    def _reserve(self, process: RankProcess, size: int) -> storage.Steps:
        held = set(self.machine.keeper.book.held(process.rank))
        yield self.node.rng.uniform(0, 0.05)
        numbers = self.arena.reserve(process.rank, size, held)
        if process not in self.connections:
            return
        process.lent = tuple(numbers)
        process.answer({number: self.arena.slots[process.rank][number] for number in process.lent})
        self.feed(e.SlotsLent(process.rank, tuple(numbers)))

    def _end(self, end: e.End) -> None:
        self.leaving.ended(end)
        if self.family is not None:
            self.family.dissolve()
        for process in self.ranks.values():
            self._dismiss(process)
            process.close()
        self.end = end
        self.node.job_ended(end)

    def die(self) -> None:
        """End by kill -9: memory, connections and storage threads are gone at once."""
        self.alive = False
        if self.family is not None:
            self.family.dissolve()
