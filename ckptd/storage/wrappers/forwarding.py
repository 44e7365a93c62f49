"""What the wrappers have in common: each call goes on to the tier within, through one place that can be overridden."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ckptd.storage.tier import Capabilities, Data, Entry, Pace, Tier

Result = TypeVar("Result")


class ForwardingTier:
    """A tier that does what the tier within does.

    A wrapper overrides `_call`, where it means the same for every operation, or single operations.
    """

    def __init__(self, tier: Tier) -> None:
        self._inner = tier

    def _call(self, operation: str, key: str, act: Callable[[], Result]) -> Result:
        """Do one call; `operation` is the name of the method, `key` may be a prefix, or empty."""
        del operation, key
        return act()

    @property
    def name(self) -> str:
        """The name of the tier within."""
        return self._inner.name

    @property
    def url(self) -> str:
        """Where the tier within is."""
        return self._inner.url

    @property
    def capabilities(self) -> Capabilities:
        """What the tier within can do: a wrapper adds none and takes none."""
        return self._inner.capabilities

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep `data` under `key`."""
        self._call("put", key, lambda: self._inner.put(key, data, create_only=create_only, pace=pace))

    def get(self, key: str) -> bytes:
        """Return a small object whole."""
        return self._call("get", key, lambda: self._inner.get(key))

    def size_bytes(self, key: str) -> int:
        """Return the size of an object."""
        return self._call("size_bytes", key, lambda: self._inner.size_bytes(key))

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill all of `into` from `offset` of an object."""
        self._call("read_into", key, lambda: self._inner.read_into(key, offset, into))

    def open(self, key: str) -> int:
        """Return a read-only descriptor of an object's bytes."""
        return self._call("open", key, lambda: self._inner.open(key))

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every object whose key starts with `prefix`.

        The listing is drawn at once: one that fails in the middle can be done again, and none names a key twice.
        """
        yield from self._call("list", prefix, lambda: tuple(self._inner.list(prefix)))

    def delete(self, key: str) -> None:
        """Remove an object."""
        self._call("delete", key, lambda: self._inner.delete(key))

    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        """Remove what killed puts have left."""
        return self._call("sweep", prefix, lambda: self._inner.sweep(prefix, older_than_s))

    def check_writable(self) -> None:
        """Raise `StoreError` unless an object could be put now."""
        self._call("check_writable", "", self._inner.check_writable)

    def hold(self, job: str, deadline_s: float) -> None:
        """Keep every other process from holding a job's keys."""
        self._call("hold", job, lambda: self._inner.hold(job, deadline_s))

    def close(self) -> None:
        """Let the tier within let go of connections and threads."""
        self._inner.close()
