"""The journal: what an agent remembers of its jobs, so that `ckptctl` can answer after a run and after a crash.

SQLite in WAL mode: several agents and readers of one user share the file, and a killed writer loses at most its last
words. Checkpoints are not in it; the tiers themselves are the truth about those.
"""

from __future__ import annotations

import json
import sqlite3
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ckptd.errors import StoreError
from ckptd.types import Incident

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    job TEXT PRIMARY KEY, config TEXT NOT NULL, status TEXT NOT NULL,
    agent_pid INTEGER NOT NULL, agent_socket TEXT NOT NULL, updated_at REAL NOT NULL, life TEXT NOT NULL DEFAULT '{}'
);
CREATE TABLE IF NOT EXISTS incidents (
    job TEXT NOT NULL, number INTEGER NOT NULL, incident TEXT NOT NULL, PRIMARY KEY (job, number)
);
CREATE TABLE IF NOT EXISTS comebacks (job TEXT PRIMARY KEY, attempts INTEGER NOT NULL);
"""
_LIFE = "ALTER TABLE jobs ADD COLUMN life TEXT NOT NULL DEFAULT '{}'"
_WAL_ATTEMPTS = 100
_WAL_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class Life:
    """What the next agent has to know of a job to go on with it."""

    comes_back: bool = False
    """Whether a service that starts goes on with it: nobody has stopped the job itself, and it has not ended."""
    boot_id: str = ""
    """Of which boot of the node its processes are; those of another one are gone, whoever has their numbers now."""
    launcher_pid: int = 0
    """The process that is the ranks' parent; 0: there is none."""
    launcher_started: int = 0
    """When that process began, in the kernel's ticks since the boot: a number that was given anew has another one."""
    incarnation: str = ""
    """The name of this run of the job, by which its launcher and ranks are told from those of another one."""
    ranks_started: dict[str, int] = field(default_factory=dict)
    """When the process of each rank began, by its number."""
    handover: dict[str, Any] = field(default_factory=dict)
    """Where its machine was, as `core.handover` has it."""
    slot_bytes: int = 0
    """How much memory one slot of every rank takes together."""
    left: str = ""
    """How far the job was when its agent began to end together with it; "" while it does not."""
    stopped: bool = False
    """Whether somebody has ended the job itself: whoever goes on with it does so to its end only."""

    def to_json(self) -> dict[str, Any]:
        """Return the form that stands in the journal."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Life:
        """Rebuild what `to_json` wrote, also by another version: what is missing is as if nothing were known."""
        return cls(**{item.name: data[item.name] for item in fields(cls) if item.name in data})


@dataclass(frozen=True, slots=True)
class JobEntry:
    """A job as it was last written down. `status` is the shape of `ckptctl status --json`."""

    job: str
    config: dict[str, Any]
    status: dict[str, Any]
    agent_pid: int
    agent_socket: str
    updated_at: float
    life: Life = field(default_factory=Life)


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
            _extend(self._database)
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
            "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                entry.job,
                json.dumps(entry.config),
                json.dumps(entry.status),
                entry.agent_pid,
                entry.agent_socket,
                entry.updated_at,
                json.dumps(entry.life.to_json()),
            ),
        )

    def read_job(self, job: str) -> JobEntry | None:
        """Return what is known of a job."""
        return next(iter(self._read("WHERE job = ?", (job,))), None)

    def read_jobs(self) -> list[JobEntry]:
        """Return all jobs, the last written first."""
        return self._read("ORDER BY updated_at DESC", ())

    def _read(self, clause: str, values: tuple[str, ...]) -> list[JobEntry]:
        rows = self._execute(f"SELECT * FROM jobs {clause}", values)  # noqa: S608 - ours
        return [
            JobEntry(row[0], json.loads(row[1]), json.loads(row[2]), *row[3:6], *map(_life, row[6:])) for row in rows
        ]

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

    def read_attempts(self) -> dict[str, int]:
        """Return for each job how many agents in a row have ended soon after they brought it back."""
        return dict(self._execute("SELECT job, attempts FROM comebacks", ()))

    def write_attempts(self, job: str, attempts: int) -> None:
        """Write that number down."""
        self._execute("INSERT OR REPLACE INTO comebacks VALUES (?, ?)", (job, attempts))

    def close(self) -> None:
        """Close the file."""
        self._database.close()


def _life(text: str) -> Life:
    return Life.from_json(json.loads(text))


def _extend(database: sqlite3.Connection) -> None:
    """Give a table that an older version has made the column that it lacks; one agent does, others wait for it."""
    database.execute("BEGIN IMMEDIATE")
    try:
        if "life" not in {row[1] for row in database.execute("PRAGMA table_info(jobs)")}:
            database.execute(_LIFE)
    finally:
        database.execute("COMMIT")


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


def entry_now(
    job: str,
    config: dict[str, Any],
    status: dict[str, Any],
    agent_pid: int,
    agent_socket: str,
    *,
    life: Life | None = None,
) -> JobEntry:
    """Return an entry stamped with the present."""
    return JobEntry(job, config, status, agent_pid, agent_socket, time.time(), life or Life())
