"""How an exception travels, and which of them mean that a process fails."""

import pytest

from ckptd.errors import RESUMABLE
from ckptd.protocol.failure import describe_end, is_failure


@pytest.mark.parametrize(
    ("code", "fails", "message"),
    [
        (None, False, "0"),
        (0, False, "0"),
        (False, False, "0"),
        (256, False, "0"),
        (RESUMABLE, False, str(RESUMABLE)),
        (1, True, "1"),
        (3, True, "3"),
        (-1, True, "255"),
        ("3", True, "1"),
        ("no such file", True, "1"),
    ],
)
def test_exits(code: object, fails: bool, message: str) -> None:
    """`sys.exit` fails with the exit code that Python makes of its argument, unless that says success or resumable."""
    error = SystemExit(code)
    assert is_failure(error) is fails
    assert (describe_end(error).type, describe_end(error).message) == ("SystemExit", message)


def test_exceptions() -> None:
    """Every exception is a failure, and an interrupt from the keyboard or no exception at all is none."""
    assert is_failure(ValueError("no good"))
    assert not is_failure(KeyboardInterrupt())
    assert not is_failure(None)
