"""Real agents and real ranks without torch: an agent in a thread of the test, ranks as puppets on pipes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import structlog

import ckptd.daemon.agent as agent_module
from ckptd.config import AgentConfig
from ckptd.core.events import StopWanted
from ckptd.daemon.agent import Agent
from ckptd.daemon.supervisor import Supervisor
from ckptd.journal import Journal
from ckptd.log import set_up
from ckptd.plugin.manager import PluginManager
from ckptd.storage import manifest
from tests.daemon import bytes_framework
from tests.waiting import PATIENCE_S, until

Result = TypeVar("Result")
PUPPET = Path(__file__).with_name("puppet.py")
TRAIN = """
import time
from tests.daemon.bytes_framework import contents
def train(steps, pause=0.0):
    for _ in range(steps):
        data[:] = contents(run._step + 1, len(data))
        run.step()
        time.sleep(pause)
"""


async def eventually(condition: Callable[[], Any]) -> None:
    """Let the loop run until something is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - what a test waits for has no event
            await asyncio.sleep(0.001)


def open_descriptors() -> int:
    """Return how many descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def mapped_regions() -> int:
    """Return how many regions of an agent this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/memfd:ckptd-")


class PuppetError(Exception):
    """What a puppet's code raised."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["traceback"])
        self.kind: str = answer["kind"]
        self.code: str | None = answer["code"]
        self.message: str = answer["message"]


class Puppet:
    """A rank's process. `do` runs code there; `start` and `finish` are its two halves, for what has to wait."""

    def __init__(self, log: Path, env: dict[str, str]) -> None:
        self._log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(PUPPET)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
            )
        self.pid = self.process.pid

    def start(self, code: str) -> None:
        """Begin to run code."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def finish(self, patience_s: float = PATIENCE_S) -> Any:
        """Wait for the end of what was started, and return its `result`."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], patience_s)
        assert ready, f"the puppet did not answer within {patience_s:g} s; it said: {self.said}"
        line = self.process.stdout.readline()
        assert line, f"the puppet ended; it said: {self.said}"
        answer = json.loads(line)
        if "kind" in answer:
            raise PuppetError(answer)
        return answer["result"]

    def do(self, code: str, patience_s: float = PATIENCE_S) -> Any:
        """Run code in the rank and return its `result`; raises `PuppetError` for what it raises."""
        self.start(code)
        return self.finish(patience_s)

    def attach(self, size: int = 1000, **options: Any) -> Any:
        """Attach `data` of so many bytes; returns (generation, restored step, tier)."""
        self.start_attach(size, **options)
        return self.finish()

    def start_attach(self, size: int = 1000, **options: Any) -> None:
        """Begin to attach; a rank that does only what a test tells it is not hung when it does nothing."""
        options = {"hang": False, **options}
        self.start(
            f"{TRAIN}\ndata = bytearray({size})\nrun = ckptd.attach(data=data, **{options!r})\n"
            "result = [run.generation, run.restored and run.restored.step, run.restored and run.restored.tier]"
        )

    def train(self, steps: int, pause: float = 0.0) -> int:
        """Train some steps; returns the last one's number."""
        return int(self.do(f"train({steps}, {pause})\nresult = run._step"))

    def train_until(self, condition: Callable[[], Any], what: str) -> Any:
        """Train until something is true in the test."""
        return until(lambda: condition() or (self.train(1, 0.001) and condition()), what)

    def data(self) -> bytes:
        """Return what `data` holds."""
        return bytes.fromhex(self.do("result = bytes(data).hex()"))

    @property
    def said(self) -> str:
        """What it has printed to stderr."""
        return self._log.read_text()

    def kill(self) -> None:
        """End it by SIGKILL, and reap it."""
        self.process.kill()
        self._reap()

    def end(self) -> int:
        """End it the way a script ends, and return its exit code."""
        self._reap()
        return self.process.returncode

    def _reap(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.wait(PATIENCE_S)


class Node:
    """A folder with everything of one test's node: state, store, socket, puppets and agents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.socket = folder / "ckptd.sock"
        self.store = folder / "store"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "XDG_RUNTIME"))}
        self.env = {
            **inherited,
            **bytes_framework.install(folder / "site"),
            "CKPTD_HOME": str(self.home),
            "CKPTD_SOCKET": str(self.socket),
            "CKPTD_JOB": "job",
            "CKPTD_STORE": str(self.store),
            "CKPTD_EVERY": "100ms",
            "NODE_TAG": str(folder),
        }
        self.puppets: list[Puppet] = []
        self._agents: list[subprocess.Popen[bytes]] = []

    def puppet(self, rank: int = 0, world_size: int = 1, **env: str) -> Puppet:
        """Start a rank's process."""
        place = {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
        puppet = Puppet(self.folder / f"puppet-{len(self.puppets)}.txt", {**self.env, **place, **env})
        self.puppets.append(puppet)
        return puppet

    def attach(self, world_size: int, size: int = 1000, **options: Any) -> list[Puppet]:
        """Start all ranks and attach them; they wait for each other in no way but through the agent."""
        puppets = [self.puppet(rank, world_size) for rank in range(world_size)]
        for puppet in puppets:
            puppet.start_attach(size, **options)
        for puppet in puppets:
            puppet.finish()
        return puppets

    def agent_process(self, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        """Start an agent as a process of its own and wait until it listens."""
        with (self.folder / "agent.txt").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "ckptd.daemon", *arguments], env={**self.env, **env}, stdout=log, stderr=log
            )
        self._agents.append(process)
        until(lambda: self.socket.exists() or process.poll() is not None, "the agent's socket")
        assert process.poll() is None, self.agent_said
        return process

    @property
    def agent_said(self) -> str:
        """What agents with a process of their own have logged."""
        logs = [self.folder / "agent.txt", self.home / "agent.log"]
        return "".join(log.read_text() for log in logs if log.exists())

    def processes(self) -> list[psutil.Process]:
        """Return every process of this node that is alive, whoever its parent is."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("NODE_TAG") == str(self.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def agents(self) -> list[psutil.Process]:
        """Return the node's agent processes."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                if "ckptd.daemon" in process.cmdline():
                    found.append(process)
        return found

    def incidents(self, job: str = "job") -> list[dict[str, Any]]:
        """Return a job's incidents from the journal."""
        journal = Journal(self.home, read_only=True)
        try:
            return journal.read_incidents(job)
        finally:
            journal.close()

    def manifests(self, job: str = "job") -> list[Path]:
        """Return the manifests of a job's commits, oldest first."""
        return sorted((self.store / job).glob("g*/s*/manifest.json"))

    def stored(self, path: Path, rank: int = 0, name: str = "data") -> bytes:
        """Return the bytes of a rank's tensor as a manifest says where they lie."""
        (chunk,) = [
            chunk for chunk in manifest.parse(path.read_bytes(), str(path)).tensors[name].chunks if chunk.shard == rank
        ]
        return (path.parents[2] / chunk.file).read_bytes()[chunk.begin : chunk.end]

    def close(self) -> None:
        """End what still runs, then fail if anything but that was left."""
        for puppet in self.puppets:
            if puppet.process.poll() is None:
                os.kill(puppet.pid, signal.SIGCONT)
                puppet.process.kill()
            puppet.end()
        for process in self._agents:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise
        try:
            until(lambda: not self.processes(), "the end of every process of the node")
        finally:
            for left in self.processes():
                left.kill()


class AgentThread:
    """A real agent whose event loop runs in a thread of the test's process, on a node's socket."""

    def __init__(self, node: Node, **config: Any) -> None:
        self.failures: list[dict[str, Any]] = []
        """What went to the loop's exception handler: bugs. `close` fails if there is any."""
        self.grace_s = 60.0
        self._log = io.StringIO()
        self._config = AgentConfig(home=node.home, socket=node.socket, **config)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="agent")
        self._thread.start()
        assert self._ready.wait(PATIENCE_S)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        before = structlog.get_config()
        set_up("json", stream=self._log, debug=True)
        try:
            self.agent = Agent(self._config, foreground=False, on_agent_loss="end")
            self._loop.set_exception_handler(lambda _, context: self.failures.append(context))
            self._ready.set()
            await self._stop.wait()
            await self.agent.close(self.grace_s)
            await asyncio.sleep(0)
        finally:
            structlog.configure(**before)
            self._ready.set()

    def call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function in the agent's loop and return its result."""

        async def run() -> Result:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE_S)

    def wait(self, work: Any, patience_s: float = PATIENCE_S) -> Any:
        """Wait for a coroutine in the agent's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(patience_s)

    def job(self, name: str = "job") -> Supervisor:
        """Return a job."""
        return self.agent.jobs[name]

    def status(self, name: str = "job") -> dict[str, Any]:
        """Return a job's status, an empty one while there is no such job."""
        return self.call(lambda: self.agent.jobs[name].status() if name in self.agent.jobs else {"state": None})

    def committed(self, name: str = "job") -> int:
        """Return the last committed step, 0 when there is none."""
        last = self.status(name).get("last_committed")
        return int(last["step"]) if last else 0

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the log's lines of one event."""
        lines = [json.loads(line) for line in self._log.getvalue().splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def close(self) -> None:
        """Stop the agent; fails if a task or callback of it has failed."""
        if not self._thread.is_alive():
            return

        def stop() -> None:
            for job in self.agent.jobs.values():
                if not job.ended.done():
                    job.feed(StopWanted(0.1, checkpoint=False))
            self._stop.set()

        self._loop.call_soon_threadsafe(stop)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the agent did not stop"
        assert not self.failures, self.failures


def train_until(puppets: Sequence[Puppet], condition: Callable[[], object], what: str) -> None:
    """Train ranks in lock-step until something is true in the test."""

    def step() -> object:
        for puppet in puppets:
            puppet.start("train(1, 0.002)")
        for puppet in puppets:
            puppet.finish()
        return condition()

    until(step, what)


def use_bytes_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let agents in this process offer the adapter for plain bytes, and no other."""
    found = partial(PluginManager, found=bytes_framework.entry_points())
    monkeypatch.setattr(agent_module, "PluginManager", found)
