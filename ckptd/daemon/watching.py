"""Looks at the control pages of a job's ranks for its machine, and gathers the evidence that it asks for."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

from ckptd.core import events as e
from ckptd.core.job import JobMachine
from ckptd.core.policy.hang import HangPolicy, Sample
from ckptd.core.watch_events import Gather, Gathered, Watched
from ckptd.daemon.attendance import Attendance
from ckptd.daemon.evidence.collect import Bundle, Order, RankView, collect
from ckptd.daemon.evidence.folders import incident_folder
from ckptd.daemon.processes import Processes
from ckptd.daemon.ranks import Rank
from ckptd.errors import CkptdError
from ckptd.log import Logger
from ckptd.protocol.page import ControlPage, Word
from ckptd.watch_config import HangConfig

_HISTORY = 240
"""How many of a rank's samples are remembered."""
_SAMPLE_EVERY_S = 1.0
"""How often one is remembered that says nothing new."""
_GATHER_S = 4.5
"""Less than the machine waits."""


def policy_of(config: HangConfig | None) -> HangPolicy | None:
    """Return what the machine needs to know of the setting."""
    return None if config is None else HangPolicy(config.floor_s, config.ceiling_s, config.first_s)


class Watcher:
    """One job's. `look` is called at every tick of the supervisor's."""

    def __init__(
        self,
        home: Path,
        machine: JobMachine,
        attendance: Attendance,
        processes: Processes | None,
        *,
        feed: Callable[[e.Input], None],
        logger: Logger,
    ) -> None:
        """Watch the ranks of `attendance`; bundles go below the state folder `home`."""
        self._home = home
        self._machine = machine
        self._attendance = attendance
        self._processes = processes
        self._feed = feed
        self._log = logger
        self._history: dict[Rank, deque[Sample]] = {}
        self._gathering: set[asyncio.Future[Bundle]] = set()

    def look(self) -> None:
        """Tell the machine what every page says now."""
        at_s = time.monotonic()
        history, self._history = self._history, {}
        samples = []
        for rank in self._attendance.admitted.values():
            if rank.page is None:
                continue
            sample = _sample(rank, rank.page, at_s)
            samples.append(sample)
            past = self._history[rank] = history.get(rank) or deque(maxlen=_HISTORY)
            if not past or past[-1].sign != sample.sign or at_s - past[-1].at_s >= _SAMPLE_EVERY_S:
                past.append(sample)
        self._feed(Watched(at_s, tuple(samples)))

    def gather(self, order: Gather) -> Awaitable[Gathered]:
        """Gather the evidence of a failure, about the ranks as they are at the call.

        What goes wrong with that costs the evidence, not the restart; and nothing waits for that of a death.
        """
        job = self._machine.spec.job
        task = Order(
            incident_folder(self._home, job, order.incident),
            job,
            order.generation,
            order.evidence,
            self._views(),
            deadline_s=_GATHER_S,
            gently=order.evidence.kind != "hang",
        )
        return self._gather(order.incident, task)

    async def _gather(self, number: int, task: Order) -> Gathered:
        while self._gathering:  # one after another: what comes later about an incident knows more, and is to stay
            await asyncio.wait(tuple(self._gathering))
        work: asyncio.Future[Bundle] = asyncio.ensure_future(asyncio.to_thread(collect, task))
        self._gathering.add(work)
        try:
            bundle = await work
        except (CkptdError, RuntimeError) as error:  # no thread can be started where processes are too many
            self._log.error("evidence lost", incident=number, error=str(error))
            return Gathered(number, None)
        finally:
            self._gathering.discard(work)
        return Gathered(number, str(bundle.path), bundle.findings, bundle.culprit)

    async def settle(self) -> None:
        """Wait for the evidence that is being gathered, for no longer than gathering takes."""
        if self._gathering:
            await asyncio.wait(self._gathering, timeout=_GATHER_S)
            await asyncio.sleep(0)  # for those who wait for it as well

    def _views(self) -> list[RankView]:
        """Return every rank that has a process, as the collector wants it."""
        generation = self._machine.generation
        views = []
        for number, pid in sorted({} if generation is None else generation.pids.items()):
            seen = (rank for rank in self._history if rank.rank == number)  # who has gone is not admitted any more
            rank = self._attendance.admitted.get(number) or next(seen, None)
            page = None if rank is None or rank.page is None else _words(rank.page)
            history = () if rank is None else tuple(self._history.get(rank, ()))
            out, err = (None, None) if self._processes is None else self._processes.output_of(number)
            views.append(RankView(number, pid, page, history, out, err))
        return views


def _sample(rank: Rank, page: ControlPage, at_s: float) -> Sample:
    words = page.words
    until_ns = words[Word.SECTION_UNTIL_NS]
    return Sample(
        rank.rank,
        words[Word.STEP],
        words[Word.BEAT_NS],
        page.phase.name.lower() if not rank.unwinding else "raised",
        at_s,
        words[Word.WAITED_NS],
        until_ns,
        page.section if until_ns else "",
    )


def _words(page: ControlPage) -> dict[str, int]:
    """Return what the page says in all words that are one and not a row."""
    rows = (Word.SECTION, Word.SLOT_SEALED, Word.SLOT_RELEASED, Word.RING)
    return {word.name: page.words[word] for word in Word if word not in rows}
