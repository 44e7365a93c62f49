"""The journal: what an agent remembers of its jobs, so that `ckptctl` can answer after a run and after a crash.

SQLite in WAL mode: several agents and readers of one user share the file, and a killed writer loses at most its last
words. Checkpoints are not in it; the tiers themselves are the truth about those.
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptd.errors import StoreError
from ckptd.types import Incident

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job TEXT PRIMARY KEY, config TEXT NOT NULL, status TEXT NOT NULL,
    agent_pid INTEGER NOT NULL, agent_socket TEXT NOT NULL, updated_at REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS incidents (
    job TEXT NOT NULL, number INTEGER NOT NULL, incident TEXT NOT NULL, PRIMARY KEY (job, number)
);
"""
_WAL_ATTEMPTS = 100
_WAL_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A job as it was last written down. `status` is the shape of `ckptctl status --json`."""

    job: str
    config: dict[str, Any]
    status: dict[str, Any]
    agent_pid: int
    agent_socket: str
    updated_at: float


class Journal:
    """Opens (and creates) the journal below a state folder; with `read_only`, a missing one reads as empty."""

    def __init__(self, home: Path, *, read_only: bool = False) -> None:
        self._path = home / "journal.sqlite"
        try:
            if read_only:
                self._database = _open_for_reading(self._path)
                return
            home.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self._path, timeout=10, isolation_level=None)
            _enter_wal(self._database)
            self._database.execute("PRAGMA synchronous=NORMAL")
            self._database.executescript(_SCHEMA)
        except (OSError, sqlite3.Error) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> StoreError:
        return StoreError(f"can't use the journal {self._path}: {error}", hint="set CKPTD_HOME to a folder of yours")

    def _execute(self, statement: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise self._failed(error) from error

    def write_job(self, entry: JobEntry) -> None:
        """Write down a job's newest state."""
        self._execute(
            "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?)",
            (
                entry.job,
                json.dumps(entry.config),
                json.dumps(entry.status),
                entry.agent_pid,
                entry.agent_socket,
                entry.updated_at,
            ),
        )

    def read_job(self, job: str) -> JobEntry | None:
        """Return what is known of a job."""
        return next(iter(self._read("WHERE job = ?", (job,))), None)

    def read_jobs(self) -> list[JobEntry]:
        """Return all jobs, the last written first."""
        return self._read("ORDER BY updated_at DESC", ())

    def _read(self, clause: str, values: tuple[str, ...]) -> list[JobEntry]:
        rows = self._execute(
            f"SELECT job, config, status, agent_pid, agent_socket, updated_at FROM jobs {clause}",  # noqa: S608 - ours
            values,
        )
        return [JobEntry(row[0], json.loads(row[1]), json.loads(row[2]), *row[3:]) for row in rows]

    def write_incident(self, incident: Incident) -> None:
        """Write down the newest form of an incident."""
        self._execute(
            "INSERT OR REPLACE INTO incidents VALUES (?, ?, ?)",
            (incident.job, incident.number, json.dumps(incident.to_json())),
        )

    def read_incidents(self, job: str) -> list[dict[str, Any]]:
        """Return a job's incidents, oldest first, in the shape of `ckptctl incidents --json`."""
        rows = self._execute("SELECT incident FROM incidents WHERE job = ? ORDER BY number", (job,))
        return [json.loads(row[0]) for row in rows]

    def next_incident(self, job: str) -> int:
        """Return the number that a job's next incident gets."""
        rows = self._execute("SELECT COALESCE(MAX(number), 0) FROM incidents WHERE job = ?", (job,))
        return int(rows[0][0]) + 1

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _enter_wal(database: sqlite3.Connection) -> None:
    """Switch to WAL mode; when another process does so at the same moment, SQLite fails instead of waiting."""
    for left in reversed(range(_WAL_ATTEMPTS)):
        try:
            database.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError:
            if not left:
                raise
            time.sleep(_WAL_PAUSE_S)
        else:
            return


def _open_for_reading(path: Path) -> sqlite3.Connection:
    """Open the file without ever changing it; one that isn't there, or has no table yet, reads as empty."""
    if path.exists():
        database = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=10, isolation_level=None)
        tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if {"jobs", "incidents"} <= tables:
            return database
        database.close()
    empty = sqlite3.connect(":memory:", isolation_level=None)
    empty.executescript(_SCHEMA)
    return empty


def entry_now(job: str, config: dict[str, Any], status: dict[str, Any], agent_pid: int, agent_socket: str) -> JobEntry:
    """Return an entry stamped with the present."""
    return JobEntry(job, config, status, agent_pid, agent_socket, time.time())
