"""Harm that a rank does to itself because `ckptctl chaos` asked for it; only ranks of jobs that allow it load this."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ckptd.client.guard import say
from ckptd.protocol.page import Harm, Word

_MS_PER_S = 1000.0


class ChaosError(RuntimeError):
    """Raised into training by `run.step()` because `ckptctl chaos` asked for an exception."""


class SelfHarm:
    """What a rank looks at, at each boundary, in a job that allows chaos."""

    def __init__(self) -> None:
        self._slow_until_s = 0.0
        self._pause_s = 0.0

    def boundary(self, words: Any, step: int, state: Mapping[str, Any]) -> None:
        """Do what the control page asks for after `step`; raises `ChaosError` when that is an exception."""
        number = words[Word.HARM]
        if number != words[Word.HARMED] and step >= words[Word.HARM_STEP]:
            words[Word.HARMLESS] = not self._do(words, step, state)
            words[Word.HARMED] = number
            if words[Word.HARM_KIND] == Harm.EXCEPTION:
                raise ChaosError(f"asked for by ckptctl chaos after step {step}")
        if self._slow_until_s:
            self._dawdle()

    def _do(self, words: Any, step: int, state: Mapping[str, Any]) -> bool:
        """Do what is no exception; return whether it could be done."""
        kind = words[Word.HARM_KIND]
        if kind == Harm.NAN:
            poisoned = poison(state)
            if poisoned is None:
                return False
            say(f"chaos: {poisoned} is NaN from step {step} on")
        elif kind == Harm.SLOW:
            self._pause_s = words[Word.HARM_PAUSE_MS] / _MS_PER_S
            self._slow_until_s = time.monotonic() + words[Word.HARM_MS] / _MS_PER_S
        return True

    def _dawdle(self) -> None:
        if time.monotonic() < self._slow_until_s:
            time.sleep(self._pause_s)
        else:
            self._slow_until_s = 0.0


def poison(state: Mapping[str, Any]) -> str | None:
    """Fill the first tensor of `state` that can hold it with NaN, as a broken device would; return its name."""
    for name, tensor in _tensors(state, ""):
        if tensor.is_floating_point():
            tensor.detach().fill_(math.nan)
            return name
    return None


def _tensors(item: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what looks like a tensor in attached objects; nothing is imported for it."""
    if hasattr(item, "state_dict"):
        item = item.state_dict()
    if hasattr(item, "is_floating_point") and hasattr(item, "fill_"):
        yield name, item
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
    elif isinstance(item, (list, tuple)):
        for number, value in enumerate(item):
            yield from _tensors(value, f"{name}.{number}")
