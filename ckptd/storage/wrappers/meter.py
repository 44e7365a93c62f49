"""A tier that counts: calls, bytes, errors and time, by operation, for status and metrics."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ckptd.errors import CkptdError
from ckptd.storage.stream import stream_of
from ckptd.storage.tier import Data, Pace, Tier
from ckptd.storage.wrappers.forwarding import ForwardingTier

Result = TypeVar("Result")

UNTYPED = "untyped"
"""The code under which an exception is counted that is no `CkptdError`."""


@dataclass(slots=True)
class _Meter:
    calls: int = 0
    """Those that are over, whatever their end."""
    running: int = 0
    size_bytes: int = 0
    seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)


class MeteredTier(ForwardingTier):
    """Counts what goes on with the tier within.

    Bytes are those of calls that succeeded: what a failed one has moved nobody knows. A descriptor from `open` counts
    as its object's size where the tier had to bring a copy, and nothing where it lends the file.
    """

    def __init__(self, tier: Tier, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(tier)
        self._clock = clock
        self._lock = threading.Lock()
        self._meters: dict[str, _Meter] = {}

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """Return the counts by operation, a copy that is consistent in itself.

        For each: `calls` that are over, calls `running`, `bytes`, `seconds` that all calls together took, and `errors`
        by their code. An operation that was never called is not there.
        """
        with self._lock:
            return {
                operation: {
                    "calls": meter.calls,
                    "running": meter.running,
                    "bytes": meter.size_bytes,
                    "seconds": meter.seconds,
                    "errors": dict(meter.errors),
                }
                for operation, meter in sorted(self._meters.items())
            }

    def _call(self, operation: str, key: str, act: Callable[[], Result]) -> Result:
        del key
        with self._lock:
            meter = self._meters.setdefault(operation, _Meter())
            meter.running += 1
        begin_s = self._clock()
        code: str | None = None
        try:
            return act()
        except BaseException as error:
            code = error.code if isinstance(error, CkptdError) else UNTYPED
            raise
        finally:
            took_s = self._clock() - begin_s
            with self._lock:
                meter.running -= 1
                meter.calls += 1
                meter.seconds += took_s
                if code is not None:
                    meter.errors[code] += 1

    def _moved(self, operation: str, size_bytes: int) -> None:
        with self._lock:
            self._meters[operation].size_bytes += size_bytes

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep `data` under `key`."""
        stream = stream_of(data)
        super().put(key, stream, create_only=create_only, pace=pace)
        self._moved("put", stream.size_bytes)

    def get(self, key: str) -> bytes:
        """Return a small object whole."""
        data = super().get(key)
        self._moved("get", len(data))
        return data

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill all of `into` from `offset` of an object."""
        super().read_into(key, offset, into)
        self._moved("read_into", len(into))

    def open(self, key: str) -> int:
        """Return a read-only descriptor of an object's bytes."""
        descriptor = super().open(key)
        if not self.capabilities.lends_files:
            self._moved("open", os.fstat(descriptor).st_size)
        return descriptor
