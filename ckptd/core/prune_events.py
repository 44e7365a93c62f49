"""What is to go from a tier (effects) and what comes of it (an input), as values; see `core.events` for all others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ckptd.types import CheckpointId


@dataclass(frozen=True, slots=True)
class Prune:
    """Remove checkpoints from a tier, but for the files to which those in `kept` refer.

    On a further tier `kept` has also those that are on their way there: what they refer to may be there already.
    """

    ids: tuple[CheckpointId, ...]
    tier: str
    reasons: tuple[str, ...]
    kept: tuple[CheckpointId, ...]


@dataclass(frozen=True, slots=True)
class Collect:
    """Remove from a tier what nobody needs: left-overs of what was killed, and generation records.

    `kept` is as in `Prune`; `needed_from` is the oldest generation of all checkpoints on all tiers, None where that is
    not known.
    """

    tier: str
    kept: tuple[CheckpointId, ...]
    needed_from: int | None


@dataclass(frozen=True, slots=True)
class MakeRoom:
    """Remove checkpoints from a tier that is full, and all garbage, and what was removed and could be undone.

    Answered by `RoomMade`; `kept` is as in `Prune`.
    """

    tier: str
    ids: tuple[CheckpointId, ...]
    reasons: tuple[str, ...]
    kept: tuple[CheckpointId, ...]


@dataclass(frozen=True, slots=True)
class RoomMade:
    """The tier that was full has so much less in it; what could not be removed is still there."""

    tier: str
    ids: tuple[CheckpointId, ...]
    """The checkpoints that were to go."""
    freed_bytes: int
    left: Mapping[CheckpointId, tuple[str, ...]] = field(default_factory=dict)
    """As in `Pruned`."""


@dataclass(frozen=True, slots=True)
class Pruned:
    """A `Prune` has ended."""

    tier: str
    ids: tuple[CheckpointId, ...]
    """The checkpoints that were to go."""
    left: Mapping[CheckpointId, tuple[str, ...]] = field(default_factory=dict)
    """Those that are still there: with the names that people have given them meanwhile, or without any if they would
    not go."""
    unreadable: tuple[CheckpointId, ...] = ()
    """What was to be kept and has a manifest that can't be read, so that nobody knows which files it needs."""
