"""The coordinator contract: who may do what, for one node or many.

All meaning stays in `core`; a coordinator only compares and sets. The embedded one serves one node, others come in as
plugins behind the same operations.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Versioned(NamedTuple):
    """A value and the version that it has; versions of a key only grow."""

    value: str
    version: int


class Lease(Protocol):
    """The right to be the only holder of a name, until released or until the holder's process is gone."""

    def release(self) -> None:
        """Give the name up."""
        ...


class Coordinator(Protocol):
    """What `ckptd` needs to agree on."""

    def get(self, key: str) -> Versioned | None:
        """Return the current value of a key."""
        ...

    def put_if_version(self, key: str, value: str, version: int) -> bool:
        """Set a key if it still has `version` (0: if it does not exist); return whether it was set."""
        ...

    def lease(self, name: str, holder: str) -> Lease:
        """Take a name; raises `FencedError` that says who holds it."""
        ...


def next_generation(coordinator: Coordinator, job: str, at_least: int) -> int:
    """Take the next generation number of a job, which nobody else gets: the fencing token of everything it writes."""
    key = f"jobs/{job}/generation"
    while True:
        current = coordinator.get(key)
        used = 0 if current is None else int(current.value)
        number = max(at_least, used + 1)
        if coordinator.put_if_version(key, str(number), 0 if current is None else current.version):
            return number
