"""What the machine and whoever carries out its effects say to each other when an agent takes over a job's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptd.errors import CkptdError
from ckptd.types import CheckpointId


@dataclass(frozen=True, slots=True)
class HeldShard:
    """A sealed slot, and what a rank says of what it holds."""

    slot: int
    id: CheckpointId
    image_bytes: int
    values: Mapping[str, float] = field(default_factory=dict)
    capture_s: float = 0.0
    final: bool = False
    witness: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RankReturned:
    """A rank of the generation that was taken over is back, and has handed back what it was lent."""

    rank: int
    pid: int
    step: int
    restored: bool
    """Whether it has its state, from what it was offered or because nothing was."""
    stepped: bool
    """Whether it has finished a step of its own."""
    slots: tuple[int, ...]
    """The slots that it has."""
    sealed: tuple[HeldShard, ...]
    """Those of them that hold something, as far as the rank knows what."""
    unknown: tuple[int, ...] = ()
    """Those that hold something of which the rank knows nothing: a generation before it has sealed them."""
    whole: bool = False
    """Whether it was told that replicated tensors differ."""


@dataclass(frozen=True, slots=True)
class StoreUnread:
    """The tiers of a job that was taken over can't be read now."""

    error: CkptdError


@dataclass(frozen=True, slots=True)
class Recall:
    """Look what the tiers hold while the ranks train on; answered by `StoreRead` or `StoreUnread`."""
