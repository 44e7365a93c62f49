"""Wrappers: tiers around a tier, each adding one behaviour, so that a tier stays about its own place.

All keep the contract and can be put around each other in any order. From the inside out, what usually makes sense:
`MeteredTier` (so that every attempt counts), `LimitedTier`, `RetryingTier` (so that a wait between two attempts holds
nobody else up), `VerifyingTier` (so that a look that fails does not send everything again).
"""

from ckptd.storage.wrappers.fill import FillableTier
from ckptd.storage.wrappers.limit import LimitedTier
from ckptd.storage.wrappers.meter import MeteredTier
from ckptd.storage.wrappers.retry import Retrier, RetryingTier, RetryPolicy, next_delay
from ckptd.storage.wrappers.verify import VerifyingTier

__all__ = [
    "FillableTier",
    "LimitedTier",
    "MeteredTier",
    "Retrier",
    "RetryPolicy",
    "RetryingTier",
    "VerifyingTier",
    "next_delay",
]
