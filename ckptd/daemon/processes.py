"""The processes of one supervised job: its launcher, its ranks and what they print."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ckptd.config import JobConfig
from ckptd.core import events as e
from ckptd.daemon.launcher import LauncherProcess
from ckptd.daemon.output import OutputFollower, last_lines, output_paths
from ckptd.errors import CkptdError, ConfigError, JobFailedError, ProtocolError, from_json
from ckptd.launcher.environment import free_port, job_env, rank_env
from ckptd.log import Logger
from ckptd.plugin.manager import PluginManager
from ckptd.protocol.messages import Exited, Kill, Message, Ready, Spawn, Spawned, SpawnFailed, check_version
from ckptd.types import Evidence, RaisedException, RankExit

Feed = Callable[[e.Input], None]


class Processes:
    """Starts, kills and watches the ranks of one job, and tells `feed` what happens to them.

    With `foreground`, what ranks print is passed on to this process's own output. `on_agent_loss` says what the
    launcher does when this agent dies: "end" every rank, or "keep" them training for the next agent.
    """

    def __init__(
        self,
        config: JobConfig,
        folder: Path,
        socket: str,
        plugins: PluginManager,
        logger: Logger,
        *,
        foreground: bool,
        on_agent_loss: Literal["end", "keep"],
    ) -> None:
        self._config = config
        self._folder = folder
        self._socket = socket
        self._plugins = plugins
        self._log = logger
        self._on_agent_loss = on_agent_loss
        self._follower = OutputFollower(sys.stdout, sys.stderr, colors=sys.stdout.isatty()) if foreground else None
        self._feed: Feed = lambda _: None
        self._launcher: LauncherProcess | None = None
        self._ready = False
        self._proven = False
        """Whether a launcher of this job was ready once, so that one which dies early was killed."""
        self._closing = False
        self._wanted: tuple[int, int] | None = None
        self._generation = 0
        self._living: dict[int, int] = {}
        self._exceptions: dict[int, RaisedException] = {}

    def start(self, feed: Feed) -> None:
        """Start the launcher: its imports take their time while the agent looks into the store."""
        self._feed = feed
        self._start_launcher()

    def _start_launcher(self) -> None:
        config = self._config
        self._ready = False
        cpu_count = len(os.sched_getaffinity(0))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._launcher = LauncherProcess(
                python=config.python,
                command=config.command,
                preload=self._preload(),
                on_agent_loss=self._on_agent_loss,
                cwd=config.cwd,
                env=job_env({**os.environ, **config.env}, nproc=config.nproc, cpu_count=cpu_count),
                log=self._folder / "launcher.log",
                on_message=self._received,
                on_exit=self._launcher_exited,
            )
        except OSError as error:
            problem = ConfigError(f"can't start {config.python} in {config.cwd}: {error.strerror}")
            asyncio.get_running_loop().call_soon(self._feed, e.SetupFailed(problem))

    def _preload(self) -> tuple[str, ...]:
        """Add to the job's list what every rank imports anyway: the client, and the adapters of its frameworks."""
        wanted = self._config.preload
        if not wanted:
            return ()
        names = list(wanted)
        for spec in self._plugins.frameworks:
            if spec.trigger in wanted:
                names += [*spec.preload, spec.target.partition(":")[0]]
        return tuple(dict.fromkeys([*names, "ckptd.client.attach"]))

    def spawn(self, generation: int, restarts: int) -> None:
        """Start every rank of a generation, as soon as the launcher is ready."""
        self._wanted = (generation, restarts)
        if self._launcher is None:
            self._start_launcher()
        elif self._ready:
            self._spawn()

    def _spawn(self) -> None:
        if self._wanted is None or self._launcher is None:
            return
        (generation, restarts), self._wanted = self._wanted, None
        self._generation = generation
        self._exceptions.clear()
        folder = self._generation_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if self._follower is not None:
            self._follower.close()
        port = free_port()
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
            )
            self._launcher.send(Spawn(rank, env, str(out), str(err)))

    def _generation_folder(self) -> Path:
        return self._folder / f"g{self._generation:06d}"

    def raised(self, rank: int, generation: int, exception: RaisedException) -> None:
        """Remember what a rank says of its end, until the end itself is seen."""
        if generation == self._generation:
            self._exceptions[rank] = exception

    def kill(self, number: int) -> None:
        """Send a signal to every rank's process group; ranks that are not started yet stay so."""
        self._wanted = None
        if self._launcher is not None:
            self._launcher.send(Kill(number))

    def pump(self) -> None:
        """Pass on what ranks have printed."""
        if self._follower is not None:
            self._follower.pump()

    # --- what the launcher says -------------------------------------------------------------------------------

    def _received(self, message: Message) -> None:
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
                self._living[message.rank] = message.pid
                self._feed(e.RankSpawned(message.rank, message.pid))
            case SpawnFailed():
                self._feed(e.SetupFailed(from_json(message.error)))
            case Exited():
                # A rank's own account of its end may lie in its socket, to be read in this turn of the loop.
                asyncio.get_running_loop().call_soon(self._exited, message)

    def _exited(self, message: Exited) -> None:
        self._living.pop(message.rank, None)
        _, err = output_paths(self._generation_folder(), message.rank)
        end = RankExit(
            message.rank,
            message.pid,
            message.returncode,
            message.at_s,
            exception=self._exceptions.get(message.rank),
            last_lines=last_lines(err) if message.returncode else (),
        )
        self._feed(e.RankExited(end.rank, end.pid, self._plugins.evidence(end), end.last_lines))

    def _launcher_exited(self, returncode: int) -> None:
        self._launcher = None
        if self._closing:
            return
        for pid in self._living.values():
            _kill_group(pid)
        self._living.clear()
        if not self._ready and not self._proven:
            self._feed(e.SetupFailed(self._launcher_failure(returncode)))
            return
        self._ready = False
        how = signal.Signals(-returncode).name if returncode < 0 else f"exit code {returncode}"
        evidence = Evidence("exit", "launcher", None, 1.0, f"the launcher ended with {how}", time.monotonic())
        self._feed(e.LauncherExited(evidence))

    def _launcher_failure(self, returncode: int) -> CkptdError:
        log = self._folder / "launcher.log"
        said = " / ".join(last_lines(log, 2)) or "nothing"
        return JobFailedError(
            f"the launcher ended with {returncode} before it was ready; it said: {said}", hint=f"see {log}"
        )

    async def close(self) -> None:
        """End every process of the job and pass on the last of what they printed."""
        self._closing = True
        if self._launcher is not None:
            await self._launcher.close()
        if self._follower is not None:
            self._follower.close()


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
