"""The folders of incidents: `jobs/JOB/incidents/NUMBER` below the state folder, of which the newest stay."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ckptd.daemon.evidence.pieces import Piece
from ckptd.errors import AgentError

KEEP = 50
"""So many incidents of a job keep their folders; the incidents themselves stay in the journal."""


def incident_folder(home: Path, job: str, number: int) -> Path:
    """Return where the evidence of an incident lies."""
    return home / "jobs" / job / "incidents" / str(number)


def write(folder: Path, pieces: Iterable[Piece]) -> None:
    """Write the files of a bundle, for nobody else to read; raises `AgentError` that says what can't be written."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for piece in pieces:
            (folder / piece.name).write_bytes(piece.data)
    except OSError as error:
        hint = "the incident itself is in the journal; make room in the state folder"
        raise AgentError(f"can't write evidence to {folder}: {error.strerror}", hint=hint) from error


def prune(parent: Path, keep: int = KEEP) -> None:
    """Remove the folders of all incidents but the newest `keep`."""
    with suppress(OSError):
        numbers = sorted(int(item.name) for item in parent.iterdir() if item.name.isdecimal())
        for number in numbers[:-keep]:
            shutil.rmtree(parent / str(number), ignore_errors=True)
