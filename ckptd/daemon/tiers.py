"""The tiers of a job, opened in their order: what lies behind a network is tried again before anybody hears of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptd.config import JobConfig
from ckptd.core import lineage
from ckptd.core.events import StoreRead
from ckptd.core.job_spec import TierSpec
from ckptd.core.restore import Source
from ckptd.errors import CkptdError, FencedError, RefusedError
from ckptd.log import Logger
from ckptd.plugin.manager import PluginManager
from ckptd.storage import catalog
from ckptd.storage.file_stream import within
from ckptd.storage.tier import Capabilities, Cost, Report, Reporting, Tier
from ckptd.storage.wrappers.fill import FillableTier
from ckptd.storage.wrappers.forwarding import ForwardingTier
from ckptd.tiers import JobTier, open_stores, patient, retention_of
from ckptd.types import CheckpointId, Held

HOLD_PATIENCE_S = 10.0
"""How long a new agent waits for the one before it to be gone."""
_MOMENT_S = 0.5
_GLANCE_S = 5.0
_SCRUB_S = 86400.0
"""How long a copy on a disk of this node is trusted. Behind a network reading costs money: nothing is read unasked."""
_LEVELS = {
    "checkpoint damaged": "error",
    "claim postponed": "warning",
    "copy unusable": "error",
    "disk passed over": "warning",
    "fetching": "info",
    "file damaged": "warning",
    "file fetched": "info",
    "file wanted": "debug",
    "manifest damaged": "error",
    "resume not needed": "info",
    "resumed": "info",
    "resuming": "info",
    "store held": "warning",
    "store not held": "warning",
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
    return TierSpec(
        item.name,
        retention_of(config),
        every_s=config.every_s,
        backlog=config.backlog,
        scrub_s=_scrub_s(item),
    )


def _scrub_s(item: JobTier) -> float:
    if item.config.scrub_s is not None:
        return item.config.scrub_s
    return _SCRUB_S if item.tier.capabilities.lends_files else 0.0


def open_tiers(
    config: JobConfig, plugins: PluginManager, home: Path, report: Report, *, patience_s: float = HOLD_PATIENCE_S
) -> tuple[JobTier, ...]:
    """Open all tiers of a job for its agent, and hold the job on those that can do that until they are closed.

    Raises the `StoreError` of a tier that can't be written, but for one behind a network that is down just now, and
    `FencedError` when somebody else still holds the job on one after `patience_s`. Nothing is held then.
    """
    opened = open_stores(config.stores, plugins, home)
    for item in opened:
        if isinstance(item.tier, Reporting):
            item.tier.report_to(report)
    tiers = tuple(dataclasses.replace(item, tier=patient(item.name, item.tier, report)) for item in opened)
    try:
        for item in opened:
            _check_writable(item.tier)
        held = tuple(_held(item, config.name, patience_s, report) for item in tiers)
    except CkptdError:
        for item in tiers:
            item.tier.close()
        raise
    if not config.chaos:
        return held
    return (dataclasses.replace(held[0], tier=FillableTier(held[0].tier)), *held[1:])


def _check_writable(tier: Tier) -> None:
    """Raise what a tier says that can't be written, but for a network that is down, or too slow to say it.

    That must neither keep a job from what its disk has, nor the agent from its other jobs. It is read next, with
    patience, and what to make of it is decided then.
    """
    if tier.capabilities.cost is not Cost.NETWORK:
        tier.check_writable()
        return
    try:
        within(_GLANCE_S, tier.url, tier.check_writable)
    except CkptdError as error:
        if not error.retryable:
            raise


class _Unheld(ForwardingTier):
    """A tier that turned out to have no locks, and says so to those who rely on being alone there."""

    @property
    def capabilities(self) -> Capabilities:
        """Those of the tier within, but for the hold."""
        return dataclasses.replace(self._inner.capabilities, exclusive_hold=False)


def _held(item: JobTier, job: str, patience_s: float, report: Report) -> JobTier:
    """Hold a job on a tier that can do that; who has it may be about to end."""
    if not item.tier.capabilities.exclusive_hold:
        return item
    try:
        item.tier.hold(job, min(patience_s, _MOMENT_S))
    except RefusedError as error:
        report("store not held", {"tier": item.name, "error": str(error)})
        return dataclasses.replace(item, tier=_Unheld(item.tier))
    except FencedError as error:
        if patience_s <= _MOMENT_S:
            raise
        report("store held", {"tier": item.name, "wait_s": patience_s, "error": error.message})
        item.tier.hold(job, patience_s - _MOMENT_S)
    return item


def read(tiers: Sequence[JobTier], job: str) -> StoreRead:
    """Look what the tiers hold of a job; the lineage is that of all of them together.

    Raises what the first one raises. What goes wrong with a further one is told, and what it holds is missing then.
    """
    parents: dict[int, CheckpointId | None] = {}
    committed: dict[str, frozenset[CheckpointId]] = {}
    held: dict[str, tuple[Held, ...]] = {}
    unread: dict[str, CkptdError] = {}
    for number, item in enumerate(tiers):
        asking = tiers if number == 0 else (item,)  # what is uploaded is judged by what the first tier says of it
        with_values = any(each.config.keep_best or each.config.keep_every_s for each in asking)
        try:
            holdings = catalog.holdings(item.tier, job)
            facts = catalog.held(item.tier, job, with_values=with_values)
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
