"""The conformance suite over every wrapper, around tiers in memory and on disk, and around each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ckptd.storage.local import LocalTier
from ckptd.storage.memory import MemoryTier
from ckptd.storage.tier import Tier
from ckptd.storage.wrappers import FillableTier, LimitedTier, MeteredTier, RetryingTier, VerifyingTier
from ckptd.testing import TierSuite

Wrap = Callable[[Tier], Tier]


def _limited(tier: Tier) -> Tier:
    return LimitedTier(tier, 2, 1e12)


def _usual(tier: Tier) -> Tier:
    return RetryingTier(_limited(MeteredTier(VerifyingTier(tier))))


def _inside_out(tier: Tier) -> Tier:
    return VerifyingTier(MeteredTier(_limited(RetryingTier(tier))))


WRAPS: list[Wrap] = [RetryingTier, _limited, VerifyingTier, MeteredTier, FillableTier, _usual, _inside_out]


@pytest.fixture(params=WRAPS, ids=["retrying", "limited", "verifying", "metered", "fillable", "usual", "inside-out"])
def wrap(request: pytest.FixtureRequest) -> Wrap:
    """Each wrapper, and two orders of all."""
    found: Wrap = request.param
    return found


class TestWrappedMemory(TierSuite):
    """A wrapped memory tier keeps the contract."""

    @pytest.fixture
    def tier(self, wrap: Wrap) -> Tier:
        """An empty memory tier, wrapped."""
        return wrap(MemoryTier())


class TestWrappedLocal(TierSuite):
    """A wrapped local tier keeps the contract."""

    @pytest.fixture
    def tier(self, wrap: Wrap, tmp_path: Path) -> Tier:
        """A local tier in a folder that does not exist yet, wrapped."""
        self._wrap = wrap
        return wrap(LocalTier(tmp_path / "store"))

    def reopen(self, tier: Tier) -> Tier:
        return self._wrap(LocalTier(Path(tier.url)))

    def litter(self, tier: Tier) -> bool:
        folder = Path(tier.url) / "job/s1"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".tmp-0123456789abcdef-killed").write_bytes(b"half")
        return True
