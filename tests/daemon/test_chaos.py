"""Harm on purpose to ranks that somebody else has started, and to nobody who does not allow it."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import psutil
import pytest

from ckptd.core.policy.chaos import Fault
from ckptd.daemon.chaos import inflict
from ckptd.errors import AgentError, ConfigError
from ckptd.protocol.page import Word
from tests.daemon.harness import AgentThread, Node, Puppet, PuppetError, until

_ALLOWED = {"CKPTD_ALLOW_CHAOS": "1", "CKPTD_EVERY": "1h"}


@pytest.fixture
def rank(node: Node, agent: AgentThread) -> Puppet:
    """A rank that trains, in a job that allows chaos."""
    rank = node.puppet(**_ALLOWED)
    rank.attach()
    rank.train(3)
    until(lambda: agent.status()["state"] == "running" and agent.status()["step"] == 3, "the job's training")
    return rank


def do(agent: AgentThread, fault: Fault) -> dict[str, object]:
    """Do a fault to the job."""
    return agent.wait(inflict(agent.job(), fault, foreground=False))


def test_a_job_of_no_such_setting_is_refused(node: Node, agent: AgentThread) -> None:
    """Nothing is done to a rank whose job does not say that it may, whatever the fault."""
    rank = node.puppet()
    rank.attach()
    rank.train(3)
    for fault in (Fault("kill", (0,)), Fault("exception", (0,)), Fault("full-disk"), Fault("agent")):
        with pytest.raises(ConfigError, match="does not allow chaos"):
            do(agent, fault)
    rank.train(3)
    assert agent.status()["generation"] == 1


def test_an_attached_rank_is_killed_and_stopped(agent: AgentThread, rank: Puppet) -> None:
    """Signals reach the process that has attached, and the agent sees the death as that of any rank."""
    assert do(agent, Fault("stop", (0,)))["what"] == "SIGSTOP to rank 0"
    process = psutil.Process(rank.pid)
    until(lambda: process.status() == psutil.STATUS_STOPPED, "the stop")
    os.kill(rank.pid, signal.SIGCONT)
    answer = do(agent, Fault("kill", (0,), signal=signal.SIGTERM))
    assert (answer["what"], answer["step"], answer["generation"]) == ("SIGTERM to rank 0", 3, 1)
    rank.process.wait(60)
    assert rank.process.returncode == -signal.SIGTERM


def test_a_signal_without_a_name(agent: AgentThread, rank: Puppet) -> None:
    """Most real-time signals have only a number, and end a rank like any other."""
    number = signal.SIGRTMIN + 1
    assert do(agent, Fault("kill", (0,), signal=number))["what"] == f"signal {number} to rank 0"
    rank.process.wait(60)
    assert rank.process.returncode == -number


@pytest.mark.parametrize("lasts", [{"for_s": 1e300}, {"pause_s": -1.0}, {"step": 2**64}, {"step": -1}])
def test_a_fault_that_no_page_has_room_for(lasts: dict[str, Any]) -> None:
    """How long, how slow and when is bounded: it has to be written to a word of the control page."""
    with pytest.raises(ConfigError):
        Fault("slow", (0,), **lasts)


def test_a_fault_waits_for_its_step(agent: AgentThread, rank: Puppet) -> None:
    """A kill at a step comes when the rank has finished it, and not before."""
    waiting = asyncio.run_coroutine_threadsafe(
        inflict(agent.job(), Fault("kill", (0,), step=10), foreground=False), agent._loop
    )
    rank.train(4)
    assert not waiting.done()
    assert rank.process.poll() is None
    rank.start("train(10**6, 0.001)")
    assert waiting.result(60)["step"] >= 10
    rank.process.wait(60)


def test_an_exception_is_raised_by_the_step(agent: AgentThread, rank: Puppet) -> None:
    """`run.step()` raises in the rank once its page says so, and the agent knows when it was done."""
    waiting = asyncio.run_coroutine_threadsafe(
        inflict(agent.job(), Fault("exception", (0,), step=5), foreground=False), agent._loop
    )
    until(lambda: agent.job().attendance.admitted[0].page.words[Word.HARM], "the order")
    with pytest.raises(PuppetError, match="ChaosError: asked for by ckptctl chaos after step 5"):
        rank.train(10)
    assert waiting.result(60)["what"] == "exception in rank 0"


def test_there_has_to_be_a_tensor(agent: AgentThread, rank: Puppet) -> None:
    """A rank without anything that could be NaN says so, and trains on."""
    waiting = asyncio.run_coroutine_threadsafe(inflict(agent.job(), Fault("nan", (0,)), foreground=False), agent._loop)
    until(lambda: agent.job().attendance.admitted[0].page.words[Word.HARM], "the order")
    rank.train(5)
    with pytest.raises(AgentError, match="could not do nan: it has no float tensor"):
        waiting.result(60)
    rank.train(5)


def test_what_an_attached_job_can_not_suffer(agent: AgentThread, rank: Puppet) -> None:
    """Its launcher is a stranger, ranks that it does not have can't be hit, and signals have to exist."""
    with pytest.raises(ConfigError, match="a launcher of its own"):
        do(agent, Fault("launcher"))
    with pytest.raises(ConfigError, match="has no rank 1"):
        do(agent, Fault("kill", (1,)))
    with pytest.raises(ConfigError, match="there is no signal 99"):
        do(agent, Fault("kill", (0,), signal=99))
    rank.do("run.close()")
    rank.end()
    until(lambda: agent.status()["state"] == "finished", "the end of the job")
    with pytest.raises(AgentError, match="has ended before"):
        do(agent, Fault("kill", (0,)))
