"""The end of a process with threads that are still at work."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from ckptd.process_end import end_without_waiting

pool = ThreadPoolExecutor(1, thread_name_prefix="ckptd-tier")
pool.submit(time.sleep, float(sys.argv[1]))
pool.shutdown(wait=False)
print("said", end="")
sys.exit(end_without_waiting(75))
"""

WITH_A_LOOP = """
import asyncio, sys, time
from ckptd.process_end import Unawaited, end_without_waiting

async def main():
    loop = asyncio.get_running_loop()
    loop.set_default_executor(Unawaited())
    assert await asyncio.to_thread(len, "two") == 3
    loop.run_in_executor(None, time.sleep, float(sys.argv[1]))

asyncio.run(main())
print("said", end="")
sys.exit(end_without_waiting(75))
"""


@pytest.mark.parametrize("program", [PROGRAM, WITH_A_LOOP], ids=["threads", "a loop"])
@pytest.mark.parametrize("takes_s", [0.1, 3600])
def test_nobody_is_waited_for(program: str, takes_s: float) -> None:
    """A process whose thread waits for a server or a disk ends with its exit code, and with what it has printed."""
    end = subprocess.run([sys.executable, "-c", program, str(takes_s)], capture_output=True, timeout=60, check=False)
    assert (end.returncode, end.stdout, end.stderr) == (75, b"said", b"")
