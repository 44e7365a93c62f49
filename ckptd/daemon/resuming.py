"""How a job that has no checkpoint anywhere begins with anybody's: found, checked and brought before it starts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from ckptd.config import JobConfig, Origin
from ckptd.core import lineage
from ckptd.core.events import StoreRead
from ckptd.daemon.further_tiers import Progress
from ckptd.errors import CkptdError, DamagedError, InvariantError, NotFoundError
from ckptd.storage import adopting, catalog
from ckptd.storage.pacing import StoppablePace
from ckptd.storage.tier import Report, Tier
from ckptd.tiers import JobTier, patient
from ckptd.types import CheckpointId

OpenTier = Callable[[str, Mapping[str, Any]], Tier]
_SHOWN = 10


class Resuming:
    """What `--resume-from` asks for, on behalf of one job. The place is opened only when something is taken there."""

    def __init__(
        self, config: JobConfig, tiers: Sequence[JobTier], origin: Origin, open_tier: OpenTier, report: Report
    ) -> None:
        self._job, self._tiers = config.name, tiers
        self._origin, self._step = origin, config.resume_step
        self._open_tier, self._report = open_tier, report
        self._stopped = threading.Event()
        self._said = False

    async def bring(self, found: StoreRead) -> bool:
        """Bring a checkpoint to the first tier if the job has none; return whether the tiers are to be read again.

        `found` is what they hold. What the job has of its own wins, so that the same command can be run again; while
        some tier can't be read, nobody knows. Raises `NotFoundError` when the origin has no such checkpoint,
        `DamagedError` when none of it can be used, and what reading there or writing here raises.
        """
        newest = max((item.id for held in found.held.values() for item in held), default=None)
        if newest is not None or found.unread:
            if newest is not None and not self._said:
                self._report("resume not needed", {"source": self._origin.url, "step": newest.step})
            self._said = True
            return False
        brought: Future[None] = Future()
        # Nothing can end a call that hangs, and nobody must wait for it: neither the end of the job nor an exit.
        arguments = brought, found.last_generation
        threading.Thread(target=self._run, args=arguments, name="ckptd-resume", daemon=True).start()
        try:
            await asyncio.wrap_future(brought)
        except asyncio.CancelledError:
            self._stopped.set()  # the job has ended: the thread must not copy on for hours
            raise
        return True

    def _run(self, brought: Future[None], last_generation: int) -> None:
        brought.set_running_or_notify_cancel()  # from here on it takes what comes of it, whoever still waits
        try:
            self._bring(last_generation)
            brought.set_result(None)
        except CkptdError as error:
            brought.set_exception(error)
        finally:
            if not brought.done():
                brought.set_exception(InvariantError("resuming has met a bug: its traceback is above"))

    def _bring(self, last_generation: int) -> None:
        opened = self._open_tier(self._origin.place, self._origin.options)
        source = patient(self._origin.url, opened, self._report)
        try:
            self._adopt_newest(source, last_generation)
        finally:
            source.close()

    def _adopt_newest(self, source: Tier, last_generation: int) -> None:
        """Take the newest checkpoint that is whole. Each time the origin is listed anew: its job may still train."""
        failures: dict[CheckpointId, str] = {}
        while True:
            chosen = self._choose(source, failures)
            try:
                self._adopt(source, chosen, last_generation)
            except (DamagedError, NotFoundError) as error:
                failures[chosen] = error.message
                fields = {"step": chosen.step, "tier": self._origin.url, "error": error.message}
                self._report("checkpoint damaged", fields)
            else:
                return

    def _choose(self, source: Tier, failures: Mapping[CheckpointId, str]) -> CheckpointId:
        origin = self._origin
        held = catalog.holdings(source, origin.job)
        line = lineage.candidates(held.parents, held.committed)
        wanted = [item for item in line if self._step in (None, item.step)]
        for item in wanted:
            if item not in failures:
                return item
        if failures:
            raise DamagedError(
                f"no checkpoint of {origin.url} to resume from is whole: {'; '.join(failures.values())}",
                hint=f"`ckptctl verify {origin.url} --all` names what is wrong; another step may be intact",
            )
        if not held.parents and not held.committed:
            there = ", ".join(catalog.jobs(source)[:_SHOWN]) or "none"
            raise NotFoundError(
                f"there is no job {origin.job} in {source.url} to resume from", hint=f"jobs there: {there}"
            )
        what = "no checkpoint" if self._step is None else f"no checkpoint of step {self._step}"
        steps = ", ".join(str(item.step) for item in line[:_SHOWN]) or "none"
        raise NotFoundError(f"job {origin.job} has {what} in {source.url}", hint=f"newest steps: {steps}")

    def _adopt(self, source: Tier, checkpoint: CheckpointId, last_generation: int) -> None:
        origin, begin_s = self._origin, time.monotonic()
        progress = Progress(checkpoint, origin.url, self._report)
        loaded = catalog.load_manifest(source, origin.job, checkpoint)
        fields = {"source": origin.url, "generation": checkpoint.generation, "step": checkpoint.step}
        self._report("resuming", {**fields, "state_bytes": loaded.state_bytes})
        for item in self._tiers[1:]:
            adopting.make_way(item.tier, self._job, loaded)
        adopted = adopting.adopt(
            source,
            origin.job,
            self._tiers[0].tier,
            self._job,
            checkpoint,
            last_generation=last_generation,
            pace=StoppablePace(0, self._stopped),
            progress=progress.moved,
        )
        took_s = time.monotonic() - begin_s
        self._report("resumed", {**fields, "size_bytes": adopted.size_bytes, "took_s": took_s})
