"""The suite of checks of the node finds what breaks the contract."""

from __future__ import annotations

import inspect
import time
from typing import Any

import pytest

from ckptd.plugin import NodePlan
from ckptd.testing import NodeCheckSuite, node_check


class Fit:
    """A check that keeps the contract."""

    name = "fit"

    def check(self, plan: NodePlan) -> str | None:
        """Find nothing wrong."""


class Nameless(Fit):
    """A check whose name is more than one word."""

    name = "my check"


class Raises(Fit):
    """A check that fails on odd settings."""

    def check(self, plan: NodePlan) -> str | None:
        """Take for granted what a user has set."""
        return "no GPU" if max(map(int, plan.env.get("CUDA_VISIBLE_DEVICES", "0").split(","))) < 0 else None


class SaysTrue(Fit):
    """A check that answers whether, not why."""

    def check(self, plan: NodePlan) -> Any:
        """Answer with a truth value."""
        return True


class SaysMuch(Fit):
    """A check that answers in several lines."""

    def check(self, plan: NodePlan) -> str | None:
        """Find something wrong, at length."""
        return "no\nroom" if plan.memory_bytes else None


class SaysNothing(Fit):
    """A check that finds something and does not say what."""

    def check(self, plan: NodePlan) -> str | None:
        """Find something wrong."""
        return " " if plan.memory_bytes else None


class Slow(Fit):
    """A check that keeps a restart waiting."""

    def check(self, plan: NodePlan) -> str | None:
        """Sleep for longer than the limit, once there is something to look at."""
        time.sleep(0.02 if plan.folders else 0)
        return None


class Forbids(Fit):
    """A check that finds every node unfit."""

    def check(self, plan: NodePlan) -> str | None:
        """Find something wrong always."""
        return "no"


def failing(check: Any) -> set[str]:
    """Return the tests of the suite that a check fails."""
    failed = set()
    for name, test in inspect.getmembers(NodeCheckSuite(), inspect.ismethod):
        if name.startswith("test_"):
            try:
                test(check)
            except Exception:
                failed.add(name.removeprefix("test_"))
    return failed


@pytest.mark.parametrize(
    ("check", "fails"),
    [
        (Fit(), set()),
        (Nameless(), {"has_a_name"}),
        (Raises(), {"answers_in_one_line", "is_fast"}),
        (SaysTrue(), {"answers_in_one_line", "finds_a_fit_node_fit", "answers_in_any_thread"}),
        (SaysMuch(), {"answers_in_one_line"}),
        (SaysNothing(), {"answers_in_one_line"}),
        (Slow(), {"is_fast"}),
        (Forbids(), {"finds_a_fit_node_fit", "answers_in_any_thread"}),
    ],
    ids=lambda item: type(item).__name__,
)
def test_what_breaks_the_contract_is_found(check: Any, fails: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each typical mistake fails the test that is about it, and a check without mistakes fails none."""
    monkeypatch.setattr(node_check, "CALL_LIMIT_S", 0.015)
    assert failing(check) == fails
