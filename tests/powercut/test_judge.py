"""The judge accepts what a power cut may leave, and nothing else."""

from __future__ import annotations

import pytest

from tests.powercut.judge import SOMETHING, Judge

_DONE = ("did", "a", "1")


@pytest.mark.parametrize(
    ("said", "found", "wrong"),
    [
        ([], {}, None),
        ([_DONE], {"a": "1"}, None),
        ([_DONE], {}, "gone"),
        ([_DONE], {"a": "2"}, "a is 2, not 1"),
        ([], {"a": "1"}, "never begun"),
        ([("may", "a", SOMETHING)], {}, None),
        ([("may", "a", SOMETHING)], {"a": "1"}, None),
        ([_DONE, ("may", "a", "2")], {"a": "1"}, None),
        ([_DONE, ("may", "a", "2")], {"a": "2"}, None),
        ([_DONE, ("may", "a", "2")], {"a": "3"}, "a is 3, not 1 or 2"),
        ([_DONE, ("may", "a", "2")], {}, "gone"),
        ([_DONE, ("may", "a", "2"), ("did", "a", "2")], {"a": "1"}, "a is 1, not 2"),
        ([_DONE, ("may", "a", None)], {"a": "1"}, None),
        ([_DONE, ("may", "a", None)], {}, None),
        ([_DONE, ("may", "a", None), ("did", "a", None)], {"a": "1"}, "removed"),
    ],
)
def test_what_may_be_found(said: list[tuple[str, str, str | None]], found: dict[str, str], wrong: str | None) -> None:
    """Before a change is acknowledged both states count, afterwards only the new one."""
    judge = Judge()
    for verb, register, value in said:
        getattr(judge, verb)(register, value)
    problems = judge.found(found)
    assert len(problems) == (wrong is not None)
    assert wrong is None or wrong in problems[0]


def test_what_was_found_stays() -> None:
    """What one boot has found the next one must find too, acknowledged or not."""
    judge = Judge()
    judge.may("a", SOMETHING)
    judge.may("b", SOMETHING)
    assert judge.found({"a": "1"}) == []
    assert judge.found({"a": "1"}) == []
    assert judge.found({"b": "1"}) == ["a was acknowledged and is gone", "b is there, but was removed or never begun"]
