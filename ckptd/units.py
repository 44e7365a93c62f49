"""Durations and sizes as people write them, read and shown."""

from __future__ import annotations

import math
import re
import signal

from ckptd.errors import ConfigError

_DURATION_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE_BYTES = {
    "": 1,
    "b": 1,
    "k": 2**10,
    "kib": 2**10,
    "kb": 10**3,
    "m": 2**20,
    "mib": 2**20,
    "mb": 10**6,
    "g": 2**30,
    "gib": 2**30,
    "gb": 10**9,
    "t": 2**40,
    "tib": 2**40,
    "tb": 10**12,
}
_MAX_DIGITS = 100
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)")


def parse_duration(text: str, what: str) -> float:
    """Return the seconds of "5s", "1m30s", "250ms" or "2h"; raises `ConfigError` that names `what`."""
    rest = text.strip().lower()
    parts = _PART.findall(rest)
    known = parts and not _PART.sub("", rest).strip() and all(unit in _DURATION_S for _, unit in parts)
    seconds = sum(float(number) * _DURATION_S[unit] for number, unit in parts) if known else math.inf
    if seconds == math.inf:
        raise ConfigError(f"{what} {text!r} is no duration", hint='write it like "5s", "250ms", "1m30s" or "2h"')
    if seconds <= 0:
        raise ConfigError(f"{what} {text!r} must be longer than nothing", hint='write it like "5s" or "1m30s"')
    return seconds


def parse_size(text: str, what: str) -> int:
    """Return the bytes of "512MiB", "2g" or "1000000"; raises `ConfigError` that names `what`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _SIZE_BYTES or len(match[1]) > _MAX_DIGITS:
        raise ConfigError(f"{what} {text!r} is no size", hint='write it like "512MiB", "2GiB" or plain bytes')
    unit_bytes = _SIZE_BYTES[match[2].lower()]
    return int(float(match[1]) * unit_bytes) if "." in match[1] else int(match[1]) * unit_bytes


def show_size(size_bytes: float) -> str:
    """Return a size as people read it: "12.3 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def show_duration(seconds: float) -> str:
    """Return a duration as people read it: "23 ms", "1.42 s", "3m05s"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.1f} ms"
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m{rest:02d}s" if hours else f"{minutes}m{rest:02d}s"


def show_signal(number: int) -> str:
    """Return "SIGKILL" for 9; most real-time signals have no name, and are shown like "signal 40"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
