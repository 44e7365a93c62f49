"""The coordinator of a single node: a table in SQLite and lock files, both in the state folder.

SQLite makes compare-and-set hold between processes; `flock` makes a lease end with its holder, even by kill -9. The
table is tiny and rarely written, so it does without WAL mode, which processes can't enter at the same moment.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from ckptd.coordination.coordinator import Versioned
from ckptd.errors import FencedError, StoreError


class FileLease:
    """A lease held by an open, locked file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Unlock; the file stays, since removing it would race with the next holder."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class EmbeddedCoordinator:
    """Serves every agent of one user on one node."""

    def __init__(self, home: Path) -> None:
        self._leases = home / "leases"
        self._path = home / "coordinator.sqlite"
        try:
            self._leases.mkdir(parents=True, exist_ok=True)
            with self._open() as database:
                database.execute("CREATE TABLE IF NOT EXISTS items (key TEXT PRIMARY KEY, value TEXT, version INTEGER)")
        except (OSError, StoreError) as error:
            raise StoreError(
                f"can't use the state folder {home}: {error}", hint="set CKPTD_HOME to a folder of yours"
            ) from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the table for one operation; what SQLite has to complain about is a `StoreError`."""
        try:
            with closing(sqlite3.connect(self._path, timeout=10, isolation_level=None)) as database:
                yield database
        except sqlite3.Error as error:
            raise StoreError(f"can't use {self._path}: {error}") from error

    def get(self, key: str) -> Versioned | None:
        """Return the current value of a key."""
        with self._open() as database:
            row = database.execute("SELECT value, version FROM items WHERE key = ?", (key,)).fetchone()
        return None if row is None else Versioned(str(row[0]), int(row[1]))

    def put_if_version(self, key: str, value: str, version: int) -> bool:
        """Set a key if it still has `version` (0: if it does not exist)."""
        with self._open() as database:
            if version == 0:
                done = database.execute("INSERT OR IGNORE INTO items VALUES (?, ?, 1)", (key, value))
            else:
                done = database.execute(
                    "UPDATE items SET value = ?, version = version + 1 WHERE key = ? AND version = ?",
                    (value, key, version),
                )
            return done.rowcount == 1

    def lease(self, name: str, holder: str) -> FileLease:
        """Take a name until `release()` or the end of this process."""
        path = self._leases / f"{name}.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"can't use the lease {path}: {error.strerror}") from error
        lease = FileLease(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = _read_holder(descriptor)
            lease.release()
            raise FencedError(
                f"{name} is held by {other or 'another agent'}",
                hint="one agent of this user runs a job: stop that one, or give this job another name",
            ) from None
        except OSError as error:
            lease.release()
            raise StoreError(f"can't use the lease {path}: {error.strerror}") from error
        with suppress(OSError):  # a full disk: it is held all the same, and only people read who has it
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        return lease


def _read_holder(descriptor: int) -> str:
    with suppress(OSError):
        return os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    return ""
