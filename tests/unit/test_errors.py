"""Errors: stable codes and exit codes, the same on both sides of the socket and in the help."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd import errors
from ckptd.cli import main
from ckptd.errors import ERROR_BY_CODE, RESUMABLE, CkptdError, InvariantError, from_json, invariant

FAMILY = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CkptdError)),
    key=lambda kind: kind.__name__,
)


def test_codes_and_exit_codes_are_unique() -> None:
    """No two errors share their code or their exit code, and none has one that means something else to a shell."""
    assert len({kind.code for kind in FAMILY}) == len(FAMILY)
    assert len({kind.exit_code for kind in FAMILY}) == len(FAMILY)
    taken = {0, RESUMABLE, 126, 127, *range(128, 256)}
    assert not {kind.exit_code for kind in FAMILY} & taken


def test_every_class_says_what_is_its_own() -> None:
    """Each error has a code and an exit code of its own, not an inherited one, and is found by its code."""
    for kind in FAMILY:
        assert {"code", "exit_code"} <= set(vars(kind)), f"{kind.__name__} inherits its code"
    assert ERROR_BY_CODE == {kind.code: kind for kind in FAMILY}


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(FAMILY), st.text(max_size=30), st.none() | st.text(min_size=1, max_size=30))
def test_round_trip(kind: type[CkptdError], message: str, hint: str | None) -> None:
    """An error that crosses the socket is the same type with the same message and hint."""
    sent = kind(message, hint=hint)
    got = from_json(sent.to_json())
    assert type(got) is kind
    assert (got.message, got.hint, got.retryable) == (message, hint, kind.retryable)
    assert str(got) == str(sent)


def test_people_see_message_and_hint() -> None:
    """As text, an error is one line with its hint behind it."""
    assert str(CkptdError("no disk", hint="buy one")) == "no disk (hint: buy one)"
    assert str(CkptdError("no disk")) == "no disk"


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"code": "from the future", "message": "x"},
        {"code": None, "message": "x"},
        {"code": ["store"], "message": "x"},
        {"message": 7, "hint": 8},
    ],
)
def test_an_unknown_error_is_still_an_error(data: dict[str, object]) -> None:
    """What a newer or broken peer sends becomes a plain error, never a crash."""
    assert isinstance(from_json(data), CkptdError)


def test_only_a_fault_of_the_world_is_retryable() -> None:
    """The same call may succeed later for a store and an agent, and for nothing that somebody has to change."""
    assert {kind.code for kind in FAMILY if kind.retryable} == {"store", "full", "agent"}


def test_an_invariant_holds_or_crashes() -> None:
    """A broken assumption of ours is no operating error: it is not caught with them, and stays under `python -O`."""
    invariant(True, "never seen")
    with pytest.raises(InvariantError, match="two and two"):
        invariant(False, "two and two")
    assert not issubclass(InvariantError, CkptdError)
    code = "from ckptd.errors import invariant; invariant(False, 'broken')"
    assert subprocess.run([sys.executable, "-O", "-c", code], check=False, capture_output=True).returncode == 1


def test_help_lists_every_exit_code() -> None:
    """`ckptctl --help` documents exactly the exit codes that there are."""
    listed = main._EPILOG.partition("Exit codes:")[2].partition("Environment:")[0]
    found = {int(number) for number in re.findall(r"(?:^|,)\s*(\d+) ", listed)}
    assert found == {0, RESUMABLE, main._INTERRUPTED, *(kind.exit_code for kind in FAMILY)}


def test_help_shows_the_list() -> None:
    """The list is in what the real command prints."""
    done = subprocess.run(
        [sys.executable, "-m", "ckptd.cli.main", "--help"], check=True, capture_output=True, text=True
    )
    assert "Exit codes: 0 done" in done.stdout
