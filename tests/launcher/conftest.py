"""A small agent for the launcher's tests: real processes, the real messages, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from ckptd.errors import AgentError
from ckptd.launcher.command import Belonging, launcher_argv
from ckptd.launcher.environment import free_port, rank_env
from ckptd.protocol import messages
from ckptd.protocol.channel import Channel

Kind = TypeVar("Kind", bound=messages.Message)
DEADLINE_S = 120.0
"""Generous: three imports of torch, one after another, may take a minute on a busy machine."""


def wait_until(fact: Callable[[], object], meaning: str) -> None:
    """Wait for a fact, and fail with its meaning when it doesn't come about."""
    end_s = time.monotonic() + DEADLINE_S
    while not fact():
        assert time.monotonic() < end_s, f"waited in vain until {meaning}"
        time.sleep(0.01)


def process_lives(pid: int) -> bool:
    """Whether a process runs; a zombie that only waits for its parent's glance does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(b")") + 2 :][:1] not in (b"Z", b"X")


@dataclass
class RankResult:
    """How one rank ended, and what it wrote."""

    pid: int
    returncode: int
    stdout: str
    stderr: str


class Agent:
    """Plays the agent of one launcher."""

    def __init__(
        self,
        folder: Path,
        command: Sequence[str],
        *,
        preload: Sequence[str],
        belongs: Belonging | None,
        cwd: Path,
        env: Mapping[str, str],
    ) -> None:
        self.folder = folder
        self._waits = belongs is not None
        self.pids: dict[int, int] = {}
        self.strangers: list[int] = []
        self.inbox: list[messages.Message] = []
        self.heard: list[messages.Message] = []
        mine, theirs = socket.socketpair()
        self.channel = Channel(mine)
        argv = launcher_argv(
            python=sys.executable,
            control_fd=theirs.fileno(),
            command=command,
            preload=preload,
            belongs=belongs,
        )
        with theirs, (folder / "launcher.out").open("wb") as out, (folder / "launcher.err").open("wb") as err:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=env,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def expect(self, kind: type[Kind]) -> Kind:
        """Return the next message of a kind; others wait in the inbox."""
        for message in self.inbox:
            if isinstance(message, kind):
                self.inbox.remove(message)
                return message
        while True:
            try:
                message = self.channel.receive(DEADLINE_S)
            except AgentError as error:
                pytest.fail(f"no {kind.__name__}: {error}; {self.story()}")
            self.heard.append(message)
            if isinstance(message, kind):
                return message
            self.inbox.append(message)

    def order(self, rank: int, env: Mapping[str, str] | None = None) -> None:
        """Ask for a rank without waiting for anything."""
        stdout, stderr = (str(self.folder / f"{rank}.{name}") for name in ("out", "err"))
        self.channel.send(messages.Spawn(rank, dict(env or {}), stdout, stderr), DEADLINE_S)

    def spawn(self, rank: int, env: Mapping[str, str] | None = None) -> int:
        """Start a rank and return its process number."""
        self.order(rank, env)
        spawned = self.expect(messages.Spawned)
        assert spawned.rank == rank
        self.pids[rank] = spawned.pid
        return spawned.pid

    def wait(self, count: int = 1) -> dict[int, RankResult]:
        """Return how the next `count` ranks ended."""
        results = {}
        for _ in range(count):
            ended = self.expect(messages.Exited)
            results[ended.rank] = RankResult(
                ended.pid, ended.returncode, self.output(ended.rank, "out"), self.output(ended.rank, "err")
            )
        return results

    def run(self, *envs: Mapping[str, str]) -> list[RankResult]:
        """Run one rank for each environment, all at once, and return how they ended."""
        for rank, env in enumerate(envs):
            self.spawn(rank, env)
        results = self.wait(len(envs))
        return [results[rank] for rank in range(len(envs))]

    def kill(self, number: int) -> None:
        """Ask the launcher to send a signal to all ranks."""
        self.channel.send(messages.Kill(number), DEADLINE_S)

    def output(self, rank: int, name: str) -> str:
        """Return what a rank has written so far."""
        return (self.folder / f"{rank}.{name}").read_text(errors="backslashreplace")

    def complaints(self) -> str:
        """Return what the launcher itself wrote to stderr."""
        return (self.folder / "launcher.err").read_text()

    def story(self) -> str:
        """Return all that is known of the launcher and its ranks: a failure under load may not come a second time."""
        files = [path for path in sorted(self.folder.iterdir()) if path.stat().st_size]
        return "\n".join([
            f"what happened; the launcher's exit code is {self.process.poll()}",
            *map(str, self.heard),
            *(f"--- {path.name}:\n{path.read_text(errors='backslashreplace')}" for path in files),
        ])  # fmt: skip

    def close(self) -> None:
        """End the launcher as an agent does that goes away; kill by number whatever a broken one has left."""
        self.channel.close()
        if self._waits:
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(DEADLINE_S)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in [*self.pids.values(), *self.strangers]:
            with suppress(ProcessLookupError, FileNotFoundError):
                # A number is only ours while TEST_MARK is in that process's environment.
                if os.fsencode(self.folder.parent) in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)


class AgentSocket:
    """The socket at which ranks report exceptions: welcomes each and keeps what it says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.heard: list[messages.Message] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                stream, _ = self._listener.accept()
            except OSError:
                return
            channel = Channel(stream)
            with suppress(AgentError):
                self.heard.append(channel.receive(DEADLINE_S))
                channel.send(messages.Welcome(os.getpid(), []), DEADLINE_S)
                self.heard.append(channel.receive(DEADLINE_S))
            channel.close()

    def close(self) -> None:
        """Stop listening."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


StartAgent = Callable[..., Agent]


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A folder on the job's PYTHONPATH, for modules that a test makes up."""
    folder = tmp_path / "modules"
    folder.mkdir()
    return folder


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Write a script, by default work/train.py, and return its path."""

    def write(text: str, name: str = "train.py") -> Path:
        path = tmp_path / "work" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        return path

    return write


@pytest.fixture
def start(tmp_path: Path, modules: Path) -> Iterator[StartAgent]:
    """Start launchers; each is ended after the test, and its folder holds its ranks' output."""
    agents: list[Agent] = []

    def begin(
        command: Sequence[str],
        *,
        preload: Sequence[str] = ("json",),
        belongs: Belonging | None = None,
        cwd: Path | None = None,
        **env: str,
    ) -> Agent:
        folder = tmp_path / f"agent{len(agents)}"
        folder.mkdir()
        work = cwd or tmp_path / "work"
        work.mkdir(exist_ok=True)
        environ = {**os.environ, "PYTHONPATH": str(modules), "TEST_MARK": str(tmp_path), **env}
        agent = Agent(folder, command, preload=preload, belongs=belongs, cwd=work, env=environ)
        agents.append(agent)
        return agent

    yield begin
    for agent in agents:
        agent.close()


@pytest.fixture
def agent_socket(tmp_path: Path) -> Iterator[AgentSocket]:
    """The socket that a rank's CKPTD_SOCKET names."""
    listening = AgentSocket(tmp_path / "ckptd.sock")
    yield listening
    listening.close()


@pytest.fixture
def until() -> Callable[[Callable[[], object], str], None]:
    """`wait_until`, for tests, which can't import this file."""
    return wait_until


@pytest.fixture
def lives() -> Callable[[int], bool]:
    """`process_lives`, likewise."""
    return process_lives


@pytest.fixture
def envs_of() -> Callable[..., list[dict[str, str]]]:
    """Return the environments of all ranks of one generation, on a port of its own."""

    def compose(world_size: int, *, socket_path: Path | str = "", generation: int = 1) -> list[dict[str, str]]:
        port = free_port()
        return [
            rank_env(
                job="gpt",
                socket_path=str(socket_path),
                rank=rank,
                local_rank=rank,
                world_size=world_size,
                local_world_size=world_size,
                master_addr="127.0.0.1",
                master_port=port,
                generation=generation,
                restarts=generation - 1,
                max_restarts=3,
            )
            for rank in range(world_size)
        ]

    return compose
