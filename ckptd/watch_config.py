"""Settings of what watches a job's ranks: `hang` and `straggler`, as flags, options and TOML files say them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptd.errors import ConfigError
from ckptd.units import parse_duration

_HANG_EXAMPLE = (
    'write "floor=5s,ceiling=10m,first=10m", any of them, or off; in a job file hang = {floor = "5s"}, or hang = false'
)
_STRAGGLER_EXAMPLE = "write straggler = {factor = 1.5, restart = false}"


@dataclass(frozen=True, slots=True)
class HangConfig:
    """How long a rank may go without a sign of life; see `core.policy.hang` for the rule between the bounds."""

    floor_s: float = 5.0
    ceiling_s: float = 600.0
    first_s: float = 600.0

    def __post_init__(self) -> None:
        """Refuse bounds that contradict each other, and ones that no agent could keep."""
        _require(self.floor_s >= 1, f"the floor of hang is {self.floor_s:g} s", "at least 1s, or busy ranks are killed")
        _require(self.ceiling_s >= self.floor_s, "the ceiling of hang is below its floor", _HANG_EXAMPLE)
        _require(self.first_s >= self.floor_s, "hang allows less for the first step than its floor", _HANG_EXAMPLE)

    def to_json(self) -> dict[str, float]:
        """Return the form that crosses the socket and stands in the journal."""
        return {"floor": self.floor_s, "ceiling": self.ceiling_s, "first": self.first_s}


@dataclass(frozen=True, slots=True)
class StragglerConfig:
    """From when on a rank is called a straggler: so many times its peers' median; and whether that is a failure."""

    factor: float = 1.5
    restart: bool = False

    def __post_init__(self) -> None:
        """Refuse a factor that half of all ranks would reach."""
        _require(1 < self.factor < math.inf, f"the factor of straggler is {self.factor:g}", "it must be more than 1")

    def to_json(self) -> dict[str, Any]:
        """Return the form that crosses the socket and stands in the journal."""
        return {"factor": self.factor, "restart": self.restart}


def read_hang(value: object) -> HangConfig | None:
    """Return what a flag ("off", "floor=5s,ceiling=10m"), JSON or TOML says of hangs; None: nobody looks for them.

    Raises `ConfigError` that says what does not fit.
    """
    if isinstance(value, str):
        value = False if value in ("off", "false") else _pairs(value, _HANG_EXAMPLE)
    if value is False:
        return None
    known = {"floor": "floor_s", "ceiling": "ceiling_s", "first": "first_s"}
    table = _table(value, "hang", known, _HANG_EXAMPLE)
    return HangConfig(**{known[key]: _seconds(item, f"hang.{key}") for key, item in table.items()})


def read_straggler(value: object) -> StragglerConfig:
    """Return what JSON or TOML says of stragglers; raises `ConfigError` that says what does not fit."""
    table = _table(value, "straggler", ("factor", "restart"), _STRAGGLER_EXAMPLE)
    usual = StragglerConfig()
    factor, restart = table.get("factor", usual.factor), table.get("restart", usual.restart)
    is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    _require(is_number, f"straggler.factor is {factor!r}", _STRAGGLER_EXAMPLE)
    _require(isinstance(restart, bool), f"straggler.restart is {restart!r}", _STRAGGLER_EXAMPLE)
    return StragglerConfig(float(factor), restart)


def _pairs(text: str, example: str) -> dict[str, str]:
    pairs = [item.partition("=") for item in text.split(",")]
    _require(all(equals for _, equals, _ in pairs), f"hang {text!r} is not understood", example)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _table(value: object, what: str, known: Any, example: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{what} is {value!r}", hint=example)
    for key in value:
        _require(key in known, f"{what} has no setting {key!r}", example)
    return value


def _seconds(value: object, what: str) -> float:
    if isinstance(value, str):
        return parse_duration(value, what)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf:
        return float(value)
    raise ConfigError(f"{what} is {value!r}", hint='write it like "5s" or "10m"')


def _require(holds: bool, message: str, hint: str) -> None:
    if not holds:
        raise ConfigError(message, hint=hint)
