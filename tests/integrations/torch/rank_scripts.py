"""Scripts of this folder that begin processes of their own, which is what collectives need; run once for many tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def run(name: str, place: Path) -> None:
    """Run a script, which leaves what its ranks have found in `place`."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "integrations")))
    ran = subprocess.run(
        [sys.executable, "-m", f"tests.integrations.torch.{name}", str(place)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert not ran.returncode, ran.stderr[-4000:]
