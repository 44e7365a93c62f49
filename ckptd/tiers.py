"""The tiers of a job, opened in their order and each under a name of its own: for the agent and for `ckptctl`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ckptd.core.policy.retention import Best, RetentionPolicy
from ckptd.errors import CkptdError
from ckptd.places import absolute_store
from ckptd.plugin.manager import PluginManager
from ckptd.storage.tier import Cost, Report, Tier
from ckptd.storage.wrappers.retry import RetryingTier, RetryPolicy
from ckptd.storage.wrappers.verify import VerifyingTier
from ckptd.store_config import StoreConfig

_PATIENCE = RetryPolicy(deadline_s=15.0)
"""What takes longer is for those who decide: an upload is tried again as a whole, a restore takes another copy."""


@dataclass(frozen=True, slots=True)
class JobTier:
    """A tier of a job, under a name that none of its other tiers has."""

    name: str
    tier: Tier
    config: StoreConfig


def retention_of(config: StoreConfig) -> RetentionPolicy:
    """Return the rules by which checkpoints stay on a tier."""
    return RetentionPolicy(
        keep_last=config.keep_last,
        keep_every_s=config.keep_every_s,
        keep_every_steps=config.keep_every_steps,
        keep_best=None if config.best is None else Best(*config.best),
        keep_tagged=config.keep_tagged,
        max_bytes=config.max_bytes,
    )


def open_stores(stores: Sequence[StoreConfig], plugins: PluginManager, home: Path) -> list[JobTier]:
    """Open all tiers of a job, fastest first; the first one is of this node.

    Where only places behind a network are named, one below `home` comes before them: flushes must not wait for a
    network, and what is on this node survives its processes. Raises what opening raises.
    """
    opened = [plugins.open_tier(store.url, store.options) for store in stores]
    if not opened[0].capabilities.lends_files:
        here = StoreConfig(absolute_store("tiers", home), keep_last=stores[0].keep_last)
        stores = [here, *stores]
        opened.insert(0, plugins.open_tier(here.url))
    tiers: list[JobTier] = []
    for store, tier in zip(stores, opened, strict=True):
        taken = {item.name for item in tiers}
        name, number = tier.name, 1
        while name in taken:
            number += 1
            name = f"{tier.name}-{number}"
        tiers.append(JobTier(name, tier, store))
    return tiers


def patient(name: str, tier: Tier, report: Report) -> Tier:
    """Return a tier whose passing troubles are waited out, when there are any to expect, and told as "tier retries"."""
    if tier.capabilities.cost is not Cost.NETWORK:
        return tier

    def retried(what: str, attempt: int, delay_s: float, error: CkptdError) -> None:
        report(
            "tier retries",
            {"tier": name, "call": what, "attempt": attempt, "in_s": round(delay_s, 2), "error": str(error)},
        )

    # A server, or what stands before it, may say that it has what it has not: nothing is committed upon that.
    return VerifyingTier(RetryingTier(tier, _PATIENCE, report=retried), reads=False)
