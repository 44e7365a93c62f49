"""A foreign tier, held to its contract: whatever else it raises becomes the `StoreError` that callers handle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from ckptd.storage.tier import Capabilities, Data, Entry, Pace, Report, Reporting, Tier

Result = TypeVar("Result")


class Caller(Protocol):
    """Calls a foreign function; `what` says what for, in the error that a fault becomes."""

    def __call__(self, what: str, function: Callable[..., Result], *arguments: object, **options: object) -> Result:
        """Return the function's result."""
        ...


class GuardedTier:
    """A tier whose every call goes through `call`, which turns faults into errors."""

    def __init__(self, tier: Tier, call: Caller) -> None:
        self._tier = tier
        self._call = call
        self.name = tier.name
        self.url = tier.url
        self.capabilities: Capabilities = tier.capabilities

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep `data` under `key`."""
        self._call(f"put {key}", self._tier.put, key, data, create_only=create_only, pace=pace)

    def get(self, key: str) -> bytes:
        """Return a small object whole."""
        return self._call(f"get {key}", self._tier.get, key)

    def size_bytes(self, key: str) -> int:
        """Return the size of an object."""
        return self._call(f"size of {key}", self._tier.size_bytes, key)

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill all of `into` from `offset` of an object."""
        self._call(f"read {key}", self._tier.read_into, key, offset, into)

    def open(self, key: str) -> int:
        """Return a read-only descriptor of an object's bytes."""
        return self._call(f"open {key}", self._tier.open, key)

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every object whose key starts with `prefix`; the listing is drawn at once, to catch its faults."""
        yield from self._call(f"list {prefix}", lambda: tuple(self._tier.list(prefix)))

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._call(f"delete {key}", self._tier.delete, key)

    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        """Remove what killed puts have left."""
        return self._call(f"sweep {prefix}", self._tier.sweep, prefix, older_than_s)

    def hold(self, job: str, deadline_s: float) -> None:
        """Keep every other process from holding a job's keys."""
        self._call(f"hold {job}", self._tier.hold, job, deadline_s)

    def close(self) -> None:
        """Let go of connections and threads."""
        self._call("close", self._tier.close)

    def check_writable(self) -> None:
        """Raise `StoreError` unless an object could be put now."""
        self._call("check", self._tier.check_writable)

    def report_to(self, report: Report) -> None:
        """Tell `report` what the tier has to tell, if it ever has."""
        if isinstance(self._tier, Reporting):
            self._call("report", self._tier.report_to, report)
