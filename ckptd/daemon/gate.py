"""Looks at the node before a generation starts: every check in a thread of its own, all at once, and not for long."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from ckptd.config import JobConfig
from ckptd.core.gate_events import NodeChecked
from ckptd.core.job import JobMachine
from ckptd.core.policy.gate import Unfit
from ckptd.daemon.arena import Arena
from ckptd.journal import JobEntry
from ckptd.plugin import NodePlan
from ckptd.plugin.manager import CALL_LIMIT_S, PluginManager
from ckptd.tiers import JobTier


class Gate:
    """The checks of one job's node. `before` is what the journal knows of the job from its last run, if anything."""

    def __init__(
        self,
        plugins: PluginManager,
        config: JobConfig,
        tiers: Sequence[JobTier],
        arena: Arena,
        machine: JobMachine,
        *,
        before: JobEntry | None,
    ) -> None:
        self._plugins = plugins
        self._config = config
        self._folders = _folders(tiers[0])
        self._arena = arena
        self._machine = machine
        alike = before is not None and before.config.get("nproc") == config.nproc
        self.had_bytes = before.life.slot_bytes if before is not None and alike else 0
        """How much one slot of every rank took together in the last run."""
        self._stuck: set[int] = set()
        """Checks that have not returned yet, by their place, and are not asked again until they have."""

    def plan(self) -> NodePlan:
        """Return what is about to start."""
        config = self._config
        return NodePlan(
            job=config.name,
            ranks=config.nproc,
            folders=self._folders,
            env={**os.environ, **config.env},
            memory_bytes=0 if self._arena.slot_bytes else self.had_bytes * config.slots,
            memory_left_bytes=self._arena.budget.left_bytes(),
            restarts=self._machine.generation is not None,
        )

    async def look(self) -> NodeChecked:
        """Ask every check. One that does not answer in time is reported, and taken to have found nothing."""
        plan, loop = self.plan(), asyncio.get_running_loop()
        checks = self._plugins.checks
        answers: dict[int, asyncio.Future[str | None]] = {}
        for place, check in enumerate(checks):  # two plugins may have had the same idea for a name
            if place not in self._stuck and not self._plugins.quarantined(check.name):
                answers[place] = loop.create_future()
                self._stuck.add(place)
                # No thread of a pool: one that hangs in a driver would keep the agent from ending.
                thread = threading.Thread(
                    target=self._ask,
                    args=(place, plan, loop, answers[place]),
                    name=f"ckptd-check-{check.name}",
                    daemon=True,
                )
                thread.start()
        if answers:
            await asyncio.wait(answers.values(), timeout=CALL_LIMIT_S)
        for place, answer in answers.items():
            if not answer.done():
                self._plugins.overran(checks[place].name, CALL_LIMIT_S)
        found = ((checks[place].name, answer.result()) for place, answer in answers.items() if answer.done())
        return NodeChecked(tuple(Unfit(name, reason) for name, reason in found if reason is not None))

    def _ask(
        self,
        place: int,
        plan: NodePlan,
        loop: asyncio.AbstractEventLoop,
        answer: asyncio.Future[str | None],
    ) -> None:
        reason = self._plugins.unfit(self._plugins.checks[place], plan)
        with contextlib.suppress(RuntimeError):  # the loop may be closed by now
            loop.call_soon_threadsafe(self._answered, place, answer, reason)

    def _answered(self, place: int, answer: asyncio.Future[str | None], reason: str | None) -> None:
        self._stuck.discard(place)
        if not answer.done():
            answer.set_result(reason)


def _folders(first: JobTier) -> tuple[str, ...]:
    url = first.tier.url
    if not first.tier.capabilities.lends_files:
        return ()
    return (url,) if Path(url).is_dir() else tuple(url.split(","))
