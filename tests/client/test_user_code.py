"""What users' code, and machines, do to a rank in the midst of things: training does not break by it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never

import pytest

import ckptd
from ckptd.client import run as run_module
from ckptd.errors import AgentError
from ckptd.protocol import messages as m
from tests.client.fake_agent import Answer, FakeAgent
from tests.client.fake_framework import FAULTS
from tests.client.harness import announce, fail, unprotected
from tests.daemon.harness import Node, PuppetError

CLOSE_ALL_OF_OURS = """
for number in os.listdir('/proc/self/fd'):
    with contextlib.suppress(OSError):
        if os.readlink(f'/proc/self/fd/{number}').startswith(('socket:', '/memfd:')):
            os.close(int(number))
"""


@pytest.fixture
def run(agent: FakeAgent) -> run_module.Run:
    """A run that has finished its first step."""
    run = ckptd.attach(data=bytearray(4))
    run.step()
    return run


@contextlib.contextmanager
def deaf(how: str) -> Iterator[None]:
    """Have a stderr that takes nothing."""
    full = Path("/dev/full").open("w")
    if how == "closed":
        full.close()
    before, sys.stderr = sys.stderr, full
    try:
        yield
    finally:
        sys.stderr = before
        with contextlib.suppress(OSError):
            full.close()


@pytest.mark.parametrize("how", ["closed", "full"])
def test_a_stderr_that_takes_nothing(agent: FakeAgent, run: run_module.Run, how: str) -> None:
    """What ckptd has to say is lost where stderr is closed, or its disk is full; training is not told of that."""
    FAULTS["write"] = fail(RuntimeError("mine"))
    with deaf(how):
        for _ in range(3):
            announce(agent, run)
    assert not run.protected


class OddError(Exception):
    """An error of a user's, whose text can't be made."""

    def __str__(self) -> Never:
        raise KeyError("odd")


def test_an_error_without_text_is_told_like_any_other(
    agent: FakeAgent, run: run_module.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The agent learns that the step was missed, and the next one is captured."""
    FAULTS["prepare"] = fail(OddError())
    announce(agent, run)
    assert agent.wait_for(m.Missed).step == run._step
    assert "a capture failed: OddError: its text can't be read (KeyError)" in capsys.readouterr().err
    FAULTS.clear()
    announce(agent, run)
    assert agent.wait_for(m.Seal).step == run._step


def test_a_handler_that_finds_the_agent_gone_in_the_midst_of_a_step(
    agent: FakeAgent, run: run_module.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's handler, or another thread, may let go of the agent between any two instructions of a step."""
    clock = run_module.monotonic_ns

    def interrupted() -> int:
        agent.hang_up()
        while run.protected:
            run.checkpoint()
        return clock()

    monkeypatch.setattr(run_module, "monotonic_ns", interrupted)
    run.step()
    assert run._step == 2


def test_more_is_reported_while_a_capture_reads_what_was(agent: FakeAgent, run: run_module.Run) -> None:
    """Another thread, or a number's own code, may report something new while the manifest's values are read."""

    class Number:
        def __float__(self) -> float:
            run.report(**{f"number {len(run._values)}": 1.0})
            return 2.0

    run.report(number=Number())
    announce(agent, run)
    assert agent.wait_for(m.Seal).values == {"number": 2.0}


def test_an_answer_that_a_handler_did_not_wait_for(
    agent: FakeAgent, run: run_module.Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer whose request was given up is not taken for that of the next one."""

    def interrupt() -> Answer:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        return None

    def handler(*_: object) -> Never:
        raise OddError

    before = signal.signal(signal.SIGALRM, handler)
    agent.answers[m.Reserve] = interrupt
    run.state["data"].extend(bytes(1000))
    try:
        announce(agent, run)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not run.protected
    assert "the connection to the agent is lost" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["\udcff", 5, None])
def test_sections_that_are_called_oddly(agent: FakeAgent, run: run_module.Run, name: Any) -> None:
    """No name and no deadline of a section breaks training or ends its protection, however often it is said."""
    for _ in range(5):
        with run.section(name, "soon"):
            run.step()
    assert run.protected
    with ckptd.client.run.Run().section(name):
        pass


def test_reports_that_can_not_be_read(agent: FakeAgent) -> None:
    """A value whose own code fails costs neither training nor its protection."""

    class Number:
        def __float__(self) -> Never:
            raise OddError

    agent.answers[m.Join] = lambda: m.Admitted(1, numbers={"metric": "loss", "skipped": []})
    run = ckptd.attach(data=bytearray(4))
    for _ in range(5):
        run.report(loss=Number())
        run.step()
    assert run.protected
    announce(agent, run)
    assert agent.wait_for(m.Seal).values == {}


def test_a_machine_without_a_place_for_an_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no agent can be started because no folder can be made, training runs unprotected; strictly it is told."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CKPTD_HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("CKPTD_SOCKET", str(tmp_path / "file" / "home" / "s"))
    ckptd.attach(data=bytearray(4)).step()
    unprotected(capsys, "no agent can be started: [Errno 20] Not a directory")
    with pytest.raises(AgentError, match="no agent can be started"):
        ckptd.attach(data=bytearray(4), strict=True)


def test_slots_that_are_too_large_for_the_address_space(node: Node) -> None:
    """Under `ulimit -v` a rank is refused as for any lack of memory, with a hint, before its first step."""
    node.agent_process()
    puppet = node.puppet()
    limit = "import resource; used = int(open('/proc/self/statm').read().split()[0]) * 4096"
    puppet.do(f"{limit}\nresource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), -1))")
    with pytest.raises(PuppetError, match="can't be mapped: Cannot allocate memory") as caught:
        puppet.attach(30 << 20)
    assert caught.value.kind == "MemoryBudgetError"


def test_a_rank_that_closes_all_descriptors(node: Node) -> None:
    """User code that closes what it finds open costs protection, and not the training."""
    puppet = node.puppet()
    puppet.attach()
    puppet.train(3)
    puppet.do(f"import contextlib\n{CLOSE_ALL_OF_OURS}")
    assert puppet.train(300, 0.001) == 303
    assert puppet.do("result = run.protected") is False
    puppet.do("run.close()")
    assert puppet.said.count("UNPROTECTED") == 1
