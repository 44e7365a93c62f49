"""The tier contract: what a place must be able to do to keep checkpoints.

A tier maps keys to immutable objects. Calls block and run in the agent's storage threads; they raise `StoreError`
(with what and where) for everything that goes wrong, and `NotFoundError` for a key that isn't there. Retrying is not
theirs to do: an error says by `retryable` whether the same call may succeed later. What a tier can't do is declared in
its `Capabilities`, never imitated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, Protocol, runtime_checkable

from ckptd.storage.stream import Stream

Buffer = bytes | memoryview
Data = Buffer | Sequence[Buffer] | Stream
"""What an object is put from: one buffer, several that become one object end to end, or a stream."""

Pace = Callable[[int], None]
"""Called with a number of bytes before they are moved; blocks for as long as they have to wait."""

Report = Callable[[str, Mapping[str, Any]], None]
"""Called with an event in words and its fields, from any thread."""


class Cost(IntEnum):
    """What reading from a tier costs: of several copies a restore takes the cheapest."""

    MEMORY = 0
    DISK = 1
    NETWORK = 2


class FailureGroup(StrEnum):
    """What takes all objects of a tier with it when it is lost."""

    PROCESS = "process"
    NODE = "node"
    SITE = "site"


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a tier can do by itself."""

    create_only_put: bool
    """`put(create_only=True)` has one winner, however many race for a key."""
    atomic_replace: bool
    """Whoever reads beside a put finds the old object or the new one."""
    range_read: bool
    """`read_into` reads just the range asked for."""
    multipart: bool
    """A large object is sent in parts, several at once, and what an earlier attempt has sent is not sent again."""
    server_checksum: bool
    """The other side refuses bytes that have changed on their way."""
    consistent_list: bool
    """A listing shows every put and delete that has returned."""
    exclusive_hold: bool
    """`hold` keeps other processes out."""
    lends_files: bool
    """`open` opens an object where it lies; otherwise it brings a copy first."""
    cost: Cost
    failure_group: FailureGroup


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a listing."""

    key: str
    size_bytes: int
    modified_at: float


class Tier(Protocol):
    """A place with a cost and a failure group, where shards and manifests are kept."""

    @property
    def name(self) -> str:
        """The short name that logs, `ls` and incidents show: "local", "memory", "s3"."""
        ...

    @property
    def url(self) -> str:
        """Where it is, as the user named it, without credentials."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can do by itself."""
        ...

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Keep `data` under `key`: durable when this returns, and seen whole or not at all by every reader.

        A sequence of buffers becomes one object, so that a file can be put together without copying its parts; a
        stream is read piece by piece, never as a whole. What reading it raises is raised, and nothing is put then.
        `pace` is asked before each piece, from any thread, so that a put takes no more bandwidth than it may.

        With `create_only` an existing key is left alone and `FencedError` raised; it needs that capability.
        """
        ...

    def get(self, key: str) -> bytes:
        """Return a small object whole."""
        ...

    def size_bytes(self, key: str) -> int:
        """Return the size of an object."""
        ...

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Fill all of `into` from `offset` of an object; an object that ends before is a `DamagedError`."""
        ...

    def open(self, key: str) -> int:
        """Return a read-only descriptor of an object's bytes, which the caller closes.

        A restore reads from it, in another process too. The bytes stay what they are while it is open, whatever is
        put or deleted under the key.
        """
        ...

    def list(self, prefix: str) -> Iterator[Entry]:
        """Yield every object whose key starts with `prefix`, in no particular order."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; one that isn't there is no error, since two prunes may meet."""
        ...

    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        """Remove what killed puts have left below `prefix` that is no object, if it is older; return what that was.

        Temporary files and open multipart uploads, in words for the log. What a living put is at is younger than
        anything that is worth sweeping: the age is the caller's to choose.
        """
        ...

    def check_writable(self) -> None:
        """Raise `StoreError` unless an object could be put now; called before a job starts."""
        ...

    def hold(self, job: str, deadline_s: float) -> None:
        """Keep every other process from holding a job's keys until `close`, or until this process ends.

        Two agents that run one job on one place would prune each other's checkpoints. It waits no longer than
        `deadline_s`; when somebody else still has the job then, it raises a `FencedError` that says who: process,
        host, and since when. Only those who hold are kept out: reading needs no hold. A tier holds a job once, however
        often it is asked. Without that capability, and where a place turns out to have no locks, it raises
        `RefusedError`.
        """
        ...

    def close(self) -> None:
        """Let go of connections, threads and jobs; nothing else is called afterwards."""
        ...


@runtime_checkable
class Reporting(Protocol):
    """A tier that has something to tell which no call fails for, as that a disk of several was passed over."""

    def report_to(self, report: Report) -> None:
        """Tell `report` from now on."""
        ...
