"""Captures the looks that `test_findings` judges: two ranks over gloo, of which one does something else.

    python tests/core/stacks/capture.py [MODE...]

Run it again when torch has changed how a stack looks; the files are named after what rank 1 does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ckptd.daemon.evidence.looking import Looks
from ckptd.daemon.evidence.order import RankView
from ckptd.launcher.environment import free_port

HERE = Path(__file__).parent
MODES = (
    "sleep", "python_loop", "c_loop", "lock", "loader", "worker_loader", "stopped", "barrier", "other_collective",
    "socket", "child", "pipe", "handle",
)  # fmt: skip


def capture(mode: str) -> list[dict[str, object]]:
    """Return what is seen of both ranks once they stand still."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_bytes((HERE / "train.py").read_bytes())
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script), mode, str(rank), port],
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            for rank in ranks:
                assert rank.stdout is not None
                rank.stdout.readline()
            time.sleep(2)
            if mode == "stopped":
                os.kill(ranks[1].pid, signal.SIGSTOP)
            looks = Looks(
                [RankView(rank, process.pid, {"STEP": 5}, (), None, None) for rank, process in enumerate(ranks)],
                time.monotonic() + 5,
            )
            looks.look()
        finally:
            for process in ranks:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
        return [_plain(dataclasses.asdict(looks.found[rank]), folder) for rank in range(2)]


def _plain(look: dict[str, object], folder: str) -> dict[str, object]:
    text = json.dumps(look | {"pid": 4711}).replace(folder, "/home/user")
    text = re.sub(r'"/[^"]*/lib/python3\.\d+/', '"/venv/lib/python3.11/', text)
    return dict(json.loads(text))


if __name__ == "__main__":
    for name in sys.argv[1:] or MODES:
        (HERE / f"{name}.json").write_text(json.dumps(capture(name), indent=1) + "\n")
        print(name)
