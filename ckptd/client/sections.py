"""Sections: parts of a training that may take long without finishing a step, such as an evaluation.

A rank in a section is not called hung before the section's deadline, and nor are those that wait for it. What is said
of one are a few words of the control page: no system call, and nothing to answer.
"""

from __future__ import annotations

import math
from contextlib import ContextDecorator
from time import monotonic_ns
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from ckptd.errors import ConfigError
from ckptd.protocol.page import NEVER, SECTION_WORDS, Word

if TYPE_CHECKING:
    from ckptd.client.run import Run

_UNTIL, _NAME = int(Word.SECTION_UNTIL_NS), int(Word.SECTION)
_NAME_BYTES = SECTION_WORDS * 8
_LONGEST_S = 10.0**9


class _Inside(NamedTuple):
    """One section that was entered."""

    until_ns: int
    name: memoryview


_OUTSIDE = _Inside(0, memoryview(bytes(_NAME_BYTES)).cast("Q"))


class Sections:
    """The sections that one rank is in, outermost first."""

    def __init__(self) -> None:
        self._inside: list[_Inside] = []
        self._entered = 0

    def enter(self, words: Any, name: str, deadline_s: float | None) -> object:
        """Note that a section begins, and return what `leave` wants; it never lasts longer than the one around it."""
        self._entered += 1
        until_ns = NEVER + self._entered  # another number each time: whoever looks sees that something has happened
        if deadline_s is not None:
            until_ns = monotonic_ns() + round(min(deadline_s, _LONGEST_S) * 1e9)
        if self._inside and self._inside[-1].until_ns < NEVER:
            until_ns = min(until_ns, self._inside[-1].until_ns)
        shown = name.encode(errors="replace")[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
        inside = _Inside(until_ns, memoryview(shown).cast("Q"))
        self._inside.append(inside)
        _write(words, inside)
        return inside

    def leave(self, words: Any, inside: object) -> None:
        """Note that a section is over, which another thread may have entered before the last one."""
        self._inside = [item for item in self._inside if item is not inside]
        _write(words, self._inside[-1] if self._inside else _OUTSIDE)


class Section(ContextDecorator):
    """A context manager, to be used any number of times, also inside itself; or a decorator of a function."""

    def __init__(self, run: Run, name: str, deadline_s: float | None) -> None:
        self._run = run
        self._name = name
        self._deadline_s = deadline_s
        self._entered: list[object] = []

    def __enter__(self) -> Self:
        self._entered.append(self._run._enter(self._name, self._deadline_s))  # noqa: SLF001 - the same package
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run._leave(self._entered.pop())  # noqa: SLF001 - the same package


def deadline_s(deadline: str | float) -> float:
    """Return the seconds of "20m" or of a number; raises `ConfigError` that says what does not fit."""
    from ckptd.units import parse_duration  # noqa: PLC0415 - only a rank with a section needs it

    if isinstance(deadline, str):
        return parse_duration(deadline, "the deadline of a section")
    if isinstance(deadline, (int, float)) and 0 < deadline < math.inf:
        return float(deadline)
    raise ConfigError(f"the deadline of a section is {deadline!r}", hint='write it like "20m", or in seconds')


def _write(words: Any, inside: _Inside) -> None:
    words[_NAME : _NAME + SECTION_WORDS] = inside.name
    words[_UNTIL] = inside.until_ns
