"""The processes of a job that was taken over: launchers that come late or are of another version."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from ckptd.config import JobConfig
from ckptd.core import events as e
from ckptd.core.handover import Handover
from ckptd.daemon.adopting import Legacy
from ckptd.daemon.connection import Connection
from ckptd.daemon.exits import Exits
from ckptd.daemon.launcher import LauncherProcess, how_it_ended
from ckptd.daemon.living import boot_id, started
from ckptd.daemon.processes import Processes
from ckptd.daemon.ranks import Terms
from ckptd.errors import FencedError, ProtocolError
from ckptd.journal import Life
from ckptd.plugin.manager import PluginManager
from ckptd.protocol.channel import Channel
from ckptd.protocol.messages import Adopted, Returned, Spawn
from ckptd.store_config import read_stores
from tests.daemon.harness import eventually, open_descriptors
from tests.waiting import PATIENCE_S


@contextmanager
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a group of its own."""
    process = subprocess.Popen(["sleep", "600"], process_group=0)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Job:
    """The processes of a job of one rank; `fed` is what its machine is told."""

    def __init__(self, folder: Path) -> None:
        self.fed: list[e.Input] = []
        self.exits = Exits(lambda _: None)
        self.processes = Processes(
            JobConfig("job", ("train.py",), read_stores(str(folder), 3), python=sys.executable, cwd=str(folder)),
            Terms("this run", 60.0),
            folder,
            socket="nowhere",
            plugins=PluginManager(lambda *_: None),
            exits=self.exits,
            logger=structlog.get_logger(),
            foreground=False,
        )

    def adopt(self, launcher: int, rank: int) -> None:
        """Take it over from the journal, in generation 1."""
        life = Life(True, boot_id(), launcher, started(launcher), "this run", {"0": started(rank)})
        self.processes.adopt(self.fed.append, Legacy(life, Handover("running", 1, pids={0: rank})))


def play(scene: Callable[..., Any], folder: Path) -> None:
    """Run a scene with a launcher and a rank of flesh and blood; no descriptor may be left."""

    async def run() -> None:
        with ExitStack() as stack:
            launcher, rank = stack.enter_context(sleeping()), stack.enter_context(sleeping())
            async with asyncio.timeout(PATIENCE_S):
                taken = Job(folder)
                taken.adopt(launcher.pid, rank.pid)
                await scene(taken, launcher, rank)
                await taken.processes.close()
                taken.exits.close()

    before = open_descriptors()
    asyncio.run(run())
    assert open_descriptors() == before


def test_a_launcher_that_comes_after_its_ranks_have_ended(tmp_path: Path) -> None:
    """Ranks that were killed while their launcher was away stay dead, and it starts the next ones when it is back."""

    async def scene(taken: Job, launcher: Any, rank: Any) -> None:
        taken.processes.kill(signal.SIGKILL)
        await eventually(lambda: taken.fed)
        (ended,) = taken.fed
        assert isinstance(ended, e.RankExited)
        taken.processes.spawn(2, 1)
        ours, theirs = socket.socketpair()
        connection = Connection(ours, lambda *_: None, taken.processes.disconnected)
        said = Returned("job", "this run", launcher.pid, 1, [{"rank": 0, "pid": rank.pid}])
        taken.processes.returned(connection, launcher.pid, said)
        channel = Channel(theirs)
        heard = [await asyncio.to_thread(channel.receive, PATIENCE_S) for _ in range(2)]
        assert isinstance(heard[0], Adopted)
        assert isinstance(heard[1], Spawn)
        assert heard[1].env["CKPTD_GENERATION"] == "2"
        assert taken.fed == [ended], "the dead are no ranks of the next generation"
        channel.close()

    play(scene, tmp_path)


def test_a_launcher_of_another_version(tmp_path: Path) -> None:
    """One that can't be talked to is ended at once, and why is the cause of the job's beginning again."""

    async def scene(taken: Job, launcher: Any, rank: Any) -> None:
        error = ProtocolError("this client speaks protocol version 1, this side 2")
        taken.processes.foreign(os.getpid(), error)
        assert launcher.poll() is None
        taken.processes.foreign(launcher.pid, error)
        await eventually(lambda: taken.fed)
        assert launcher.wait() == -signal.SIGTERM
        (ended,) = taken.fed
        assert isinstance(ended, e.LauncherExited)
        assert ended.evidence.summary == f"the launcher could not be taken over: {error.message}"
        assert rank.poll() is None

    play(scene, tmp_path)


def test_a_launcher_that_ends_as_its_job_does(tmp_path: Path) -> None:
    """One that hangs up the moment it is told to end is ended all the same, and is no reason to crash."""

    async def scene(taken: Job, launcher: Any, rank: Any) -> None:
        ours, theirs = socket.socketpair()
        connection = Connection(ours, lambda *_: None, taken.processes.disconnected)
        said = Returned("job", "this run", launcher.pid, 1, [{"rank": 0, "pid": rank.pid}])
        taken.processes.returned(connection, launcher.pid, said)
        theirs.close()
        await taken.processes.close()
        assert launcher.wait() == -signal.SIGTERM

    play(scene, tmp_path)


@pytest.mark.parametrize(
    "ranks", [[], [{"rank": 0}], [{"pid": 1}], [{"rank": 1, "pid": 1}], [{"rank": 0, "pid": 2**40}]]
)
def test_a_launcher_with_other_ranks(tmp_path: Path, ranks: list[dict[str, int]]) -> None:
    """One that comes back and does not name each rank of the generation is turned away."""

    async def scene(taken: Job, launcher: Any, _: Any) -> None:
        ours, theirs = socket.socketpair()
        connection = Connection(ours, lambda *_: None, taken.processes.disconnected)
        said = Returned("job", "this run", launcher.pid, 1, ranks)
        with pytest.raises(FencedError, match="has not all ranks of generation 1"):
            taken.processes.returned(connection, launcher.pid, said)
        connection.close()
        theirs.close()

    play(scene, tmp_path)


def test_a_launcher_that_has_just_ended(tmp_path: Path) -> None:
    """From the moment its end is seen it gets no signal: its descriptor may be one of another process already."""

    async def scene(_: Job, launcher: Any, __: Any) -> None:
        with sleeping() as process:
            ended: list[int | None] = []
            watched = LauncherProcess(process.pid, os.pidfd_open(process.pid), process, ended.append)
            process.kill()
            while not ended:  # each turn of the loop, and so also that between the two halves of its end
                watched.signal(0)
                await asyncio.sleep(0)
            assert ended == [-signal.SIGKILL]

    play(scene, tmp_path)


def test_how_a_launcher_ended() -> None:
    """What ended it is named, also by a signal that has no name."""
    assert how_it_ended(-signal.SIGTERM) == "the launcher ended with SIGTERM"
    assert how_it_ended(-(signal.SIGRTMIN + 1)) == f"the launcher ended with signal {signal.SIGRTMIN + 1}"
    assert how_it_ended(3) == "the launcher ended with exit code 3"


def test_no_room_for_what_ranks_print(tmp_path: Path) -> None:
    """Ranks whose output has no folder are not started, and the job is told why."""

    async def scene(taken: Job, launcher: Any, _: Any) -> None:
        (tmp_path / "g000002").write_text("no folder")
        taken.processes.spawn(2, 1)
        ours, theirs = socket.socketpair()
        connection = Connection(ours, lambda *_: None, taken.processes.disconnected)
        ranks = [{"rank": 0, "pid": taken.processes._known[0]}]
        taken.processes.returned(connection, launcher.pid, Returned("job", "this run", launcher.pid, 1, ranks))
        (failed,) = taken.fed
        assert isinstance(failed, e.SetupFailed)
        assert failed.error.message == f"can't start ranks, with their output in {tmp_path}/g000002: File exists"
        theirs.close()

    play(scene, tmp_path)


@pytest.mark.parametrize(("number", "outcome"), [(signal.SIGKILL, e.LauncherExited), (signal.SIGABRT, e.SetupFailed)])
def test_a_first_launcher_that_is_killed(tmp_path: Path, number: int, outcome: type[e.Input]) -> None:
    """One that is killed before it was ready is an accident, after which the job begins again; a crash is its end."""

    async def run() -> None:
        job = Job(tmp_path)
        async with asyncio.timeout(PATIENCE_S):
            job.processes.start(job.fed.append)
            os.kill(job.processes.launcher[0], number)
            await eventually(lambda: job.fed)
            (found,) = job.fed
            assert isinstance(found, outcome)
            await job.processes.close()
            job.exits.close()

    before = open_descriptors()
    asyncio.run(run())
    assert open_descriptors() == before
