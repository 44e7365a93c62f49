"""Settings of leaving on purpose: the table `halt`, as flags, options and TOML files say it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ckptd.errors import ConfigError
from ckptd.units import parse_duration

_EXAMPLE = (
    'write [halt] with any of grace = "90s", time_limit = "3h50m", margin = "30s", after_step = 1000, '
    'at = "2026-12-01T06:00", ends_at, preempt_notice = "file:/run/preempted"'
)
_NOTICE_EXAMPLE = "name file:PATH, or a command that ends with 0 once the machine is to be taken away"
NOTICE_FILE = "file:"


@dataclass(frozen=True, slots=True)
class HaltConfig:
    """When a job is to stop by itself, and how long that may take. Moments are wall-clock time, in seconds."""

    grace_s: float = 60.0
    """How long a stop may take in all: capture, flush, upload, and the end of the ranks."""
    margin_s: float = 10.0
    """How much longer before its time is over a job begins to stop than what was measured says."""
    time_limit_s: float | None = None
    """How long this run may take."""
    after_step: int | None = None
    """The last step."""
    at: float | None = None
    """When to begin to stop."""
    ends_at: float | None = None
    """When the job has to be gone: the end of a batch job, say."""
    preempt_notice: str | None = None
    """What says that the machine is about to be taken away: "file:PATH" that appears, or a command that ends with 0."""

    def __post_init__(self) -> None:
        """Refuse what no clock and no training can reach."""
        for name in ("grace_s", "time_limit_s"):
            seconds = getattr(self, name)
            _require(seconds is None or 0 < seconds < math.inf, f"{name[:-2]} is {seconds} s", "it must be longer")
        _require(0 <= self.margin_s < math.inf, f"margin is {self.margin_s} s", 'write it like "10s"; "0" for none')
        _require(self.after_step is None or self.after_step >= 1, f"after_step is {self.after_step}", "from 1 on")
        notice = self.preempt_notice
        if notice is not None:
            _require(bool(notice.removeprefix(NOTICE_FILE).strip()), "preempt_notice is empty", _NOTICE_EXAMPLE)
            _require("\0" not in notice, "preempt_notice has a zero byte", _NOTICE_EXAMPLE)

    def to_json(self) -> dict[str, Any]:
        """Return the form that crosses the socket and stands in the journal."""
        values = {key: getattr(self, field) for key, field in _FIELDS.items()}
        return {key: value for key, value in values.items() if value is not None}


_FIELDS = {
    "grace": "grace_s",
    "margin": "margin_s",
    "time_limit": "time_limit_s",
    "after_step": "after_step",
    "at": "at",
    "ends_at": "ends_at",
    "preempt_notice": "preempt_notice",
}


def read_halt(value: object) -> HaltConfig:
    """Return what flags, JSON or TOML say; raises `ConfigError` that says what does not fit."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"halt is {value!r}", hint=_EXAMPLE)
    values: dict[str, Any] = {}
    for key, item in value.items():
        _require(key in _FIELDS, f"halt has no setting {key!r}", _EXAMPLE)
        if item is not None:
            values[_FIELDS[key]] = _read(key, item)
    return HaltConfig(**values)


def _read(key: str, item: object) -> object:
    match key:
        case "grace" | "time_limit":
            return _seconds(item, key)
        case "margin":
            return 0.0 if item in (0, "0") else _seconds(item, key)
        case "at" | "ends_at":
            return read_moment(item, f"halt.{key}")
        case "after_step":
            _require(isinstance(item, int) and not isinstance(item, bool), f"after_step is {item!r}", _EXAMPLE)
            return item
    _require(isinstance(item, str), f"{key} is {item!r}", _EXAMPLE)
    return item


def _seconds(item: object, what: str) -> float:
    if isinstance(item, str):
        return parse_duration(item, what)
    if not isinstance(item, (int, float)) or isinstance(item, bool):
        raise ConfigError(f"{what} is {item!r}", hint=_EXAMPLE)
    return float(item)


def read_moment(item: object, what: str) -> float:
    """Return the wall-clock seconds of "2026-12-01T06:00", local time unless it names its zone, or of plain seconds.

    Raises `ConfigError` that names `what`.
    """
    if isinstance(item, datetime):  # TOML has moments of its own
        return item.timestamp()
    if isinstance(item, (int, float)) and not isinstance(item, bool) and 0 < item < math.inf:
        return float(item)
    try:
        return datetime.fromisoformat(str(item).strip()).timestamp()
    except (ValueError, OverflowError) as error:
        raise ConfigError(f"{what} {item!r} is no moment", hint='write it like "2026-12-01T06:00"') from error


def _require(holds: bool, message: str, hint: str) -> None:
    if not holds:
        raise ConfigError(message, hint=hint)
