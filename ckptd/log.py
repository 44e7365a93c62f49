"""structlog set-up: a console line on a terminal, JSON otherwise; one canonical line per checkpoint and incident."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any, TextIO, cast

import structlog

from ckptd.units import show_duration, show_size

EVENTS = frozenset({
    "adopting",
    "agent crashed",
    "agent hands over",
    "agent started",
    "agent stopping",
    "capture announced",
    "cause changed",
    "checkpoint committed",
    "checkpoint damaged",
    "checkpoint mended",
    "checkpoint pruned",
    "checkpoint skipped",
    "claim postponed",
    "copy unusable",
    "disk passed over",
    "evidence lost",
    "fetch failed",
    "fetching",
    "file damaged",
    "file fetched",
    "file wanted",
    "flush failed",
    "garbage collected",
    "generation failed",
    "generation started",
    "hang found",
    "hang over",
    "job adopted",
    "job comes back",
    "job ended",
    "job recovered",
    "job started",
    "job stays away",
    "journal failed",
    "launcher learned",
    "launcher lost",
    "launcher missing",
    "launcher ready",
    "launcher refused",
    "launcher returned",
    "leaving",
    "manifest damaged",
    "mend failed",
    "message refused",
    "module not preloaded",
    "node not ready",
    "node ready",
    "notice unreadable",
    "numbers healthy again",
    "numbers suspect",
    "one slot per rank",
    "plugin failed",
    "prune failed",
    "rank disconnected",
    "rank not slow any more",
    "rank returned",
    "rank slow",
    "ranks missing",
    "ranks not attached",
    "replicas differ",
    "reports missed",
    "restart delayed",
    "restart requested",
    "restore failed",
    "restore planned",
    "resume not needed",
    "resumed",
    "resuming",
    "scavenging",
    "scrub failed",
    "scrub finished",
    "scrub started",
    "slot lost",
    "slots lent",
    "snapshot abandoned",
    "step back",
    "stop without checkpoint",
    "stopping",
    "store held",
    "store not held",
    "store unread",
    "tier retries",
    "tier unreadable",
    "time is over",
    "upload failed",
    "upload skipped",
})  # fmt: skip
"""Every event name that ckptd logs; a test holds the code against this list."""

Logger = structlog.typing.FilteringBoundLogger


def set_up(log_format: str = "auto", *, stream: TextIO | None = None, debug: bool = False) -> None:
    """Configure structlog for this process. The only place that touches its global state."""
    out = sys.stderr if stream is None else stream
    target = Sink(out)
    console = log_format == "console" or (log_format == "auto" and out.isatty())
    shared: list[structlog.typing.Processor] = [structlog.processors.add_log_level]
    if console:
        shared += [
            structlog.processors.TimeStamper(fmt="%H:%M:%S", utc=False),
            _for_people,
            structlog.dev.ConsoleRenderer(colors=out.isatty(), pad_event_to=22, sort_keys=False),
        ]
    else:
        shared += [
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(default=str),
        ]
    structlog.configure(
        processors=shared,
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if debug else logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", target)),
        cache_logger_on_first_use=False,
    )


class Sink:
    """A stream for logs that may vanish: a closed terminal or a full disk must not end a job."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write if it can be written."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if it can be flushed."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def get_logger(**context: object) -> Logger:
    """Return a logger that adds `context` to every line."""
    logger: Logger = structlog.get_logger(**context)
    return logger


def _for_people(_: object, __: str, fields: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Show seconds and bytes the way people read them; JSON keeps the plain numbers."""
    shown: dict[str, Any] = {}
    for key, value in fields.items():
        if key.endswith("_bytes") and isinstance(value, (int, float)):
            shown[key.removesuffix("_bytes")] = show_size(value).replace(" ", "")
        elif key.endswith("_s") and isinstance(value, (int, float)):
            shown[key.removesuffix("_s")] = show_duration(value).replace(" ", "")
        elif key == "seconds" and isinstance(value, Mapping):
            shown[key] = ", ".join(f"{name} {show_duration(part).replace(' ', '')}" for name, part in value.items())
        elif isinstance(value, float):
            shown[key] = f"{value:.6g}"
        elif value is None:
            continue
        elif key == "restored" and isinstance(value, Mapping):
            shown[key] = f"step {value['step']} from {value['tier']}"
        else:
            shown[key] = value
    return shown
