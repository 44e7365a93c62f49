"""The processes of one supervised job: its launcher, its ranks and what they print."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ckptd.config import JobConfig
from ckptd.core import events as e
from ckptd.daemon.adopting import Legacy
from ckptd.daemon.connection import Connection
from ckptd.daemon.evidence.traces import trace_env
from ckptd.daemon.exits import Exits
from ckptd.daemon.launcher import LauncherProcess, how_it_ended, start_launcher
from ckptd.daemon.living import boot_id, started
from ckptd.daemon.orphans import Orphans
from ckptd.daemon.output import OutputFollower, last_lines, output_paths
from ckptd.daemon.ranks import Terms
from ckptd.errors import CkptdError, ConfigError, FencedError, JobFailedError, ProtocolError, StoreError, from_json
from ckptd.journal import Life
from ckptd.launcher.command import Belonging
from ckptd.launcher.environment import free_port, job_env, rank_env
from ckptd.log import Logger
from ckptd.plugin.manager import PluginManager
from ckptd.protocol.messages import (
    Adopted,
    Exited,
    Kill,
    Learn,
    Learned,
    Message,
    Ready,
    Returned,
    Spawn,
    Spawned,
    SpawnFailed,
    check_version,
)
from ckptd.types import Evidence, RaisedException, RankExit

Feed = Callable[[e.Input], None]
RETURN_S = 10.0
"""How long a launcher may take to come back to an agent that takes its job over: it dials ten times a second."""


class Processes:
    """Starts, kills and watches the ranks of one job, and tells `feed` what happens to them.

    With `foreground`, what ranks print is passed on to this process's own output. `terms` say how long launcher and
    ranks go on without an agent when this one dies; 0: they end with it.
    """

    def __init__(
        self,
        config: JobConfig,
        terms: Terms,
        folder: Path,
        *,
        socket: str,
        plugins: PluginManager,
        exits: Exits,
        logger: Logger,
        foreground: bool,
    ) -> None:
        self._config = config
        self._incarnation = terms.incarnation
        self._belongs = Belonging(config.name, terms.incarnation, socket, terms.agent_wait_s)
        self._folder = folder
        self._socket = socket
        self._plugins = plugins
        self._exits = exits
        self._log = logger
        self._follower = OutputFollower(sys.stdout, sys.stderr, colors=sys.stdout.isatty()) if foreground else None
        self._feed: Feed = lambda _: None
        self._launcher: LauncherProcess | None = None
        self._ready = False
        self._proven = False
        """Whether a launcher of this job was ready once, so that one which dies early was killed."""
        self._foreign: str | None = None
        """Why the launcher could not be taken over, and was ended."""
        self._closing = False
        self._wanted: tuple[int, int] | None = None
        self._generation = 0
        self._living: dict[int, tuple[int, int]] = {}
        """The process of each rank, and when it began."""
        self._known: dict[int, int] = {}
        """The process of each rank of the generation, whether it lives or not."""
        self._orphans = Orphans(self._orphan_ended)
        self._killing = False
        self._leftover: LauncherProcess | None = None
        """A launcher whose ranks can't go on, until it has ended."""
        self._exceptions: dict[int, RaisedException] = {}

    def start(self, feed: Feed) -> None:
        """Start the launcher: its imports take their time while the agent looks into the store."""
        self._feed = feed
        self._start_launcher()

    def adopt(self, feed: Feed, legacy: Legacy) -> None:
        """Take over what an agent before us has left: the launcher that comes back, and the ranks of a generation.

        Where no rank can go on the launcher is ended, and another one started.
        """
        life, goes_on = legacy.life, legacy.handover.has_ranks
        self._feed, self._generation, self._proven = feed, legacy.handover.generation, True
        self._living = {rank: (pid, life.ranks_started.get(str(rank), 0)) for rank, pid in legacy.pids.items()}
        self._known = legacy.pids
        for pid in self._known.values():
            self._exits.begin(pid, time.monotonic())
        launcher, loop = self._find(life), asyncio.get_running_loop()
        if launcher is None and goes_on:
            loop.call_soon(self._launcher_exited, None)
        elif launcher is None:
            self._start_launcher()
        elif goes_on:
            self._launcher = launcher
            loop.call_later(RETURN_S, self._miss, launcher)
        else:
            self._leftover = launcher
            launcher.signal(signal.SIGTERM)
            loop.call_later(RETURN_S, launcher.signal, signal.SIGKILL)

    def _find(self, life: Life) -> LauncherProcess | None:
        """Return the launcher that an agent before us has started, if it still runs."""
        if not life.launcher_pid or life.boot_id != boot_id():
            return None
        try:
            pidfd = os.pidfd_open(life.launcher_pid)
        except ProcessLookupError:
            return None
        if started(life.launcher_pid) != life.launcher_started:
            os.close(pidfd)
            return None
        return LauncherProcess(life.launcher_pid, pidfd, None, self._launcher_exited)

    def _miss(self, launcher: LauncherProcess) -> None:
        """End a launcher that lives and does not come back: it may be stopped."""
        if self._launcher is launcher and not launcher.connected and not self._closing:
            self._log.error("launcher missing", pid=launcher.pid, wait_s=RETURN_S)
            launcher.signal(signal.SIGKILL)

    def foreign(self, pid: int, error: CkptdError) -> None:
        """End the launcher, with its ranks, if it is the process that can't be talked to."""
        launcher = self._launcher
        if launcher is not None and launcher.pid == pid and self._foreign is None:
            self._foreign = f"the launcher could not be taken over: {error.message}"
            self._log.error("launcher refused", pid=pid, error=str(error))
            launcher.signal(signal.SIGTERM)

    def returned(self, connection: Connection, pid: int, message: Returned) -> None:
        """Take a launcher in that has lost its agent, or its connection; raises `FencedError` for any other one."""
        launcher = self._launcher
        if launcher is None or launcher.pid != pid or message.incarnation != self._incarnation:
            raise FencedError(f"job {self._config.name} goes on without launcher {pid}")
        ranks = {item.get("rank", -1): item.get("pid", 0) for item in message.ranks}
        whole = ranks.keys() == set(range(self._config.nproc)) and all(0 < number < 2**31 for number in ranks.values())
        if message.generation != self._generation or not whole:
            raise FencedError(f"launcher {pid} has not all ranks of generation {self._generation}")
        launcher.connect(connection)
        self._ready = self._proven = True
        connection.send(Adopted())
        self._log.info("launcher returned", pid=pid, ranks=len(ranks))
        for rank, number in ranks.items():
            if self._known.get(rank) != number:
                self._begun(rank, number)
        self._spawn()

    def disconnected(self, connection: Connection) -> None:
        """Take note of a launcher's connection that is closed; one that lives comes back."""
        if self._launcher is not None:
            self._launcher.disconnected(connection)

    def _start_launcher(self) -> None:
        config = self._config
        self._ready = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._launcher = start_launcher(
                python=config.python,
                command=config.command,
                preload=self._preload(),
                belongs=self._belongs if self._belongs.wait_s else None,
                cwd=config.cwd,
                env=job_env({**os.environ, **config.env}, nproc=config.nproc, cpu_count=len(os.sched_getaffinity(0))),
                log=self._folder / "launcher.log",
                on_message=self.received,
                on_exit=self._launcher_exited,
            )
        except OSError as error:
            problem = ConfigError(f"can't start {config.python} in {config.cwd}: {error.strerror}")
            asyncio.get_running_loop().call_soon(self._feed, e.SetupFailed(problem))

    def _preload(self) -> tuple[str, ...]:
        """Add to the job's list what every rank imports anyway: the client, and the adapters of its frameworks."""
        names = list(self._config.preload)
        if not names:
            return ()
        for spec in self._plugins.frameworks:
            if spec.trigger in self._config.preload:
                names += [*spec.preload, spec.target.partition(":")[0]]
        return tuple(dict.fromkeys([*names, "ckptd.client.attach"]))

    @property
    def launcher(self) -> tuple[int, int]:
        """The launcher's number, and when it began, in the kernel's ticks since the boot; zeros while there is none."""
        return (0, 0) if self._launcher is None else (self._launcher.pid, started(self._launcher.pid))

    def spawn(self, generation: int, restarts: int) -> None:
        """Start every rank of a generation, as soon as the launcher is ready."""
        self._wanted = (generation, restarts)
        if self._leftover is not None:
            return
        if self._launcher is None:
            self._start_launcher()
        elif self._ready and self._launcher.connected:
            self._spawn()

    def _spawn(self) -> None:
        if self._wanted is None or self._launcher is None:
            return
        (generation, restarts), self._wanted = self._wanted, None
        self._generation = generation
        self._exceptions.clear()
        self._known.clear()
        self._killing = False
        folder = self._generation_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            port = free_port()
        except OSError as error:  # the disk of the state folder may be full
            self._feed(e.SetupFailed(StoreError(f"can't start ranks, with their output in {folder}: {error.strerror}")))
            return
        if self._follower is not None:
            self._follower.close()
        for rank in range(self._config.nproc):
            out, err = output_paths(folder, rank)
            if self._follower is not None:
                self._follower.follow(out, rank)
                self._follower.follow(err, rank)
            env = rank_env(
                job=self._config.name,
                socket_path=self._socket,
                rank=rank,
                local_rank=rank,
                world_size=self._config.nproc,
                local_world_size=self._config.nproc,
                master_addr="127.0.0.1",
                master_port=port,
                generation=generation,
                restarts=restarts,
                max_restarts=self._config.max_restarts,
                overlap=self._config.overlap,
                incarnation=self._incarnation,
                agent_wait_s=self._belongs.wait_s,
            )
            env |= trace_env(folder, rank, {**os.environ, **self._config.env})
            self._launcher.send(Spawn(rank, env, str(out), str(err)))

    def _generation_folder(self) -> Path:
        return self._folder / f"g{self._generation:06d}"

    @property
    def ranks_started(self) -> dict[int, int]:
        """When the process of each living rank began, in the kernel's ticks since the boot."""
        return {rank: began for rank, (_, began) in self._living.items()}

    def output_of(self, rank: int) -> tuple[Path, Path]:
        """Return the files of a rank's stdout and stderr in the present generation."""
        return output_paths(self._generation_folder(), rank)

    def raised(self, rank: int, generation: int, exception: RaisedException) -> None:
        """Remember what a rank says of its end, until the end itself is seen."""
        if generation == self._generation:
            self._exceptions[rank] = exception.told_after(self._exceptions.get(rank))

    def kill(self, number: int) -> None:
        """Send a signal to every rank's process group; ranks that are not started yet stay so."""
        self._wanted, self._killing = None, True
        if self._launcher is not None and self._launcher.connected:
            self._launcher.send(Kill(number))
            return
        if not self._orphans:
            self._orphans.take(self._living)
        self._orphans.kill(number)

    def learn(self, modules: Sequence[str]) -> None:
        """Have the launcher import what ranks have imported, before it forks the next ones."""
        if self._launcher is not None and self._launcher.connected:
            self._launcher.send(Learn(list(modules)))

    def pump(self) -> None:
        """Pass on what ranks have printed."""
        if self._follower is not None:
            self._follower.pump()

    # --- what the launcher says -------------------------------------------------------------------------------

    def received(self, message: Message) -> None:
        """Take in what the launcher says."""
        match message:
            case Ready():
                try:
                    check_version(message.version, f"the ckptd of {self._config.python}")
                except ProtocolError as error:
                    self._feed(e.SetupFailed(error))
                    return
                self._ready = self._proven = True
                self._log.info(
                    "launcher ready", import_s=round(message.seconds, 3), preloaded=",".join(self._config.preload)
                )
                for name, reason in message.skipped.items():
                    self._log.warning("module not preloaded", module=name, reason=reason)
                self._spawn()
            case Spawned():
                self._begun(message.rank, message.pid)
            case Learned():
                self._log.info("launcher learned", modules=message.modules, import_s=round(message.seconds, 3))
                for name, reason in message.skipped.items():
                    self._log.debug("module not preloaded", module=name, reason=reason)
            case SpawnFailed():
                self._feed(e.SetupFailed(from_json(message.error)))
            case Exited():
                # A rank's own account of its end may lie in its socket, to be read in this turn of the loop.
                asyncio.get_running_loop().call_soon(self._exited, message)

    def _begun(self, rank: int, pid: int) -> None:
        self._known[rank] = pid
        self._living[rank] = pid, started(pid)
        self._exits.begin(pid, time.monotonic())
        self._feed(e.RankSpawned(rank, pid))

    def _exited(self, message: Exited) -> None:
        if self._living.pop(message.rank, (0, 0))[0] != message.pid:
            return  # known already
        self._orphans.forget(message.rank)
        _, err = output_paths(self._generation_folder(), message.rank)
        end = RankExit(
            message.rank,
            message.pid,
            message.returncode,
            message.at_s,
            exception=self._exceptions.get(message.rank),
            last_lines=last_lines(err) if message.returncode else (),
            core_dumped=message.core_dumped,
        )
        self._feed(e.RankExited(end.rank, end.pid, self._exits.evidence(end, time.monotonic()), end.last_lines))

    def _launcher_exited(self, returncode: int | None) -> None:
        self._launcher = None
        if self._closing:
            return
        killed = returncode == -signal.SIGKILL  # nobody does that to itself: another one may live
        if self._leftover is not None or not (self._ready or self._proven or killed):
            self._never_served(returncode)
            return
        self._ready = False
        if not self._orphans:
            self._orphans.take(self._living)
        summary, self._foreign = self._foreign or how_it_ended(returncode), None
        self._feed(e.LauncherExited(Evidence("exit", "launcher", None, 1.0, summary, time.monotonic())))

    def _never_served(self, returncode: int | None) -> None:
        """Go on without a launcher that had no part in this agent's doings: one of an agent before, or a dud."""
        leftover, self._leftover = self._leftover, None
        if leftover is None:
            self._feed(e.SetupFailed(self._launcher_failure(returncode)))
        else:
            self._start_launcher()

    def _orphan_ended(self, rank: int, pid: int) -> None:
        if self._living.get(rank, (0, 0))[0] != pid or self._closing:
            return
        del self._living[rank]
        summary = f"rank {rank} ended, and its launcher was not there to say how"
        evidence = None if self._killing else Evidence("pidfd", "vanished", rank, 0.5, summary, time.monotonic())
        self._feed(e.RankExited(rank, pid, evidence))

    def _launcher_failure(self, returncode: int | None) -> CkptdError:
        log = self._folder / "launcher.log"
        said = " / ".join(last_lines(log, 2)) or "nothing"
        return JobFailedError(f"{how_it_ended(returncode)} before it was ready; it said: {said}", hint=f"see {log}")

    async def close(self) -> None:
        """End every process of the job and pass on the last of what they printed."""
        self._closing = True
        if self._launcher is None or not self._launcher.connected:
            if not self._orphans:
                self._orphans.take(self._living)
            self._orphans.kill(signal.SIGKILL)
        for launcher in (self._launcher, self._leftover):
            if launcher is not None:
                await launcher.close()
        self._orphans.close()
        if self._follower is not None:
            self._follower.close()
