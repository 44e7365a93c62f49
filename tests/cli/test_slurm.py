"""What `ckptctl run` makes of a SLURM job, and the example that queues itself up again."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from ckptd.cli.slurm import end_time

EXAMPLE = Path(__file__).parents[2] / "examples" / "slurm.sh"
MOMENT = "2026-12-01T06:00:00"
SECONDS = datetime.fromisoformat(MOMENT).timestamp()


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a program of that name, a script for sh, before all others."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name: str, text: str) -> None:
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    return put


@pytest.mark.parametrize(
    ("told", "squeue", "end"),
    [
        ("1796104800", "exit 1", 1796104800.0),
        (None, f"echo {MOMENT}", SECONDS),
        ("0", f"echo {MOMENT}", SECONDS),
        ("soon", f"echo {MOMENT}", SECONDS),
        (None, "echo N/A", None),
        (None, "exit 1", None),
        (None, f"echo {MOMENT}; echo {MOMENT}", None),
    ],
)
def test_when_the_batch_job_ends(
    tool: Callable[[str, str], None], told: str | None, squeue: str, end: float | None
) -> None:
    """The environment says it, or else `squeue`; what is no moment is no limit, and without SLURM nobody is asked."""
    tool("squeue", squeue)
    environ = {"SLURM_JOB_ID": "7"} | ({} if told is None else {"SLURM_JOB_END_TIME": told})
    assert end_time(environ) == end
    assert end_time({"SLURM_JOB_END_TIME": "1796104800"}) is None


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (10, False)])
def test_the_example_queues_itself_up_again(
    tool: Callable[[str, str], None], tmp_path: Path, code: int, requeued: bool
) -> None:
    """The signal reaches the command, whose own exit code is the script's; only what is resumable is queued again."""
    tool("ckptctl", f"trap 'exit {code}' USR1\ntouch {tmp_path}/here\nwhile :; do sleep 0.02; done")
    tool("scontrol", f'echo "$@" > {tmp_path}/queued')
    script = subprocess.Popen(["bash", str(EXAMPLE)], env={**os.environ, "SLURM_JOB_ID": "7"})
    deadline_s = time.monotonic() + 30
    while not (tmp_path / "here").exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(30) == code
    assert (tmp_path / "queued").exists() is requeued
    if requeued:
        assert (tmp_path / "queued").read_text() == "requeue 7\n"
