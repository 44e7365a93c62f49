"""The supervisor: carries out what a job's machine decides, and tells the machine what happens.

All decisions are in `core.job`; this is its shell. Inputs are queued, so that an effect that produces the next input
at once can't run inside the one before it. Whatever blocks runs in a thread and comes back as an input.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ckptd.config import JobConfig
from ckptd.coordination.coordinator import Coordinator
from ckptd.core import events as e
from ckptd.core.job import JobMachine, JobSpec, Now
from ckptd.core.job_states import TERMINAL
from ckptd.core.policy.restart import RestartPolicy
from ckptd.core.restore import MEMORY, Source
from ckptd.daemon.arena import Arena, Budget
from ckptd.daemon.checkpoints import Checkpoints
from ckptd.daemon.processes import Processes
from ckptd.daemon.ranks import Rank
from ckptd.daemon.status import show
from ckptd.daemon.tiers import spec_of, teller
from ckptd.errors import AgentError, CkptdError, DamagedError, StateError, unreachable
from ckptd.journal import Journal, entry_now
from ckptd.log import Logger
from ckptd.tiers import JobTier
from ckptd.types import RaisedException

TICK_S = 0.05
_JOURNAL_EVERY_S = 1.0
_DISCONNECT_GRACE_S = 2.0
_ONE_SLOT = "from the announcement of a capture until it is sealed, a restart has to read the disk"


@dataclass(frozen=True, slots=True)
class Services:
    """What an agent shares among its jobs."""

    journal: Journal
    coordinator: Coordinator
    budget: Budget
    pool: ThreadPoolExecutor
    socket: str
    pid: int
    logger: Logger


class Supervisor:
    """Runs one job. `ended` resolves to the `End` effect once nothing of the job is left."""

    def __init__(
        self, config: JobConfig, tiers: Sequence[JobTier], services: Services, processes: Processes | None
    ) -> None:
        self.config = config
        self.ended: asyncio.Future[e.End] = asyncio.get_running_loop().create_future()
        self.ranks: dict[int, Rank] = {}
        self._arrived: dict[int, Rank] = {}
        self.processes = processes
        self.stopping = False
        """Whether it was told to stop already."""
        self._services = services
        self._log = services.logger.bind(job=config.name)
        self._arena = Arena(config.name, services.budget, config.slots)
        coordinator, pool, report = services.coordinator, services.pool, teller(self._log)
        self._checkpoints = Checkpoints(
            config, tiers, coordinator=coordinator, arena=self._arena, pool=pool, report=report
        )
        self._inputs: deque[e.Input] = deque()
        self._busy = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._journaled_at_s = 0.0
        self._journal_failed = False
        spec = JobSpec(
            config.name,
            config.nproc,
            config.every_s,
            supervised=config.supervised,
            slots=config.slots,
            tiers=tuple(map(spec_of, tiers)),
            restart=RestartPolicy(config.max_restarts),
        )
        self.machine = JobMachine(spec, services.journal.next_incident(config.name))
        places = [item.tier.url for item in tiers]
        self._log.info("job started", nproc=config.nproc, every_s=config.every_s, store=places)
        if config.slots == 1:
            self._log.warning("one slot per rank", risk=_ONE_SLOT, hint="slots = 2 keeps one snapshot in memory always")
        if processes is not None:
            processes.start(self._from_processes)
            self._carry_out(self.machine.begin())
        self._spawn_task(self._tick())

    # --- inputs -----------------------------------------------------------------------------------------------

    def feed(self, event: e.Input) -> None:
        """Tell the machine what happened, and carry out what it wants done."""
        self._inputs.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._inputs:
                now, event = Now(time.monotonic(), time.time()), self._inputs.popleft()
                self._carry_out(self.machine.handle(event, now))
                if isinstance(event, e.RankRestored):
                    self._restored()
        finally:
            self._busy = False

    def stop(self, grace_s: float, *, checkpoint: bool = True) -> None:
        """Stop the job on purpose: with a last checkpoint within `grace_s`, or at once."""
        self.stopping = True
        self.feed(e.StopWanted(grace_s, checkpoint))

    @property
    def idle(self) -> bool:
        """Whether it has ended, or may be left alone: nobody is here, and nothing waits for its commit."""
        busy = self.config.supervised or self.ranks or self._arrived or self.machine.keeper.pending
        return self.ended.done() or not busy

    @property
    def ending(self) -> bool:
        """Whether it is over but for the cleaning up."""
        return self.machine.state in TERMINAL and not self.ended.done()

    async def _tick(self) -> None:
        while not self.ended.done():
            await asyncio.sleep(TICK_S)
            self._look_at_pages()
            self.feed(e.Tick())
            if self.processes is not None:
                self.processes.pump()
            if time.monotonic() - self._journaled_at_s > _JOURNAL_EVERY_S:
                self.write_down()

    def _look_at_pages(self) -> None:
        """Tell the machine how far the ranks are."""
        steps = {number: step for number, rank in self.ranks.items() if (step := rank.step)}
        if steps:
            self.feed(e.Progress(steps))

    def _from_processes(self, event: e.Input) -> None:
        if isinstance(event, (e.RankExited, e.LauncherExited)):
            self._look_at_pages()  # the page outlives its rank, and says how far it came
        self.feed(event)

    # --- effects ----------------------------------------------------------------------------------------------

    def _carry_out(self, effects: list[e.Effect]) -> None:
        for effect in effects:
            self._do(effect)

    def _do(self, effect: e.Effect) -> None:  # noqa: C901, PLR0912 - a dispatch table in match form
        match effect:
            case e.Log():
                getattr(self._log, effect.level)(effect.event, **effect.fields)
            case e.Announce():
                for rank in self.ranks.values():
                    rank.announce(effect.step)
            case e.Release():
                if effect.rank in self.ranks:
                    self.ranks[effect.rank].release(effect.slot)
            case e.Flush():
                self._spawn_task(self._flush(effect))
            case e.Record():
                self._journal(lambda: self._services.journal.write_incident(effect.incident))
                self.write_down()
            case e.Admit():
                self._admit(effect)
            case e.Whole():
                for rank in self.ranks.values():
                    rank.capture_whole()
            case e.Dismiss():
                if effect.rank in self.ranks:
                    self.ranks[effect.rank].dismiss()
            case e.Kill():
                if self.processes is not None:
                    self.processes.kill(effect.signal)
                else:
                    self._let_go()
            case e.Spawn():
                for rank in (*self.ranks.values(), *self._arrived.values()):
                    rank.close()
                self.ranks, self._arrived = {}, {}
                if self.machine.generation is not None and self.machine.generation.offer is not None:
                    self._prepare(effect.generation, self.machine.generation.offer)  # while the ranks begin
                if self.processes is not None:
                    self.processes.spawn(effect.generation, effect.restarts)
            case e.ReadStore():
                self._spawn_task(self._answer(self._checkpoints.read()))
            case e.Claim():
                self._spawn_task(self._answer(self._checkpoints.claim(effect)))
            case e.Fetch():
                self._spawn_task(self._answer(self._checkpoints.check(effect.source, self.config.nproc)))
            case e.Upload():
                self._spawn_task(self._answer(self._checkpoints.upload(effect)))
            case e.Prune():
                self._spawn_task(self._prune(effect))
            case e.End():
                self._spawn_task(self._end(effect))
            case _:
                unreachable(f"no such effect: {effect}")

    def _spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A bug of ours: crash the agent, systemd brings it back. Going on could lose a checkpoint.
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a storage task failed", "exception": task.exception(), "task": task}
            )

    async def _answer(self, work: Awaitable[e.Input]) -> None:
        try:
            self.feed(await work)
        except CkptdError as error:
            self.feed(e.SetupFailed(error))

    async def _flush(self, order: e.Flush) -> None:
        self.feed(await self._checkpoints.flush(order, self.machine.keeper.book.snapshots))
        self.write_down()

    async def _prune(self, order: e.Prune) -> None:
        error = await self._checkpoints.prune(order)
        if error is not None:
            self._log.warning("prune failed", error=str(error))
        self._log.debug("checkpoint pruned", steps=[item.step for item in order.ids], reasons=list(order.reasons))

    # --- ranks ------------------------------------------------------------------------------------------------

    def join(self, rank: Rank) -> None:
        """Take in a rank that asks for its place; it is admitted when its generation is ready."""
        if not self.config.supervised:
            rank.watch(lambda: self._attached_gone(rank))
        # Until it is admitted, whoever has its place now must go on undisturbed.
        before = self._arrived.get(rank.rank)
        if before is not None:
            before.refuse(AgentError(f"another process has come to be rank {rank.rank} of job {self.config.name}"))
            before.close()
        self._arrived[rank.rank] = rank
        self.feed(e.RankJoined(rank.rank, rank.peer.pid))

    def raised(self, pid: int, number: int, generation: int, exception: RaisedException) -> None:
        """Remember what a rank says of its end, until the end itself is seen."""
        if self.processes is not None:
            self.processes.raised(number, generation, exception)
        elif number in self.ranks and self.ranks[number].peer.pid == pid:
            self.ranks[number].exception = exception

    def disconnected(self, rank: Rank) -> None:
        """Take note of a rank that closed its connection, unless it is about to end anyway."""
        admitted = self.ranks.get(rank.rank) is rank
        if admitted and not rank.left:
            asyncio.get_running_loop().call_later(_DISCONNECT_GRACE_S, self._still_disconnected, rank)
        elif not self.config.supervised:
            self._attached_gone(rank)  # whatever its process does next has nothing to do with this job

    def _still_disconnected(self, rank: Rank) -> None:
        generation = self.machine.generation
        gone = generation is None or rank.rank in generation.gone
        if self.ranks.get(rank.rank) is rank and not gone and not self.ended.done():
            self._log.warning("rank disconnected", rank=rank.rank, hint="it trains on unprotected; its stderr says why")
            self.feed(e.RankLeft(rank.rank, rank.step or 0))

    def _let_go(self) -> None:
        """End our part in ranks that somebody else has started, and who are not ours to kill."""
        for rank in list(self.ranks.values()):
            rank.left = True
            self._attached_gone(rank)

    def _attached_gone(self, rank: Rank) -> None:
        place = next((place for place in (self.ranks, self._arrived) if place.get(rank.rank) is rank), None)
        if place is None:
            return  # its connection and its process end at the same moment
        self._look_at_pages()
        del place[rank.rank]
        evidence = rank.evidence(time.monotonic())
        rank.close()
        self.feed(e.RankExited(rank.rank, rank.peer.pid, evidence))

    def _admit(self, order: e.Admit) -> None:
        rank = self.ranks[order.rank] = self._arrived.pop(order.rank)
        rank.place(self.machine.keeper.book.held(order.rank), whole=order.whole)
        if order.offer is None:
            rank.admit(order.generation, None)
        else:
            self._prepare(order.generation, order.offer)
            self._spawn_task(self._offer(rank, order.generation, order.offer))

    def _prepare(self, generation: int, source: Source) -> None:
        keeper = self.machine.keeper
        in_memory = source.tier == MEMORY
        snapshot = keeper.order_of(keeper.book.snapshots[source.id]) if in_memory else None
        self._checkpoints.prepare(generation, source, snapshot)

    async def _offer(self, rank: Rank, generation: int, source: Source) -> None:
        """Let a rank in once its offer is ready. One that can't be made ready is damaged as far as a restart goes."""
        try:
            rank.admit(generation, await self._checkpoints.offer(generation))
        except (DamagedError, StateError) as error:
            damage = DamagedError(f"{source} can't be offered: {error.message}", hint=error.hint)
            self.feed(e.RestoreFailed(rank.rank, source.id, damage))
            rank.refuse(damage)
        except CkptdError as error:
            rank.refuse(error)

    def open(self, rank: Rank, files: Sequence[str]) -> None:
        """Lend an admitted rank files of what it is offered."""
        generation = self.machine.generation
        if generation is None or self.ranks.get(rank.rank) is not rank:
            raise AgentError(f"rank {rank.rank} of job {self.config.name} is not offered anything")
        self._spawn_task(self._open(rank, generation.number, files))

    async def _open(self, rank: Rank, generation: int, files: Sequence[str]) -> None:
        try:
            rank.lend_files(files, await self._checkpoints.open(generation, files))
        except CkptdError as error:
            rank.refuse(error)

    def _restored(self) -> None:
        generation = self.machine.generation
        if generation is not None and generation.all_in(generation.restored):
            self._checkpoints.withdraw()

    def reserve(self, rank: Rank, image_bytes: int) -> None:
        """Lend a rank slots that are large enough."""
        rank.waits_for_slots = True
        self._spawn_task(self._reserve(rank, image_bytes))

    async def _reserve(self, rank: Rank, image_bytes: int) -> None:
        held = self.machine.keeper.book.held(rank.rank)
        try:
            numbers = await asyncio.to_thread(self._arena.reserve, rank.rank, image_bytes, held)
        except CkptdError as error:
            rank.waits_for_slots = False
            rank.refuse(error)
            self.feed(e.SetupFailed(error))
            return
        rank.waits_for_slots = False
        slots = self._arena.slots(rank.rank)
        self._log.debug("slots lent", rank=rank.rank, slots=len(numbers), size_bytes=image_bytes)
        rank.lend(slots, numbers)
        self.feed(e.SlotsLent(rank.rank, tuple(numbers)))

    # --- views ------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the shape of `ckptctl status --json`."""
        return show(self.machine, self.ranks)

    def write_down(self) -> None:
        """Write the job's state to the journal."""
        self._journaled_at_s = time.monotonic()
        services = self._services
        entry = entry_now(self.config.name, self.config.to_json(), self.status(), services.pid, services.socket)
        self._journal(lambda: services.journal.write_job(entry))

    def _journal(self, write: Callable[[], None]) -> None:
        """Write to the journal; a full state folder costs memory of the past, not the training."""
        try:
            write()
        except CkptdError as error:
            if not self._journal_failed:
                self._log.error("journal failed", error=str(error))
            self._journal_failed = True

    # --- the end ----------------------------------------------------------------------------------------------

    async def _end(self, end: e.End) -> None:
        if self.processes is not None:
            await self.processes.close()
        for rank in self.ranks.values():
            rank.dismiss()
        # A rank that waits must not take our end for a reason to begin afresh.
        for rank in (*self._arrived.values(), *(item for item in self.ranks.values() if item.waits_for_slots)):
            rank.refuse(end.error or AgentError(f"job {self.config.name} is {end.outcome}"))
        self.write_down()
        level = "info" if end.error is None else "error"
        getattr(self._log, level)("job ended", outcome=end.outcome, error=None if end.error is None else str(end.error))
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        for rank in (*self.ranks.values(), *self._arrived.values()):
            rank.close()
        await asyncio.gather(*others, return_exceptions=True)
        self._checkpoints.withdraw()
        await asyncio.gather(asyncio.to_thread(self._arena.close), self._checkpoints.close())
        self.ended.set_result(end)
