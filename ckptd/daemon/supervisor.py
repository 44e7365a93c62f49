"""The supervisor: carries out what a job's machine decides, and tells the machine what happens.

All decisions are in `core.job`; this is its shell. Inputs are queued, so that an effect that produces the next input
at once can't run inside the one before it. Whatever blocks runs in a thread and comes back as an input.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.config import JobConfig
from ckptd.coordination.coordinator import Coordinator
from ckptd.core import events as e
from ckptd.core.adopt_events import RankReturned, Recall
from ckptd.core.gate_events import CheckNode
from ckptd.core.halt_events import Leave
from ckptd.core.job import JobMachine, Now
from ckptd.core.job_states import TERMINAL, JobState
from ckptd.core.number_events import Marked
from ckptd.core.prune_events import Collect, MakeRoom, Prune
from ckptd.core.scrub_events import Mend, Scrub
from ckptd.core.watch_events import EndRanks, Gather
from ckptd.daemon import leaving
from ckptd.daemon.adopting import Legacy, take_slots
from ckptd.daemon.arena import Arena, Budget
from ckptd.daemon.attendance import Attendance
from ckptd.daemon.checkpoints import Checkpoints
from ckptd.daemon.exits import Exits
from ckptd.daemon.fdstore import FdStore
from ckptd.daemon.gate import Gate
from ckptd.daemon.processes import Processes
from ckptd.daemon.ranks import Terms
from ckptd.daemon.record import Record, life_of, returns
from ckptd.daemon.removing import remove
from ckptd.daemon.resuming import OpenTier
from ckptd.daemon.specs import job_spec
from ckptd.daemon.status import show
from ckptd.daemon.tiers import teller
from ckptd.daemon.watching import Watcher
from ckptd.errors import AgentError, CkptdError, unreachable
from ckptd.journal import Journal
from ckptd.log import Logger
from ckptd.plugin.manager import PluginManager
from ckptd.tiers import JobTier
from ckptd.types import RaisedException

TICK_S = 0.05
_REMEMBERED = (
    e.Claimed, e.RankSpawned, e.RankJoined, e.RankRestored, e.RankLeft, e.RankExited, e.RankSealed, e.RestoreFailed,
    e.LauncherExited, e.StopWanted, RankReturned,
)  # fmt: skip
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
    open_tier: OpenTier
    home: Path
    exits: Exits
    plugins: PluginManager
    kept: FdStore
    service: bool = False
    """Whether the agent is a service: the next one goes on with its supervised jobs, however this one ends."""


class Supervisor:
    """Runs one job. `ended` resolves to the `End` effect once nothing of the job is left."""

    def __init__(
        self,
        config: JobConfig,
        tiers: Sequence[JobTier],
        services: Services,
        processes: Processes | None,
        *,
        terms: Terms,
        legacy: Legacy | None = None,
    ) -> None:
        """Begin the job, or go on with it where `legacy` says that an agent before us was."""
        self.config = config
        self.incarnation = terms.incarnation
        self.outlives_agent = bool(terms.agent_wait_s)
        """Whether its processes wait for another agent when this one ends."""
        self.tiers = tuple(tiers)
        self.ended: asyncio.Future[e.End] = asyncio.get_running_loop().create_future()
        self.processes = processes
        self.stopping = False
        """Whether it was told to stop already."""
        self.left: JobState | None = None
        """How far it was when its agent began to end; None while the job ends for its own sake, or not at all."""
        self._services = services
        self._log = services.logger.bind(job=config.name)
        self._arena = Arena(config.name, services.budget, config.slots, services.kept)
        coordinator, pool, report = services.coordinator, services.pool, teller(self._log)
        self._checkpoints = Checkpoints(
            config,
            tiers,
            coordinator=coordinator,
            arena=self._arena,
            pool=pool,
            report=report,
            open_tier=services.open_tier,
        )
        self._inputs: deque[e.Input] = deque()
        self._busy = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._record = Record(services.journal, config, services.pid, services.socket, self._log)
        self.machine = JobMachine(job_spec(config, tiers), services.journal.next_incident(config.name))
        before = services.journal.read_job(config.name)
        self._gate = Gate(services.plugins, config, self.tiers, self._arena, self.machine, before=before)
        self._recall()
        self.attendance = Attendance(
            config,
            self.machine,
            arena=self._arena,
            checkpoints=self._checkpoints,
            exits=services.exits,
            terms=terms,
            feed=self.feed,
            start=self._spawn_task,
            logger=self._log,
        )
        self._watcher = Watcher(
            services.home, self.machine, self.attendance, processes, feed=self.feed, logger=self._log
        )
        places = [item.tier.url for item in tiers]
        self._log.info("job started", nproc=config.nproc, every_s=config.every_s, store=places)
        if config.slots == 1:
            self._log.warning("one slot per rank", risk=_ONE_SLOT, hint="slots = 2 keeps one snapshot in memory always")
        if legacy is not None:
            self._take_over(legacy)
        elif processes is not None:
            processes.start(self._from_processes)
            self._carry_out(self.machine.begin())
        self._spawn_task(self._tick())
        self._spawn_task(self._heed())

    def _take_over(self, legacy: Legacy) -> None:
        """Go on where an agent before us was, with what it has left."""
        life, handover, pids = legacy.life, legacy.handover, legacy.pids
        if pids and handover.state == JobState.STOPPING.value:
            self.left = JobState(life.left) if life.left else None
            self.stopping = life.stopped or self.left is None
        memory = take_slots(self.config.name, self._arena, self._services.kept, self._log)
        if handover.has_ranks:
            self._checkpoints.adopt(handover.generation)
        effects = self.machine.adopt(handover, Now(time.monotonic(), time.time()), memory)
        if self.processes is not None:
            self.processes.adopt(self._from_processes, legacy)
        else:
            began = life.ranks_started
            self.attendance.await_back({rank: (pid, began.get(str(rank), 0)) for rank, pid in pids.items()})
        self._carry_out(effects)

    def _recall(self) -> None:
        """Take over what is known of the health of checkpoints, from who ran the job on the same store before."""
        entry = self._services.journal.read_job(self.config.name)
        if entry is not None and entry.config.get("store", [])[:1] == self.config.to_json()["store"][:1]:
            self.machine.keeper.health.recall(entry.status.get("numbers", {}))

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
                self._record.urgent |= isinstance(event, _REMEMBERED)
                effects = self.machine.handle(event, now)
                if isinstance(event, (e.Claimed, e.RestoreFailed)):
                    self.write_down()  # no rank may act upon what the next agent has never heard of
                self._carry_out(effects)
                if isinstance(event, e.RankRestored):
                    self._restored()
        finally:
            self._busy = False

    def stop(self, grace_s: float, *, checkpoint: bool = True, reason: str = "somebody asked for it") -> None:
        """Stop the job on purpose: with a last checkpoint, and all of it within `grace_s`; or at once."""
        self.stopping = True
        self.write_down()  # it must not go on if the agent ends meanwhile
        self.feed(e.StopWanted(grace_s, checkpoint, reason))

    def leave(self, grace_s: float) -> None:
        """Stop the job, within `grace_s` or its own grace, because the agent ends: it comes back with the next one."""
        if not self.stopping and self.machine.why is None:
            self.left = self.machine.state
        self.feed(e.StopWanted(min(grace_s, self.config.halt.grace_s), reason="the agent is stopped"))

    async def _heed(self) -> None:
        halt = self.config.halt
        if halt.preempt_notice is not None:
            self.stop(halt.grace_s, reason=await leaving.until_notice(halt.preempt_notice, self._log))

    def raised(
        self, pid: int, number: int, generation: int, exception: RaisedException, *, uncaught: bool = False
    ) -> None:
        """Remember what a rank says of its end, until the end itself is seen."""
        if self.processes is not None:
            self.processes.raised(number, generation, exception)
            if uncaught:
                self.attendance.unwinding(pid, number)
        else:
            self.attendance.raised(pid, number, exception)

    @property
    def idle(self) -> bool:
        """Whether it has ended, or may be left alone: nobody is here, and nothing waits for its commit."""
        busy = self.config.supervised or any(True for _ in self.attendance) or self.machine.keeper.pending
        return self.ended.done() or not busy

    @property
    def ending(self) -> bool:
        """Whether it is over but for the cleaning up."""
        return self.machine.state in TERMINAL and not self.ended.done()

    async def _tick(self) -> None:
        while not self.ended.done():
            await asyncio.sleep(TICK_S)
            self.attendance.look_at_pages()
            self._watcher.look()
            self._services.exits.look(time.monotonic())
            self.feed(e.Tick())
            if self.processes is not None:
                self.processes.pump()
            if self._record.due:
                self.write_down()

    def _restored(self) -> None:
        generation = self.machine.generation
        if generation is not None and generation.all_in(generation.restored):
            self._checkpoints.withdraw()

    def _from_processes(self, event: e.Input) -> None:
        if isinstance(event, (e.RankExited, e.LauncherExited)):
            self.attendance.look_at_pages()  # the page outlives its rank, and says how far it came
        self.feed(event)

    # --- effects ----------------------------------------------------------------------------------------------

    def _carry_out(self, effects: list[e.Effect]) -> None:
        released = [(effect.rank, effect.slot) for effect in effects if isinstance(effect, e.Release)]
        if released and self._arena.kept:
            self._arena.keep(released, known=self.write_down())
        for effect in effects:
            self._do(effect)

    def _do(self, effect: e.Effect) -> None:  # noqa: C901, PLR0912, PLR0915 - a dispatch table in match form
        match effect:
            case e.Log():
                getattr(self._log, effect.level)(effect.event, **effect.fields)
            case e.Announce():
                self.attendance.announce(effect.step, last=effect.last)
            case Leave():
                self.attendance.leave()
            case e.Release():
                self.attendance.release(effect.rank, effect.slot)
            case e.Flush():
                self._spawn_task(self._flush(effect))
            case e.Record():
                self._record.write_incident(effect.incident)
                self.write_down()
            case e.Admit():
                self.attendance.admit(effect)
            case e.Whole():
                self.attendance.capture_whole()
            case e.Dismiss():
                self.attendance.dismiss(effect.rank)
            case e.Kill():
                if self.processes is not None:
                    self.processes.kill(effect.signal)
                else:
                    self.attendance.let_go()
            case e.Spawn():
                self.attendance.clear()
                if self.machine.generation is not None and self.machine.generation.offer is not None:
                    self.attendance.prepare(effect.generation, self.machine.generation.offer)  # while the ranks begin
                if self.processes is not None:
                    self.processes.spawn(effect.generation, effect.restarts)
            case Recall():
                self._spawn_task(self._answer(self._checkpoints.look_again()))
            case e.ReadStore():
                self._spawn_task(self._answer(self._checkpoints.read()))
            case e.Claim():
                self._spawn_task(self._answer(self._checkpoints.claim(effect)))
            case e.Fetch():
                self._spawn_task(self._answer(self._checkpoints.check(effect.source, self.config.nproc)))
            case e.Upload():
                self._spawn_task(self._answer(self._checkpoints.upload(effect)))
            case Prune() | Collect() | MakeRoom():
                self._spawn_task(self._remove(effect))
            case Scrub():
                self._spawn_task(self._answer(self._checkpoints.scrubber.scrub(effect.source)))
            case Mend():
                self._spawn_task(self._answer(self._checkpoints.scrubber.mend(effect.source)))
            case CheckNode():
                self._spawn_task(self._answer(self._gate.look()))
            case Gather():
                self._spawn_task(self._answer(self._watcher.gather(effect)))
            case EndRanks():
                self.attendance.end_ranks(effect.ranks)
            case Marked():
                self.write_down()
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

    async def _remove(self, order: Prune | Collect | MakeRoom) -> None:
        answer = await remove(order, self._checkpoints, self._log)
        if answer is not None:
            self.feed(answer)

    # --- views ------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the shape of `ckptctl status --json`."""
        return show(self.machine, self.attendance.admitted)

    def write_down(self) -> bool:
        """Write the job's state to the journal; return whether that could be done."""
        life = life_of(
            self.machine,
            self.processes,
            self.attendance.admitted,
            incarnation=self.incarnation,
            back=self._services.service and returns(self.machine.state, stopped=self.stopping, left=self.left),
            left=self.left,
            stopped=self.stopping,
            slot_bytes=self._arena.slot_bytes or self._gate.had_bytes,
        )
        return self._record.write(self.status(), life)

    # --- the end ----------------------------------------------------------------------------------------------

    async def _end(self, end: e.End) -> None:
        if self.processes is not None:
            await self.processes.close()
        self.attendance.end(end.error or AgentError(f"job {self.config.name} is {end.outcome}"))
        self.write_down()
        level = "info" if end.error is None else "error"
        getattr(self._log, level)("job ended", outcome=end.outcome, error=None if end.error is None else str(end.error))
        await self._watcher.settle()
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        self.attendance.clear()
        await asyncio.gather(*others, return_exceptions=True)
        self._checkpoints.withdraw()
        await asyncio.gather(asyncio.to_thread(self._arena.close), self._checkpoints.close())
        self.ended.set_result(end)
