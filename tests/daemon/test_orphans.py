"""Ranks that nobody reports on, as real processes."""

from __future__ import annotations

import asyncio
import subprocess
import sys

from ckptd.daemon.living import started
from ckptd.daemon.orphans import Orphans
from tests.waiting import PATIENCE_S


def test_one_rank_is_ended_and_reported() -> None:
    """Of two ranks that have not come back, the one that hangs is killed and said to have ended, and no other."""
    ranks = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
    ended: list[tuple[int, int]] = []

    async def watch() -> None:
        over = asyncio.Event()
        orphans = Orphans(lambda rank, pid: (ended.append((rank, pid)), over.set()))
        orphans.take({rank: (process.pid, started(process.pid)) for rank, process in enumerate(ranks)})
        orphans.end(7)
        orphans.end(1)
        await asyncio.wait_for(over.wait(), PATIENCE_S)
        orphans.close()

    try:
        asyncio.run(watch())
        assert ended == [(1, ranks[1].pid)]
        assert ranks[0].poll() is None
    finally:
        for process in ranks:
            process.kill()
            process.wait()
