"""The conformance suite of checks of the node."""

from __future__ import annotations

import threading
import time

from ckptd.plugin import NodeCheck, NodePlan
from ckptd.plugin.manager import CALL_LIMIT_S

PLANS: tuple[NodePlan, ...] = (
    NodePlan("job", 1, (), {}),
    NodePlan("job", 8, ("/nowhere/at/all",), {"PATH": "/usr/bin"}, restarts=True),
    NodePlan("job", 1024, ("/nowhere/one", "/nowhere/two"), {"CUDA_VISIBLE_DEVICES": "7,GPU-0a1b,MIG-2c"}),
    NodePlan("job", 2, (), {"CUDA_VISIBLE_DEVICES": ""}, memory_bytes=2**62),
    NodePlan("job", 2, (), {"CUDA_VISIBLE_DEVICES": " ä☃,-1 "}, memory_bytes=2**30, memory_left_bytes=-1),
)
"""What may be about to start, as an agent may describe it, with odd settings of users."""


class NodeCheckSuite:
    """The contract of `ckptd.plugin.NodeCheck`: subclass it and give it a `check` fixture that finds this node fit.

    The agent calls a check in a thread, while ranks of the last generation are still ending, and starts nothing until
    all have answered. So a check must answer fast, never raise, look without changing anything, and say what it finds
    in a form that reaches logs and `ckptctl status` unharmed.
    """

    def test_has_a_name(self, check: NodeCheck) -> None:
        """A check's name stands before its reason, in one word."""
        assert isinstance(check.name, str)
        assert check.name
        assert not any(character.isspace() for character in check.name)

    def test_answers_in_one_line(self, check: NodeCheck) -> None:
        """Whatever is about to start, a check answers None or one line that says something, and never raises."""
        for plan in PLANS:
            reason = check.check(plan)
            assert reason is None or isinstance(reason, str), f"{plan} made it return {reason!r}"
            if reason is not None:
                assert reason.strip(), f"about {plan} it says nothing"
                assert len(reason.splitlines()) == 1, f"about {plan} it says more than one line"

    def test_finds_a_fit_node_fit(self, check: NodeCheck) -> None:
        """A job that needs nothing but a process may start on this node."""
        assert check.check(PLANS[0]) is None

    def test_is_fast(self, check: NodeCheck) -> None:
        """Once it has been asked, it answers within the limit: a restart waits for it."""
        check.check(PLANS[0])
        for plan in PLANS:
            begin_s = time.monotonic()
            check.check(plan)
            assert time.monotonic() - begin_s < CALL_LIMIT_S

    def test_answers_in_any_thread(self, check: NodeCheck) -> None:
        """Each call comes in a thread of its own, several jobs at once: the answers are the same."""
        answers: list[str | None] = []
        threads = [threading.Thread(target=lambda: answers.append(check.check(PLANS[0]))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [None] * len(threads)
