"""Reading a job's stored copies again, and mending them: slowly, in one thread that ends when the job does."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

from ckptd.core.restore import Source
from ckptd.core.scrub_events import Mended, Scrubbed
from ckptd.errors import CkptdError, DamagedError, StoreError
from ckptd.storage import catalog, fetching
from ckptd.storage.checks import checks_of
from ckptd.storage.pacing import StoppablePace, be_nice
from ckptd.storage.tier import Cost, Report
from ckptd.tiers import JobTier

_STOP_S = 2.0
"""How long the end of the job waits for a read that is under way; one that hangs is left alone."""


class Scrubber:
    """Reads and mends copies of one job, one at a time."""

    def __init__(self, job: str, tiers: Sequence[JobTier], report: Report) -> None:
        """Read what is on `tiers`; `report` is told of the files that mending fetches."""
        self._job = job
        self._tiers = {item.name: item for item in tiers}
        self._report = report
        self._stop = threading.Event()
        self._paces = {item.name: StoppablePace(item.config.scrub_max_bytes_per_s, self._stop) for item in tiers}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ckptd-scrub", initializer=be_nice)
        self._work: Future[Any] | None = None

    async def scrub(self, source: Source) -> Scrubbed:
        """Read every byte of a copy, and say what is wrong with it."""
        work = self._work = self._pool.submit(self._scrub, source)
        return await asyncio.wrap_future(work)

    async def mend(self, source: Source) -> Mended:
        """Replace what is damaged of a copy by what other tiers have of it."""
        work = self._work = self._pool.submit(self._mend, source)
        return await asyncio.wrap_future(work)

    async def close(self) -> None:
        """Stop what is under way, and wait a moment for it to let go of the tiers."""
        self._stop.set()
        if self._work is not None:
            await asyncio.to_thread(wait, [self._work], _STOP_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _scrub(self, source: Source) -> Scrubbed:
        tier = self._tiers[source.tier].tier
        begin_s = time.monotonic()
        read_bytes: list[int] = []
        problems: list[str] = []
        verify = partial(
            catalog.verify_file, tier, self._job, pace=self._paces[source.tier], progress=read_bytes.append
        )
        try:
            loaded = catalog.load_manifest(tier, self._job, source.id)
            for checks in checks_of(loaded, headers=True).values():
                problems += _named(partial(verify, checks), unreadable_is_damage=tier.capabilities.cost < Cost.NETWORK)
            if problems:
                catalog.load_manifest(tier, self._job, source.id)  # it may have been pruned in the meantime
        except DamagedError as error:
            problems.append(error.message)
        except CkptdError as error:
            return Scrubbed(source, error=error)
        return Scrubbed(source, tuple(problems), None, sum(read_bytes), time.monotonic() - begin_s)

    def _mend(self, source: Source) -> Mended:
        others = [item for name, item in self._tiers.items() if name != source.tier]
        sources = [item.tier for item in others]
        tier, pace = self._tiers[source.tier].tier, self._paces[source.tier]
        try:
            repairs = fetching.repair(tier, sources, self._job, source.id, threads=1, pace=pace, report=self._report)
        except CkptdError as error:
            return Mended(source, error=error)
        lost = tuple(f"{item.file}: {item.problems[0]}; {item.error}" for item in repairs if item.source is None)
        names = {item.tier.name: item.name for item in others}
        origins = {item.file: names.get(item.source, item.source) for item in repairs if item.source is not None}
        return Mended(source, origins, lost)


def _named(verify: Callable[[], list[str]], *, unreadable_is_damage: bool) -> list[str]:
    """Return what is wrong with a file. What a disk can't read is lost; what a network can't may be there again."""
    try:
        return verify()
    except StoreError as error:
        if not unreadable_is_damage:
            raise
        return [error.message]
