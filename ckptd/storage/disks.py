"""Several disks of a node as one tier: the shards of a checkpoint are spread over them, so that all write at once.

Each disk is a `LocalTier` with the same layout of keys. What commits and claims (manifests, records of generations,
tags) lies on the first disk only, where a create-only put has one winner; shards lie on any one. Which one is written
down nowhere: a reader looks on all of them, beginning where the file was last. A disk that is full, fails or is gone is
passed over for the next; what it had is missing then, which is damage, and a further tier can repair it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ckptd.errors import FencedError, FullError, NotFoundError, StoreError
from ckptd.storage import disk_set, keys
from ckptd.storage.local import LocalTier
from ckptd.storage.spreading import Spread
from ckptd.storage.stream import Buffers, Stream, stream_of
from ckptd.storage.tier import Data, Entry, Pace, Report

Result = TypeVar("Result")


class DisksTier:
    """Folders on several disks as one tier. `disk_set` keeps it from writing to a folder whose disk is missing."""

    name = LocalTier.name
    capabilities = LocalTier.capabilities

    def __init__(self, folders: Sequence[Path]) -> None:
        self._disks = tuple(LocalTier(folder) for folder in folders)
        self._spread = Spread(len(folders))
        self._marks: tuple[disk_set.Mark, ...] = ()
        """What the disks were marked with before the first put."""
        self._report: Report | None = None

    def report_to(self, report: Report) -> None:
        """Tell `report` of a disk that is passed over, once until it takes something again."""
        self._report = report

    @property
    def url(self) -> str:
        """The folders, as `--store` takes them."""
        return ",".join(disk.url for disk in self._disks)

    # --- putting ----------------------------------------------------------------------------------------------

    def put(self, key: str, data: Data, *, create_only: bool = False, pace: Pace | None = None) -> None:
        """Put a shard on one of the disks, anything else on the first."""
        if not self._marks:
            self._marks = disk_set.make_set(self._disks)
        with self._spread.alone(key):
            if create_only or not self._is_spread(key):
                self._put_first(key, data, create_only, pace)
            else:
                self._put_spread(key, stream_of(data), pace)

    def _is_spread(self, key: str) -> bool:
        return keys.is_shard_file(key.partition("/")[2])

    def _put_first(self, key: str, data: Data, create_only: bool, pace: Pace | None) -> None:
        if create_only and any(self._has(at, key) for at in range(1, len(self._disks))):
            raise FencedError(f"{self.url}/{key} exists already")
        self._require(0)
        self._disks[0].put(key, data, create_only=create_only, pace=pace)
        self._leave_only(0, key)

    def _put_spread(self, key: str, data: Stream, pace: Pace | None) -> None:
        """Put a shard where it is already, or on the disk that suits best; pass over those that fail."""
        watched = None if isinstance(data, Buffers) else _Watched(data)  # buffers don't fail, and lie where they are
        left = {at: disk.free_bytes for at, disk in enumerate(self._disks)}
        full = [at for at, free in left.items() if free < data.size_bytes]
        holders = [at for at in left if self._has(at, key)]
        errors: dict[int, StoreError] = {}
        while left:
            among = {at: left[at] for at in holders if at in left} or left
            try:
                with self._spread.writing(key, data.size_bytes, among) as at:
                    del left[at]
                    self._require(at)
                    self._disks[at].put(key, watched or data, pace=pace)
            except StoreError as error:
                if watched is not None and watched.is_broken:
                    raise
                self._spread.failed(at)
                errors[at] = error
            else:
                self._leave_only(at, key)
                for other in {*full, *errors} - {at}:
                    self._tell(other, errors.get(other))
                return
        raise _all_failed(list(errors.values())) from errors[at]

    def _tell(self, at: int, error: StoreError | None) -> None:
        """Say that a disk was passed over; without an error it was not tried, since it has too little room."""
        if self._report is None or not self._spread.passed_over(at):
            return
        if error is None:
            try:
                self._require(at)
                error = FullError(f"{self._disks[at].url} has too little room for a shard")
            except StoreError as gone:
                error = gone
        self._report("disk passed over", {"disk": self._disks[at].url, "error": error.message})

    def _require(self, at: int) -> None:
        """Raise `StoreError` when a disk is not there any more."""
        disk = self._disks[at]
        if disk_set.read_mark(disk) != self._marks[at]:
            raise StoreError(f"{disk.url} is gone: it has no {disk_set.MARK} any more", hint="is it still mounted?")

    def _leave_only(self, at: int, key: str) -> None:
        """Delete all other copies of a key; when one can't be deleted the new one goes, or either might be read."""
        try:
            for other, disk in enumerate(self._disks):
                if other != at and self._has(other, key):
                    disk.delete(key)
        except StoreError:
            self._disks[at].delete(key)
            raise

    def _has(self, at: int, key: str) -> bool:
        """Whether a disk has a key; one that fails to say so has nothing that could be read."""
        try:
            self._disks[at].size_bytes(key)
        except (NotFoundError, StoreError):
            return False
        return True

    # --- reading ----------------------------------------------------------------------------------------------

    def get(self, key: str) -> bytes:
        """Read a file whole."""
        return self._read(key, lambda disk: disk.get(key))

    def size_bytes(self, key: str) -> int:
        """Return the file's size."""
        return self._read(key, lambda disk: disk.size_bytes(key))

    def read_into(self, key: str, offset: int, into: memoryview) -> None:
        """Read a range of a file."""
        self._read(key, lambda disk: disk.read_into(key, offset, into))

    def open(self, key: str) -> int:
        """Open the file."""
        return self._read(key, lambda disk: disk.open(key))

    def _read(self, key: str, read: Callable[[LocalTier], Result]) -> Result:
        """Read from the disk that has a key; a disk that fails matters only when no other one has it."""
        failed: StoreError | None = None
        order = self._spread.look_order(key)
        for at in (*order, *order):  # twice: a put may move it to where it was not yet
            try:
                result = read(self._disks[at])
            except NotFoundError:
                continue
            except StoreError as error:
                failed = error
                continue
            self._spread.found(key, at)
            return result
        if failed is not None:
            raise failed
        disk_set.is_set(self._disks)
        raise NotFoundError(f"no file {key} on any disk of {self.url}")

    def list(self, prefix: str) -> Iterator[Entry]:
        """Walk the files of all disks; one that is missing is an error, since what it has would seem to be gone."""
        disk_set.is_set(self._disks)
        seen: set[str] = set()
        for disk in self._disks:
            for entry in disk.list(prefix):
                if entry.key not in seen:  # twice for a moment, while a put moves it
                    seen.add(entry.key)
                    yield entry

    # --- deleting, and the rest -------------------------------------------------------------------------------

    def delete(self, key: str) -> None:
        """Remove a file from every disk, and the folders above it that are empty now."""
        self._on_all(lambda disk: disk.delete(key))
        self._spread.gone(key)

    def sweep(self, prefix: str, older_than_s: float) -> Sequence[str]:
        """Remove temporary files on all disks."""
        return [said for swept in self._on_all(lambda disk: disk.sweep(prefix, older_than_s)) for said in swept]

    def check_writable(self) -> None:
        """See that the disks are those of this store, or make them one, and that each can be written.

        All but the first may be full: they are passed over then.
        """
        self._marks = disk_set.make_set(self._disks)
        self._disks[0].check_writable()
        for disk in self._disks[1:]:
            with contextlib.suppress(FullError):
                disk.check_writable()

    def hold(self, job: str, deadline_s: float) -> None:
        """Lock a hidden file of the job on the first disk."""
        self._disks[0].hold(job, deadline_s)

    def close(self) -> None:
        """Let go of jobs and spares."""
        self._on_all(lambda disk: disk.close())

    def _on_all(self, act: Callable[[LocalTier], Result]) -> Sequence[Result]:
        """Do something on every disk, also when one fails; then raise the first error."""
        results, errors = list[Result](), list[StoreError]()
        for disk in self._disks:
            try:
                results.append(act(disk))
            except StoreError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return results


class _Watched:
    """A stream that remembers whether reading it failed: no other disk would help then."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.size_bytes = stream.size_bytes
        self.is_broken = False

    def read_into(self, offset: int, into: memoryview) -> None:
        try:
            self._stream.read_into(offset, into)
        except BaseException:
            self.is_broken = True
            raise


def _all_failed(errors: Sequence[StoreError]) -> StoreError:
    """Return the one error of a put that every disk failed; when one is full, room helps whatever the others have."""
    kinds = {type(error) for error in errors}
    kind = FullError if FullError in kinds else kinds.pop() if len(kinds) == 1 else StoreError
    hint = next((item.hint for item in errors if isinstance(item, kind)), None)
    return kind("; ".join(item.message for item in errors), hint=hint)
