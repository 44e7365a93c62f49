"""The setting `numbers` of a job, as flags, options and TOML files say it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ckptd.core.policy.numbers import NumbersPolicy
from ckptd.errors import ConfigError

POLICIES = ("warn", "step_back", "off")
_EXAMPLE = (
    'write "warn", "step_back" or "off", and any of ",metric=loss,window=128,zscore=10,healthy=3"; '
    'or, in a job file, numbers = {policy = "step_back", window = 128}'
)
_MAX_WINDOW = 10_000
_MAX_HEALTHY = 10_000


def read_numbers(value: object) -> NumbersPolicy:
    """Return what a flag or option ("step_back,healthy=5"), JSON or TOML says of reported numbers.

    Raises `ConfigError` that says what does not fit.
    """
    table = _pairs(value) if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        raise ConfigError(f"numbers is {value!r}", hint=_EXAMPLE)
    known = {item.name: item.default for item in dataclasses.fields(NumbersPolicy)}
    for key in table:
        _require(key in known, f"numbers has no setting {key!r}")
    config = NumbersPolicy(**{key: _fit(key, item, known[key]) for key, item in table.items()})
    _require(config.policy in POLICIES, f"the policy of numbers is {config.policy!r}, not one of {', '.join(POLICIES)}")
    _require(bool(config.metric), "the metric of numbers has no name")
    _require(2 <= config.window <= _MAX_WINDOW, f"the window of numbers is {config.window}, not 2 to {_MAX_WINDOW}")
    _require(0 <= config.zscore < math.inf, f"the zscore of numbers is {config.zscore:g}; 0 means that no spike counts")
    _require(1 <= config.healthy <= _MAX_HEALTHY, f"numbers.healthy is {config.healthy}, not 1 to {_MAX_HEALTHY}")
    return config


def _pairs(text: str) -> dict[str, str]:
    """Read "step_back", "step_back,healthy=5" or "metric=nll"."""
    table: dict[str, str] = {}
    for number, item in enumerate(text.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        _require(bool(equals) or number == 0, f"numbers {text!r} is not understood")
        table |= {key: value} if equals else {"policy": key}
    return table


def _fit(key: str, value: object, default: Any) -> Any:
    """Return a value as the setting wants it; on the command line numbers come as text."""
    try:
        if isinstance(value, str) and not isinstance(default, str):
            value = int(value) if isinstance(default, int) else float(value)
    except ValueError:
        pass
    fits = isinstance(value, (int, float) if isinstance(default, float) else type(default))
    _require(fits and not isinstance(value, bool), f"numbers.{key} is {value!r}")
    return float(value) if isinstance(default, float) else value  # type: ignore[arg-type]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message, hint=_EXAMPLE)
