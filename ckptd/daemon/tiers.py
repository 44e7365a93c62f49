"""The tiers of a job, opened in their order: what lies behind a network is tried again before anybody hears of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptd.config import JobConfig
from ckptd.core import lineage
from ckptd.core.events import StoreRead
from ckptd.core.job_spec import TierSpec
from ckptd.core.policy.retention import Best, RetentionPolicy
from ckptd.core.restore import Source
from ckptd.errors import CkptdError
from ckptd.log import Logger
from ckptd.plugin.manager import PluginManager
from ckptd.storage import catalog
from ckptd.storage.tier import Cost, Tier
from ckptd.storage.wrappers.retry import RetryingTier, RetryPolicy
from ckptd.tiers import JobTier, open_stores
from ckptd.types import CheckpointId, Held

Report = Callable[[str, Mapping[str, Any]], None]
"""Told what happens on a tier: an event and its fields, from any thread."""
_PATIENCE = RetryPolicy(deadline_s=15.0)
"""What takes longer is for those who decide: an upload is tried again as a whole, a restore takes another copy."""
_LEVELS = {
    "claim postponed": "warning",
    "copy unusable": "error",
    "fetching": "info",
    "file fetched": "info",
    "file wanted": "info",
    "manifest damaged": "error",
    "tier retries": "warning",
}


def teller(log: Logger) -> Report:
    """Return what writes events of tiers into a log, each with the level that `_LEVELS` gives it."""

    def tell(event: str, fields: Mapping[str, Any]) -> None:
        getattr(log, _LEVELS[event])(event, **fields)

    return tell


def spec_of(item: JobTier) -> TierSpec:
    """Return what the machine needs to know of a tier."""
    config = item.config
    best = config.best
    return TierSpec(
        item.name,
        RetentionPolicy(
            keep_last=config.keep_last,
            keep_every_s=config.keep_every_s,
            keep_every_steps=config.keep_every_steps,
            keep_best=None if best is None else Best(*best),
            keep_tagged=config.keep_tagged,
            max_bytes=config.max_bytes,
        ),
        every_s=config.every_s,
        backlog=config.backlog,
    )


def open_tiers(config: JobConfig, plugins: PluginManager, home: Path, report: Report) -> tuple[JobTier, ...]:
    """Open all tiers of a job for its agent; raises the `StoreError` of one that can't be written."""
    opened = open_stores(config.stores, plugins, home)
    tiers = tuple(dataclasses.replace(item, tier=_patient(item.name, item.tier, report)) for item in opened)
    for item in tiers:
        item.tier.check_writable()
    return tiers


def read(tiers: Sequence[JobTier], job: str) -> StoreRead:
    """Look what the tiers hold of a job; the lineage is that of all of them together.

    Raises what the first one raises. What goes wrong with a further one is told, and what it holds is missing then.
    """
    parents: dict[int, CheckpointId | None] = {}
    committed: dict[str, frozenset[CheckpointId]] = {}
    held: dict[str, tuple[Held, ...]] = {}
    unread: dict[str, CkptdError] = {}
    for number, item in enumerate(tiers):
        try:
            holdings = catalog.holdings(item.tier, job)
            facts = catalog.held(item.tier, job, with_values=bool(item.config.keep_best or item.config.keep_every_s))
        except CkptdError as error:
            if number == 0 or not error.retryable:
                raise
            unread[item.name] = error
            continue
        parents |= holdings.parents
        committed[item.name] = frozenset(holdings.committed)
        held[item.name] = tuple(facts)
    everywhere = sorted(frozenset().union(*committed.values()))
    line = lineage.candidates(parents, everywhere)
    sources = tuple(
        Source(checkpoint, item.name)
        for checkpoint in line
        for item in tiers
        if checkpoint in committed.get(item.name, ())
    )
    return StoreRead(sources, lineage.latest_generation(parents, everywhere), held, unread)


def _patient(name: str, tier: Tier, report: Report) -> Tier:
    """Return a tier whose passing troubles are waited out, when there are any to expect."""
    if tier.capabilities.cost is not Cost.NETWORK:
        return tier

    def retried(what: str, attempt: int, delay_s: float, error: CkptdError) -> None:
        report(
            "tier retries",
            {"tier": name, "call": what, "attempt": attempt, "in_s": round(delay_s, 2), "error": str(error)},
        )

    return RetryingTier(tier, _PATIENCE, report=retried)
