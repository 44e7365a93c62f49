"""How fast a large object is sent: all at once, or gently, where the way to the bucket is slow.

The engine knows only a limit for all of a request, and can't tell one that stands still from one that is slow. So a
request has to be small enough to be over in time, and how small that is shows by trying: a put that ran out of time is
followed by gentle ones, until those are fast enough for the usual way. The limit stays what it is, or a server that
hangs would be waited for ever longer. Pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from ckptd_plugins.storage_s3.options import S3Options
from ckptd_plugins.storage_s3.parts import MIN_PART_BYTES

_SPARE_TIMES = 3


@dataclass(frozen=True, slots=True)
class Gear:
    """How the parts of an object are sent."""

    part_bytes: int
    in_flight: int


GENTLE = Gear(MIN_PART_BYTES, 1)
"""The smallest parts that there are, one after the other."""


def usual(options: S3Options) -> Gear:
    """Return what the options say."""
    return Gear(options.part_bytes, options.parts_in_flight)


def after_success(now: Gear, options: S3Options, size_bytes: int, seconds: float) -> Gear:
    """Return how to go on when so much was sent in so long, waiting for a pace left out.

    The usual way comes back when all that it has in flight would be over in a third of the time that it has.
    """
    best = usual(options)
    if now == best or size_bytes <= now.part_bytes:  # one request says more of the server than of the way
        return now
    needed_bytes_per_s = _SPARE_TIMES * best.part_bytes * best.in_flight / options.timeout_s
    return best if size_bytes >= needed_bytes_per_s * seconds else now
