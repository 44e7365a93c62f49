"""When the SLURM job ends in which a command runs."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from datetime import datetime

_DEADLINE_S = 10.0


def end_time(environ: Mapping[str, str]) -> float | None:
    """Return the wall-clock seconds at which the SLURM job ends; None outside of one, or where it has no end.

    `SLURM_JOB_END_TIME` says it; a SLURM that does not set it is asked by `squeue`.
    """
    job = environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    told = environ.get("SLURM_JOB_END_TIME", "")
    if told.isdecimal() and int(told):
        return float(told)
    try:
        answer = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%e"],  # noqa: S607 - as SLURM is installed
            capture_output=True,
            text=True,
            timeout=_DEADLINE_S,
            check=False,
        )
        return datetime.fromisoformat(answer.stdout.strip()).timestamp()
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return None
