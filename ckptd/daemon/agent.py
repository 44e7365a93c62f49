"""The agent: one process per node and user that owns memory, journal, tiers and jobs, and answers on a socket."""

from __future__ import annotations

import asyncio
import os
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from ckptd.config import AgentConfig, JobConfig
from ckptd.coordination.coordinator import Lease
from ckptd.coordination.embedded import EmbeddedCoordinator
from ckptd.core import events as e
from ckptd.core.halt_events import HaltWanted
from ckptd.core.policy.chaos import Fault
from ckptd.daemon import chaos, requests
from ckptd.daemon.adopting import Legacy, conditions_of, legacy_of, new_incarnation
from ckptd.daemon.arena import Budget
from ckptd.daemon.comeback import forget, refuse_second
from ckptd.daemon.exits import Exits
from ckptd.daemon.fdstore import FdStore
from ckptd.daemon.offers import close_all
from ckptd.daemon.processes import Processes
from ckptd.daemon.ranks import Rank, Terms
from ckptd.daemon.server import Peer, Server
from ckptd.daemon.supervisor import Services, Supervisor
from ckptd.daemon.tiers import HOLD_PATIENCE_S, open_tiers, teller
from ckptd.errors import AgentError, CkptdError, ConfigError, FencedError, NotFoundError
from ckptd.journal import JobEntry, Journal
from ckptd.log import get_logger
from ckptd.plugin.manager import PluginManager
from ckptd.protocol import messages as m
from ckptd.storage.pacing import be_nice
from ckptd.tiers import JobTier

_STORAGE_THREADS = 4
_ANSWER_S = 2.0
_END_S = 10.0
"""After the grace time: for ranks to die and the last flush to come to its end."""
_ANSWERED = (m.Join, m.Rejoin, m.Returned, m.Reserve, m.Open, m.Leave, m.Status, m.Submit, m.Control, m.Fault)
CRASHED = 70
"""The exit code of an agent that met a bug of its own."""


class Agent:
    """Serves one socket. `on_agent_loss` is what launchers do when this process dies; see `Processes`.

    Of a `service` the next agent goes on with the jobs that this one had.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        foreground: bool,
        on_agent_loss: Literal["end", "keep"],
        service: bool = False,
    ) -> None:
        self.config = config
        self.jobs: dict[str, Supervisor] = {}
        self._foreground = foreground
        self._on_agent_loss = on_agent_loss
        self._log = get_logger()
        self._leases: dict[str, Lease] = {}
        self._ranks: dict[Peer, tuple[Supervisor, Rank]] = {}
        self._launchers: dict[Peer, Processes] = {}
        """Those that have come back to this agent."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        asyncio.get_running_loop().set_exception_handler(_crash)
        self.plugins = PluginManager(self._plugin_failed, config.blocked_plugins)
        self.journal = Journal(config.home)
        self.kept = FdStore(os.environ if service else {}, os.getpid())
        self._services = Services(
            journal=self.journal,
            coordinator=EmbeddedCoordinator(config.home),
            budget=Budget(config.memory_max_bytes),
            pool=ThreadPoolExecutor(_STORAGE_THREADS, thread_name_prefix="ckptd-flush", initializer=be_nice),
            socket=str(config.socket),
            pid=os.getpid(),
            logger=self._log,
            open_tier=self.plugins.open_tier,
            home=config.home,
            exits=Exits(self.plugins.evidence),
            plugins=self.plugins,
            kept=self.kept,
            service=service,
        )
        frameworks = [
            {"name": item.name, "trigger": item.trigger, "target": item.target} for item in self.plugins.frameworks
        ]
        self.server = Server(config.socket, frameworks, self._received, self._closed, self._foreign)
        self._log.debug("agent started", socket=str(config.socket), plugins=self.plugins.loaded)

    def _plugin_failed(self, name: str, problem: str) -> None:
        self._log.error("plugin failed", plugin=name, problem=problem)

    # --- jobs -------------------------------------------------------------------------------------------------

    def submit(self, config: JobConfig) -> Supervisor:
        """Start a job; raises `CkptdError` for everything that can be known before it runs."""
        return self._begin(config, None, second=config.supervised)

    def adopt(self, entry: JobEntry) -> Supervisor:
        """Take over a job that was recorded as running by an agent that is gone; its ranks may be alive or not.

        Ranks that live train on; where none is left the job begins with its newest checkpoint. Raises `NotFoundError`
        when there is nothing to go on with, since its ranks were somebody else's and have ended, `FencedError` when
        somebody else runs it, and whatever `submit` raises.
        """
        config, legacy = JobConfig.from_json(entry.config), legacy_of(entry)
        if not config.supervised and (legacy is None or not legacy.has_living()):
            raise NotFoundError(f"no rank of job {entry.job} is left", hint="its own launcher starts them")
        job = self._begin(config, legacy)
        if legacy is None:
            conditions, last = conditions_of(entry), entry.status.get("last_committed")
            if conditions is not None:
                job.feed(HaltWanted(conditions))
            job.machine.expects = None if last is None else last["step"]
        return job

    def _begin(self, config: JobConfig, legacy: Legacy | None, *, second: bool = False) -> Supervisor:
        if self._closing:
            raise AgentError("this agent is being stopped", hint="try again when the next one is there")
        running = self.jobs.get(config.name)
        if running is not None and not running.ended.done():
            raise FencedError(f"job {config.name} runs already", hint="stop it first, or give this one another --name")
        if config.supervised:
            requests.check_command(config)
        if config.name in self._leases:  # it has ended in this very turn of the loop
            self._release(config.name, self._leases[config.name])
        lease = self._services.coordinator.lease(config.name, f"agent {os.getpid()}")
        self._leases[config.name] = lease
        try:
            if second:  # asked with the lease in hand: no agent has the job then
                refuse_second(self.journal, config.name)
            tiers = self._open_tiers(config)
        except CkptdError:
            self._release(config.name, lease)
            raise
        kept = (config.on_agent_loss or self._on_agent_loss) == "keep"
        incarnation = new_incarnation() if legacy is None else legacy.life.incarnation
        terms = Terms(incarnation, config.agent_wait_s if kept else 0.0)
        processes = None
        if config.supervised:
            processes = Processes(
                config,
                terms,
                self.config.home / "jobs" / config.name / "logs",
                socket=str(self.config.socket),
                plugins=self.plugins,
                exits=self._services.exits,
                logger=self._log.bind(job=config.name),
                foreground=self._foreground,
            )
        job = Supervisor(config, tiers, self._services, processes, terms=terms, legacy=legacy)
        self.jobs[config.name] = job
        job.ended.add_done_callback(lambda _: self._release(config.name, lease))
        job.write_down()
        return job

    def _open_tiers(self, config: JobConfig) -> tuple[JobTier, ...]:
        """Open the tiers of a job; who holds it there is waited for only while no other job would wait too."""
        busy = any(not job.ended.done() for job in self.jobs.values())
        tell = teller(self._log.bind(job=config.name))
        return open_tiers(config, self.plugins, self.config.home, tell, patience_s=0.0 if busy else HOLD_PATIENCE_S)

    def _release(self, name: str, lease: Lease) -> None:
        if self._leases.get(name) is lease:
            del self._leases[name]
            lease.release()

    def runs(self, name: str) -> bool:
        """Return whether a job is here and has not ended."""
        return name in self.jobs and not self.jobs[name].ended.done()

    def job(self, name: str) -> Supervisor:
        """Return a job of this agent; raises `NotFoundError`."""
        if name not in self.jobs:
            known = ", ".join(self.jobs) or "none"
            raise NotFoundError(f"this agent has no job {name}", hint=f"its jobs: {known}")
        return self.jobs[name]

    @property
    def idle(self) -> bool:
        """Whether nobody is connected and no job has anything left to do."""
        return not self.server.peers and all(job.idle for job in self.jobs.values())

    async def close(self, grace_s: float = 60.0) -> None:
        """Stop every job at its next boundary, then stop listening.

        After `grace_s` no upload is waited for any more, which the next start of its job makes up for.
        """
        self._closing = True
        await self._stop([job for job in self.jobs.values() if not job.ended.done()], grace_s)
        if self._tasks:  # somebody who asked for the end waits for the answer
            await asyncio.wait(self._tasks, timeout=_ANSWER_S)
        self.server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._services.pool.shutdown(wait=False, cancel_futures=True)  # one that hangs, hangs for good
        self._services.exits.close()
        self.journal.close()

    async def hand_over(self, grace_s: float = 60.0) -> None:
        """Stop the jobs that end with this agent, and write down the others: this process may end at any moment then.

        It need not, and should not, let go of anything: what the others have goes on, as if it had been killed.
        """
        self._closing = True
        running = [job for job in self.jobs.values() if not job.ended.done()]
        await self._stop([job for job in running if not job.outlives_agent], grace_s)
        for job in running:
            job.write_down()

    async def _stop(self, jobs: Sequence[Supervisor], grace_s: float) -> None:
        for job in jobs:
            job.leave(grace_s)
        if jobs:
            _, late = await asyncio.wait([job.ended for job in jobs], timeout=grace_s + _END_S)
            for job in jobs if late else ():
                job.feed(e.StopWanted(0.0, checkpoint=False))
            await asyncio.wait([job.ended for job in jobs])

    # --- messages ---------------------------------------------------------------------------------------------

    def _received(self, peer: Peer, message: m.Message) -> None:
        try:
            if isinstance(message, m.Join):
                self._join(peer, message)
            elif isinstance(message, m.Raised):
                if message.job in self.jobs:
                    exception = requests.exception_of(message)
                    uncaught = peer not in self._ranks  # told by the launcher's hook, when all blocks are left
                    self.jobs[message.job].raised(
                        peer.pid, message.rank, message.generation, exception, uncaught=uncaught
                    )
            elif isinstance(message, m.Rejoin):
                self._rejoin(peer, message)
            elif isinstance(message, m.Returned):
                self._returned(peer, message)
            elif peer in self._ranks:
                requests.from_rank(*self._ranks[peer], message)
            elif peer in self._launchers:
                self._launchers[peer].received(message)
            elif peer.role == "ctl":
                self._control(peer, message)
            else:
                raise AgentError(f"{type(message).__name__} makes no sense before Join")
        except CkptdError as error:
            if isinstance(message, _ANSWERED):
                peer.refuse(error)
            else:  # nobody waits for an answer, and the next request would take it for its own
                self._log.error("message refused", message=type(message).__name__, pid=peer.pid, error=str(error))

    def _join(self, peer: Peer, message: m.Join) -> None:
        self._check_newcomer(peer)
        if not 0 <= message.rank < message.world_size:
            raise ConfigError(f"there is no rank {message.rank} among {message.world_size}")
        job = self.jobs.get(message.job)
        if job is not None and job.ending:
            job.ended.add_done_callback(lambda _: self._join_later(peer, message))
            return
        if job is None or job.ended.done():
            if message.generation:
                raise FencedError(f"this agent does not run job {message.job}")
            job = self.submit(requests.attached_config(message, Path.cwd()))
        elif job.config.supervised and not message.generation:
            raise FencedError(
                f"job {message.job} is run by this agent, which starts its ranks itself",
                hint="stop it first, or give this training another job=...",
            )
        if message.world_size != job.config.nproc:
            raise ConfigError(
                f"rank {message.rank} of {message.world_size} can't join job {message.job} of {job.config.nproc} ranks",
                hint="RANK and WORLD_SIZE must be those that ckptd set",
            )
        current = job.machine.generation
        if message.generation and (current is None or current.number != message.generation):
            raise FencedError(f"generation {message.generation} of job {message.job} is over")
        if message.generation and current is not None and message.rank in current.joined:
            raise ConfigError(
                f"rank {message.rank} of job {message.job} has joined already",
                hint="attach once in a process, with all its state in one call",
            )
        if message.generation and message.incarnation != job.incarnation:
            raise FencedError(f"job {message.job} of this agent is another run than that of this rank")
        if job.machine.offers_lost and current is not None and message.rank not in current.joined:
            raise FencedError(f"what generation {current.number} of job {message.job} began with is gone")
        rank = Rank(message.job, message.rank, peer, self._services.kept)
        self._ranks[peer] = (job, rank)
        job.attendance.join(rank)

    def _join_later(self, peer: Peer, message: m.Join) -> None:
        """Take in a rank that had to wait for the end of the job of its name, unless it has hung up meanwhile."""
        if peer in self.server.peers:
            self._received(peer, message)

    def _check_newcomer(self, peer: Peer) -> None:
        """Refuse to make two of one connection: nobody would let go of the first when it closes."""
        if peer in self._ranks or peer in self._launchers:
            raise AgentError("this connection is a rank's already", hint="a process attaches once")

    def _rejoin(self, peer: Peer, message: m.Rejoin) -> None:
        descriptors = peer.connection.take_descriptors()
        try:
            self._check_newcomer(peer)
            job = self.job(message.job)
            current = job.machine.generation
            mine = current is not None and current.number == message.generation
            mine = mine and 0 <= message.rank < job.config.nproc and message.incarnation == job.incarnation
            if job.ending or job.ended.done() or not mine:
                raise FencedError(f"job {message.job} goes on without this rank {message.rank}")
        except CkptdError:
            close_all(descriptors)
            raise
        rank = Rank(message.job, message.rank, peer, self._services.kept)
        self._ranks[peer] = (job, rank)  # before it is answered, for that may prove that it has hung up
        try:
            job.attendance.rejoin(rank, message, descriptors)
        except CkptdError:
            self._ranks.pop(peer, None)
            raise

    def _returned(self, peer: Peer, message: m.Returned) -> None:
        self._check_newcomer(peer)
        processes = self.job(message.job).processes
        if processes is None:
            raise FencedError(f"job {message.job} has a launcher of its own")
        self._launchers[peer] = processes
        try:
            processes.returned(peer.connection, peer.pid, message)
        except CkptdError:
            self._launchers.pop(peer, None)
            raise

    def _foreign(self, pid: int, error: CkptdError) -> None:
        for job in self.jobs.values():
            if job.processes is not None:
                job.processes.foreign(pid, error)

    def _closed(self, peer: Peer) -> None:
        processes = self._launchers.pop(peer, None)
        if processes is not None:
            processes.disconnected(peer.connection)
        job, rank = self._ranks.pop(peer, (None, None))
        if job is not None and rank is not None:
            job.attendance.disconnected(rank)

    def _control(self, peer: Peer, message: m.Message) -> None:
        match message:
            case m.Status():
                jobs = self.jobs.values() if message.job is None else [self.job(message.job)]
                peer.send(m.Done({"jobs": [job.status() for job in jobs]}))
            case m.Submit():
                job = self.submit(JobConfig.from_json(message.config))
                peer.send(m.Done({"job": job.config.name}))
            case m.Control(verb="stop") if not self.runs(message.job) and forget(self.journal, message.job):
                peer.send(m.Done({"job": message.job, "outcome": "stopped"}))
            case m.Control():
                self._start(requests.control(self.job(message.job), message), peer)
            case m.Fault():
                fault = Fault.from_json(message.fault)
                self._start(chaos.inflict(self.job(message.job), fault, foreground=self._foreground), peer)
            case _:
                raise AgentError(f"{type(message).__name__} is no request of ckptctl")

    def _start(self, work: Any, peer: Peer) -> None:
        async def answer() -> None:
            try:
                peer.send(m.Done(await work))
            except CkptdError as error:
                peer.refuse(error)

        task = asyncio.get_running_loop().create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _crash(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End the agent on a bug of ours: to go on with a broken assumption could lose a checkpoint.

    Memory is given back, ranks end, and whatever is committed stays; the next agent goes on from there.
    """
    error = context.get("exception")
    get_logger().error("agent crashed", problem=context.get("message"), error=repr(error))
    if isinstance(error, BaseException):
        traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(CRASHED)
