"""Sections: what a rank says on its control page of parts that take long."""

from __future__ import annotations

import time

import pytest

import ckptd
from ckptd.client.run import Run
from ckptd.errors import ConfigError
from ckptd.protocol.page import NEVER, Phase, Word
from tests.client.fake_agent import FakeAgent

_UNTIL = Word.SECTION_UNTIL_NS


@pytest.fixture
def run(agent: FakeAgent) -> Run:
    """A run with an agent."""
    return ckptd.attach(data=bytearray(4))


def rest_s(agent: FakeAgent) -> float:
    """How long the rank may still be where it is."""
    return agent.page.words[_UNTIL] / 1e9 - time.monotonic()


def test_a_section_is_on_the_page(agent: FakeAgent, run: Run) -> None:
    """While a rank is in a section its page says until when and how that is called, and nothing afterwards."""
    with run.section("evaluation", deadline="20m"):
        assert 1190 < rest_s(agent) <= 1200
        assert agent.page.section == "evaluation"
    assert agent.page.words[_UNTIL] == 0
    assert agent.page.section == ""


def test_a_section_without_deadline(agent: FakeAgent, run: Run) -> None:
    """Without a deadline the page names no time, and another number each time, so that each is a sign of life."""
    seen = set()
    for _ in range(3):
        with run.section("eval"):
            assert agent.page.words[_UNTIL] > NEVER
            seen.add(agent.page.words[_UNTIL])
    assert len(seen) == 3


def test_a_section_in_a_section(agent: FakeAgent, run: Run) -> None:
    """The inner one counts, ends no later than the outer one, and gives back to that when it is over."""
    with run.section("outer", deadline=60):
        outer = agent.page.words[_UNTIL]
        with run.section("short", deadline=5):
            assert 4 < rest_s(agent) <= 5
            assert agent.page.section == "short"
        assert (agent.page.words[_UNTIL], agent.page.section) == (outer, "outer")
        with run.section("long", deadline="1h"):
            assert agent.page.words[_UNTIL] == outer
        with run.section("open"):
            assert agent.page.words[_UNTIL] == outer
    with run.section("open"), run.section("short", deadline=5):
        assert 4 < rest_s(agent) <= 5
    assert agent.page.words[_UNTIL] == 0


def test_an_exception_ends_a_section(agent: FakeAgent, run: Run) -> None:
    """Whatever a section ends with, it is over, and the exception is the user's."""
    with pytest.raises(ValueError, match="mine"), run.section("eval", deadline=60):
        raise ValueError("mine")
    assert agent.page.words[_UNTIL] == 0


def test_a_section_as_a_decorator(agent: FakeAgent, run: Run) -> None:
    """A decorated function is a section each time it is called, also by itself."""

    @run.section("eval", deadline="1m")
    def evaluate(depth: int) -> int:
        assert agent.page.section == "eval"
        return depth if depth == 0 else 1 + evaluate(depth - 1)

    assert evaluate(3) == 3
    assert agent.page.words[_UNTIL] == 0


def test_a_long_name_is_cut(agent: FakeAgent, run: Run) -> None:
    """A name that has no room is cut, also in the middle of a letter."""
    with run.section("ü" * 40):
        assert agent.page.section == "ü" * 32
    with run.section("x" + "ü" * 40):
        assert agent.page.section == "x" + "ü" * 31


def test_a_deadline_that_cannot_be_read(agent: FakeAgent, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake in a deadline is said and does not end a training; the section has none then."""
    with run.section("eval", deadline="soon"):
        assert agent.page.words[_UNTIL] > NEVER
    assert "the deadline of a section 'soon' is no duration" in capsys.readouterr().err


@pytest.mark.parametrize("deadline", [1e12, 1e308, "1000000d"])
def test_a_deadline_beyond_all_time(agent: FakeAgent, run: Run, deadline: str | float) -> None:
    """Who writes a huge number means that it may take as long as it likes, and the page has room for no more."""
    with run.section("eval", deadline=deadline):
        assert 10**9 < agent.page.words[_UNTIL] / 1e9 < NEVER / 1e9


@pytest.mark.parametrize("deadline", ["soon", "-1s", 0, -5, float("inf"), float("nan")])
def test_a_strict_run_refuses_a_wrong_deadline(deadline: str | float) -> None:
    """Who asks for it hears of the mistake at once."""
    with pytest.raises(ConfigError, match="deadline of a section"):
        Run(strict=True).section("eval", deadline=deadline)


def test_a_section_without_agent() -> None:
    """Without an agent sections cost nothing and do nothing."""
    run = Run()
    with run.section("eval", deadline="20m"), run.section("inner"):
        run.step()


def test_an_agent_that_is_lost_in_a_section(agent: FakeAgent, run: Run) -> None:
    """A section that began with an agent ends without one."""
    with run.section("eval"):
        run._unprotect()
    run.step()


def test_the_last_capture_is_leaving(agent: FakeAgent, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page tells the last capture, which may wait for a slot, from one in the middle of training."""
    seen: list[Phase] = []
    target = run._capturing._target
    monkeypatch.setattr(run._capturing, "_target", lambda *a, **k: (seen.append(agent.page.phase), target(*a, **k))[1])
    run.step()
    run.close()
    assert seen == [Phase.LEAVING]
