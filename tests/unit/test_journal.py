"""The journal: written by several processes, read while it is written, and whole after a kill."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ckptd.errors import StoreError
from ckptd.journal import JobEntry, Journal, Life, entry_now
from ckptd.testing import race
from ckptd.types import Incident


def entry(job: str, step: int = 0, updated_at: float = 1.0) -> JobEntry:
    """What is written of a job."""
    return JobEntry(job, {"name": job, "command": ["ä"]}, {"job": job, "step": step}, 7, "/run/c.sock", updated_at)


def incident(job: str, number: int, **fields: object) -> Incident:
    """An incident with some fields."""
    plain = {"generation": 1, "cause": "rank 1 was killed", "rank": 1, "signal": 9, "returncode": -9}
    return Incident(number, job, failed_at=1.0, failed_step=3, **{**plain, **fields})  # type: ignore[arg-type]


def test_jobs_are_kept(tmp_path: Path) -> None:
    """The newest entry of each job is kept, and read back equal by another journal; the last written comes first."""
    journal = Journal(tmp_path / "state")
    for step in range(3):
        journal.write_job(entry("gpt", step, updated_at=10.0 + step))
    journal.write_job(entry("bert", updated_at=11.5))
    journal.close()
    other = Journal(tmp_path / "state", read_only=True)
    assert other.read_job("gpt") == entry("gpt", 2, 12.0)
    assert other.read_jobs() == [entry("gpt", 2, 12.0), entry("bert", updated_at=11.5)]
    assert other.read_job("none") is None
    other.close()


def test_what_the_next_agent_needs_is_kept(tmp_path: Path) -> None:
    """Whether a job comes back, and whose processes it has, is read back equal; an entry without is one of nobody."""
    journal = Journal(tmp_path)
    life = Life(comes_back=True, boot_id="b", launcher_pid=7, launcher_started=1234)
    journal.write_job(replace(entry("gpt"), life=life))
    journal.write_job(entry("bert"))
    lives = {item.job: item.life for item in journal.read_jobs()}
    assert lives == {"gpt": life, "bert": Life()}
    journal.close()
    assert Life.from_json({"comes_back": True, "of a later version": 1}) == Life(comes_back=True)


def test_a_journal_of_an_older_version(tmp_path: Path) -> None:
    """A file without the column for that is read as it is, and gets it from the first agents that write, at once."""
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as database:
        database.execute(
            "CREATE TABLE jobs (job TEXT PRIMARY KEY, config TEXT NOT NULL, status TEXT NOT NULL,"
            " agent_pid INTEGER NOT NULL, agent_socket TEXT NOT NULL, updated_at REAL NOT NULL)"
        )
        database.execute("CREATE TABLE incidents (job TEXT, number INTEGER, incident TEXT, PRIMARY KEY (job, number))")
        database.execute("INSERT INTO jobs VALUES ('gpt', '{}', '{\"step\": 3}', 7, 's', 1.0)")
        database.commit()
    reader = Journal(tmp_path, read_only=True)
    assert reader.read_job("gpt") == JobEntry("gpt", {}, {"step": 3}, 7, "s", 1.0)
    reader.close()
    code = """
from pathlib import Path
from ckptd.journal import Journal, Life, entry_now
ready()
journal = Journal(Path(sys.argv[2]))
journal.write_job(entry_now(f"job-{sys.argv[1]}", {}, {}, 7, "s", life=Life(comes_back=True)))
"""
    race(code, 4, str(tmp_path))
    reader = Journal(tmp_path, read_only=True)
    assert {item.job: item.life.comes_back for item in reader.read_jobs()} == {
        "gpt": False, **{f"job-{number}": True for number in range(4)}
    }  # fmt: skip
    reader.close()


def test_incidents_are_kept(tmp_path: Path) -> None:
    """Incidents come back in the shape of `--json`, oldest first; the newest form of one replaces the older."""
    journal = Journal(tmp_path)
    assert (journal.next_incident("gpt"), journal.read_incidents("gpt")) == (1, [])
    for number in (2, 1, 10):
        journal.write_incident(incident("gpt", number))
    journal.write_incident(incident("other", 77))
    journal.write_incident(incident("gpt", 2, closed=True, seconds={"total": 0.5}))
    found = journal.read_incidents("gpt")
    assert [item["number"] for item in found] == [1, 2, 10]
    assert found[1] == incident("gpt", 2, closed=True, seconds={"total": 0.5}).to_json()
    assert (journal.next_incident("gpt"), journal.next_incident("none")) == (11, 1)
    journal.close()


def test_an_entry_is_stamped() -> None:
    """An entry of now has the wall clock's time."""
    import time

    before = time.time()
    assert before <= entry_now("gpt", {}, {}, 7, "s").updated_at <= time.time()


@pytest.mark.parametrize("name", ["plain", "with a blank", "what?#%41ä"])
def test_any_folder_will_do(tmp_path: Path, name: str) -> None:
    """A folder's name is a name, not a piece of a URL."""
    journal = Journal(tmp_path / name)
    journal.write_job(entry("gpt"))
    journal.close()
    assert (tmp_path / name / "journal.sqlite").exists()
    reader = Journal(tmp_path / name, read_only=True)
    assert reader.read_job("gpt") == entry("gpt")
    reader.close()


# --- several processes ------------------------------------------------------------------------------------------


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    """Several agents that open and write the same new journal at once all get their words in."""
    code = """
from pathlib import Path
from ckptd.journal import Journal, entry_now
from ckptd.types import Incident
number, home = sys.argv[1:]
ready()
journal = Journal(Path(home))
for step in range(40):
    journal.write_job(entry_now(f"job-{number}", {}, {"step": step}, 7, "s"))
    journal.write_incident(Incident(step, "shared-" + number, 1, "x", 0, 9, -9, 1.0, step))
journal.close()
"""
    race(code, 4, str(tmp_path / "state"))
    journal = Journal(tmp_path / "state", read_only=True)
    assert sorted((item.job, item.status) for item in journal.read_jobs()) == [
        (f"job-{n}", {"step": 39}) for n in range(4)
    ]
    for number in range(4):
        assert [item["number"] for item in journal.read_incidents(f"shared-{number}")] == list(range(40))
    journal.close()


def test_reading_while_writing(tmp_path: Path) -> None:
    """A reader beside a busy writer is never refused and always sees a whole entry."""
    code = """
from pathlib import Path
from ckptd.journal import Journal, entry_now
journal = Journal(Path(sys.argv[2]))
journal.write_job(entry_now("gpt", {}, {"step": 0, "again": 0}, 7, "s"))
ready()
for step in range(300):
    journal.write_job(entry_now("gpt", {"text": "x" * 5000}, {"step": step, "again": step}, 7, "s"))
"""
    Journal(tmp_path).close()
    writer = threading.Thread(target=race, args=(code, 1, str(tmp_path)))
    writer.start()
    seen: list[int] = []
    try:
        while writer.is_alive():
            reader = Journal(tmp_path, read_only=True)
            found = reader.read_job("gpt")
            reader.close()
            if found is not None:
                assert found.status["step"] == found.status["again"]
                seen.append(found.status["step"])
    finally:
        writer.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 1


def test_a_killed_writer_leaves_it_whole(tmp_path: Path) -> None:
    """After kill -9 in the middle of writing, everything written before is there and the next agent goes on."""
    code = """
import os, signal
from pathlib import Path
from ckptd.journal import Journal, entry_now
journal = Journal(Path(sys.argv[2]))
ready()
for step in range(50):
    journal.write_job(entry_now("gpt", {}, {"step": step}, 7, "s"))
journal._database.execute("BEGIN")
journal.write_job(entry_now("gpt", {}, {"step": "half"}, 7, "s"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    with pytest.raises(AssertionError, match="ended with -9"):
        race(code, 1, str(tmp_path))
    reader = Journal(tmp_path, read_only=True)
    found = reader.read_job("gpt")
    reader.close()
    assert found is not None
    assert found.status == {"step": 49}
    journal = Journal(tmp_path)
    journal.write_job(entry("gpt", 50))
    assert journal.read_job("gpt") == entry("gpt", 50)
    journal.close()
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- trouble ----------------------------------------------------------------------------------------------------


def test_a_missing_journal_reads_as_empty(tmp_path: Path) -> None:
    """Before the first job there is nothing to tell, and reading creates nothing."""
    reader = Journal(tmp_path / "never", read_only=True)
    assert (reader.read_jobs(), reader.read_job("gpt"), reader.read_incidents("gpt")) == ([], None, [])
    reader.close()
    assert not (tmp_path / "never").exists()


def test_a_journal_that_was_only_just_created_reads_as_empty(tmp_path: Path) -> None:
    """An agent that was killed before it wrote its tables leaves a file that reads as empty."""
    (tmp_path / "journal.sqlite").touch()
    reader = Journal(tmp_path, read_only=True)
    assert (reader.read_jobs(), reader.read_job("gpt"), reader.read_incidents("gpt")) == ([], None, [])
    reader.close()


def test_a_damaged_journal_is_a_store_error(tmp_path: Path) -> None:
    """A file that is no database is a `StoreError` with its path and a hint, for readers and for writers."""
    (tmp_path / "journal.sqlite").write_bytes(b"this is no database" * 1000)
    with pytest.raises(StoreError, match=r"journal\.sqlite") as caught:
        Journal(tmp_path, read_only=True).read_jobs()
    assert caught.value.hint
    with pytest.raises(StoreError, match=r"journal\.sqlite"):
        Journal(tmp_path)


def test_a_folder_that_can_not_be_made_is_a_store_error(tmp_path: Path) -> None:
    """A state folder that is a file is refused with a hint."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="can't use the journal") as caught:
        Journal(tmp_path / "file")
    assert "CKPTD_HOME" in (caught.value.hint or "")


def test_a_full_disk_is_a_store_error(tmp_path: Path) -> None:
    """What SQLite can't write any more is a `StoreError` that the agent can log, and no crash."""
    code = """
import resource, sys
from pathlib import Path
from ckptd.errors import StoreError
from ckptd.journal import Journal, entry_now
journal = Journal(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    for step in range(1000):
        journal.write_job(entry_now(f"job {step}", {"text": "x" * 1000}, {}, 7, "s"))
except StoreError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert "can't use the journal" in done.stdout


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    """A journal that was opened for reading refuses to be written."""
    Journal(tmp_path).close()
    reader = Journal(tmp_path, read_only=True)
    with pytest.raises(StoreError, match="readonly"):
        reader.write_job(entry("gpt"))
    reader.close()


def test_closing_leaves_no_descriptor(tmp_path: Path) -> None:
    """A closed journal holds no file."""
    Journal(tmp_path).close()
    before = len(os.listdir("/proc/self/fd"))
    for read_only in (False, True):
        Journal(tmp_path, read_only=read_only).close()
    assert len(os.listdir("/proc/self/fd")) == before
