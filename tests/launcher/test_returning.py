"""How a launcher that has lost its agent keeps its ranks, and comes back to the next one."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ckptd.errors import CkptdError, FencedError, NotFoundError
from ckptd.launcher.command import Belonging
from ckptd.protocol import messages as m
from ckptd.protocol.channel import Channel

DEADLINE_S = 60.0
TRAIN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("asked to end", flush=True), os._exit(7)))
print("trains", flush=True)
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.01)
os._exit(5)
"""


class NextAgent:
    """The agent that comes after: answers each launcher that dials as it is told to."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(DEADLINE_S)
        self._channels: list[Channel] = []

    def meet(self, refusal: CkptdError | None = None) -> tuple[Channel, m.Returned]:
        """Wait for a launcher to come, and take it over, or turn it away."""
        channel = Channel(self._listener.accept()[0])
        self._channels.append(channel)
        hello = channel.receive(DEADLINE_S)
        assert isinstance(hello, m.Hello)
        assert hello.role == "launcher"
        returned = channel.receive(DEADLINE_S)
        assert isinstance(returned, m.Returned)
        channel.send(m.Welcome(os.getpid(), []), DEADLINE_S)
        channel.send(m.Adopted() if refusal is None else m.Refused(refusal.to_json()), DEADLINE_S)
        return channel, returned

    def close(self) -> None:
        """Be gone."""
        self._listener.close()
        for channel in self._channels:
            channel.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where agents listen."""
    return tmp_path / "next.sock"


@pytest.fixture
def next_agent(place: Path) -> Iterator[NextAgent]:
    """The agent that comes after, which listens already."""
    agent = NextAgent(place)
    yield agent
    agent.close()


@pytest.fixture
def lost(start, script, place, tmp_path, until):
    """Return what starts a launcher with two ranks that train, and takes its agent away."""

    def begin(wait_s: float = 600.0):
        belongs = Belonging("gpt", "abc", str(place), wait_s)
        agent = start([str(script(TRAIN))], belongs=belongs)
        for rank in (0, 1):
            agent.spawn(rank, {"GO": str(tmp_path / f"go{rank}"), "CKPTD_GENERATION": "3"})
        until(lambda: all(agent.output(rank, "out") for rank in (0, 1)), "both ranks train")
        agent.channel.close()
        return agent

    return begin


def test_the_next_agent_learns_of_all_ranks(lost, place, tmp_path, until, lives):
    """Ranks train on without an agent; the next one is told who they are and how those ended that have."""
    agent = lost()
    (tmp_path / "go0").touch()
    until(lambda: not lives(agent.pids[0]), "rank 0 ends")
    assert lives(agent.pids[1])
    after = NextAgent(place)
    channel, returned = after.meet()
    assert (returned.job, returned.incarnation, returned.generation) == ("gpt", "abc", 3)
    assert returned.pid == agent.process.pid
    assert returned.ranks == [{"rank": rank, "pid": agent.pids[rank]} for rank in (0, 1)]
    ended = channel.receive(DEADLINE_S)
    assert isinstance(ended, m.Exited)
    assert (ended.rank, ended.pid, ended.returncode) == (0, agent.pids[0], 5)
    channel.send(m.Kill(signal.SIGKILL), DEADLINE_S)
    ended = channel.receive(DEADLINE_S)
    assert isinstance(ended, m.Exited)
    assert (ended.rank, ended.returncode) == (1, -signal.SIGKILL)
    channel.send(m.Spawn(0, {"GO": str(tmp_path / "go0"), "CKPTD_GENERATION": "4"}, *paths(tmp_path)), DEADLINE_S)
    assert isinstance(channel.receive(DEADLINE_S), m.Spawned)
    ended = channel.receive(DEADLINE_S)
    assert isinstance(ended, m.Exited)
    assert ended.returncode == 5
    channel.send(m.Dissolve(), DEADLINE_S)
    assert agent.process.wait(DEADLINE_S) == 0
    after.close()


def paths(folder: Path) -> tuple[str, str]:
    """Return where a rank's output goes."""
    return str(folder / "later.out"), str(folder / "later.err")


def test_one_agent_after_the_other(lost, next_agent, lives):
    """An agent that does not have the job yet is asked again, and one that is lost as well is followed by another."""
    agent = lost()
    next_agent.meet(NotFoundError("this agent has no job gpt"))
    channel, _ = next_agent.meet()
    channel.close()
    _, returned = next_agent.meet()
    assert len(returned.ranks) == 2
    assert all(lives(pid) for pid in agent.pids.values())
    assert agent.complaints() == "ckptd: launcher: not taken over yet: this agent has no job gpt\n"


def test_a_job_that_goes_on_without_it(lost, next_agent, lives):
    """A launcher that is turned away for good ends its ranks and itself at once."""
    agent = lost()
    next_agent.meet(FencedError("job gpt goes on without this launcher"))
    assert agent.process.wait(DEADLINE_S) == 0
    assert not any(lives(pid) for pid in agent.pids.values())


def test_nobody_comes(lost, lives):
    """After its wait a launcher ends its ranks, by SIGTERM first, and then itself."""
    agent = lost(wait_s=0.5)
    assert agent.process.wait(DEADLINE_S) == 0
    assert [agent.output(rank, "out") for rank in (0, 1)] == ["trains\nasked to end\n"] * 2
    assert not any(lives(pid) for pid in agent.pids.values())


def test_a_stranger_at_the_agents_place(lost, place, lives):
    """Whoever listens there and is no agent is left alone after a while, and costs no rank its life."""
    agent = lost()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        listener.settimeout(DEADLINE_S)
        stream, _ = listener.accept()
        stream.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        again, _ = listener.accept()
        for each in (stream, again):
            each.close()
    assert all(lives(pid) for pid in agent.pids.values())


def test_sigterm_while_it_looks(lost, lives):
    """A launcher that is told to end while it has no agent ends its ranks."""
    agent = lost()
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(DEADLINE_S) == 0
    assert not any(lives(pid) for pid in agent.pids.values())


def test_a_launcher_without_ranks_waits_as_well(start, script, place, tmp_path):
    """What it had to tell of ranks that have ended would be lost with it."""
    (tmp_path / "go").touch()
    agent = start([str(script(TRAIN))], belongs=Belonging("gpt", "abc", str(place), 600.0))
    agent.order(0, {"GO": str(tmp_path / "go"), "CKPTD_GENERATION": "1"})
    agent.expect(m.Exited)
    agent.channel.close()
    after = NextAgent(place)
    channel, _ = after.meet()
    ended = channel.receive(DEADLINE_S)
    assert isinstance(ended, m.Exited)
    with suppress(OSError):
        channel.send(m.Dissolve(), DEADLINE_S)
    assert agent.process.wait(DEADLINE_S) == 0
    after.close()
