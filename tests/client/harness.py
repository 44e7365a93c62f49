"""What tests of ranks have in common."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckptd.client.run import Run, current_run
from tests.client.fake_agent import FakeAgent
from tests.client.fake_framework import FAULTS, FakeBinding, FakeCopy

Begin = Callable[..., tuple[Run, FakeBinding]]
AGENTS_REGIONS = 3
"""What the fake agent itself has mapped: two slots and the page."""


def announce(agent: FakeAgent, run: Run) -> None:
    """Announce the next step, and do it."""
    agent.page.announce(run._step + 1)
    run.step()


def let_go(copy: FakeCopy) -> None:
    """Let a copy run to its end once somebody waits for it."""
    FAULTS["finish"] = copy.gate.set


def fail(error: BaseException) -> Callable[[], None]:
    """Return a function that raises one like it, which nothing keeps."""
    kind, arguments = type(error), error.args

    def raiser() -> None:
        raise kind(*arguments)

    return raiser


def unprotected(capsys: pytest.CaptureFixture[str], because: str) -> None:
    """Check that exactly one line says so, after one with the reason, and that nothing is left of a session."""
    reason, verdict = capsys.readouterr().err.splitlines()
    assert because in reason
    assert verdict == "ckptd: training goes on UNPROTECTED: nothing will be checkpointed"
    assert current_run() is None
