"""The guard: faults are said, counted and never raised into training, and enough of them end the trying."""

from __future__ import annotations

import pytest

from ckptd.client.guard import FAULTS_BEFORE_OPEN, Guard, as_ckptd_error, attempt
from ckptd.errors import AgentError, CkptdError


class Opened:
    """Counts how often the breaker has opened."""

    count = 0

    def __call__(self) -> None:
        self.count += 1


def fail() -> None:
    """Fail as foreign code does."""
    raise ZeroDivisionError("no good")


def test_a_result_is_passed_on() -> None:
    """What the guarded work returns is returned, with its arguments passed in."""
    assert Guard(strict=False, on_open=Opened()).run("adding", lambda a, b: a + b, 1, 2) == 3


def test_a_fault_is_said_and_not_raised(capsys: pytest.CaptureFixture[str]) -> None:
    """A fault costs one line that says what failed and why, and gives None."""
    guard = Guard(strict=False, on_open=Opened())
    assert guard.run("a capture", fail) is None
    assert capsys.readouterr().err == "ckptd: a capture failed: ZeroDivisionError: no good\n"
    assert not guard.open


def test_three_faults_in_a_row_open_the_breaker(capsys: pytest.CaptureFixture[str]) -> None:
    """With the third fault in a row the breaker opens, says so once, and nothing is tried any more."""
    opened = Opened()
    guard = Guard(strict=False, on_open=opened)
    for _ in range(FAULTS_BEFORE_OPEN):
        assert not guard.open
        guard.run("a capture", fail)
    assert guard.open
    tried: list[int] = []
    for _ in range(10):
        assert guard.run("a capture", tried.append, 1) is None
    guard.trip("again")
    assert not tried
    assert opened.count == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == FAULTS_BEFORE_OPEN + 1
    assert said[-1] == "ckptd: 3 faults in a row: training goes on UNPROTECTED, without further checkpoints"


def test_a_success_resets_the_count() -> None:
    """Faults with successes between them never open the breaker."""
    guard = Guard(strict=False, on_open=Opened())
    for _ in range(10):
        for _ in range(FAULTS_BEFORE_OPEN - 1):
            guard.run("a capture", fail)
        guard.run("a capture", lambda: None)
    assert not guard.open


def test_kinds_of_work_are_counted_apart() -> None:
    """A look that succeeds between two captures that fail does not hide them, nor does work that had nothing to do."""
    guard = Guard(strict=False, on_open=Opened())
    for number in range(FAULTS_BEFORE_OPEN):
        assert not guard.open, number
        guard.run("a capture", fail)
        guard.run("a look", lambda: None)
        assert guard.run("a capture", lambda: False) is (None if guard.open else False)
    assert guard.open


def test_an_attempt_only_says_its_fault(capsys: pytest.CaptureFixture[str]) -> None:
    """On the way out a fault is said and nothing else; what ends a program passes."""
    done: list[int] = []
    attempt("closing", done.append, 1)
    attempt("closing", fail)
    assert (done, capsys.readouterr().err) == ([1], "ckptd: closing failed: ZeroDivisionError: no good\n")
    with pytest.raises(KeyboardInterrupt):
        attempt("closing", interrupt)


def interrupt() -> None:
    """End the program."""
    raise KeyboardInterrupt


def test_strict_raises() -> None:
    """With strict the fault itself is raised, every time, and nothing is swallowed or counted."""
    opened = Opened()
    guard = Guard(strict=True, on_open=opened)
    for _ in range(FAULTS_BEFORE_OPEN + 2):
        with pytest.raises(ZeroDivisionError):
            guard.run("a capture", fail)
    assert not guard.open
    assert opened.count == 0


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_what_ends_a_program_passes(kind: type[BaseException], capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C and exits are no faults of ours."""

    def interrupt() -> None:
        raise kind

    guard = Guard(strict=False, on_open=Opened())
    with pytest.raises(kind):
        guard.run("a capture", interrupt)
    assert capsys.readouterr().err == ""


def test_the_breaker_can_be_tripped(capsys: pytest.CaptureFixture[str]) -> None:
    """Where trying again is of no use, the breaker opens at once, with the reason."""
    opened = Opened()
    guard = Guard(strict=False, on_open=opened)
    guard.trip("the agent is lost")
    assert guard.open
    assert opened.count == 1
    assert capsys.readouterr().err.startswith("ckptd: the agent is lost: training goes on UNPROTECTED")


def test_errors_of_ours_stay_what_they_are() -> None:
    """An error of ours keeps its kind and hint, any other is told by its type."""
    ours = AgentError("gone", hint="look")
    assert as_ckptd_error(ours) is ours
    theirs = as_ckptd_error(KeyError("x"))
    assert (type(theirs), str(theirs)) == (CkptdError, "KeyError: 'x'")
