"""Captures: what they see, what they cost training when something is wrong, and when no more is tried."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

import ckptd
from ckptd.client.run import Run
from ckptd.errors import AgentError, MemoryBudgetError
from ckptd.protocol import messages as m
from ckptd.protocol.page import Phase, Word
from tests.client.fake_agent import FakeAgent
from tests.client.fake_framework import FAULTS, read
from tests.daemon.harness import mapped_regions

Attach = Callable[..., Run]


@pytest.fixture
def attach(agent: FakeAgent) -> Attach:
    """Attach some state and finish the first step, so that nothing but captures is to come."""

    def attach(strict: bool = False, **state: Any) -> Run:
        run = ckptd.attach(strict=strict, **(state or {"data": bytearray(b"data")}))
        run.step()
        agent.wait_for(m.Stepped)
        return run

    return attach


def capture(agent: FakeAgent, run: Run, ahead: int = 1) -> int:
    """Announce a step, do it, and return its number."""
    step = run._step + ahead
    agent.page.announce(step)
    for _ in range(ahead):
        run.step()
    return step


def captured(agent: FakeAgent, seal: m.Seal) -> dict[str, Any]:
    """Return the state that a sealed slot holds."""
    return read(agent.slots[seal.slot].contents)


def look(run: Run) -> None:
    """Have the next step look whether the agent is there."""
    run._look_ns, run._due_ns = 1, 0


def faulty(kind: type[BaseException], text: str = "no good") -> Callable[[], None]:
    """Return a function that raises."""

    def fail() -> None:
        raise kind(text)

    return fail


def test_a_capture_sees_the_state_of_its_step(agent: FakeAgent, attach: Attach) -> None:
    """Exactly the announced step is captured, with the objects as they are then, and the slot is sealed once."""
    data = bytearray(b"0000")
    run = attach(data=data, epoch=1)
    agent.page.announce(4)
    for step in run.steps(6):
        data[:] = b"%04d" % step
        run.state["epoch"] = step * 10
    seal = agent.wait_for(m.Seal)
    assert (seal.step, seal.final) == (4, False)
    assert captured(agent, seal) == {"data": b"0004", "epoch": 40}
    assert agent.held == {seal.slot}
    assert agent.page.phase is Phase.TRAINING


def test_state_that_is_reassigned(agent: FakeAgent, attach: Attach) -> None:
    """A value put into `run.state` is what the next capture sees, a new name included."""
    run = attach(data=bytearray(b"old"), epoch=1)
    run.state["data"] = bytearray(b"another")
    run.state["epoch"] += 1
    run.state["best"] = 0.5
    capture(agent, run)
    assert captured(agent, agent.wait_for(m.Seal)) == {"data": b"another", "epoch": 2, "best": 0.5}


def test_reported_values_travel_with_the_seal(agent: FakeAgent, attach: Attach) -> None:
    """The numbers reported last are in the message that seals, and nothing that is no number."""
    run = attach()
    run.report(loss=0.5, lr=1e-3, wrong=float("nan"), text="x")
    capture(agent, run)
    assert agent.wait_for(m.Seal).values == {"loss": 0.5, "lr": 1e-3}


def test_a_step_that_was_missed_is_told(agent: FakeAgent, attach: Attach) -> None:
    """A rank that is past an announced step says so once, with where it is, and captures the next one."""
    run = attach()
    for _ in range(5):
        run.step()
    agent.page.announce(4)
    run.step()
    run.step()
    assert agent.wait_for(m.Missed) == m.Missed(4, 7)
    step = capture(agent, run, ahead=3)
    assert agent.wait_for(m.Seal).step == step


def test_a_withdrawn_step_is_not_captured(agent: FakeAgent, attach: Attach) -> None:
    """A step whose announcement was withdrawn in time costs nothing and is no miss."""
    run = attach()
    agent.page.announce(10)
    run.step()
    agent.page.announce(None)
    for _ in range(12):
        run.step()
    step = capture(agent, run)
    assert agent.wait_for(m.Seal).step == step
    assert not agent.heard(m.Missed)


def test_busy_slots_skip_a_capture(agent: FakeAgent, attach: Attach) -> None:
    """With every slot sealed a capture is missed with the reason, at once; a released slot serves the next one."""
    run = attach()
    for _ in range(2):
        capture(agent, run)
    assert agent.held == {0, 1}
    step = capture(agent, run)
    missed = agent.wait_for(m.Missed)
    assert (missed.step, missed.at_step) == (step, step)
    assert missed.error is not None
    assert missed.error["message"] == "every slot is busy"
    agent.page.release(0)
    capture(agent, run)
    assert agent.wait_for(m.Seal, 3).slot == 0
    assert run.protected


def test_a_checkpoint_on_request(agent: FakeAgent, attach: Attach) -> None:
    """`run.checkpoint()` asks the agent and returns at once."""
    run = attach()
    run.checkpoint()
    assert agent.wait_for(m.Request) == m.Request(1)


def test_a_grown_state_gets_larger_slots(agent: FakeAgent, attach: Attach) -> None:
    """A state that outgrew its slots asks for larger ones within the capture, and the slot holds all of it."""
    data = bytearray(b"small")
    run = attach(data=data)
    data.extend(bytes(range(256)) * 8000)
    capture(agent, run)
    assert captured(agent, agent.wait_for(m.Seal)) == {"data": data}
    assert len(agent.heard(m.Reserve)) == 2


def test_a_first_step_that_makes_state_prepares_for_it(agent: FakeAgent) -> None:
    """What an optimizer makes in its first step gets slots right then, so that the first capture needn't wait."""
    data = bytearray(b"small")
    run = ckptd.attach(data=data)
    data.extend(bytes(3_000_000))
    run.step()
    assert len(agent.heard(m.Reserve)) == 2
    assert agent.heard(m.Reserve)[1].image_bytes > 3_000_000


# --- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["prepare", "write"])
@pytest.mark.parametrize("kind", [ckptd.CkptdError, ZeroDivisionError])
def test_a_fault_of_a_capture_is_told(agent: FakeAgent, attach: Attach, where: str, kind: type[Exception]) -> None:
    """Whatever a capture fails with reaches the agent, seals nothing, and the next capture finds its slots free."""
    run = attach()
    FAULTS[where] = faulty(kind)
    step = capture(agent, run)
    missed = agent.wait_for(m.Missed)
    assert (missed.step, missed.at_step) == (step, step)
    assert missed.error is not None
    assert missed.error["message"] == ("no good" if kind is ckptd.CkptdError else "ZeroDivisionError: no good")
    assert not agent.held
    FAULTS.clear()
    capture(agent, run)
    agent.wait_for(m.Seal)
    assert run.protected


@pytest.mark.parametrize("where", ["prepare", "write"])
def test_three_faults_in_a_row_end_the_trying(
    agent: FakeAgent, attach: Attach, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    """After three failed captures in a row, training goes on without any, says so once and lets go of the agent."""
    run = attach()
    FAULTS[where] = faulty(ZeroDivisionError)
    for _ in range(5):
        capture(agent, run)
    assert not run.protected
    assert list(run.steps(20))[-1] == 20
    run.checkpoint()
    run.close()
    said = capsys.readouterr().err
    assert said.count("a capture failed: ZeroDivisionError: no good") == 3
    assert said.count("UNPROTECTED") == 1
    agent.drain()
    assert len(agent.heard(m.Missed)) == 3
    assert not agent.heard(m.Leave)
    assert mapped_regions() == 3  # the agent's own: two slots and the page


def test_a_fault_before_the_seal_costs_no_slot(agent: FakeAgent, attach: Attach) -> None:
    """What fails when the image is there and not sealed yet costs that capture, and not the slot for ever."""
    run = attach()
    FAULTS["witness"] = faulty(LookupError)
    for _ in range(2):
        capture(agent, run)
    assert not agent.held
    FAULTS.clear()
    capture(agent, run)
    agent.wait_for(m.Seal)


def test_strict_raises_the_fault(agent: FakeAgent, attach: Attach) -> None:
    """With strict, a fault of a capture is raised by the step that met it, as it was."""
    run = attach(strict=True)
    FAULTS["write"] = faulty(ZeroDivisionError)
    with pytest.raises(ZeroDivisionError, match="no good"):
        capture(agent, run)


def test_ctrl_c_in_a_capture_passes(agent: FakeAgent, attach: Attach) -> None:
    """Ctrl-C that comes while a slot is written is not swallowed, and nothing is sealed."""
    run = attach()
    FAULTS["write"] = faulty(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        capture(agent, run)
    assert not agent.held
    assert not agent.heard(m.Seal)


def test_refused_slots_do_not_end_training(agent: FakeAgent, attach: Attach) -> None:
    """A state that grows beyond what the agent can lend costs its captures, not the training, in the agent's words."""
    data = bytearray(b"small")
    run = attach(data=data)
    agent.answers[m.Reserve] = lambda: m.Refused(MemoryBudgetError("no memory").to_json())
    data.extend(bytes(3_000_000))
    step = capture(agent, run)
    missed = agent.wait_for(m.Missed)
    assert missed.error is not None
    assert (missed.step, missed.error["code"]) == (step, "memory")
    assert list(run.steps(step + 3))[-1] == step + 3


# --- an agent that is gone or stuck -------------------------------------------------------------------------------


def test_a_deadline_passes_in_a_capture(
    agent: FakeAgent, attach: Attach, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that asks an agent which doesn't answer returns at its deadline; the lost connection ends the trying."""
    monkeypatch.setattr("ckptd.client.session.CALL_DEADLINE_S", 0.3)
    data = bytearray(b"small")
    run = attach(data=data)
    agent.answers[m.Reserve] = lambda: None
    data.extend(bytes(3_000_000))
    begin_s = time.monotonic()
    capture(agent, run)
    assert 0.3 <= time.monotonic() - begin_s < 10
    assert not run.protected
    assert list(run.steps(50))[-1] == 50
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "ckptd: a capture failed: the agent did not answer within 0.3 s",
        "ckptd: the connection to the agent is lost: training goes on UNPROTECTED, without further checkpoints",
    ]


def test_an_agent_that_hangs_up_is_noticed(
    agent: FakeAgent, attach: Attach, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank looks now and then whether its agent is there, and says once when it isn't, though nothing was due."""
    monkeypatch.setattr("ckptd.client.run._LOOK_EVERY_NS", 0)
    run = attach()
    look(run)
    for _ in range(10):
        run.step()
    assert run.protected
    agent.hang_up()
    for _ in range(10):
        run.step()
    assert not run.protected
    said = capsys.readouterr().err
    assert said.count("UNPROTECTED") == 1
    assert "the agent has closed the connection" in said


def test_an_agent_that_hangs_up_is_an_error_when_strict(agent: FakeAgent, attach: Attach) -> None:
    """With strict, the look that finds the agent gone raises."""
    run = attach(strict=True)
    agent.hang_up()
    look(run)
    with pytest.raises(AgentError, match="closed the connection"):
        run.step()


def test_a_look_costs_no_answer(agent: FakeAgent, attach: Attach) -> None:
    """Looking whether the agent is there takes nothing from the connection: later answers are read whole."""
    data = bytearray(b"small")
    run = attach(data=data)
    for _ in range(5):
        look(run)
        run.step()
    data.extend(bytes(3_000_000))
    capture(agent, run)
    assert agent.wait_for(m.Seal).image_bytes > 3_000_000


def test_steps_before_a_late_attach(agent: FakeAgent) -> None:
    """A function of `@resumable` that counts steps before it attaches is protected all the same from then on."""

    @ckptd.resumable(job="late")
    def train(run: Run) -> None:
        for _ in range(3):
            run.step()
        run.attach(data=bytearray(4))
        run.step()
        agent.wait_for(m.Stepped)
        capture(agent, run)

    train()
    assert {seal.step for seal in agent.heard(m.Seal)} == {5}
    assert agent.page.words[Word.STEP] == 5
