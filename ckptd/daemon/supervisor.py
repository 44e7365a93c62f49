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
from itertools import compress
from typing import Any

from ckptd.config import JobConfig
from ckptd.coordination.coordinator import Coordinator
from ckptd.core import events as e
from ckptd.core.job import JobMachine, JobSpec, Now
from ckptd.core.job_states import TERMINAL, JobState
from ckptd.core.policy.restart import RestartPolicy
from ckptd.core.prune_events import Collect, MakeRoom, Prune
from ckptd.core.scrub_events import Mend, Scrub
from ckptd.daemon.arena import Arena, Budget
from ckptd.daemon.attendance import Attendance
from ckptd.daemon.checkpoints import Checkpoints
from ckptd.daemon.living import boot_id
from ckptd.daemon.processes import Processes
from ckptd.daemon.resuming import OpenTier
from ckptd.daemon.status import show
from ckptd.daemon.tiers import spec_of, teller
from ckptd.errors import AgentError, CkptdError, unreachable
from ckptd.journal import Journal, Life, entry_now
from ckptd.log import Logger
from ckptd.tiers import JobTier
from ckptd.types import RaisedException

TICK_S = 0.05
_JOURNAL_EVERY_S = 1.0
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
    service: bool = False
    """Whether the agent is a service: the next one goes on with its supervised jobs, however this one ends."""


class Supervisor:
    """Runs one job. `ended` resolves to the `End` effect once nothing of the job is left."""

    def __init__(
        self, config: JobConfig, tiers: Sequence[JobTier], services: Services, processes: Processes | None
    ) -> None:
        self.config = config
        self.ended: asyncio.Future[e.End] = asyncio.get_running_loop().create_future()
        self.processes = processes
        self.stopping = False
        """Whether it was told to stop already."""
        self.leaving = False
        """Whether it is stopped because its agent is, and not for its own sake."""
        self._services = services
        self._log = services.logger.bind(job=config.name)
        self._arena = Arena(config.name, services.budget, config.slots)
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
        self._journaled_at_s = 0.0
        self._journal_failed = False
        spec = JobSpec(
            config.name,
            config.nproc,
            config.every_s,
            supervised=config.supervised,
            slots=config.slots,
            tiers=tuple(map(spec_of, tiers)),
            restart=RestartPolicy(config.max_restarts, config.restart_window_s),
        )
        self.machine = JobMachine(spec, services.journal.next_incident(config.name))
        self.attendance = Attendance(
            config,
            self.machine,
            arena=self._arena,
            checkpoints=self._checkpoints,
            feed=self.feed,
            start=self._spawn_task,
            logger=self._log,
        )
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
        self.write_down()  # it must not come back if the agent ends meanwhile
        self.feed(e.StopWanted(grace_s, checkpoint))

    def raised(self, pid: int, number: int, generation: int, exception: RaisedException) -> None:
        """Remember what a rank says of its end, until the end itself is seen."""
        if self.processes is not None:
            self.processes.raised(number, generation, exception)
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
            self.feed(e.Tick())
            if self.processes is not None:
                self.processes.pump()
            if time.monotonic() - self._journaled_at_s > _JOURNAL_EVERY_S:
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
        for effect in effects:
            self._do(effect)

    def _do(self, effect: e.Effect) -> None:  # noqa: C901, PLR0912 - a dispatch table in match form
        match effect:
            case e.Log():
                getattr(self._log, effect.level)(effect.event, **effect.fields)
            case e.Announce():
                self.attendance.announce(effect.step)
            case e.Release():
                self.attendance.release(effect.rank, effect.slot)
            case e.Flush():
                self._spawn_task(self._flush(effect))
            case e.Record():
                self._journal(lambda: self._services.journal.write_incident(effect.incident))
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
            case e.ReadStore():
                self._spawn_task(self._answer(self._checkpoints.read()))
            case e.Claim():
                self._spawn_task(self._answer(self._checkpoints.claim(effect)))
            case e.Fetch():
                self._spawn_task(self._answer(self._checkpoints.check(effect.source, self.config.nproc)))
            case e.Upload():
                self._spawn_task(self._answer(self._checkpoints.upload(effect)))
            case Prune() | Collect() | MakeRoom():
                self._spawn_task(self._prune(effect))
            case Scrub():
                self._spawn_task(self._answer(self._checkpoints.scrubber.scrub(effect.source)))
            case Mend():
                self._spawn_task(self._answer(self._checkpoints.scrubber.mend(effect.source)))
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

    async def _prune(self, order: Prune | Collect | MakeRoom) -> None:
        match order:
            case Prune():
                removed, answer = await self._checkpoints.prune(order)
            case Collect():
                removed = await self._checkpoints.collect(order)
            case MakeRoom():
                removed, answer = await self._checkpoints.make_room(order)
        for error in removed.errors[-1:]:
            self._log.warning("prune failed", tier=order.tier, error=str(error))
        if not isinstance(order, Collect) and removed.checkpoints:
            went = [item in removed.checkpoints for item in order.ids]
            steps, reasons = [item.step for item in compress(order.ids, went)], list(compress(order.reasons, went))
            self._log.debug("checkpoint pruned", tier=order.tier, steps=steps, reasons=reasons)
        if not isinstance(order, Prune):
            fields = {"tier": order.tier, "files": removed.files, "freed_bytes": removed.freed_bytes}
            fields |= {"records": removed.records, "swept": list(removed.swept)}
            level = "info" if isinstance(order, MakeRoom) else "debug"
            getattr(self._log, level)("garbage collected", **fields)
        if not isinstance(order, Collect):
            self.feed(answer)

    # --- views ------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Return the shape of `ckptctl status --json`."""
        return show(self.machine, self.attendance.admitted)

    def write_down(self) -> None:
        """Write the job's state to the journal."""
        self._journaled_at_s = time.monotonic()
        services = self._services
        entry = entry_now(
            self.config.name, self.config.to_json(), self.status(), services.pid, services.socket, self._life()
        )
        self._journal(lambda: services.journal.write_job(entry))

    def _life(self) -> Life:
        state = self.machine.state
        over = state in TERMINAL and (not self.leaving or state is JobState.FINISHED)
        comes_back = self._services.service and self.config.supervised and not (self.stopping or over)
        launcher = (0, 0) if self.processes is None else self.processes.launcher
        return Life(comes_back, boot_id(), *launcher)

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
        self.attendance.end(end.error or AgentError(f"job {self.config.name} is {end.outcome}"))
        self.write_down()
        level = "info" if end.error is None else "error"
        getattr(self._log, level)("job ended", outcome=end.outcome, error=None if end.error is None else str(end.error))
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        self.attendance.clear()
        await asyncio.gather(*others, return_exceptions=True)
        self._checkpoints.withdraw()
        await asyncio.gather(asyncio.to_thread(self._arena.close), self._checkpoints.close())
        self.ended.set_result(end)
