"""Keeping flushes out of training's way: how much bandwidth they take, and how much of the processor."""

from __future__ import annotations

import contextlib
import os
import threading
import time

from ckptd.errors import CkptdError, invariant

NICENESS = 10
"""Where training fills every core, a thread of this niceness gets a tenth of one, so the 0.15 s of processor time that
a flush of 1 GiB takes are spread over many steps instead of stopping one. On an idle core it is as fast as any."""
_BURST_S = 0.1


class Bucket:
    """A token bucket of bytes, pure: time is an argument.

    Over any stretch of time no more passes than the rate allows, plus one burst and the request that overdrew it.
    A request larger than the bucket is let through at once and paid for by those that follow: what is written at once
    is the tier's choice, and no size of request can starve.
    """

    def __init__(self, max_bytes_per_s: float, now_s: float) -> None:
        invariant(max_bytes_per_s > 0, "a bandwidth that is bounded to nothing would never flush")
        self._rate = max_bytes_per_s
        self._capacity = max_bytes_per_s * _BURST_S
        self._tokens = self._capacity
        self._at_s = now_s

    def take(self, size_bytes: int, now_s: float) -> float:
        """Book `size_bytes` and return how many seconds to wait before they may be moved."""
        elapsed_s = max(0.0, now_s - self._at_s)
        self._at_s = max(now_s, self._at_s)
        self._tokens = min(self._capacity, self._tokens + elapsed_s * self._rate)
        wait_s = max(0.0, -self._tokens / self._rate)
        self._tokens -= size_bytes
        return wait_s


class Pacer:
    """A `Pace` for `Tier.put`, shared by any number of threads: together they keep to `max_bytes_per_s`."""

    def __init__(self, max_bytes_per_s: float) -> None:
        self._bucket = Bucket(max_bytes_per_s, time.monotonic())
        self._lock = threading.Lock()

    def __call__(self, size_bytes: int) -> None:
        """Wait until `size_bytes` may be moved."""
        with self._lock:
            wait_s = self._bucket.take(size_bytes, time.monotonic())
        if wait_s > 0:
            time.sleep(wait_s)


class StoppedError(CkptdError):
    """Raised out of whatever moves bytes for somebody who has ended."""


class StoppablePace:
    """A `Pace` that keeps to a bandwidth, without one (0) only to the end of whoever asked for the bytes."""

    def __init__(self, max_bytes_per_s: float, stop: threading.Event) -> None:
        self._bucket = Bucket(max_bytes_per_s, time.monotonic()) if max_bytes_per_s else None
        self._lock = threading.Lock()
        self._stop = stop

    def __call__(self, size_bytes: int) -> None:
        """Wait until `size_bytes` may be moved; raises `StoppedError` instead once `stop` is set."""
        wait_s = 0.0
        if self._bucket is not None:
            with self._lock:
                wait_s = self._bucket.take(size_bytes, time.monotonic())
        if self._stop.wait(wait_s):
            raise StoppedError("the job has ended")


def be_nice() -> None:
    """Let this thread, and those that it starts, step back behind whatever else wants the processor.

    Meant as the `initializer` of a pool of threads; training is never slowed by them more than that.
    """
    with contextlib.suppress(PermissionError):  # we are that nice already, or nicer: only going back needs a right
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
