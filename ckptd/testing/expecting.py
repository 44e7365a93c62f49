"""The two things that the suites need of a test framework, without importing one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar
from unittest import SkipTest

Kind = TypeVar("Kind", bound=BaseException)


class Caught(Generic[Kind]):
    """What `expecting` caught; there is an `error` once the block is over."""

    def __init__(self) -> None:
        self.found: Kind | None = None

    @property
    def error(self) -> Kind:
        """The exception that ended the block."""
        assert self.found is not None, "the block is not over yet"
        return self.found


@contextmanager
def expecting(kind: type[Kind], why: str) -> Iterator[Caught[Kind]]:
    """Fail with `why` unless the block raises a `kind`; any other exception passes through."""
    caught: Caught[Kind] = Caught()
    try:
        yield caught
    except kind as error:
        caught.found = error
        return
    raise AssertionError(f"no {kind.__name__} was raised: {why}")


def only_if(holds: bool, reason: str) -> None:
    """Skip the test, with `reason`, unless `holds`; pytest and unittest both understand."""
    if not holds:
        raise SkipTest(reason)
