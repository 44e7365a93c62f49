"""The end of a run: a block that is left in peace, by an exception, or by what ends programs; and the decorator."""

from __future__ import annotations

import inspect
import time

import pytest

import ckptd
from ckptd.client.run import current_run
from ckptd.errors import AgentError, StateError
from ckptd.protocol import messages as m
from ckptd.protocol.page import Phase
from tests.client.fake_agent import FakeAgent
from tests.client.fake_framework import BOUND, FAULTS


def test_leaving_the_block_captures_the_last_step(agent: FakeAgent) -> None:
    """The end of the block captures what was done since the last capture, leaves, and lets go of everything."""
    with ckptd.attach(data=bytearray(4)) as run:
        assert list(run.steps(5)) == [1, 2, 3, 4, 5]
    seal = agent.wait_for(m.Seal)
    assert (seal.step, seal.final) == (5, True)
    assert agent.wait_for(m.Leave) == m.Leave(5)
    assert agent.page.phase is Phase.LEFT
    assert not run.protected
    assert current_run() is None


def test_a_last_step_that_is_captured_already(agent: FakeAgent) -> None:
    """A last step that was announced and captured is not captured again; its seal is said to be final."""
    captures: list[int] = []
    FAULTS["write"] = lambda: captures.append(1)
    with ckptd.attach(data=bytearray(4)) as run:
        agent.page.announce(3)
        list(run.steps(3))
    again = agent.wait_for(m.Seal, 2)
    first = agent.heard(m.Seal)[0]
    assert (first.final, again.final) == (False, True)
    assert (again.step, again.slot, again.image_bytes) == (3, first.slot, first.image_bytes)
    assert len(captures) == 1
    assert agent.held == {first.slot}
    assert agent.wait_for(m.Leave) == m.Leave(3)


def test_a_last_seal_is_said_again_though_its_slot_was_released(agent: FakeAgent) -> None:
    """Where another rank missed the last step, its slot was released already, and is sealed anew with what it holds."""
    with ckptd.attach(data=bytearray(4)) as run:
        agent.page.announce(1)
        run.step()
        slot = agent.wait_for(m.Seal).slot
        agent.page.release(slot)
    assert agent.wait_for(m.Seal, 2).final
    assert agent.held == {slot}


def test_a_block_without_a_step_captures_nothing(agent: FakeAgent) -> None:
    """Training that did nothing has nothing to capture."""
    with ckptd.attach(data=bytearray(4)):
        pass
    assert agent.wait_for(m.Leave) == m.Leave(0)
    assert not agent.heard(m.Seal)


def test_closing_twice_is_closing_once(agent: FakeAgent) -> None:
    """`run.close()` in the block, and again, changes nothing."""
    with ckptd.attach(data=bytearray(4)) as run:
        run.step()
        run.close()
        run.close()
    assert len(agent.heard(m.Leave)) == 1
    assert len(agent.heard(m.Seal)) == 1


def test_a_last_capture_waits_for_a_slot(agent: FakeAgent) -> None:
    """The last capture does not give up while every slot is still being flushed; it waits for one."""
    released: list[float] = []

    def leave() -> m.Message:
        return m.Done()

    def stepped() -> None:
        released.append(time.monotonic())

    agent.answers[m.Leave] = leave
    with ckptd.attach(data=bytearray(4)) as run:
        for step in (1, 2):
            agent.page.announce(step)
            run.step()
        agent.wait_for(m.Seal, 2)
        assert agent.held == {0, 1}
        run.step()
        import threading

        timer = threading.Timer(0.2, lambda: (stepped(), agent.page.release(1)))
        timer.start()
    timer.join()
    seal = agent.heard(m.Seal)[-1]
    assert released
    assert (seal.step, seal.slot, seal.final) == (3, 1, True)


def test_an_exception_is_reported_and_captures_nothing(agent: FakeAgent) -> None:
    """An exception that leaves the block reaches the agent with its traceback, and passes on; nothing is captured."""
    with pytest.raises(ValueError, match="no good"), ckptd.attach(data=bytearray(4)) as run:
        run.step()
        raise ValueError("no good")
    raised = agent.wait_for(m.Raised)
    assert (raised.job, raised.rank, raised.generation) == ("job", 0, 1)
    assert (raised.exception["type"], raised.exception["message"]) == ("ValueError", "no good")
    assert "test_an_exception_is_reported" in raised.exception["traceback"]
    assert not agent.heard(m.Seal)
    assert not agent.heard(m.Leave)
    assert not run.protected
    assert current_run() is None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_is_no_exception(agent: FakeAgent, kind: type[BaseException]) -> None:
    """Ctrl-C and exits leave the block without being reported as exceptions of the training, and without a capture."""
    with pytest.raises(kind), ckptd.attach(data=bytearray(4)) as run:
        run.step()
        raise kind
    agent.wait_for(m.Stepped)
    assert not run.protected
    assert current_run() is None
    agent.drain()
    assert not agent.heard(m.Raised)
    assert not agent.heard(m.Seal)


def test_an_exception_with_an_agent_that_is_gone(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    """The user's exception passes though it can't be reported, strict or not, and the line says why."""
    for strict in (False, True):
        with pytest.raises(ValueError, match="no good"), ckptd.attach(data=bytearray(4), strict=strict):
            agent.hang_up()
            raise ValueError("no good")
        assert current_run() is None
    assert "reporting the exception failed" in capsys.readouterr().err


def test_a_last_checkpoint_that_fails(agent: FakeAgent, capsys: pytest.CaptureFixture[str]) -> None:
    """A last capture that fails is said, and the program goes on behind the block."""
    with ckptd.attach(data=bytearray(4)) as run:
        run.step()

        def fail() -> None:
            raise ZeroDivisionError("no good")

        FAULTS["write"] = fail
    assert "the last checkpoint failed: ZeroDivisionError: no good" in capsys.readouterr().err
    assert current_run() is None


def test_a_last_checkpoint_that_fails_when_strict(agent: FakeAgent) -> None:
    """With strict a last checkpoint that fails is raised, and everything is let go of all the same."""
    run = ckptd.attach(data=bytearray(4), strict=True)
    run.step()
    agent.hang_up()
    with pytest.raises(AgentError):
        run.close()
    assert not run.protected
    assert current_run() is None


def test_leaving_has_a_deadline(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A last commit that never comes is waited for no longer than its deadline."""
    monkeypatch.setattr("ckptd.client.session.LEAVE_DEADLINE_S", 0.2)
    agent.answers[m.Leave] = lambda: None
    with ckptd.attach(data=bytearray(4)) as run:
        run.step()
    assert "the last checkpoint failed: the agent did not answer within 0.2 s" in capsys.readouterr().err


# --- the decorator ------------------------------------------------------------------------------------------------


def test_the_decorator_passes_arguments_and_result(agent: FakeAgent) -> None:
    """A resumable function is called without its run, with all other arguments, and its result comes back."""

    @ckptd.resumable(
        every=5,
        store="/x",
        strict=True,
        rng=False,
        overlap="on",
        replicated=("data",),
        resume_from="/o/a",
        resume_step=2,
    )
    def train_it(run: ckptd.Run, first: int, *rest: int, scale: float = 1.0, **more: int) -> tuple[object, ...]:
        """Train."""
        run.attach(data=bytearray(4))
        list(run.steps(3))
        return first, rest, scale, more, run.protected

    assert train_it(1, 2, 3, scale=0.5, extra=4) == (1, (2, 3), 0.5, {"extra": 4}, True)
    assert (BOUND[0].rng, BOUND[0].membership.replicated, len(BOUND[0].images)) == (False, ("data",), 4)
    assert (train_it.__name__, train_it.__doc__) == ("train_it", "Train.")
    assert next(iter(inspect.signature(train_it).parameters)) == "run"
    told = {"store": "/x", "every_s": 5.0, "hang": False, "resume_from": "/o/a", "resume_step": 2}
    assert agent.heard(m.Join)[0].options == told
    assert agent.wait_for(m.Leave) == m.Leave(3)


@pytest.mark.parametrize(
    ("name", "job", "expected"), [("train", None, "train"), ("_my__run_", None, "my-run"), ("train", "mine", "mine")]
)
def test_the_job_is_named_after_the_function(
    agent: FakeAgent, monkeypatch: pytest.MonkeyPatch, name: str, job: str | None, expected: str
) -> None:
    """Without a name of its own the job is that of the function, in characters that a job may have."""
    monkeypatch.delenv("CKPTD_JOB")

    def function(run: ckptd.Run) -> None:
        run.attach(data=bytearray(4))

    function.__name__ = name
    ckptd.resumable(job=job)(function)()
    assert agent.wait_for(m.Join).job == expected


def test_an_exception_of_a_resumable_function(agent: FakeAgent) -> None:
    """What the function raises is reported and passes on; the next call begins anew."""

    @ckptd.resumable()
    def train(run: ckptd.Run, fail: bool) -> str:
        run.attach(data=bytearray(4))
        if fail:
            raise ValueError("no good")
        return "done"

    with pytest.raises(ValueError, match="no good"):
        train(fail=True)
    assert agent.wait_for(m.Raised).exception["message"] == "no good"
    assert train(fail=False) == "done"


def test_a_resumable_function_attaches_once(agent: FakeAgent) -> None:
    """A second attach in the function is a `state` error; a function that attaches nothing just runs."""

    @ckptd.resumable()
    def twice(run: ckptd.Run) -> None:
        run.attach(data=bytearray(4))
        run.attach(more=bytearray(4))

    with pytest.raises(StateError, match="has its objects already"):
        twice()
    assert ckptd.resumable()(lambda run: run.protected)() is False
    assert len(agent.heard(m.Join)) == 1


def test_the_outer_of_two_resumable_functions(agent: FakeAgent) -> None:
    """A run whose function waits for another one can't be attached beside it, but after it."""

    @ckptd.resumable(job="inner")
    def inner(run: ckptd.Run, outer_run: ckptd.Run) -> None:
        run.attach(data=bytearray(4))
        with pytest.raises(ckptd.CkptdError, match="has a run already"):
            outer_run.attach(data=bytearray(4))

    @ckptd.resumable(job="outer")
    def outer(run: ckptd.Run) -> None:
        inner(run)
        assert current_run() is None

    outer()
    assert len(agent.heard(m.Join)) == 1


def test_resumable_functions_in_each_other(agent: FakeAgent) -> None:
    """A resumable function that has attached and calls another one is refused the second attach."""

    @ckptd.resumable(job="inner")
    def inner(run: ckptd.Run) -> None:
        run.attach(data=bytearray(4))

    @ckptd.resumable(job="outer")
    def outer(run: ckptd.Run) -> None:
        run.attach(data=bytearray(4))
        inner()

    with pytest.raises(ckptd.CkptdError, match="has a run already"):
        outer()
    assert len(agent.heard(m.Join)) == 1
    assert current_run() is None
